"""The GPT: pre-norm blocks of attention and feed-forward, Llama's (rotary positions, RMSNorm, SwiGLU; dense or a
mixture of experts) or GPT-2's (learned positions, LayerNorm, GELU, biases).

Activations are [S/tp, B, D] between layers (see parallel.py). The head is the embedding's table or one of its own, cut
over the vocabulary, so whole logits exist on no rank while training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.mesh import Mesh
from training.model_config import ModelConfig
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
from training.rotary import rotary_angles, rotary_frequencies, rotate
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


class LayerNorm(ShardedModule):
    """(x - mean) / std * weight + bias over the last dimension, computed in fp32. Source: arXiv:1607.06450."""

    def __init__(self, width: int, eps: float, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.eps = eps
        self.weight = self.new_parameter("weight", ParamSpec((width,), None))
        self.bias = self.new_parameter("bias", ParamSpec((width,), 0.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def _norm(config: ModelConfig, mesh: Mesh) -> RMSNorm | LayerNorm:
    kind = LayerNorm if config.block == "gpt2" else RMSNorm
    return kind(config.d_model, config.norm_eps, mesh)


class Positions(ShardedModule):
    """GPT-2's learned positions: adds row p of a table to each token at position p; x [S/tp, B, D]."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.weight = self.new_parameter("weight", ParamSpec((config.max_seq_len, config.d_model), STD))

    def forward(self, x: Tensor) -> Tensor:
        first = self.mesh.tp.rank * x.shape[0]
        return x + self.weight[first : first + x.shape[0]].unsqueeze(1)


def document_mask(documents: Tensor) -> Tensor:
    """bool [B, 1, S, S] from the document of each token, int64 [S, B]: true where a query sees a key, which is of its
    own document and not after it."""
    of_batch = documents.T
    same = of_batch.unsqueeze(-1) == of_batch.unsqueeze(-2)
    return same.tril().unsqueeze(1)


class Attention(nn.Module):
    """Causal attention whose heads are cut over tp: [S/tp, B, D] to [S/tp, B, D]."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.head_dim = config.head_width
        self.frequencies: Tensor | None
        frequencies = rotary_frequencies(config) if config.block == "llama" else None
        self.register_buffer("frequencies", frequencies, persistent=False)
        width, kv_width = config.n_heads * self.head_dim, config.n_kv_heads * self.head_dim
        bias = config.block == "gpt2"
        self.query = ColumnLinear(config.d_model, width, mesh, STD, bias)
        self.key = ColumnLinear(config.d_model, kv_width, mesh, STD, bias)
        self.value = ColumnLinear(config.d_model, kv_width, mesh, STD, bias)
        self.out = RowLinear(width, config.d_model, mesh, STD / (2 * config.n_layers) ** 0.5, bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: of document_mask(), None where each sequence is one document."""
        x = gather_sequence(x, self.mesh)
        query = self.query(x).unflatten(-1, (-1, self.head_dim))
        key = self.key(x).unflatten(-1, (-1, self.head_dim))
        value = self.value(x).unflatten(-1, (-1, self.head_dim))
        if self.frequencies is not None:
            cos, sin = rotary_angles(x.shape[0], self.frequencies)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))  # [B, H, S, head_dim]
        grouped = key.shape[1] != query.shape[1]
        y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=grouped)
        return self.out.add_bias(reduce_scatter_sequence(self.out(y.permute(2, 0, 1, 3).flatten(-2)), self.mesh))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202), or GELU in a gpt2 block, whose width is cut over tp: [S/tp, B, D] to [S/tp, B, D]."""

    def __init__(self, config: ModelConfig, mesh: Mesh, width: int) -> None:
        super().__init__()
        self.mesh = mesh
        bias = config.block == "gpt2"
        self.gate = None if bias else ColumnLinear(config.d_model, width, mesh, STD)
        self.up = ColumnLinear(config.d_model, width, mesh, STD, bias)
        self.down = RowLinear(width, config.d_model, mesh, STD / (2 * config.n_layers) ** 0.5, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = gather_sequence(x, self.mesh)
        up = self.up(x)
        inner = F.gelu(up, approximate="tanh") if self.gate is None else F.silu(self.gate(x)) * up
        return self.down.add_bias(reduce_scatter_sequence(self.down(inner), self.mesh))


class Block(nn.Module):
    """x + attention(norm(x)), then + feed-forward(norm(x)); returns the balance loss of its experts beside it."""

    def __init__(self, config: ModelConfig, mesh: Mesh, index: int) -> None:
        super().__init__()
        self.attention_norm = _norm(config, mesh)
        self.attention = Attention(config, mesh)
        self.feed_forward_norm = _norm(config, mesh)
        self.experts: MixtureOfExperts | None = None
        self.feed_forward: FeedForward | None = None  # beside experts: those that every token visits
        if config.has_experts(index):
            self.experts = MixtureOfExperts(config, mesh, STD)
            if config.n_shared_experts:
                self.feed_forward = FeedForward(config, mesh, config.n_shared_experts * config.expert_width)
        else:
            self.feed_forward = FeedForward(config, mesh, config.d_ff)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = x + self.attention(self.attention_norm(x), mask)
        normed = self.feed_forward_norm(x)
        if self.feed_forward is not None:
            x = x + self.feed_forward(normed)
        if self.experts is None:
            return x, None
        y, balance = self.experts(normed)
        return x + y, balance


class GPT(nn.Module):
    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        self.config = config
        self.mesh = mesh
        self.embedding = VocabParallelEmbedding(config.vocab_size, config.d_model, mesh, STD)
        self.positions = Positions(config, mesh) if config.block == "gpt2" else None
        self.blocks = nn.ModuleList(Block(config, mesh, index) for index in range(config.n_layers))
        self.norm = _norm(config, mesh)
        self.head = None if config.tie_embeddings else ColumnLinear(config.d_model, config.vocab_size, mesh, STD)

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [S, B, V/tp] of tokens int64 [S, B], and the balance loss: fp32 scalar, this rank's part of the sum
        over sequences and layers. documents int64 [S, B]: attention stays within tokens of equal ones."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = self.positions(x)
        mask = None if documents is None else document_mask(documents)
        balance = torch.zeros(())
        for block in self.blocks:
            x, of_block = block(x, mask)
            if of_block is not None:
                balance = balance + of_block
        x = gather_sequence(self.norm(x), self.mesh)
        table = self.embedding.weight if self.head is None else self.head.weight
        return F.linear(x, table), balance

    def loss(self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The cross-entropy summed over tokens, fp32 scalar equal on every tp rank, and forward()'s balance loss."""
        logits, balance = self(tokens, documents)
        return vocab_parallel_cross_entropy(logits.flatten(0, 1), targets.flatten(), self.mesh).sum(), balance

    def whole_logits(self, logits: Tensor) -> Tensor:
        """This rank's columns of the logits at one place [B, V/tp] to the whole, fp32 [B, V]. Not differentiable."""
        return gather_vocab(logits.detach().float(), self.mesh)
