"""Expert-parallel exchange: rows go to the ranks that hold their experts and come back, with gradients.

    ep = ExpertParallel(group, num_experts)                       # rank r holds experts r * E/W ... (r+1) * E/W - 1
    dispatched = ep.dispatch(x, topk_idx, topk_weights)           # x [T, H], topk_idx [T, K], topk_weights [T, K]
    y = ep.combine(run_my_experts(dispatched.rows), dispatched)   # [T, H]

Flat and dropless: one copy of a row for each of its K experts, whatever their load. Sizes are exchanged once, by
plan(); dispatch, combine and both backwards move rows with that plan. Rows reach an expert in (source rank, token)
order and a token's outputs are added in expert order in fp32, so results depend on no timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pycomm.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence


class AllToAllGroup(Protocol):
    """What the exchange needs of a group: pycomm.Group, or anything that wraps one."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_counts: Sequence[int] | None = None,
        input_counts: Sequence[int] | None = None,
    ) -> Any: ...


@dataclass(frozen=True)
class ExchangePlan:
    """Where the rows of one batch go. Slot t * K + j is token t's j-th expert in ascending order of expert; slots are
    sent ordered by (expert, token)."""

    by_expert: Tensor  # [T, K] int64: the column of topk_idx that each slot came from
    order: Tensor  # [T*K] int64: the slot sent at each place
    places: Tensor  # [T*K] int64: the place that each slot is sent at
    send_counts: tuple[int, ...]  # rows to each rank
    recv_counts: tuple[int, ...]  # rows from each rank
    arrival: Tensor  # [n_received] int64: received row at each place of the (expert, source rank, token) order
    expert_counts: tuple[int, ...]  # rows for each expert of this rank


@dataclass(frozen=True)
class Dispatched:
    """rows [n_received, H]: those of this rank's first expert, then of its second, ...; expert_counts of each."""

    rows: Tensor
    expert_counts: tuple[int, ...]
    weights: Tensor  # [T, K], as given
    plan: ExchangePlan


class ExpertParallel:
    """The exchange for num_experts experts spread evenly, in order, over group's ranks. Keeps nothing of a batch."""

    def __init__(self, group: AllToAllGroup, num_experts: int) -> None:
        if num_experts < 1 or num_experts % group.size:
            raise InvalidArgument(
                f"{num_experts} experts do not spread evenly over {group.size} ranks; use a multiple of {group.size}"
            )
        self.group = group
        self.num_experts = num_experts

    def plan(self, topk_idx: Tensor) -> ExchangePlan:
        """The plan of a batch from topk_idx [T, K] int64, a token's experts; all ranks together, one small all_to_all.

        Raises InvalidArgument where an expert does not exist or a token names one twice."""
        ascending, by_expert = self._checked(topk_idx).sort(-1)
        experts = ascending.flatten()
        order = experts.argsort(stable=True)

        world = self.group.size
        sent = torch.bincount(experts, minlength=self.num_experts).view(world, -1)  # [destination, its experts]
        received = torch.empty_like(sent)  # [source, my experts]
        if world > 1:
            self.group.all_to_all(received, sent)
        else:
            received.copy_(sent)
        return ExchangePlan(
            by_expert=by_expert,
            order=order,
            places=order.argsort(),
            send_counts=tuple(sent.sum(1).tolist()),
            recv_counts=tuple(received.sum(1).tolist()),
            arrival=_expert_major(received),
            expert_counts=tuple(received.sum(0).tolist()),
        )

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, plan: ExchangePlan | None = None
    ) -> Dispatched:
        """Sends row t of x [T, H] to each expert in topk_idx[t]; topk_weights [T, K] are kept for combine().

        plan: of an earlier call with the same topk_idx, to exchange no sizes again (recomputation)."""
        if x.dim() != 2 or topk_idx.shape != topk_weights.shape or len(x) != len(topk_idx):
            raise InvalidArgument(
                f"x is {list(x.shape)}, topk_idx {list(topk_idx.shape)}, topk_weights {list(topk_weights.shape)}; "
                "they must be [T, H], [T, K] and [T, K]"
            )
        plan = self.plan(topk_idx) if plan is None else plan
        if plan.by_expert.shape != topk_idx.shape:
            raise InvalidArgument(
                f"the plan is of topk_idx {list(plan.by_expert.shape)}, this batch has {list(topk_idx.shape)}; "
                "make a plan of this batch"
            )
        # One row a slot, then a permutation: its backward writes each row once, so no sum depends on thread timing.
        slots = x.unsqueeze(1).expand(-1, topk_idx.shape[1], -1).flatten(0, 1)
        sent = slots[plan.order]
        received = self._exchange(sent, plan.recv_counts, plan.send_counts)
        return Dispatched(received[plan.arrival], plan.expert_counts, topk_weights, plan)

    def combine(self, expert_out: Tensor, dispatched: Dispatched) -> Tensor:
        """[T, H] in expert_out's dtype: for each token the sum of weight × its expert's output, added in fp32.

        expert_out: [n_received, H], one row for each of dispatched.rows."""
        plan = dispatched.plan
        if expert_out.dim() != 2 or len(expert_out) != len(plan.arrival):
            raise InvalidArgument(
                f"expert_out is {list(expert_out.shape)}, dispatched.rows had {len(plan.arrival)} rows; they must match"
            )
        in_arrival_order = torch.empty_like(expert_out).index_copy(0, plan.arrival, expert_out)
        returned = self._exchange(in_arrival_order, plan.send_counts, plan.recv_counts)
        n_tokens, top_k = dispatched.weights.shape
        outputs = returned[plan.places].view(n_tokens, top_k, expert_out.shape[1]).float()
        weights = dispatched.weights.gather(1, plan.by_expert).float()
        total = outputs[:, 0] * weights[:, :1]
        for k in range(1, top_k):
            total = total + outputs[:, k] * weights[:, k : k + 1]
        return total.to(expert_out.dtype)

    def _exchange(self, rows: Tensor, output_counts: tuple[int, ...], input_counts: tuple[int, ...]) -> Tensor:
        if self.group.size == 1:
            return rows
        result: Tensor = _Exchange.apply(rows, self.group, output_counts, input_counts)  # type: ignore[no-untyped-call]
        return result

    def _checked(self, topk_idx: Tensor) -> Tensor:
        if topk_idx.dim() != 2 or topk_idx.dtype != torch.int64 or topk_idx.shape[1] < 1:
            raise InvalidArgument(
                f"topk_idx is {topk_idx.dtype} {list(topk_idx.shape)}; it must be int64 [T, K], K >= 1"
            )
        if topk_idx.numel() == 0:
            return topk_idx
        low, high = int(topk_idx.min()), int(topk_idx.max())
        if low < 0 or high >= self.num_experts:
            raise InvalidArgument(f"topk_idx names experts {low} to {high}; there are 0 to {self.num_experts - 1}")
        ascending = topk_idx.sort(-1).values
        twice = (ascending[:, 1:] == ascending[:, :-1]).any(-1).nonzero()
        if len(twice):
            token = int(twice[0])
            raise InvalidArgument(f"topk_idx names one expert twice for token {token}: {topk_idx[token].tolist()}")
        return topk_idx


class _Exchange(torch.autograd.Function):
    """all_to_all of rows; backward sends the gradient back the way the rows came, with the same counts."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, group: AllToAllGroup, output_counts: tuple[int, ...], input_counts: tuple[int, ...]
    ) -> Tensor:
        ctx.group, ctx.output_counts, ctx.input_counts = group, output_counts, input_counts
        output = rows.new_empty((sum(output_counts), *rows.shape[1:]))
        group.all_to_all(output, rows.contiguous(), output_counts, input_counts)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        output = grad.new_empty((sum(ctx.input_counts), *grad.shape[1:]))
        ctx.group.all_to_all(output, grad.contiguous(), ctx.input_counts, ctx.output_counts)
        return output, None, None, None


def _expert_major(received: Tensor) -> Tensor:
    """The permutation from arrival order (source, expert, token) to (expert, source, token), from counts [W, E/W]."""
    world, n_local = received.shape
    blocks = torch.arange(world * n_local) % n_local  # the expert of each block of arriving rows
    return blocks.repeat_interleave(received.flatten()).argsort(stable=True)
