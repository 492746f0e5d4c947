"""Tensor and sequence parallelism: the operators of Megatron-LM's sequence-parallel layer, and the layers around them.

Activations are [sequence, batch, width], sequence first, so that gathering or scattering the sequence is one collective
on contiguous memory. Between layers each tensor parallel rank holds its part of the sequence; inside one it holds the
whole sequence and a part of the width:

    [S/tp, B, D] ── gather_sequence ──► [S, B, D] ── ColumnLinear ──► [S, B, F/tp] ── RowLinear ──► partial [S, B, D]
                                                                      ── reduce_scatter_sequence ──► [S/tp, B, D]

Each operator's backward is the other one. Source: Korthikanti et al., arXiv:2205.05198, section 4.2.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.mesh import Mesh, MeteredGroup
from training.sharding import ParamSpec, ShardedModule


def _all_gather(x: Tensor, group: MeteredGroup) -> Tensor:
    output = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    group.all_gather(output, x.contiguous())
    return output


def _reduce_scatter(x: Tensor, group: MeteredGroup) -> Tensor:
    output = x.new_empty((x.shape[0] // group.size, *x.shape[1:]))
    group.reduce_scatter(output, x.contiguous())
    return output


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: MeteredGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: MeteredGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group), None


def gather_sequence(x: Tensor, mesh: Mesh) -> Tensor:
    """[S/tp, B, D] of each tensor parallel rank to the whole [S, B, D]; backward reduce-scatters the gradient."""
    return x if mesh.tp.size == 1 else _GatherSequence.apply(x, mesh.tp)


def reduce_scatter_sequence(x: Tensor, mesh: Mesh) -> Tensor:
    """Partial sums [S, B, D] to this rank's part of their sum, [S/tp, B, D]; backward all-gathers the gradient."""
    return x if mesh.tp.size == 1 else _ReduceScatterSequence.apply(x, mesh.tp)


class ColumnLinear(ShardedModule):
    """y = x Wᵀ + b with W's output features cut over tp: [..., d_in] to [..., d_out / tp]."""

    def __init__(self, d_in: int, d_out: int, mesh: Mesh, std: float, bias: bool = False) -> None:
        super().__init__(mesh)
        self.weight = self.new_parameter("weight", ParamSpec((d_out, d_in), std, "tp", 0))
        self.bias = self.new_parameter("bias", ParamSpec((d_out,), 0.0, "tp", 0)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowLinear(ShardedModule):
    """y = x Wᵀ with W's input features cut over tp: [..., d_in / tp] to a partial sum [..., d_out]. add_bias() belongs
    after the sum, where each token is on one rank."""

    def __init__(self, d_in: int, d_out: int, mesh: Mesh, std: float, bias: bool = False) -> None:
        super().__init__(mesh)
        self.weight = self.new_parameter("weight", ParamSpec((d_out, d_in), std, "tp", 1))
        self.bias = self.new_parameter("bias", ParamSpec((d_out,), 0.0)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(ShardedModule):
    """A table [V, D] cut over its rows: tokens [S, B] to [S/tp, B, D]. Each rank looks up the tokens that it holds."""

    def __init__(self, vocab_size: int, d_model: int, mesh: Mesh, std: float) -> None:
        super().__init__(mesh)
        self.weight = self.new_parameter("weight", ParamSpec((vocab_size, d_model), std, "tp", 0))

    def forward(self, tokens: Tensor) -> Tensor:
        local, mine = _local_ids(tokens, self.weight.shape[0], self.mesh.tp)
        rows = F.embedding(local, self.weight).masked_fill(~mine.unsqueeze(-1), 0.0)
        return reduce_scatter_sequence(rows, self.mesh)


def _local_ids(ids: Tensor, n_local: int, group: MeteredGroup) -> tuple[Tensor, Tensor]:
    """ids in this rank's rows (0 where another rank's), and which are this rank's."""
    local = ids - group.rank * n_local
    mine = (local >= 0) & (local < n_local)
    return local.where(mine, 0), mine


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Two small all_reduces, [N] for the maximum and [2, N] for the sums; the logits themselves never move."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: MeteredGroup) -> Tensor:
        ctx.dtype = logits.dtype
        logits = logits.float()
        peak = logits.amax(-1)
        if group.size > 1:
            group.all_reduce(peak, "max")
        shifted = logits - peak.unsqueeze(-1)
        local, mine = _local_ids(targets, logits.shape[-1], group)
        target = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~mine, 0.0)
        exponentials = shifted.exp_()
        sums = torch.stack([exponentials.sum(-1), target])
        if group.size > 1:
            group.all_reduce(sums)
        ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(-1)), local, mine)
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        softmax, local, mine = ctx.saved_tensors
        grad_logits = softmax * grad.unsqueeze(-1)
        grad_logits.scatter_add_(-1, local.unsqueeze(-1), (grad * mine).neg().unsqueeze(-1))
        return grad_logits.to(ctx.dtype), None, None


def vocab_parallel_cross_entropy(logits: Tensor, targets: Tensor, mesh: Mesh) -> Tensor:
    """Cross-entropy of each token, fp32 [N], from this rank's columns of the logits [N, V/tp] and whole ids [N]."""
    return _VocabParallelCrossEntropy.apply(logits, targets, mesh.tp)


def gather_vocab(logits: Tensor, mesh: Mesh) -> Tensor:
    """[N, V/tp] of each tensor parallel rank to the whole [N, V]. Not differentiable."""
    if mesh.tp.size == 1:
        return logits
    return _all_gather(logits.mT, mesh.tp).mT
