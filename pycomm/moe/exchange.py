"""ExpertParallel: rows go to the ranks that hold their experts and come back, with gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Literal

import torch
from torch import Tensor

from pycomm import _C
from pycomm.errors import InvalidArgument
from pycomm.group import Group
from pycomm.moe.autograd import Combine, Dispatch, picked
from pycomm.moe.checks import (
    problem_of_output,
    problem_of_plan,
    problem_of_rows,
    require,
    require_equal,
    require_sizes,
)
from pycomm.moe.cost import MODES, Choice, Dedup
from pycomm.moe.dispatched import Dispatched
from pycomm.moe.form import Wire
from pycomm.moe.movement import Movement
from pycomm.moe.placement import Geometry, Placement, Places
from pycomm.moe.planning import FORM, Planning, Settings, form
from pycomm.moe.stream import ExpertStream, Later
from pycomm.moe.tables import Cut, ExchangePlan, Layout
from pycomm.moe.through_hosts import ThroughHosts
from pycomm.moe.transport import Direct, Transport
from pycomm.moe.waits import Call, RowsGroup, Waits

KEPT_NBYTES: Final = 256 << 20  # of output rows that nobody holds any more, for the next batch


class ExpertParallel:
    """The exchange of one set of experts over group's ranks; all of them make it together. It keeps nothing of a batch,
    so layers whose experts are alike share one.

    num_experts: of the router. hidden, top_k: the width of a row and a token's number of experts, 1 to 32; None takes
    any. placement: which rank holds which experts, replicas included; default: in order, evenly.
    layout, align: what dispatch gives (Dispatched); align is a multiple to which each expert's rows are padded.
    wire: what a dispatched row looks like while it travels, on every path, so that results depend on none: "bf16", or
    "fp8" (e4m3 with a scale per 128 values). A host's sums on the way back are then bf16 (docs/moe.md has the errors).
    dedup: "none" sends a copy for each expert, "rank" one for each rank, "host" one for each host; "auto" takes what
    explain() says. Results are equal bit for bit (transport.py). chunks: pieces of a batch, of which one is on its way
    while another is worked on; "auto" by the link's rate. Tensors on a device go in one piece (in a stream's chunks).
    max_tokens: most rows that one expert (each replica) takes; more raise InvalidArgument on all ranks, with the exact
    count, or with drop=True are left out, last in (source rank, token) order, and counted in plan.dropped.

    Raises InvalidArgument for wrong arguments, from plan(), dispatch() and combine() on all ranks and before rows move.
    Errors of the group, such as PeerTimeout, name this rank and the stage."""

    def __init__(
        self,
        group: RowsGroup,
        num_experts: int,
        hidden: int | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        layout: Layout = "expert",
        wire: Wire | None = None,
        dedup: Dedup | Literal["auto"] = "auto",
        chunks: int | Literal["auto"] = "auto",
        align: int = 1,
        placement: Placement | None = None,
        *,
        drop: bool = False,
    ) -> None:
        require_sizes(num_experts, hidden, top_k, max_tokens)
        require(layout in ("expert", "rank", "token"), f"layout {layout!r} is none of expert, rank, token")
        require(wire in (None, "bf16", "fp8"), f"wire {wire!r} is none of None, bf16, fp8")
        require(dedup in ("auto", *MODES), f"dedup {dedup!r} is none of auto, none, rank, host")
        require(chunks == "auto" or int(chunks) >= 1, f"chunks is {chunks!r}; give a number from 1 or 'auto'")
        require(align >= 1, f"align is {align}; it must be 1 or more")
        require(not drop or max_tokens is not None, "drop leaves out what is above max_tokens; give max_tokens")
        require(
            not (layout == "rank" and dedup == "none"),
            "layout 'rank' has one row for a token, dedup 'none' sends one for each expert; use dedup 'rank' or 'host'",
        )
        self.group = group
        self.num_experts, self.hidden, self.top_k, self.layout = num_experts, hidden, top_k, layout
        self.placement = placement or Placement.even(num_experts, group.size)
        require(
            (self.placement.num_experts, self.placement.n_ranks) == (num_experts, group.size),
            f"placement puts {self.placement.num_experts} experts on {self.placement.n_ranks} ranks; there are "
            f"{num_experts} experts and {group.size} ranks",
        )
        self._settings = Settings(
            num_experts, hidden, top_k, max_tokens, layout, wire, dedup, chunks, align, drop, self.placement
        )
        hosts = group.host_ids if isinstance(group, Group) else ("",) * group.size
        self._geometry = Geometry.of(group.rank, hosts)
        self._masked: frozenset[int] = frozenset()
        self._places = Places(self.placement, self._geometry)
        host_group = None
        if isinstance(group, Group) and dedup in ("auto", "host") and (group.size > 1 or dedup == "host"):
            host_group = group.split(self._geometry.host, name=f"{group.name}/moe")
        require(
            dedup != "host" or host_group is not None,
            "dedup='host' needs a pycomm.Group, whose ranks share memory inside a host",
        )
        self._host_group = host_group
        self.waits = Waits(group, host_group)
        memory = _C.RowMemory(KEPT_NBYTES)
        direct = Direct(self.waits, self._geometry.n_hosts == 1)
        transports: dict[Dedup, Transport] = {"rank": direct}
        if layout != "rank":
            transports["none"] = direct
        through_hosts = None
        if host_group is not None and isinstance(group, Group):
            through_hosts = ThroughHosts(self.waits, group, host_group, self._geometry)
            transports["host"] = through_hosts
        self._moves = Movement(self.waits, memory, transports, wire, self._geometry.n_hosts)
        self._planning = Planning(self._settings, self.waits, self._geometry, tuple(transports), through_hosts)

    @property
    def n_local(self) -> int:
        """The experts of this rank."""
        return len(self.placement.experts[self.group.rank])

    # The three calls.

    def plan(self, topk_idx: Tensor) -> ExchangePlan:
        """The plan of a batch from topk_idx [T, K] int64, a token's experts; T may differ by rank and be 0. All ranks
        together: it exchanges what the batch needs, once. A slot whose expert is masked goes nowhere.

        Raises InvalidArgument where an expert does not exist, a token names one twice, or ranks differ in K."""
        return self._planning.plan(topk_idx, None, (), self._owner(), self._places).plan

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, plan: ExchangePlan | None = None
    ) -> Dispatched:
        """Sends row t of x [T, H] to the experts in topk_idx[t]; topk_weights [T, K] go with it. x: float32, bfloat16
        or float16 (float64 travels as it is and is summed in fp32), alike on all ranks.

        plan: of an earlier plan() or dispatch() with the same topk_idx, so that only rows are exchanged; the backward
        of this call and of its combine() use it too."""
        problem, known = problem_of_rows(x, topk_idx, topk_weights, self.hidden), None
        if plan is None:
            planned = self._planning.plan(topk_idx, problem, (x, topk_weights), self._owner(), self._places)
            plan, known = planned.plan, planned.slot_weights
        else:
            self._agree("dispatch", problem or problem_of_plan(plan, self._owner(), topk_idx), x, topk_weights)
        weights = topk_weights.float().contiguous()
        rows, slot_weights, anchor = Dispatch.apply(x.contiguous(), weights, self._moves, plan, known)  # type: ignore[no-untyped-call]
        experts = plan.slot_expert if self.layout == "token" else None
        if self.layout == "rank":
            experts = picked(plan.slot_expert + 1, plan.slot_of_row) - 1
        of_rows = picked(slot_weights, plan.slot_of_row if self.layout == "rank" else plan.slot_of_out)
        return Dispatched(rows, of_rows, experts, plan, anchor, weights.detach().flatten()[plan.home_weights])

    def combine(self, expert_out: Tensor, dispatched: Dispatched) -> Tensor:
        """y [T, H] in expert_out's dtype: for each token the weighted sum of its experts' outputs, in the order and
        with the roundings of transport.py; 0 for a token without experts.

        expert_out [n_out, H]: a row for each of dispatched.rows; what stands in padding does not matter."""
        plan = dispatched.plan
        problem = problem_of_output(expert_out, plan.n_out, self.hidden, dispatched.rows.device)
        if plan.owner != self._owner():
            problem = "dispatched is of another ExpertParallel, or of this one before mask(); dispatch again"
        weights = None if self.layout == "rank" else dispatched.weights
        inputs = (expert_out, dispatched.anchor) if weights is None else (expert_out, weights, dispatched.anchor)
        any_needs = self._agree("combine", problem, *inputs)
        anchor = dispatched.anchor
        if any_needs and torch.is_grad_enabled() and not any(each.requires_grad for each in inputs):
            anchor = anchor.detach().requires_grad_()  # so that this rank meets the others in backward
        result: Tensor = Combine.apply(  # type: ignore[no-untyped-call]
            expert_out.contiguous(), weights, anchor, self._moves, plan, dispatched.home_weights
        )
        return result

    def stream(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        *,
        n_chunks: int | Literal["auto"] = "auto",
        cut: Cut = "tokens",
        later: Later | None = None,
        flush: bool = True,
    ) -> ExpertStream:
        """dispatch() and combine() of one batch around the experts, in parts, of which one is computed while others
        cross between hosts (stream.py):

            stream = ep.stream(x, topk_idx, topk_weights)
            for chunk in stream:
                chunk.output = my_experts(chunk.rows.split(chunk.sizes))
            y = stream.output  # [T, H]

        n_chunks: in how many crossings; "auto" by the links' latency, 1 where overlapping would lose (stream.why).
        cut: "tokens", so that a chunk has some rows of each expert, those that stay on this host first and last, with
        `later` in the last two chunks (backward then begins with them, and ends with the weights' gradients); or
        "experts", so that it has all rows of some experts: results, the experts' weights' gradients included, are then
        those of dispatch() and combine() bit for bit, and no product is split, but crossings are less even.
        later: a pycomm.overlap.WeightGradients that the experts' products use; backward flushes it when the last rows
        have left, so that weight gradients are computed while these are on their way.
        flush: False where another stream with the same `later` follows before the optimizer's step: its waits compute
        what this one's had no time for. `later` keeps the inputs of those products; later.flush() ends them.

        Raises InvalidArgument as dispatch() does, on all ranks before rows move, and where the layout is not "expert"
        with align 1."""
        require(
            self.layout == "expert" and self._settings.align == 1,
            f"a stream gives rows by expert without padding; layout is {self.layout!r}, align {self._settings.align}",
        )
        require(cut in ("tokens", "experts"), f"cut {cut!r} is none of tokens, experts")
        require(n_chunks == "auto" or n_chunks >= 1, f"n_chunks is {n_chunks!r}; give 1 or more, or 'auto'")
        problem = problem_of_rows(x, topk_idx, topk_weights, self.hidden)
        planned = self._planning.plan(topk_idx, problem, (x, topk_weights), self._owner(), self._places, cut, n_chunks)
        return ExpertStream(self._moves, planned, x.contiguous(), topk_weights.float().contiguous(), later, flush)

    # Failure.

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Around any part of a step: an exception that leaves the block on one rank breaks the exchange's groups, and
        the others raise GroupClosed at once, with that rank, the stage after which it failed and the exception, instead
        of waiting for its combine or its backward:

            with ep.failing_together():
                dispatched = ep.dispatch(x, topk_idx, topk_weights)
                loss(ep.combine(my_experts(dispatched.rows), dispatched)).backward()

        InvalidArgument passes by, since what this class raises of it is raised on all ranks."""
        try:
            yield
        except InvalidArgument:
            raise
        except BaseException as error:
            self.waits.abandon_after(f"{type(error).__name__}: {error}")
            raise

    def mask(self, rank: int, *, allow_lost: bool = False) -> None:
        """From the next plan on, nothing goes to the experts of `rank`; their replicas elsewhere take over. Every rank
        calls it alike. allow_lost: experts without a replica are gone, their slots go nowhere and are counted in
        plan.dropped (weights are not renormalised); without it such experts raise InvalidArgument.

        A rank that no longer runs breaks its group: mask it, then go on with rebuild()."""
        require(0 <= rank < self.group.size, f"mask: rank {rank} is not in 0 .. {self.group.size - 1}")
        masked = self._masked | {rank}
        places = Places(self.placement, self._geometry, masked)
        lost = sorted(set(places.lost) - set(self._places.lost))
        require(
            allow_lost or not lost,
            f"mask({rank}): experts {lost} are on no other rank; give them replicas, or pass allow_lost=True to go on "
            "without them",
        )
        self._masked, self._places = masked, places

    def rebuild(self, group: RowsGroup, ranks: tuple[int, ...] | None = None) -> ExpertParallel:
        """This exchange on a new group, whose rank i was ranks[i] of this one's (default: those that are not masked, in
        order) and holds the same experts. All ranks of the new group call it. Experts that mask() let go stay lost.

        Raises InvalidArgument where others would be lost."""
        ranks = ranks or tuple(rank for rank in range(self.group.size) if rank not in self._masked)
        require(
            len(ranks) == group.size and len(set(ranks)) == len(ranks) and set(ranks) <= set(range(self.group.size)),
            f"rebuild: the new group has {group.size} ranks, said to have been {list(ranks)} of {self.group.size}; "
            "mask() the ranks that are gone, or give the old rank of each",
        )
        held = tuple(self.placement.experts[rank] for rank in ranks)
        gone = sorted(set(range(self.num_experts)) - set(itertools.chain.from_iterable(held)))
        new = sorted(set(gone) - set(self._places.lost))
        require(
            not new,
            f"rebuild: experts {new} are on no rank of the new group; place them anew, or mask() their ranks with "
            "allow_lost=True first",
        )
        of = self._settings
        return ExpertParallel(
            group,
            of.num_experts,
            of.hidden,
            of.top_k,
            of.max_tokens,
            of.layout,
            of.wire,
            of.dedup,
            of.chunks,
            of.align,
            Placement(held, tuple(gone)),
            drop=of.drop,
        )

    def close(self) -> None:
        """Closes the group of this host's ranks; the group that was given stays its owner's."""
        if self._host_group is not None:
            self._host_group.close()

    # Choice.

    def choice(
        self, n_tokens: int = 1024, top_k: int | None = None, itemsize: int = 2, device: str | torch.device = "cpu"
    ) -> Choice:
        """What `dedup` comes to for n_tokens a rank of itemsize bytes a value on such a device, and what each way would
        cost."""
        return self._planning.choice(n_tokens, top_k, itemsize, torch.device(device).type)

    def explain(
        self, n_tokens: int = 1024, top_k: int | None = None, itemsize: int = 2, device: str | torch.device = "cpu"
    ) -> str:
        """choice() in words: the way taken, why, and every way's rows, bytes and expected time."""
        return self._planning.explain(n_tokens, top_k, itemsize, torch.device(device).type)

    # What all ranks agree on before rows move.

    def _owner(self) -> tuple[Any, ...]:
        return (id(self), tuple(sorted(self._masked)))

    def _agree(self, name: Call, problem: str | None, *inputs: Tensor) -> bool:
        """Raises the problem of any rank on all. Returns whether an input of any rank requires a gradient."""
        needs = any(each.requires_grad for each in inputs)
        facts = self.waits.agree(name, problem, [int(needs), form(inputs[0])])
        require_equal(facts[:, 1:], [f"{name}: {FORM}"])
        return bool(facts[:, 0].any())
