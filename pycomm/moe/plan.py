"""The plan of one batch, from every rank's topk_idx, which all ranks hold. The tables are made in C++
(csrc/cpu/expert_plan.h); here are the stages of a batch, and the tables' form."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from pycomm import _C
from pycomm.moe.cost import Dedup
from pycomm.moe.placement import Geometry, Places
from pycomm.moe.rows import Terms
from pycomm.moe.tables import Cut, ExchangePlan, Expansion, Layout, Leg, OnHost, Route


@dataclass(frozen=True)
class Request:
    """What a plan is made for: the exchange's settings."""

    owner: tuple[Any, ...]
    geometry: Geometry
    places: Places
    mode: Dedup
    layout: Layout
    n_chunks: int
    cut: Cut  # stages are of tokens (this rank's own or host's, then crossing by crossing), or of experts
    align: int
    max_tokens: int | None
    drop: bool

    @property
    def crossing_of_stage(self) -> tuple[int | None, ...]:
        """In which parts this rank's output rows are made, and what crosses before and after each.

        Of tokens: half of those that do not cross, then a stage a crossing, then the other half: what needs no wire
        fills the waits at both ends. Of experts: as many stages as crossings, each of a part of every rank's experts,
        so that an expert has all its rows at once."""
        crosses = (self.geometry.n_hosts if self.mode == "host" else self.geometry.size) > 1
        if self.cut == "experts":
            return tuple(range(self.n_chunks)) if crosses else (None,) * self.n_chunks
        return (None, *range(self.n_chunks), None) if crosses else (None,)

    def stage_experts(self, n_local: int) -> tuple[range, ...]:
        """By stage, the local experts that it may have rows of: expert e of n in stage e * stages // n."""
        n_stages = len(self.crossing_of_stage)
        if self.cut == "tokens":
            return (range(n_local),) * n_stages
        starts = (-(-stage * n_local // n_stages) for stage in range(n_stages + 1))
        return tuple(range(a, b) for a, b in pairwise(starts))


def make_plan(request: Request, topk_idx: Tensor, everyone: Tensor, n_tokens: tuple[int, ...]) -> ExchangePlan:
    """topk_idx [T, K]: this rank's. everyone: that of all ranks one after the other, [sum of n_tokens, K], uint8, int16
    or int32, on the CPU; n_tokens by rank.

    Raises InvalidArgument, on all ranks the same, where an expert gets more than max_tokens and drop is off."""
    crossings = request.crossing_of_stage
    n_crossings = sum(each is not None for each in crossings)
    found = _C.expert_tables(
        request.places.native,
        everyone.contiguous(),
        n_tokens,
        request.mode,
        request.layout,
        request.cut == "experts",
        n_crossings,
        len(crossings),
        request.align,
        request.max_tokens or 0,
        request.drop,
    )
    top_k = everyone.shape[1]
    out = _route(found["out"], top_k)
    offsets = found["expert_offsets"].tolist()
    return ExchangePlan(
        owner=request.owner,
        mode=request.mode,
        layout=request.layout,
        n_chunks=n_crossings,
        crossing_of_stage=crossings,
        topk_idx=topk_idx.detach().clone(),
        batch=None,
        expert_counts=found["expert_counts"],
        expert_offsets=found["expert_offsets"],
        sizes=tuple(b - a for a, b in pairwise(offsets)),
        stage_counts=found["stage_counts"],
        stage_sizes=tuple(map(tuple, found["stage_counts"].tolist())),
        stage_experts=request.stage_experts(len(found["expert_counts"])),
        dropped=found["dropped"],
        n_slots=len(found["slot_expert"]),
        n_out=len(found["slot_of_out"]),
        slot_of_out=found["slot_of_out"],
        slot_expert=found["slot_expert"],
        slot_of_row=found["slot_of_row"],
        slot_weights=found["slot_weights"],
        scalars=Leg(**found["scalars"]),
        home_weights=found["home_weights"],
        out=out,
        back=out if found["back"] is None else _route(found["back"], top_k),
        one_host=request.geometry.n_hosts == 1 and found["every_token_goes"],
    )


def _route(of: dict[str, Any], top_k: int) -> Route:
    def terms(each: tuple[Tensor, Tensor, Tensor]) -> Terms:
        return Terms(*each, top_k)

    on_host = of["on_host"]
    if on_host is not None:
        gateway = tuple(terms(each) for each in on_host["gateway"])
        on_host = OnHost(on_host["staged"], on_host["arrived"], on_host["partials"], gateway, own=terms(on_host["own"]))
    return Route(
        leg=Leg(**of["leg"]),
        expansions=tuple(Expansion(*each) for each in of["expansions"]),
        leaving=tuple(terms(each) for each in of["leaving"]),
        leaving_rows=of["leaving_rows"],
        own=terms(of["own"]),
        home=tuple(terms(each) for each in of["home"]),
        on_host=on_host,
    )
