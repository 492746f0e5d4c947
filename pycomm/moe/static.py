"""The exchange with sizes that are known beforehand: nothing is read from the device, so that a CUDA graph can hold it.

Each rank gets every rank's rows (all_gather) and picks those of its experts into max_tokens places an expert; each rank
returns its partial sums of all tokens (all_to_all). For a few experts a token per rank, or two hosts, that moves hardly
more than an exact exchange (docs/moe.md); sums are in the same order, so results are equal bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pycomm.errors import InvalidArgument
from pycomm.group import Group
from pycomm.moe.backward import Backwards
from pycomm.moe.checks import problem_of_output, problem_of_rows, require, require_sizes
from pycomm.moe.placement import Geometry, Placement, Places
from pycomm.moe.waits import RowsGroup, Waits


@dataclass(frozen=True)
class StaticPlan:
    """Of N = ranks × T tokens and n_out = local experts × max_tokens rows, all on the batch's device."""

    row_of_out: Tensor  # [n_out]: the token of each output row, N for none
    column_of_out: Tensor  # [n_out]: the column of topk_idx that it came from
    out_of_slot: Tensor  # [N, K], in place order: the output row of each slot, n_out for none
    column: Tensor  # [N, K], in place order
    expert_counts: Tensor  # [local experts] int64
    dropped: Tensor  # int64 scalar: slots of all ranks that found no room or no expert

    def check(self) -> None:
        """Raises InvalidArgument where slots were left out; reads the device."""
        if n := int(self.dropped):
            raise InvalidArgument(
                f"{n} slots found no room among max_tokens rows an expert, or no expert; raise max_tokens, or drop=True"
            )


@dataclass(frozen=True)
class StaticDispatched:
    """rows [local experts, max_tokens, H], zeros beyond expert_counts; weights float32 [local experts, max_tokens]."""

    rows: Tensor
    weights: Tensor
    plan: StaticPlan

    @property
    def expert_counts(self) -> Tensor:
        return self.plan.expert_counts


class StaticExpertParallel:
    """ExpertParallel with capacity max_tokens an expert and T equal on all ranks and in all calls that a graph holds.

    With drop=False slots without room raise InvalidArgument on all ranks, with the exact count: at once on the CPU,
    elsewhere in plan.check(), which the caller asks when it likes. Expert ids that do not exist go nowhere and count as
    dropped; a token must not name one twice. Arguments are checked on each rank alone."""

    def __init__(
        self,
        group: RowsGroup,
        num_experts: int,
        max_tokens: int,
        hidden: int | None = None,
        top_k: int | None = None,
        placement: Placement | None = None,
        *,
        drop: bool = False,
    ) -> None:
        require_sizes(num_experts, hidden, top_k, max_tokens)
        self.group, self.waits = group, Waits(group)
        self.backwards = Backwards(self.waits)
        self.num_experts, self.max_tokens, self.hidden, self.top_k, self.drop = (
            num_experts,
            max_tokens,
            hidden,
            top_k,
            drop,
        )
        self.placement = placement or Placement.even(num_experts, group.size)
        require(
            (self.placement.num_experts, self.placement.n_ranks) == (num_experts, group.size),
            f"placement puts {self.placement.num_experts} experts on {self.placement.n_ranks} ranks; there are "
            f"{num_experts} experts and {group.size} ranks",
        )
        hosts = group.host_ids if isinstance(group, Group) else ("",) * group.size
        self.geometry = Geometry.of(group.rank, hosts)
        self._places = Places(self.placement, self.geometry)
        self.n_local = len(self.placement.experts[group.rank])

    def plan(self, topk_idx: Tensor) -> StaticPlan:
        """From topk_idx [T, K] int64; one all_gather."""
        idx = self.waits.all_gather("static plan", topk_idx.contiguous()).flatten(0, 1)
        places = self._places.to(idx.device)
        n, top_k = idx.shape
        known = (idx >= 0) & (idx < self.num_experts)
        turn = torch.arange(n, device=idx.device)
        turn = turn // len(topk_idx) + turn % len(topk_idx) if len(topk_idx) else turn
        place, column = places.route(torch.where(known, idx, 0), turn, known)
        # The position of each slot among those of its place, in (source rank, token) order.
        is_at = place.unsqueeze(-1) == torch.arange(places.n, device=idx.device)  # [N, K, places]
        takes = is_at.any(1)
        before = takes.long().cumsum(0) - 1
        position = torch.cat([before, before.new_full((n, 1), self.max_tokens)], 1).gather(1, place)
        room = position < self.max_tokens
        mine = room & (places.rank[place] == self.group.rank)
        n_out = self.n_local * self.max_tokens
        out_of_slot = torch.where(mine, places.local[place] * self.max_tokens + position, n_out)
        token = torch.arange(n, device=idx.device).unsqueeze(1).expand(-1, top_k)
        row_of_out = idx.new_full((n_out + 1,), n).scatter_(0, out_of_slot.flatten(), token.flatten())[:n_out]
        column_of_out = idx.new_zeros(n_out + 1).scatter_(0, out_of_slot.flatten(), column.flatten())[:n_out]
        local = torch.where(mine, places.local[place], self.n_local)
        counts = idx.new_zeros(self.n_local + 1).scatter_add_(0, local.flatten(), mine.long().flatten())
        plan = StaticPlan(row_of_out, column_of_out, out_of_slot, column, counts[: self.n_local], (~room).sum())
        if not self.drop and type(topk_idx) is Tensor and topk_idx.device.type == "cpu":
            plan.check()
        return plan

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, plan: StaticPlan | None = None
    ) -> StaticDispatched:
        """As ExpertParallel.dispatch()."""
        if problem := problem_of_rows(x, topk_idx, topk_weights, self.hidden):
            raise InvalidArgument(problem)
        plan = plan or self.plan(topk_idx)
        rows, weights = _Dispatch.apply(x.contiguous(), topk_weights.float().contiguous(), self, plan)  # type: ignore[no-untyped-call]
        return StaticDispatched(
            rows.view(self.n_local, self.max_tokens, -1), weights.view(self.n_local, self.max_tokens), plan
        )

    def combine(self, expert_out: Tensor, dispatched: StaticDispatched) -> Tensor:
        """As ExpertParallel.combine(); expert_out [local experts, max_tokens, H]."""
        flat = expert_out.flatten(0, 1)
        if problem := problem_of_output(flat, self.n_local * self.max_tokens, self.hidden):
            raise InvalidArgument(problem)
        result: Tensor = _Combine.apply(flat.contiguous(), dispatched.weights.flatten(), self, dispatched.plan)  # type: ignore[no-untyped-call]
        return result

    # What the gradients are made of.

    def expand(self, stage: str, plan: StaticPlan, rows: Tensor) -> Tensor:
        everyone = self.waits.all_gather(stage, rows).flatten(0, 1)
        padded = torch.cat([everyone, everyone.new_zeros(1, rows.shape[1])])
        return padded[plan.row_of_out]

    def reduce(self, stage: str, plan: StaticPlan, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Sums in transport.py's order: here of the rank, at home of each host and in all."""
        n, top_k = plan.out_of_slot.shape
        padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        factors = None if weights is None else torch.cat([weights, weights.new_zeros(1)])
        partial = torch.zeros(n, rows.shape[1], device=rows.device)
        for k in range(top_k):
            slot = plan.out_of_slot[:, k]
            value = padded[slot].float()
            if factors is not None:
                value = value * factors[slot].unsqueeze(1)
            partial = partial + torch.where((slot < len(rows)).unsqueeze(1), value, 0.0)
        world = self.group.size
        returned = torch.empty_like(partial)
        even = [n // world] * world
        self.waits.all_to_all(stage, returned, partial, even, even)
        of_ranks = returned.view(world, n // world, -1)
        total = torch.zeros_like(of_ranks[0])
        for members in self.geometry.members:
            of_host = torch.zeros_like(total)
            for rank in members:
                of_host = of_host + of_ranks[rank]
            total = total + of_host.to(rows.dtype).float()
        return total.to(rows.dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, ep: StaticExpertParallel, plan: StaticPlan
    ) -> tuple[Tensor, Tensor]:
        ctx.ep, ctx.plan = ep, plan
        ep.backwards.expect(ctx)
        everyone = ep.waits.all_gather("static dispatch, weights", weights).flatten(0, 1)
        padded = torch.cat([everyone, everyone.new_zeros(1, weights.shape[1])])
        return ep.expand("static dispatch", plan, x), padded[plan.row_of_out, plan.column_of_out]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, of_out = grads
        ep, plan = ctx.ep, ctx.plan
        with ep.backwards.reached(ctx):
            x = ep.reduce("backward of static dispatch", plan, rows.contiguous(), None)
            n, top_k = plan.out_of_slot.shape
            padded = torch.cat([of_out, of_out.new_zeros(1)])
            slots = torch.zeros(n, top_k, device=of_out.device).scatter_(1, plan.column, padded[plan.out_of_slot])
            returned = torch.empty_like(slots)
            even = [n // ep.group.size] * ep.group.size
            ep.waits.all_to_all("backward of static dispatch, weights", returned, slots, even, even)
            return x, returned.view(ep.group.size, -1, top_k).sum(0), None, None  # one rank has each, the others zero


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, expert_out: Tensor, weights: Tensor, ep: StaticExpertParallel, plan: StaticPlan) -> Tensor:
        ctx.ep, ctx.plan = ep, plan
        ctx.save_for_backward(expert_out, weights)
        ep.backwards.expect(ctx)
        return ep.reduce("static combine", plan, expert_out, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        with ctx.ep.backwards.reached(ctx):
            expert_out, weights = ctx.saved_tensors
            rows = ctx.ep.expand("backward of static combine", ctx.plan, grads[0].contiguous())
            used = ctx.plan.row_of_out < len(ctx.plan.out_of_slot)
            of_weights = torch.where(used, (rows.float() * expert_out.float()).sum(-1), 0.0)
            return (rows * weights.unsqueeze(1)).to(expert_out.dtype), of_weights, None, None
