"""The GPT: pre-norm blocks of rotary attention and SwiGLU feed-forward, dense or a mixture of experts.

Activations are [S/tp, B, D] between layers (see parallel.py). The head is the embedding's table or one of its own, cut
over the vocabulary, so whole logits exist on no rank while training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import ModelConfig
from training.mesh import Mesh
from training.moe import MixtureOfExperts
from training.parallel import (
    ColumnLinear,
    RowLinear,
    VocabParallelEmbedding,
    gather_sequence,
    gather_vocab,
    reduce_scatter_sequence,
    vocab_parallel_cross_entropy,
)
from training.sharding import ParamSpec, ShardedModule

STD = 0.02  # of the normal init, GPT-2's


class RMSNorm(ShardedModule):
    """x / rms(x) * weight over the last dimension, computed in fp32. Source: arXiv:1910.07467."""

    def __init__(self, width: int, eps: float, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.eps = eps
        self.weight = self.new_parameter("weight", ParamSpec((width,), None))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_angles(seq_len: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each fp32 [S, 1, 1, head_dim / 2]. Source: arXiv:2104.09864."""
    frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)[:, None, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + head_dim/2]) of x [S, B, H, head_dim] by each position's angles, in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal attention whose heads are cut over tp: [S/tp, B, D] to [S/tp, B, D]."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.head_dim = config.d_model // config.n_heads
        self.rope_base = config.rope_base
        kv_width = config.n_kv_heads * self.head_dim
        self.query = ColumnLinear(config.d_model, config.d_model, mesh, STD)
        self.key = ColumnLinear(config.d_model, kv_width, mesh, STD)
        self.value = ColumnLinear(config.d_model, kv_width, mesh, STD)
        self.out = RowLinear(config.d_model, config.d_model, mesh, STD / (2 * config.n_layers) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = gather_sequence(x, self.mesh)
        cos, sin = rotary_angles(x.shape[0], self.head_dim, self.rope_base)
        query = rotate(self.query(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        key = rotate(self.key(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        value = self.value(x).unflatten(-1, (-1, self.head_dim))
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))  # [B, H, S, head_dim]
        grouped = key.shape[1] != query.shape[1]
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return reduce_scatter_sequence(self.out(y.permute(2, 0, 1, 3).flatten(-2)), self.mesh)


class FeedForward(nn.Module):
    """SwiGLU whose width is cut over tp: [S/tp, B, D] to [S/tp, B, D]. Source: arXiv:2002.05202."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.gate = ColumnLinear(config.d_model, config.d_ff, mesh, STD)
        self.up = ColumnLinear(config.d_model, config.d_ff, mesh, STD)
        self.down = RowLinear(config.d_ff, config.d_model, mesh, STD / (2 * config.n_layers) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = gather_sequence(x, self.mesh)
        return reduce_scatter_sequence(self.down(F.silu(self.gate(x)) * self.up(x)), self.mesh)


class Block(nn.Module):
    """x + attention(norm(x)), then + feed-forward(norm(x)); returns the balance loss of its experts beside it."""

    def __init__(self, config: ModelConfig, mesh: Mesh, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps, mesh)
        self.attention = Attention(config, mesh)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps, mesh)
        self.experts: MixtureOfExperts | None = None
        self.feed_forward: FeedForward | None = None
        if config.n_experts and (index + 1) % config.moe_every == 0:
            self.experts = MixtureOfExperts(config, mesh, STD)
        else:
            self.feed_forward = FeedForward(config, mesh)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x + self.attention(self.attention_norm(x))
        normed = self.feed_forward_norm(x)
        if self.feed_forward is not None:
            return x + self.feed_forward(normed), None
        assert self.experts is not None
        y, balance = self.experts(normed)
        return x + y, balance


class GPT(nn.Module):
    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.config = config
        self.mesh = mesh
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.d_model, mesh, STD)
        self.blocks = nn.ModuleList(Block(config, mesh, index) for index in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps, mesh)
        self.head = None if config.tie_embeddings else ColumnLinear(config.d_model, config.vocab_size, mesh, STD)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [S, B, V/tp] of tokens int64 [S, B], and the balance loss: fp32 scalar, this rank's part of the sum
        over sequences and layers."""
        x = self.embedding(tokens)
        balance = torch.zeros(())
        for block in self.blocks:
            x, of_block = block(x)
            if of_block is not None:
                balance = balance + of_block
        x = gather_sequence(self.norm(x), self.mesh)
        table = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(x, table), balance

    def loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-entropy summed over tokens, fp32 scalar equal on every tp rank, and forward()'s balance loss."""
        logits, balance = self(tokens)
        return vocab_parallel_cross_entropy(logits.flatten(0, 1), targets.flatten(), self.mesh).sum(), balance

    def whole_logits(self, logits: Tensor) -> Tensor:
        """This rank's columns of the logits at one place [B, V/tp] to the whole, fp32 [B, V]. Not differentiable."""
        return gather_vocab(logits.detach().float(), self.mesh)
