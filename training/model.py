"""The GPT: pre-norm blocks of attention and feed-forward, Llama's (rotary positions, RMSNorm, SwiGLU; dense or a
mixture of experts) or GPT-2's (learned positions, LayerNorm, GELU, biases).

Activations are [S/cp/tp, B, D] between layers (see parallel.py and context.py; "S" below is S/cp). The head is the
embedding's table or one of its own, cut over the vocabulary, and the loss goes through the tokens in chunks: whole
logits exist on no rank while training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.attention import Attention, LatentAttention
from training.cache import KeyValueCache
from training.context import own_part, positions
from training.mesh import Axis, Mesh
from training.model_config import ModelConfig
from training.moe import MixtureOfExperts
from training.norms import norm
from training.parallel import (
    ColumnLinear,
    RowLinear,
    VocabParallelEmbedding,
    column_linears,
    fused_cross_entropy,
    gather_sequence,
    gather_vocab,
    row_linear,
)
from training.recompute import again
from training.sharding import STD, ParamSpec, ShardedModule, specs_of
from training.stages import Placement, Stages, assign_layers


class Positions(ShardedModule):
    """GPT-2's learned positions: adds row p of a table to each token at position p; x [S/tp, B, D]."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.cache: KeyValueCache | None = None
        self.weight = self.new_parameter("weight", ParamSpec((config.max_seq_len, config.d_model), STD))

    def forward(self, x: Tensor) -> Tensor:
        mesh = self.mesh
        at = positions(x.shape[0] * mesh.sequence.size, mesh.cp.size, mesh.cp.rank, x.device)
        if self.cache is not None:
            at = (at + self.cache.n_seen).clamp(max=len(self.weight) - 1)  # padding may go beyond
        return x + self.weight[at.chunk(mesh.tp.size)[mesh.tp.rank]].unsqueeze(1)


@dataclass(frozen=True)
class Parallel:
    """How a model is cut and what it keeps, beside what the mesh says. stages None: every layer on this rank."""

    stages: Stages | None = None
    context: Literal["ring", "ulysses"] = "ring"
    context_latents: bool = True
    recompute: Literal["none", "selective", "full"] = "none"
    loss_chunk: int = 1024


WHOLE = Parallel()


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
        up, *gate = column_linears(x, [self.up, self.gate] if self.gate else [self.up], self.mesh)
        inner = F.silu(gate[0]) * up if gate else F.gelu(up, approximate="tanh")
        return row_linear(inner, self.down, self.mesh)


class Block(nn.Module):
    """x + attention(norm(x)), then + feed-forward(norm(x)); returns the balance loss of its experts beside it."""

    def __init__(self, config: ModelConfig, mesh: Mesh, index: int, parallel: Parallel) -> None:
        super().__init__()
        self.mesh = mesh
        self.attention_norm = norm(config, mesh)
        self.attention = (LatentAttention if config.latent else Attention)(config, mesh, parallel)
        self.feed_forward_norm = norm(config, mesh)
        self.experts: MixtureOfExperts | None = None
        self.feed_forward: FeedForward | None = None  # beside experts: those that every token visits
        if config.has_experts(index):
            self.experts = MixtureOfExperts(config, mesh, STD)
            if config.n_shared_experts:
                self.feed_forward = FeedForward(config, mesh, config.n_shared_experts * config.expert_width)
        else:
            self.feed_forward = FeedForward(config, mesh, config.d_ff)
        self._compiled: Callable[..., tuple[Tensor, Tensor | None]] | None = None

    def compile_layers(self) -> None:
        """Forwards that a backward follows run compiled from now on, in one graph, or several between which ranks
        exchange; hooks of the block itself stay outside."""
        if self.mesh.cp.size > 1:
            self.attention.attend = torch.compiler.disable(self.attention.attend)
            if isinstance(self.attention, LatentAttention):
                self.attention.attend_latents = torch.compiler.disable(self.attention.attend_latents)
        if self.experts is not None:
            self.experts.exchanged = torch.compiler.disable(self.experts.exchanged)
        self._compiled = torch.compile(self._layers, dynamic=False)

    def forward(self, x: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        run = self._compiled if self._compiled is not None and torch.is_grad_enabled() else self._layers
        return run(x, documents)

    def _layers(self, x: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = x + self.attention(self.attention_norm(x), documents)
        normed = self.feed_forward_norm(x)
        if self.feed_forward is not None:
            x = x + self.feed_forward(normed)
        if self.experts is None:
            return x, None
        y, balance = self.experts(normed)
        return x + y, balance


class GPT(nn.Module):
    """The layers of this rank's stages, under the names that they have in the whole model."""

    def __init__(self, config: ModelConfig, mesh: Mesh, parallel: Parallel = WHOLE) -> None:
        super().__init__()
        self.config = config
        self.mesh = mesh
        self.parallel = parallel
        stages = parallel.stages or assign_layers(config.n_layers, Placement(1))
        placement = stages.placement
        held = [placement.stage(mesh.pp_index if parallel.stages else 0, c) for c in range(placement.n_chunks)]
        self.chunks = [stages.layers(stage) for stage in held]
        self.first, self.last = 0 in held, placement.n_stages - 1 in held
        tied = config.tie_embeddings
        self.embedding: VocabParallelEmbedding | None = None
        if self.first or (self.last and tied):
            axis: Axis = "tied" if tied and parallel.stages and mesh.ties else "tp"
            self.embedding = VocabParallelEmbedding(config.vocab_size, config.d_model, mesh, STD, axis)
        self.positions = Positions(config, mesh) if config.block == "gpt2" and self.first else None
        self.blocks = nn.ModuleDict(
            {str(index): Block(config, mesh, index, parallel) for layers in self.chunks for index in layers}
        )
        self.norm = norm(config, mesh) if self.last else None
        separate = self.last and not tied
        self.head = ColumnLinear(config.d_model, config.vocab_size, mesh, STD) if separate else None

    def compile_blocks(self) -> None:
        """torch.compile for each block's forward and backward: done at the first of them, once for blocks alike."""
        import torch._dynamo  # slow, and few runs need it

        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(self.blocks))
        for group in self.mesh.groups:
            group.leave_out_of_graphs()
        for block in self.blocks.values():
            cast(Block, block).compile_layers()

    @contextmanager
    def keeping(self, cache: KeyValueCache | None) -> Iterator[None]:
        """Within it, forwards begin at the cache's position, and attention sees and keeps what is there. Without
        context parallel ranks."""
        layers = [each for each in self.modules() if isinstance(each, (Attention, LatentAttention, Positions))]
        for layer in layers:
            layer.cache = cache
        try:
            yield
        finally:
            for layer in layers:
                layer.cache = None

    def embed(self, tokens: Tensor) -> Tensor:
        """[S/cp/tp, B, D] of this context parallel rank's tokens int64 [S/cp, B]; on the first stage."""
        assert self.embedding is not None
        x = self.embedding(tokens)
        return x if self.positions is None else self.positions(x)

    def run_blocks(self, chunk: int, x: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        """x through the layers of a chunk, and the balance loss: fp32 scalar, this rank's part of the sum over
        sequences and these layers."""
        balance = torch.zeros((), device=x.device)
        for index in self.chunks[chunk]:
            x, of_block = again(self.blocks[str(index)], x, documents, enabled=self.parallel.recompute == "full")
            if of_block is not None:
                balance = balance + of_block
        return x, balance

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy summed over this context parallel rank's tokens, fp32 scalar equal on every tp rank, from
        the last layer's output and targets int64 [S/cp, B]; on the last stage."""
        x, table = self._normed(x)
        return fused_cross_entropy(x.flatten(0, 1), table, targets.flatten(), self.mesh, self.parallel.loss_chunk)

    def logits(self, x: Tensor) -> Tensor:
        """[S/cp, B, V/tp] from the last layer's output; on the last stage."""
        return F.linear(*self._normed(x))

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.norm is not None
        holder = self.embedding if self.head is None else self.head
        assert holder is not None
        return gather_sequence(self.norm(x), self.mesh), holder.weight

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Without a pipeline: logits [S/cp, B, V/tp] of whole tokens int64 [S, B], and the balance loss. documents
        int64 [S, B]: attention stays within tokens of equal ones."""
        x, balance = self.run_blocks(0, self.embed(own_part(tokens, self.mesh)), documents)
        return self.logits(x), balance

    def loss(self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Without a pipeline: cross_entropy() and the balance loss of whole tokens and targets int64 [S, B]."""
        x, balance = self.run_blocks(0, self.embed(own_part(tokens, self.mesh)), documents)
        return self.cross_entropy(x, own_part(targets, self.mesh)), balance

    def whole_logits(self, logits: Tensor) -> Tensor:
        """This rank's columns of the logits at one place [B, V/tp] to the whole, fp32 [B, V]. Not differentiable."""
        return gather_vocab(logits.detach().float(), self.mesh)


def specs_of_whole(config: ModelConfig, mesh: Mesh) -> dict[str, ParamSpec]:
    """The spec of every parameter of the whole model, whatever this rank has of it. Nothing is allocated."""
    with torch.device("meta"):
        return specs_of(GPT(config, mesh))
