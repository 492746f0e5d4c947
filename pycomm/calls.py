"""Schedules of whole collectives: what the CUDA engine gives to NCCL, tile by tile, where ranks stand on several hosts.

A CallSchedule's calls are collectives over some of the ranks, on some of the chunks. expand() writes each as the
transfers it promises, so check() proves a CallSchedule, and simulate() and the CPU engine run it, like any other;
project.project_calls() gives a rank the calls themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

import numpy as np

from pycomm.errors import ScheduleError
from pycomm.schedule import TRANSFER, Schedule, Transfers, in_parallel, transfers
from pycomm.topology import Topology

TILES: Final = 4  # that many are under way at once: while one crosses hosts, the next is reduced inside them
Partition = tuple[tuple[int, ...], ...]  # ranks of the group, each in at most one part


@dataclass(frozen=True)
class Call:
    """One collective over each part of a partition at once. chunks[p]: what part p works on.

    all_to_all: the chunks are cut into n x n runs for the part's n ranks; run i n + j goes from its i-th to its j-th.
    all_reduce: every rank of the part ends with the sum of its ranks' values of each chunk. reduce_scatter and
    all_gather: the chunks are cut into as many runs as the part has ranks, and run i is summed to, or comes from, its
    i-th rank."""

    round: int
    collective: str
    partition: int
    chunks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class CallSchedule:
    """Calls by round. Those of one round touch different chunks, or other ranks; each reads what earlier ones left."""

    collective: str
    algorithm: str
    n_ranks: int
    n_chunks: int
    partitions: tuple[Partition, ...]
    calls: tuple[Call, ...] = field(repr=False)

    def expand(self) -> Schedule:
        """The same as transfers: sums go to their rank one after another, copies all at once."""
        width = 2 * max(len(part) for partition in self.partitions for part in partition)
        rows = [
            _later(_transfers(call.collective, part, chunks), call.round * width)
            for call in self.calls
            for part, chunks in zip(self.partitions[call.partition], call.chunks, strict=True)
        ]
        return Schedule(self.collective, self.algorithm, self.n_ranks, self.n_chunks, 0, in_parallel(rows))


def _later(rows: Transfers, rounds: int) -> Transfers:
    rows["round"] += rounds
    return rows


def runs(chunks: tuple[int, ...], n: int) -> list[tuple[int, ...]]:
    if len(chunks) % n:
        raise ScheduleError(f"{len(chunks)} chunks cannot be cut into runs for {n} ranks; give a multiple")
    each = len(chunks) // n
    return [chunks[i * each : (i + 1) * each] for i in range(n)]


def _transfers(collective: str, part: tuple[int, ...], chunks: tuple[int, ...]) -> Transfers:
    """What one call promises. Sums take n-1 rounds, since only one transfer may write a value in a round."""
    n = len(part)
    if collective == "all_to_all":
        sent = [
            (0, part[at // n], part[at % n], chunk, False)
            for at, run in enumerate(runs(chunks, n * n))
            for chunk in run
            if at // n != at % n
        ]
        return transfers(*zip(*sent, strict=True)) if sent else np.empty(0, TRANSFER)
    owned = [chunks] + [()] * (n - 1) if collective == "all_reduce" else runs(chunks, n)
    rows = []  # round, src, dst, chunk, reduce
    for at, run in enumerate(owned):
        for chunk in run:
            others = [part[(at + distance) % n] for distance in range(1, n)]
            if collective != "all_gather":
                rows += [(turn, other, part[at], chunk, True) for turn, other in enumerate(others)]
            if collective != "reduce_scatter":
                rows += [(n - 1, part[at], other, chunk, False) for other in others]
    return transfers(*zip(*rows, strict=True)) if rows else np.empty(0, TRANSFER)


# ---- planners -------------------------------------------------------------------------------------------------------


def _levels(topology: Topology) -> tuple[Partition, Partition]:
    """(the ranks of each host, the ranks with one place in their hosts). Raises ScheduleError where hosts have
    different numbers of ranks."""
    index = np.asarray(topology.host_index)
    hosts = tuple(tuple(int(r) for r in np.flatnonzero(index == host)) for host in dict.fromkeys(index.tolist()))
    if len({len(host) for host in hosts}) != 1:
        sizes = ", ".join(str(len(host)) for host in hosts)
        raise ScheduleError(f"hierarchical calls need as many ranks on every host; they have {sizes}")
    return hosts, tuple(zip(*hosts, strict=True))


def hierarchical_all_reduce_calls(topology: Topology) -> CallSchedule:
    """reduce_scatter inside hosts, all_reduce across, all_gather inside; each tile one round behind the one before it.

    Each byte crosses a host's link 2(N-1)/N times for N hosts, spread over all its ranks' NICs.
    Source: Traff & Hunold 2020."""
    hosts, rails = _levels(topology)
    n = len(hosts[0])
    calls = []
    for tile in range(TILES):
        chunks = tuple(range(tile * n, (tile + 1) * n))
        inside = tuple(chunks for _ in hosts)
        calls.append(Call(tile, "reduce_scatter", 0, inside))
        calls.append(Call(tile + 1, "all_reduce", 1, tuple((chunk,) for chunk in chunks)))
        calls.append(Call(tile + 2, "all_gather", 0, inside))
    return _schedule(topology, "all_reduce", TILES * n, (hosts, rails), calls)


def hierarchical_reduce_scatter_calls(topology: Topology) -> CallSchedule:
    """Inside hosts each rank sums what its place gets on every host; then across."""
    hosts, rails = _levels(topology)
    places = tuple(rank for rail in rails for rank in rail)
    calls = [Call(0, "reduce_scatter", 0, tuple(places for _ in hosts)), Call(1, "reduce_scatter", 1, rails)]
    return _schedule(topology, "reduce_scatter", topology.n_ranks, (hosts, rails), calls)


def hierarchical_all_gather_calls(topology: Topology) -> CallSchedule:
    """Across hosts among the ranks of one place; then inside, what each has got."""
    hosts, rails = _levels(topology)
    places = tuple(rank for rail in rails for rank in rail)
    calls = [Call(0, "all_gather", 1, rails), Call(1, "all_gather", 0, tuple(places for _ in hosts))]
    return _schedule(topology, "all_gather", topology.n_ranks, (hosts, rails), calls)


def hierarchical_all_to_all_calls(topology: Topology) -> CallSchedule:
    """Inside hosts each rank gives every place what goes to that place on any host; then across, where a rank has for
    each host the pieces of all its ranks in one run: N-1 messages of n pieces instead of (N-1) n of one.

    Source: Traff & Hunold 2020."""
    hosts, rails = _levels(topology)
    n_ranks = topology.n_ranks

    def chunk(src: int, dst: int) -> int:
        return src * n_ranks + dst

    inside = tuple(
        tuple(chunk(src, dst) for src in host for place in range(len(host)) for dst in rails[place]) for host in hosts
    )
    across = tuple(tuple(chunk(src, dst) for source in hosts for dst in rail for src in source) for rail in rails)
    calls = [Call(0, "all_to_all", 0, inside), Call(1, "all_to_all", 1, across)]
    return _schedule(topology, "all_to_all", n_ranks**2, (hosts, rails), calls)


def _schedule(
    topology: Topology, collective: str, n_chunks: int, partitions: tuple[Partition, ...], calls: list[Call]
) -> CallSchedule:
    ordered = tuple(sorted(calls, key=lambda call: call.round))
    return CallSchedule(collective, "hierarchical", topology.n_ranks, n_chunks, partitions, ordered)


CALL_PLANNERS: Final[Mapping[str, Callable[[Topology], CallSchedule]]] = MappingProxyType(
    {
        "all_reduce": hierarchical_all_reduce_calls,
        "reduce_scatter": hierarchical_reduce_scatter_calls,
        "all_gather": hierarchical_all_gather_calls,
        "all_to_all": hierarchical_all_to_all_calls,
    }
)
