"""The differentiable halves of an exchange. Each one's backward moves rows as the other's forward does.

dispatch: rows = x at the plan's places.        backward: x.grad = the sums of rows.grad without weights
combine:  y = the weighted sums of expert_out.  backward: expert_out.grad = weight × y.grad at the same places,
                                                weights.grad = y.grad · expert_out, in fp32

Roundings on the way (wire, a host's sums) count as the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pycomm.moe.movement import Movement
from pycomm.moe.tables import ExchangePlan


class Dispatch(torch.autograd.Function):
    """(rows [n_out, H], the slots' weights [n_slots], an empty anchor that ties combine() to this dispatch)"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, moves: Movement, plan: ExchangePlan, slot_weights: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.moves, ctx.plan, ctx.weights_shape = moves, plan, weights.shape
        moves.backwards.expect(ctx)
        if slot_weights is not None:
            return moves.expand("dispatch", plan, plan.out, x), slot_weights, x.new_empty(0)
        arriving: list[Callable[[], Tensor]] = []

        def send_weights() -> None:  # behind the rows: they cross while the last of these are put in their places
            arriving.append(moves.start_weights("dispatch", plan, weights))

        rows = moves.expand("dispatch", plan, plan.out, x, send_weights)
        return rows, arriving[0](), x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows, slot_weights, _ = grads
        stage = "backward of dispatch"
        with ctx.moves.backwards.reached(ctx):
            arriving = ctx.moves.start_back(stage, ctx.plan, slot_weights.contiguous())
            x = ctx.moves.reduce(stage, ctx.plan, ctx.plan.out, rows.contiguous(), None, None)
            return x, arriving().view(ctx.weights_shape), None, None, None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        expert_out: Tensor,
        weights: Tensor | None,
        anchor: Tensor,
        moves: Movement,
        plan: ExchangePlan,
        home_weights: Tensor,
    ) -> Tensor:
        ctx.moves, ctx.plan, ctx.anchor = moves, plan, (anchor.shape, anchor.dtype, anchor.device)
        ctx.save_for_backward(expert_out, weights)
        moves.backwards.expect(ctx)
        return moves.reduce("combine", plan, plan.back, expert_out, weights, home_weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None, None]:
        with ctx.moves.backwards.reached(ctx):
            return Combine._gradients(ctx, grads[0])

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None, None]:
        expert_out, weights = ctx.saved_tensors
        shape, dtype, device = ctx.anchor
        anchor = torch.zeros(shape, dtype=dtype, device=device)
        stage, plan, grad = "backward of combine", ctx.plan, grad.contiguous()
        if weights is None:
            return ctx.moves.expand(stage, plan, plan.back, grad), None, anchor, None, None, None
        rows, of_weights = ctx.moves.expand_weighted(
            stage, plan, plan.back, grad, weights, expert_out, ctx.needs_input_grad[1]
        )
        return rows, of_weights, anchor, None, None, None


def picked(values: Tensor, index: Tensor) -> Tensor:
    """values[index], 0 where index is -1; differentiable."""
    padded = torch.cat([values, values.new_zeros(1)])
    return padded[torch.where(index < 0, len(values), index)]
