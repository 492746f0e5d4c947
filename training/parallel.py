"""Tensor and sequence parallelism: the operators of Megatron-LM's sequence-parallel layer, and the layers around them.

Activations are [sequence, batch, width], sequence first, so that gathering or scattering the sequence is one collective
on contiguous memory. Between layers each tensor parallel rank holds its part of the sequence; inside one it holds the
whole sequence and a part of the width:

    [S/tp, B, D] ── gather_sequence ──► [S, B, D] ── ColumnLinear ──► [S, B, F/tp] ── RowLinear ──► partial [S, B, D]
                                                                      ── reduce_scatter_sequence ──► [S/tp, B, D]

Each operator's backward is the other one. Source: Korthikanti et al., arXiv:2205.05198, section 4.2.2. column_linears()
and row_linear() are such a pair with its products, which go around a ring piece by piece beside the exchange where
pycomm.overlap expects that to gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pycomm.overlap import (
    MatmulPlan,
    all_gather_matmuls,
    matmul_reduce_scatter,
    plan_all_gather_matmul,
    plan_matmul_reduce_scatter,
)
from training import fp8
from training.mesh import Axis, Mesh
from training.metered import MeteredGroup
from training.sharding import ParamSpec, ShardedModule


def _all_gather(x: Tensor, group: MeteredGroup, wire: str | None = None) -> Tensor:
    output = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    group.all_gather(output, x.contiguous(), wire=wire)
    return output


def _reduce_scatter(x: Tensor, group: MeteredGroup, wire: str | None = None) -> Tensor:
    output = x.new_empty((x.shape[0] // group.size, *x.shape[1:]))
    group.reduce_scatter(output, x.contiguous(), wire=wire)
    return output


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: MeteredGroup, wire: str | None) -> Tensor:
        ctx.group, ctx.wire = group, wire
        return _all_gather(x, group, wire)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grad, ctx.group, ctx.wire), None, None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return _reduce_scatter(x, mesh.tp, mesh.wire["tp"])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.mesh.tp, ctx.mesh.wire["tp"]), None


def gather_sequence(x: Tensor, mesh: Mesh, coded: bool = True) -> Tensor:
    """[S/tp, B, D] of each tensor parallel rank to the whole [S, B, D]; backward reduce-scatters the gradient. coded:
    on the wire for tp, if there is one."""
    return x if mesh.tp.size == 1 else _GatherSequence.apply(x, mesh.tp, mesh.wire["tp"] if coded else None)


def reduce_scatter_sequence(x: Tensor, mesh: Mesh) -> Tensor:
    """Partial sums [S, B, D] to this rank's part of their sum, [S/tp, B, D]; backward all-gathers the gradient."""
    return x if mesh.tp.size == 1 else _ReduceScatterSequence.apply(x, mesh)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, mesh: Mesh) -> Tensor:
    """F.linear, in fp8 where the run's products are (mesh.fp8), whose weight gradient is put off where the pipeline's
    schedule wants it (mesh.weight_gradients)."""
    if mesh.fp8:
        return fp8.linear(x, weight, bias, mesh.weight_gradients)
    if mesh.weight_gradients is None:
        return F.linear(x, weight, bias)
    return mesh.weight_gradients.linear(x, weight, bias)


class Linear(ShardedModule):
    """y = x Wᵀ with W whole on each tensor parallel rank, which runs it for its part of the sequence."""

    def __init__(self, d_in: int, d_out: int, mesh: Mesh, std: float) -> None:
        super().__init__(mesh)
        self.weight = self.new_parameter("weight", ParamSpec((d_out, d_in), std))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, None, self.mesh)


class ColumnLinear(ShardedModule):
    """y = x Wᵀ + b with W's output features cut over tp: [..., d_in] to [..., d_out / tp]."""

    def __init__(self, d_in: int, d_out: int, mesh: Mesh, std: float, bias: bool = False) -> None:
        super().__init__(mesh)
        self.weight = self.new_parameter("weight", ParamSpec((d_out, d_in), std, "tp", 0))
        self.bias = self.new_parameter("bias", ParamSpec((d_out,), 0.0, "tp", 0)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.mesh)


class RowLinear(ShardedModule):
    """y = x Wᵀ with W's input features cut over tp: [..., d_in / tp] to a partial sum [..., d_out]. add_bias() belongs
    after the sum, where each token is on one rank."""

    def __init__(self, d_in: int, d_out: int, mesh: Mesh, std: float, bias: bool = False) -> None:
        super().__init__(mesh)
        self.weight = self.new_parameter("weight", ParamSpec((d_out, d_in), std, "tp", 1))
        self.bias = self.new_parameter("bias", ParamSpec((d_out,), 0.0)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, None, self.mesh)

    def add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


def column_linears(x: Tensor, layers: Sequence[ColumnLinear], mesh: Mesh) -> list[Tensor]:
    """Each layer of the whole sequence, which is gathered once: [S/tp, B, D] to [S, B, F/tp] of each."""
    weights = [layer.weight for layer in layers]
    plan = _plan("all_gather", x, weights, mesh)
    if plan.n_pieces == 0:
        x = gather_sequence(x, mesh)
        return [layer(x) for layer in layers]
    products = all_gather_matmuls(x, weights, mesh.tp, plan, keep=True, later=mesh.weight_gradients)
    return [y if each.bias is None else y + each.bias for y, each in zip(products, layers, strict=True)]


def row_linear(x: Tensor, layer: RowLinear, mesh: Mesh) -> Tensor:
    """The layer, bias included, summed over tp: [S, B, F/tp] to this rank's part of the sequence, [S/tp, B, D]."""
    plan = _plan("reduce_scatter", x, [layer.weight], mesh)
    if plan.n_pieces == 0:
        return layer.add_bias(reduce_scatter_sequence(layer(x), mesh))
    return layer.add_bias(matmul_reduce_scatter(x, layer.weight, mesh.tp, plan, later=mesh.weight_gradients))


_UNSPLIT = MatmulPlan(0, "unsplit")
_ALWAYS = MatmulPlan(2, "layout.tp_overlap is always")


def _plan(collective: str, x: Tensor, weights: Sequence[Tensor], mesh: Mesh) -> MatmulPlan:
    """How a product of these shapes runs, by layout.tp_overlap. Decided once, in training: other shapes run unsplit."""
    way = mesh.layout.tp_overlap
    if mesh.tp.size == 1 or way == "never":
        return _UNSPLIT
    if way == "always":
        return _ALWAYS
    key = (collective, tuple(x.shape), *(tuple(weight.shape) for weight in weights))
    if key not in mesh.products and torch.is_grad_enabled():
        gathers = collective == "all_gather"
        mesh.products[key] = (
            plan_all_gather_matmul(x, weights, mesh.tp)
            if gathers
            else plan_matmul_reduce_scatter(x, weights[0], mesh.tp)
        )
    return mesh.products.get(key, _UNSPLIT)


class VocabParallelEmbedding(ShardedModule):
    """A table [V, D] cut over its rows: tokens [S, B] to [S/tp, B, D]. Each rank looks up the tokens that it holds."""

    def __init__(self, vocab_size: int, d_model: int, mesh: Mesh, std: float, axis: Axis = "tp") -> None:
        """axis: "tied" where the first and the last pipeline stage have the table."""
        super().__init__(mesh)
        self.weight = self.new_parameter("weight", ParamSpec((vocab_size, d_model), std, axis, 0))

    def forward(self, tokens: Tensor) -> Tensor:
        local, others = _local_ids(tokens, self.weight.shape[0], self.mesh.tp)
        rows = F.embedding(local, self.weight)
        if others is not None:
            rows = rows.masked_fill(others.unsqueeze(-1), 0.0)
        return reduce_scatter_sequence(rows, self.mesh)


def _local_ids(ids: Tensor, n_local: int, group: MeteredGroup) -> tuple[Tensor, Tensor | None]:
    """ids in this rank's rows (0 where another rank's), and which are another's; None where this rank has all."""
    if group.size == 1:
        return ids, None
    local = ids - group.rank * n_local
    others = (local < 0) | (local >= n_local)
    return local.masked_fill(others, 0), others


class _FusedCrossEntropy(torch.autograd.Function):
    """Forward makes the logits of a chunk of tokens, their loss and, since the loss is a sum, their gradient at once;
    no other logits exist then. Two small all_reduces a chunk over tp: [N] for the maximum, [2, N] for the sums.

    Source: the chunked form of Liger Kernel, arXiv:2410.10989; over vocabulary shards Megatron-LM, arXiv:1909.08053."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, targets: Tensor, group: MeteredGroup, chunk: int) -> Tensor:
        needed = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if needed[0] else None
        grad_table: Tensor | None = None
        total = torch.zeros((), device=x.device)
        for first in range(0, len(x), chunk):
            rows = x[first : first + chunk]
            logits = F.linear(rows, table).float()
            peak = logits.amax(-1)
            if group.size > 1:
                group.all_reduce(peak, "max")
            logits -= peak.unsqueeze(-1)
            local, others = _local_ids(targets[first : first + chunk], logits.shape[-1], group)
            local = local.unsqueeze(-1)
            target = logits.gather(-1, local).squeeze(-1)
            if others is not None:
                target.masked_fill_(others, 0.0)
            exponentials = logits.exp_()
            sums = torch.stack([exponentials.sum(-1), target])
            if group.size > 1:
                group.all_reduce(sums)
            total += (sums[0].log() - sums[1]).sum()
            if not any(needed[:2]):
                continue
            grad = exponentials.div_(sums[0].unsqueeze(-1))
            at_target = torch.full_like(target, -1.0) if others is None else others.float() - 1.0
            grad.scatter_add_(-1, local, at_target.unsqueeze(-1))
            grad = grad.to(x.dtype)
            if grad_x is not None:
                torch.mm(grad, table, out=grad_x[first : first + chunk])
            if needed[1]:
                product = (grad.mT @ rows).float()
                grad_table = product if grad_table is None else grad_table.add_(product)
        ctx.save_for_backward(grad_x, grad_table)
        ctx.table_dtype = table.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_x, grad_table = ctx.saved_tensors  # torch refuses a second backward: they are scaled where they are
        return (
            None if grad_x is None else grad_x.mul_(grad.to(grad_x.dtype)),
            None if grad_table is None else grad_table.mul_(grad).to(ctx.table_dtype),
            None,
            None,
            None,
        )


def fused_cross_entropy(x: Tensor, table: Tensor, targets: Tensor, mesh: Mesh, chunk: int) -> Tensor:
    """The cross-entropy summed over tokens, fp32 scalar equal on every tp rank: of the logits x tableᵀ, from x [N, D],
    this rank's rows of the table [V/tp, D] and whole ids [N]. At most chunk × V/tp logits exist at a time."""
    loss: Tensor = _FusedCrossEntropy.apply(x, table, targets, mesh.tp, chunk)
    return loss


def gather_vocab(logits: Tensor, mesh: Mesh) -> Tensor:
    """[N, V/tp] of each tensor parallel rank to the whole [N, V]. Not differentiable."""
    if mesh.tp.size == 1:
        return logits
    return _all_gather(logits.mT, mesh.tp).mT
