"""Placements from loads: hot experts get replicas, and ranks as equal loads as can be.

Source: the greedy method of DeepSeek's EPLB (DeepSeek-V3, arXiv:2412.19437, section 3.4): replicas for the largest load
per replica, then the largest first onto the least loaded rank with room."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from pycomm.errors import InvalidArgument
from pycomm.moe.placement import Placement


def balanced_placement(loads: Sequence[float], n_ranks: int, slots_per_rank: int | None = None) -> Placement:
    """A placement of len(loads) experts on n_ranks ranks of slots_per_rank places each (default: as few as hold all).
    Places beyond one an expert become replicas, no two of an expert on one rank; where that leaves no use for a place
    it stays empty.

    Raises InvalidArgument where the places do not hold all experts, or a load is negative."""
    n = len(loads)
    per_rank = -(-n // n_ranks) if slots_per_rank is None else slots_per_rank
    if n < 1 or n_ranks < 1 or per_rank * n_ranks < n:
        raise InvalidArgument(f"{n} experts do not fit on {n_ranks} ranks of {per_rank} places; give more places")
    if min(loads) < 0:
        raise InvalidArgument(f"the load of expert {list(loads).index(min(loads))} is {min(loads)}; give 0 or more")
    replicas = [1] * n
    hottest = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(hottest)
    for _ in range(per_rank * n_ranks - n):
        while hottest and replicas[hottest[0][1]] == n_ranks:
            heapq.heappop(hottest)  # it is everywhere
        if not hottest:
            break
        expert = hottest[0][1]
        replicas[expert] += 1
        heapq.heapreplace(hottest, (-loads[expert] / replicas[expert], expert))

    # The most replicas first among equal loads, since they need the most ranks.
    pieces = sorted(
        (e for e in range(n) for _ in range(replicas[e])), key=lambda e: (-loads[e] / replicas[e], -replicas[e], e)
    )
    held: list[list[int]] = [[] for _ in range(n_ranks)]
    total = [0.0] * n_ranks
    for expert in pieces:
        share = loads[expert] / replicas[expert]
        free = [r for r in range(n_ranks) if len(held[r]) < per_rank and expert not in held[r]]
        if not free:  # of a replica: an expert that is nowhere yet finds one of the places
            continue
        rank = min(free, key=lambda r: (total[r], len(held[r]), r))
        held[rank].append(expert)
        total[rank] += share
    return Placement(tuple(tuple(sorted(each)) for each in held))


def rank_loads(placement: Placement, loads: Sequence[float]) -> list[float]:
    """The load of each rank, an expert's spread evenly over its replicas."""
    replicas = [0] * placement.num_experts
    for held in placement.experts:
        for expert in held:
            replicas[expert] += 1
    return [sum(loads[e] / replicas[e] for e in held) for held in placement.experts]
