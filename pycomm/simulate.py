"""simulate(schedule, topology, nbytes): a schedule event by event, with stragglers and failed links.

The model. Every ordered pair of ranks has a channel, which carries its transfers one after another in the schedule's
order. Transfers of different channels share the ports they load (traffic.py) by max-min fairness in bytes per second:
TCP flows through one NIC divide it evenly, and a rank serves its peers in turn, segment by segment. It begins them one
by one: the next when the first segment of the one before has left, so that small messages do not share. A message costs
its link's overhead_s besides, as so many bytes more; the transfers of a round between two ranks are one message. Bytes
arrive latency_s after they leave. Reducing costs bytes / reduce_bytes_per_s: inside a host on the receiving port,
between hosts beside the NIC, where only the last segment adds time. A transfer waits for the values it reads, chunk by
chunk and segment by segment, never for a round: it begins when their first segment is there, and ends no earlier than
one segment after their last. A straggler enters late, or does everything slower. What crosses a failed link never ends,
nor does what waits for it.

Large messages are striped over a host's NICs as they have room (docs/tcp.md), so these count as one port."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pycomm.errors import InvalidArgument
from pycomm.fairness import max_min_rates
from pycomm.schedule import Schedule
from pycomm.topology import Topology
from pycomm.traffic import SEGMENT_BYTES, Floats, Ints, Traffic, before_on_channel, chunk_sizes, host_bytes, traffic

SAME_TIME: Final = 1e-9  # events closer than this, relative to the time since the start, are one


@dataclass(frozen=True, eq=False)
class Simulation:
    """The predicted run of one schedule. Times in seconds from the start, per transfer ([n_transfers]); inf where it
    never comes to that."""

    schedule: Schedule = field(repr=False)
    total_s: float  # inf where a failed link keeps a transfer from ending
    begin_s: Floats = field(repr=False)  # the first bytes leave src
    end_s: Floats = field(repr=False)  # all bytes have arrived at dst, and are reduced
    failed: NDArray[np.bool_] = field(repr=False)  # crosses a failed link
    host_sent_bytes: Ints  # [n_hosts]: what each host sends to other hosts
    host_received_bytes: Ints  # [n_hosts]

    @property
    def bytes_between_hosts(self) -> int:
        return int(self.host_sent_bytes.sum())

    @property
    def round_end_s(self) -> Floats:
        """[n_rounds]: when the last transfer of each round ends; rounds overlap."""
        ends = np.zeros(self.schedule.n_rounds)
        np.maximum.at(ends, self.schedule.transfers["round"], self.end_s)
        return ends

    @property
    def rank_end_s(self) -> Floats:
        """[n_ranks]: when the last transfer to or from each rank ends."""
        ends = np.zeros(self.schedule.n_ranks)
        for side in ("src", "dst"):
            np.maximum.at(ends, self.schedule.transfers[side], self.end_s)
        return ends

    def unfinished(self) -> list[str]:
        """One line for each rank that waits for ever: how many of its transfers never end, and the first of them."""
        rows = self.schedule.transfers
        never = np.flatnonzero(np.isinf(self.end_s))
        of_rank: dict[int, list[int]] = {}
        for index in never.tolist():
            for rank in (int(rows["src"][index]), int(rows["dst"][index])):
                of_rank.setdefault(rank, []).append(index)
        lines = []
        for rank in sorted(of_rank):
            row, index = rows[of_rank[rank][0]], of_rank[rank][0]
            why = "the link has failed" if self.failed[index] else "what it waits for never ends"
            total = int(((rows["src"] == rank) | (rows["dst"] == rank)).sum())
            lines.append(
                f"rank {rank}: {len(of_rank[rank])} of {total} transfers never end; the first, in round "
                f"{row['round']}: chunk {row['chunk']} from rank {row['src']} to rank {row['dst']}: {why}"
            )
        return lines


def simulate(
    schedule: Schedule,
    topology: Topology,
    nbytes: int | None = None,
    *,
    chunk_bytes: ArrayLike | None = None,
    segment_bytes: int = SEGMENT_BYTES,
    same_time: float = SAME_TIME,
    late_s: ArrayLike = 0.0,
    slowdown: ArrayLike = 1.0,
    failed_links: Sequence[tuple[int, int]] = (),
    failed_hosts: Sequence[str] = (),
) -> Simulation:
    """Times `schedule` for `nbytes` in near-equal chunks (see schedule.chunk_nbytes), or for the given `chunk_bytes`.

    same_time: events that come within this part of the time since the start are taken as one, at the first of them. At
    1e-3 tens of thousands of ranks take seconds, and times change by less than 1 % (tests/test_simulate.py).
    late_s: when each rank enters, in seconds, [n_ranks] or one for all. slowdown: how many times longer each rank takes
    for what it sends, gets and reduces, [n_ranks] or one for all, 1 or more. failed_links: pairs of ranks that cannot
    reach each other, either way. failed_hosts: names of hosts that no other reaches.
    Raises InvalidArgument unless exactly one of nbytes and chunk_bytes is given, the topology has the schedule's ranks,
    and the rest fits the topology."""
    sizes = chunk_sizes(schedule, nbytes, chunk_bytes)
    if segment_bytes < 1:
        raise InvalidArgument(f"simulate: segment_bytes is {segment_bytes}; give at least 1")
    if not 0 <= same_time < 1:
        raise InvalidArgument(f"simulate: same_time is {same_time}; give a part of the time, from 0 to below 1")
    load = traffic(schedule, topology)
    late = _per_rank(topology, "late_s", late_s, 0.0)
    slow = _per_rank(topology, "slowdown", slowdown, 1.0)
    failed = _failed(schedule, topology, failed_links, failed_hosts)
    begin, end = _Run(schedule, topology, load, sizes, segment_bytes, late, slow, failed).times(same_time)
    sent, received = host_bytes(schedule, topology, sizes)
    return Simulation(schedule, float(end.max(initial=0.0)), begin, end, failed, sent, received)


def _per_rank(topology: Topology, name: str, given: ArrayLike, least: float) -> Floats:
    values = np.asarray(given, np.float64)
    if values.shape not in ((), (topology.n_ranks,)) or not np.all((values >= least) & (values < math.inf)):
        raise InvalidArgument(f"simulate: {name} must be {topology.n_ranks} figures of {least:g} or more, one per rank")
    return np.broadcast_to(values, topology.n_ranks)


def _failed(
    schedule: Schedule, topology: Topology, links: Sequence[tuple[int, int]], hosts: Sequence[str]
) -> NDArray[np.bool_]:
    rows = schedule.transfers
    failed = np.zeros(len(rows), np.bool_)
    for here, there in links:
        if not (0 <= here < topology.n_ranks and 0 <= there < topology.n_ranks):
            raise InvalidArgument(
                f"simulate: failed link ({here}, {there}): no such ranks of 0 .. {topology.n_ranks - 1}"
            )
        failed |= (rows["src"] == here) & (rows["dst"] == there) | (rows["src"] == there) & (rows["dst"] == here)
    position = {host.name: index for index, host in enumerate(topology.hosts)}
    src_host, dst_host = topology.host_index[rows["src"]], topology.host_index[rows["dst"]]
    for name in hosts:
        if name not in position:
            raise InvalidArgument(f"simulate: failed host {name!r} is not among {list(position)[:8]}")
        failed |= (src_host != dst_host) & ((src_host == position[name]) | (dst_host == position[name]))
    return failed


class _Dependents:
    """Who waits for transfer i: after[begin[i] : begin[i + 1]]."""

    def __init__(self, needed: Ints, by: Ints, n: int) -> None:
        real = needed >= 0
        needed, by = needed[real], by[real]
        order = np.argsort(needed, kind="stable")
        self.after = by[order]
        self.begin = np.searchsorted(needed[order], np.arange(n + 1))

    def of(self, indices: Ints) -> Ints:
        first, counts = self.begin[indices], self.begin[indices + 1] - self.begin[indices]
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.asarray(self.after[np.repeat(first, counts) + within])


class _Run:
    """One run's state. A transfer waits for its channel and the first segments of what it reads; flows until its bytes
    have left (drained); and ends once what it reads has ended too."""

    def __init__(
        self,
        schedule: Schedule,
        topology: Topology,
        load: Traffic,
        sizes: Ints,
        segment_bytes: int,
        late: Floats,
        slow: Floats,
        failed: NDArray[np.bool_],
    ) -> None:
        rows, n = schedule.transfers, len(schedule.transfers)
        src, dst = rows["src"], rows["dst"]
        chunk = sizes[rows["chunk"]].astype(np.float64)
        segment = np.minimum(chunk, segment_bytes)
        rank_slow = np.maximum(slow[src], slow[dst])
        reduce_s = np.where(rows["reduce"], 1 / topology.reduce_bytes_per_s, 0.0) * slow[dst]
        self.ports, self.latency = np.ascontiguousarray(load.ports.T), load.latency_s
        self.s_per_byte = load.s_per_byte * rank_slow
        self.extra = load.overhead_s * rank_slow / self.s_per_byte  # the overhead, in bytes
        work = chunk + self.extra
        self.reduce_weight = np.where(load.between, 0.0, reduce_s * chunk / np.maximum(work, 1e-300))
        self.first_left, self.second_left = self.extra + segment, chunk - segment
        self.beside = np.where(load.between, segment * reduce_s, 0.0)
        self.tail = segment * (self.s_per_byte + reduce_s)
        self.port_s_per_byte = load.port_s_per_byte.copy()
        n_ranks = topology.n_ranks
        n_out = len(self.port_s_per_byte) // 2
        self.port_s_per_byte[:n_ranks] *= slow
        self.port_s_per_byte[n_out : n_out + n_ranks] *= slow
        before = before_on_channel(schedule)
        needs = load.needs
        everyone = np.arange(n)
        self.on_value = _Dependents(needs.T.ravel(), np.tile(everyone, 2), n)
        self.on_channel = _Dependents(before, everyone, n)
        self.needs = needs
        self.entered = np.maximum(late[src], late[dst])
        self.awaited = (before >= 0).astype(np.int32) + (needs >= 0).sum(axis=1).astype(np.int32) + failed
        self.open_needs = (needs >= 0).sum(axis=1).astype(np.int32)
        self.begin = np.full(n, math.inf)
        self.drained = np.full(n, math.inf)
        self.end = np.full(n + 1, math.inf)
        self.end[n] = -math.inf  # what a transfer that needs nothing waits for
        self.left = self.first_left.copy()
        self.in_first = np.ones(n, np.bool_)
        self.turn = src.astype(np.int64) * 2 + load.between
        self.taken = np.zeros(2 * n_ranks, np.bool_)  # by turn: a first segment is on its way
        self.waiting = np.empty(0, np.int64)  # turn * n + transfer, sorted: what may begin when its turn comes
        self.active = np.empty(0, np.int64)
        self.touched = [np.empty(0, np.int64)]  # what has begun or drained since rates were shared out
        self.rates, self.since, self.due = np.zeros((3, n))  # bytes per second, since when, and until when they hold
        self.events: list[tuple[float, int, Ints, bool]] = []  # (time, serial, transfers, they may begin)
        self.n_events = 0

    def times(self, same_time: float) -> tuple[Floats, Floats]:
        """(begin, end) of every transfer."""
        self._begin_or_wait(np.flatnonzero(self.awaited == 0), 0.0)
        self._share(0.0)
        while len(self.active) or self.events:
            due = self.due[self.active]
            now = float(min(due.min(initial=math.inf), self.events[0][0] if self.events else math.inf))
            reached = np.flatnonzero(due <= now * (1 + same_time))
            if len(reached):
                self._flowed(reached, now)
            while self.events and self.events[0][0] <= now * (1 + same_time):
                _, _, indices, may_begin = heapq.heappop(self.events)
                if may_begin:
                    self._start(indices, now)
                else:
                    self._release(indices, now)
            self._share(now)
        return self.begin, self.end[:-1]

    def _at(self, times: Floats, indices: Ints, may_begin: bool = False) -> None:
        """At each of `times` those of `indices` no longer hold up one of the things they were waited for."""
        moments, which = np.unique(times, return_inverse=True)
        order = np.argsort(which, kind="stable")
        bounds = np.searchsorted(which[order], np.arange(len(moments) + 1))
        for moment, first, last in zip(moments.tolist(), bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            heapq.heappush(self.events, (moment, self.n_events, indices[order[first:last]], may_begin))
            self.n_events += 1

    def _release(self, indices: Ints, now: float) -> None:
        np.subtract.at(self.awaited, indices, 1)
        ready = np.unique(indices)
        self._begin_or_wait(ready[self.awaited[ready] == 0], now)

    def _begin_or_wait(self, indices: Ints, now: float) -> None:
        later = self.entered[indices] > now
        if later.any():
            self._at(self.entered[indices[later]], indices[later], may_begin=True)
        self._start(indices[~later], now)

    def _start(self, indices: Ints, now: float) -> None:
        codes = np.sort(self.turn[indices] * len(self.begin) + indices)
        self.waiting = np.insert(self.waiting, np.searchsorted(self.waiting, codes), codes)
        self._serve(np.unique(self.turn[indices]), now)

    def _serve(self, turns: Ints, now: float) -> None:
        """Where no first segment is on its way, the first of those that wait begins."""
        turns = turns[~self.taken[turns]]
        n = len(self.begin)
        places = np.searchsorted(self.waiting, turns * n)
        places = places[np.append(self.waiting, -1)[places] // n == turns]
        indices = self.waiting[places] % n
        self.waiting = np.delete(self.waiting, places)
        self.taken[self.turn[indices]] = True
        self.begin[indices] = now
        self.since[indices] = now
        self.active = np.concatenate([self.active, indices])
        self.touched.append(indices)

    def _flowed(self, where: Ints, now: float) -> None:
        """Those at `where` among the active have let a first segment go, or all their bytes."""
        indices = self.active[where]
        done = ~self.in_first[indices] | (self.second_left[indices] == 0)
        first = indices[self.in_first[indices]]
        self.in_first[first] = False
        self.left[first], self.since[first] = self.second_left[first], now
        self.due[first] = now + self.left[first] / self.rates[first]
        self._first_segment_left(first, now)
        stays = np.ones(len(self.active), np.bool_)
        stays[where[done]] = False
        self.active = self.active[stays]
        self.touched.append(indices[done])
        self._drained(indices[done], now)
        self.taken[self.turn[first]] = False
        self._serve(np.unique(self.turn[first]), now)

    def _first_segment_left(self, indices: Ints, now: float) -> None:
        readers = self.on_value.of(indices)
        counts = self.on_value.begin[indices + 1] - self.on_value.begin[indices]
        self._at(np.repeat(now + self.beside[indices] + self.latency[indices], counts), readers)

    def _drained(self, indices: Ints, now: float) -> None:
        self.drained[indices] = now
        ends = indices[self.open_needs[indices] == 0]
        while len(ends):
            needed = self.end[self.needs[ends]].max(axis=1)
            left = np.maximum(self.drained[ends], needed + self.tail[ends] - self.beside[ends])
            self.end[ends] = left + self.beside[ends] + self.latency[ends]
            following = self.on_channel.of(ends)
            counts = self.on_channel.begin[ends + 1] - self.on_channel.begin[ends]
            self._at(np.repeat(np.maximum(left, now), counts), following)
            readers = self.on_value.of(ends)
            np.subtract.at(self.open_needs, readers, 1)
            readers = np.unique(readers)
            ends = readers[(self.open_needs[readers] == 0) & np.isfinite(self.drained[readers])]

    def _share(self, now: float) -> None:
        """New rates for all that flow and share a port, also at third hand, with one that has begun or is drained."""
        changed = np.concatenate(self.touched)
        self.touched = [np.empty(0, np.int64)]
        if not len(changed):
            return
        flows, ports = self.active, self.ports[:, self.active]
        reached = np.zeros(len(self.port_s_per_byte), np.bool_)
        reached[self.ports[:, changed]] = True
        affected: NDArray[np.bool_] = np.zeros(len(flows), np.bool_)
        n_affected = -1
        while n_affected < (n_affected := int(affected.sum())) <= len(flows) // 2:
            reached[ports[:, affected]] = True
            reached[-1] = False  # no port
            affected = np.logical_or.reduce(reached[ports])
        if n_affected <= len(flows) // 2:  # else they are best served with the rest
            flows, ports = flows[affected], ports[:, affected]
        self.left[flows] -= self.rates[flows] * (now - self.since[flows])
        weights = self.port_s_per_byte[ports]
        weights[1] += self.reduce_weight[flows]
        self.rates[flows] = max_min_rates(ports, weights, 1 / self.s_per_byte[flows], len(self.port_s_per_byte))
        self.since[flows] = now
        self.due[flows] = now + np.maximum(self.left[flows], 0.0) / self.rates[flows]
