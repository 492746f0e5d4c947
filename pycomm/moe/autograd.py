"""The differentiable halves of an exchange. Each one's backward moves rows as the other's forward does.

dispatch: rows = x at the plan's places.        backward: x.grad = the sums of rows.grad without weights
combine:  y = the weighted sums of expert_out.  backward: expert_out.grad = weight × y.grad at the same places,
                                                weights.grad = y.grad · expert_out, in fp32

Roundings on the way (wire, a host's sums) count as the identity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pycomm.moe.exchange import ExpertParallel
    from pycomm.moe.plan import ExchangePlan


class Dispatch(torch.autograd.Function):
    """(rows [n_out, H], the slots' weights [n_slots], an empty anchor that ties combine() to this dispatch)"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, ep: ExpertParallel, plan: ExchangePlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.ep, ctx.plan, ctx.weights_shape = ep, plan, weights.shape
        arriving = ep.start_weights("dispatch", plan, weights)  # beside the rows
        rows = ep.expand("dispatch", plan, x)
        return rows, arriving(), x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, slot_weights, _ = grads
        x = ctx.ep.reduce("backward of dispatch", ctx.plan, rows.contiguous(), None, None)
        weights = ctx.ep.return_weights("backward of dispatch", ctx.plan, slot_weights.contiguous())
        return x, weights.view(ctx.weights_shape), None, None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        expert_out: Tensor,
        weights: Tensor | None,
        anchor: Tensor,
        ep: ExpertParallel,
        plan: ExchangePlan,
        home_weights: Tensor,
    ) -> Tensor:
        ctx.ep, ctx.plan, ctx.anchor = ep, plan, (anchor.shape, anchor.dtype, anchor.device)
        ctx.save_for_backward(expert_out, weights)
        return ep.reduce("combine", plan, expert_out, weights, home_weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None, None]:
        expert_out, weights = ctx.saved_tensors
        shape, dtype, device = ctx.anchor
        anchor = torch.zeros(shape, dtype=dtype, device=device)
        rows = ctx.ep.expand("backward of combine", ctx.plan, grads[0].contiguous())
        if weights is None:
            return rows, None, anchor, None, None, None
        of_weights = None
        if ctx.needs_input_grad[1]:
            of_weights = (rows.float() * expert_out.float()).sum(-1)
        return (rows * weights.unsqueeze(1)).to(expert_out.dtype), of_weights, anchor, None, None, None


def picked(values: Tensor, index: Tensor) -> Tensor:
    """values[index], 0 where index is -1; differentiable."""
    padded = torch.cat([values, values.new_zeros(1)])
    return padded[torch.where(index < 0, len(values), index)]
