"""The exchange with sizes that are known beforehand: nothing is read from the device, so that a CUDA graph can hold it.

Each rank gets every rank's rows (all_gather) and picks those of its experts into max_tokens places an expert; each rank
returns its partial sums of all tokens (all_to_all). For a few experts a token per rank, or two hosts, that moves hardly
more than an exact exchange (docs/moe.md); sums are in the same order, so results are equal bit for bit.

Every sum has a term for each that it could have; those that it has not are zeros, which change no bit of a sum that
begins with +0 (rows.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from pycomm.errors import InvalidArgument
from pycomm.group import Group
from pycomm.moe.autograd import picked
from pycomm.moe.backward import Backwards
from pycomm.moe.checks import (
    code_of,
    problem_of_output,
    problem_of_routing,
    problem_of_routing_form,
    problem_of_rows,
    require,
    require_equal,
    require_sizes,
)
from pycomm.moe.placement import Geometry, Placement, Places
from pycomm.moe.planning import FORM, form
from pycomm.moe.rows import Terms, copy_rows, count_slots, weigh_rows
from pycomm.moe.transport import sums
from pycomm.moe.waits import RowsGroup, Waits

_FACTS: Final = (
    "whether x or topk_weights require a gradient",
    FORM,
)


def _readable(topk_idx: Tensor) -> bool:
    """Whether its values are the host's, and no tracing or faking hides them."""
    return type(topk_idx) is Tensor and topk_idx.device.type == "cpu"


def _facts(inputs: Sequence[Tensor]) -> list[int]:
    """In the order of _FACTS, of rows and what belongs to them, where they are known."""
    needs = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
    return [int(needs), form(inputs[0]) if inputs else 0]


@dataclass(frozen=True)
class StaticPlan:
    """Of N = ranks × T tokens and n_out = local experts × max_tokens rows, all on the batch's device."""

    topk_idx: Tensor  # [T, K] of this rank, a copy
    row_of_out: Tensor  # [n_out]: the token of each output row, -1 for none
    slot_of_out: Tensor  # [n_out]: its place in topk_idx of all ranks, flattened, -1 for none
    out_of_slot: Tensor  # [N * K], a token's in place order: the output row of each slot, -1 for none
    partial: Terms  # of this rank's sums [N], over its output rows and, as a second source, a row of zeros
    home: tuple[Terms, Terms]  # of each host's sums [hosts * T], over the ranks' sums [N], and of all hosts' [T]
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
    """ExpertParallel with capacity max_tokens an expert, and T equal on all ranks and in all calls that a graph holds.
    Layout "expert" alone; no wire, align or mask.

    CPU tensors: as ExpertParallel's, what is wrong on one rank raises InvalidArgument on all before rows move, slots
    without room too, with the exact count. Tensors on a device, which nothing reads: each rank checks shapes and types
    of its own arguments, slots without room raise in plan.check(), which the caller asks when it likes, and the caller
    sees to it that a token names no expert twice. drop: slots without room, and ids that do not exist (padding, say),
    go nowhere; plan.dropped counts them."""

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
        self._room = 0  # bytes that a rank may tell in one go

    def plan(self, topk_idx: Tensor) -> StaticPlan:
        """From topk_idx [T, K] int64; one all_gather."""
        return self._plan(topk_idx, None)

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, plan: StaticPlan | None = None
    ) -> StaticDispatched:
        """As ExpertParallel.dispatch()."""
        problem = problem_of_rows(x, topk_idx, topk_weights, self.hidden)
        if plan is None:
            plan = self._plan(topk_idx, problem, x, topk_weights)
        else:
            self._agree_on_plan(plan, topk_idx, problem, x, topk_weights)
        rows, weights = _Dispatch.apply(x.contiguous(), topk_weights.float().contiguous(), self, plan)  # type: ignore[no-untyped-call]
        return StaticDispatched(
            rows.view(self.n_local, self.max_tokens, x.shape[1]), weights.view(self.n_local, self.max_tokens), plan
        )

    def combine(self, expert_out: Tensor, dispatched: StaticDispatched) -> Tensor:
        """As ExpertParallel.combine(); expert_out [local experts, max_tokens, H]."""
        flat = expert_out.flatten(0, 1)
        problem = problem_of_output(flat, self.n_local * self.max_tokens, self.hidden, dispatched.rows.device)
        inputs = (flat, dispatched.weights)
        if _readable(dispatched.plan.topk_idx):
            facts = self.waits.agree("combine", problem, _facts(inputs))
            require_equal(facts[:, 1:], [_FACTS[1]])
            if facts[:, 0].any() and torch.is_grad_enabled() and not any(each.requires_grad for each in inputs):
                flat = flat.detach().requires_grad_()  # so that this rank meets the others in backward
        else:
            require(problem is None, problem or "")
        result: Tensor = _Combine.apply(flat.contiguous(), dispatched.weights.flatten(), self, dispatched.plan)  # type: ignore[no-untyped-call]
        return result

    # What ranks agree on before rows move, where that can be read.

    def _plan(self, topk_idx: Tensor, problem: str | None, *inputs: Tensor) -> StaticPlan:
        if not _readable(topk_idx):
            problem = problem or problem_of_routing_form(topk_idx, self.num_experts, self.top_k)
            require(problem is None, problem or "")
            idx = self.waits.all_gather("static plan", topk_idx.contiguous())
        else:
            problem = problem or problem_of_routing(topk_idx, self.num_experts, self.top_k, strangers=self.drop)
            settings = code_of((self.num_experts, self.max_tokens, self.hidden, self.top_k, self.drop, self.placement))
            size = topk_idx.shape if topk_idx.dim() == 2 else (0, 0)
            told = torch.empty(0, dtype=torch.uint8) if problem else topk_idx.contiguous().view(torch.uint8).flatten()
            facts = [*size, settings, *_facts(inputs)]
            everyone, gathered = self.waits.agree_and_gather("plan", problem, facts, told, self._room)
            self._room = gathered.shape[1]
            require_equal(
                everyone,
                [
                    "T, the tokens of a rank",
                    "K, the experts of a token",
                    "the StaticExpertParallel's settings or placement (as a hash)",
                    *_FACTS,
                ],
            )
            idx = gathered.contiguous().view(torch.int64).view(self.group.size, *size)
        places = self._places.to(idx.device)
        plan = _static_plan(idx, places, self.geometry, self.n_local, self.max_tokens)
        if not self.drop and _readable(topk_idx):
            plan.check()
        return plan

    def _agree_on_plan(self, plan: StaticPlan, topk_idx: Tensor, problem: str | None, *inputs: Tensor) -> None:
        if plan.topk_idx.shape != topk_idx.shape or len(plan.row_of_out) != self.n_local * self.max_tokens:
            problem = problem or "the plan is of another batch or StaticExpertParallel; make a plan of this batch"
        if not _readable(topk_idx):
            require(problem is None, problem or "")
            return
        if not problem and not torch.equal(plan.topk_idx, topk_idx):
            problem = "the plan is of another batch, whose tokens have other experts; make a plan of this batch"
        require_equal(self.waits.agree("dispatch", problem, _facts(inputs)), list(_FACTS))

    # What the gradients are made of.

    def expand(self, stage: str, plan: StaticPlan, rows: Tensor) -> Tensor:
        everyone = self.waits.all_gather(stage, rows).flatten(0, 1)
        out = rows.new_empty(len(plan.row_of_out), rows.shape[1])
        return copy_rows(out, [everyone], torch.zeros_like(plan.row_of_out), plan.row_of_out)

    def reduce(self, stage: str, plan: StaticPlan, rows: Tensor, weights: Tensor | None) -> Tensor:
        """Sums in transport.py's order: here of the rank, at home of each host and in all."""
        nothing = rows.new_zeros(1, rows.shape[1])
        of_slots = None if weights is None else picked(weights, plan.out_of_slot)
        partial = sums(plan.partial, [rows, nothing], torch.float32, of_slots)
        returned = torch.empty_like(partial)
        even = [len(partial) // self.group.size] * self.group.size
        self.waits.all_to_all(stage, returned, partial, even, even)
        hosts, tokens = plan.home
        return sums(tokens, [sums(hosts, [returned], rows.dtype)], rows.dtype)


def _static_plan(idx: Tensor, places: Places, geometry: Geometry, n_local: int, max_tokens: int) -> StaticPlan:
    """idx [ranks, T, K]: topk_idx of all ranks."""
    mine_idx, idx, n_tokens = idx[geometry.rank], idx.flatten(0, 1), idx.shape[1]
    (n, top_k), device = idx.shape, idx.device

    def every(n: int) -> Tensor:
        return torch.arange(n, device=device)

    known = (idx >= 0) & (idx < places.num_experts)
    turn = every(n_tokens).repeat(geometry.size) + every(geometry.size).repeat_interleave(n_tokens)
    place, column = places.route(torch.where(known, idx, 0), turn, known)
    place, slot = place.flatten(), (every(n).unsqueeze(1) * top_k + column).flatten()
    position, _, _ = count_slots(place, places.n)  # in (source rank, token) order
    room = (position < max_tokens) & (place < places.n)
    mine = room & (places.rank[place] == geometry.rank)
    local = torch.where(mine, places.local[place], n_local)
    n_out = n_local * max_tokens
    out = torch.where(mine, local * max_tokens + position, n_out)
    slot_of_out = slot.new_full((n_out + 1,), -1).scatter_(0, out, slot)[:n_out]
    # Of hosts' sums, host by host: their ranks' sums of a token. Of a token: its hosts' sums.
    ranks = [torch.stack([every(n_tokens) + r * n_tokens for r in of_host], 1) for of_host in geometry.members]
    lengths = torch.cat([torch.full_like(each[:, 0], each.shape[1]) for each in ranks])
    hosts = every(geometry.n_hosts * n_tokens).view(geometry.n_hosts, n_tokens).T
    return StaticPlan(
        topk_idx=mine_idx,
        row_of_out=slot_of_out.div(top_k, rounding_mode="floor"),
        slot_of_out=slot_of_out,
        out_of_slot=torch.where(mine, out, -1),
        partial=Terms((~mine).long(), torch.where(mine, out, 0), every(n + 1) * top_k, top_k),
        home=(
            _terms(torch.cat([each.flatten() for each in ranks]), lengths, max(each.shape[1] for each in ranks)),
            _terms(hosts.flatten(), torch.full_like(hosts[:, 0], geometry.n_hosts), geometry.n_hosts),
        ),
        expert_counts=slot.new_zeros(n_local + 1).scatter_add_(0, local, torch.ones_like(local))[:n_local],
        dropped=(~room).sum(),
    )


def _terms(rows: Tensor, lengths: Tensor, most: int) -> Terms:
    """Of one source, a sum of lengths[i] terms after the other."""
    return Terms(torch.zeros_like(rows), rows, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), most)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, ep: StaticExpertParallel, plan: StaticPlan
    ) -> tuple[Tensor, Tensor]:
        ctx.ep, ctx.plan = ep, plan
        ctx.top_k = weights.shape[1]
        ep.backwards.expect(ctx)
        everyone = ep.waits.all_gather("static dispatch, weights", weights)
        return ep.expand("static dispatch", plan, x), picked(everyone.flatten(), plan.slot_of_out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, of_out = grads
        ep, plan = ctx.ep, ctx.plan
        with ep.backwards.reached(ctx):
            x = ep.reduce("backward of static dispatch", plan, rows.contiguous(), None)
            n, size = len(plan.out_of_slot), ep.group.size
            slot = torch.where(plan.slot_of_out < 0, n, plan.slot_of_out)
            slots = of_out.new_zeros(n + 1).scatter_(0, slot, of_out)[:n]
            returned, even = torch.empty_like(slots), [n // size] * size
            ep.waits.all_to_all("backward of static dispatch, weights", returned, slots, even, even)
            return x, returned.view(size, -1, ctx.top_k).sum(0), None, None  # one rank has each, the others zero


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
            everyone = ctx.ep.waits.all_gather("backward of static combine", grads[0].contiguous()).flatten(0, 1)
            out, of_weights, rows = torch.empty_like(expert_out), torch.empty_like(weights), ctx.plan.row_of_out
            weigh_rows(out, of_weights, [everyone], torch.zeros_like(rows), rows, None, None, weights, expert_out)
            return out, of_weights, None, None
