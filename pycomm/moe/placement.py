"""Where experts are: which rank holds which, replicas included, and the order in which their outputs are added.

A *place* is one copy of one expert on one rank. Places are numbered by (host, rank, the rank's own order); this is the
order of every sum (transport.py). A rank may hold any number of experts, none included."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pycomm import _C
from pycomm.errors import InvalidArgument


@dataclass(frozen=True)
class Placement:
    """experts[r]: the experts that rank r holds, in its own order. An expert that several ranks hold has replicas,
    which take turns by token. lost: experts that no rank holds any more; slots of theirs go nowhere.

    Raises InvalidArgument where a rank holds an expert twice, or one below the highest is neither held nor lost."""

    experts: tuple[tuple[int, ...], ...]
    lost: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(tuple(int(e) for e in held) for held in self.experts))
        for rank, held in enumerate(self.experts):
            if len(set(held)) != len(held):
                raise InvalidArgument(f"placement: rank {rank} holds an expert twice: {list(held)}")
        everyone = {e for held in self.experts for e in held} | set(self.lost)
        if not everyone or min(everyone) != 0 or max(everyone) != len(everyone) - 1:
            raise InvalidArgument(
                f"placement: experts {sorted(everyone)[:8]} .. must be 0 to their number - 1, each on a rank at least"
            )

    @staticmethod
    def even(num_experts: int, n_ranks: int) -> Placement:
        """Experts in order, num_experts // n_ranks a rank; the first num_experts % n_ranks ranks hold one more."""
        each, more = divmod(num_experts, n_ranks)
        starts = [rank * each + min(rank, more) for rank in range(n_ranks + 1)]
        return Placement(tuple(tuple(range(a, b)) for a, b in itertools.pairwise(starts)))

    @property
    def num_experts(self) -> int:
        return max(e for held in (*self.experts, self.lost) for e in held) + 1

    @property
    def n_ranks(self) -> int:
        return len(self.experts)


@dataclass(frozen=True)
class Geometry:
    """One rank's place among hosts. host_index[r]: the host of rank r, numbered as they first appear."""

    rank: int
    host_index: tuple[int, ...]

    @staticmethod
    def of(rank: int, host_ids: Sequence[str]) -> Geometry:
        known: dict[str, int] = {}
        return Geometry(rank, tuple(known.setdefault(host, len(known)) for host in host_ids))

    @property
    def size(self) -> int:
        return len(self.host_index)

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each host, ascending."""
        return tuple(
            tuple(r for r, host in enumerate(self.host_index) if host == h) for h in range(max(self.host_index) + 1)
        )

    @cached_property
    def local_index(self) -> tuple[int, ...]:
        return tuple(self.members[host].index(rank) for rank, host in enumerate(self.host_index))

    @property
    def host(self) -> int:
        return self.host_index[self.rank]

    @property
    def n_hosts(self) -> int:
        return len(self.members)

    def gateway(self, rank: int, host: int) -> int:
        """The rank of another host through which that of `rank` sends to the host and hears from it."""
        members = self.members[host]
        return members[self.local_index[rank] % len(members)]


class Places:
    """The places of a placement as tables, [n + 1] each; entry n is nowhere: a slot that goes to no expert.

    without: ranks whose experts are not used."""

    def __init__(self, placement: Placement, geometry: Geometry, without: frozenset[int] = frozenset()) -> None:
        entries = sorted(
            (geometry.host_index[rank], rank, local, expert)
            for rank, held in enumerate(placement.experts)
            if rank not in without
            for local, expert in enumerate(held)
        )
        self.n, self.num_experts = len(entries), placement.num_experts
        self._geometry = geometry
        self._elsewhere: dict[torch.device, Places] = {}
        table = torch.tensor([*entries, (geometry.n_hosts, geometry.size, -1, -1)], dtype=torch.int64)
        self.host, self.rank, self.local, self.expert = table.T.contiguous()
        self.n_held = tuple(len(held) for held in placement.experts)  # by rank, used or not
        of_expert: list[list[int]] = [[] for _ in range(placement.num_experts)]
        for place, entry in enumerate(entries):
            of_expert[entry[3]].append(place)
        self.lost = tuple(e for e, places in enumerate(of_expert) if not places)
        self._n_replicas = torch.tensor([max(1, len(places)) for places in of_expert])
        most = int(self._n_replicas.max())
        self._of_expert = torch.tensor([places + [self.n] * (most - len(places)) for places in of_expert])

    @cached_property
    def native(self) -> _C.ExpertPlaces:
        """What plans are made from (csrc/cpu/expert_plan.h)."""
        of, tables = self._geometry, (self.rank[:-1].tolist(), self.local[:-1].tolist(), self.expert[:-1].tolist())
        return _C.ExpertPlaces(of.rank, len(self._of_expert), of.host_index, self.n_held, *tables)

    def to(self, device: torch.device) -> Places:
        if device.type == "cpu":
            return self
        if device not in self._elsewhere:
            there = copy.copy(self)
            for name in ("host", "rank", "local", "expert", "_n_replicas", "_of_expert"):
                setattr(there, name, getattr(self, name).to(device))
            self._elsewhere[device] = there
        return self._elsewhere[device]

    def route(self, topk_idx: Tensor, turn: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(place, column) [N, K] of each token's slots in ascending order of place; a token's replica is that of its
        turn [N]. known: where it is false the slot goes nowhere."""
        replica = turn.unsqueeze(1) % self._n_replicas[topk_idx]
        place = self._of_expert[topk_idx, replica]
        if known is not None:
            place = torch.where(known, place, self.n)
        place, column = place.sort(dim=-1, stable=True)
        return place, column
