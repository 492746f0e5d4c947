"""simulate(schedule, topology, nbytes): when every transfer begins and ends, and what crosses each host's link.

The model. Inside a host a transfer holds two ports, the sending rank's and the receiving rank's; between hosts it holds
both hosts' NICs, which all ranks of a host share, full duplex. It holds them for overhead_s + bytes / bytes_per_s. A
port serves one transfer at a time, by round, and in a round every sending port's first transfer before any second. The
transfers of a round between two ranks are one message and pay overhead_s once. Bytes arrive latency_s after they leave.
Reducing takes bytes / reduce_bytes_per_s: inside a host it holds the receiving port, between hosts it goes on beside
the NIC and only its last segment adds time. A transfer waits for the values it reads, chunk by chunk and segment by
segment, never for a round: it begins when their first segment is there and ends no earlier than one segment after
their last."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pycomm.errors import InvalidArgument
from pycomm.schedule import Schedule, chunk_nbytes
from pycomm.topology import Topology

SEGMENT_BYTES: Final = 256 << 10

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Simulation:
    """The predicted run of one schedule. Times in seconds from the start, per transfer ([n_transfers])."""

    schedule: Schedule = field(repr=False)
    total_s: float
    begin_s: Floats = field(repr=False)
    end_s: Floats = field(repr=False)  # all bytes have arrived at dst, and are reduced
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


def simulate(
    schedule: Schedule,
    topology: Topology,
    nbytes: int | None = None,
    *,
    chunk_bytes: ArrayLike | None = None,
    segment_bytes: int = SEGMENT_BYTES,
) -> Simulation:
    """Times `schedule` for `nbytes` in near-equal chunks (see schedule.chunk_nbytes), or for the given `chunk_bytes`.

    Raises InvalidArgument unless exactly one of the two is given and the topology has the schedule's ranks."""
    if (nbytes is None) == (chunk_bytes is None):
        raise InvalidArgument("simulate: give either nbytes or chunk_bytes")
    sizes = chunk_nbytes(schedule, nbytes) if nbytes is not None else np.asarray(chunk_bytes, np.int64)
    if sizes.shape != (schedule.n_chunks,) or sizes.min() < 0:
        raise InvalidArgument(
            f"simulate: chunk_bytes must be {schedule.n_chunks} sizes of 0 or more, one for each chunk"
        )
    begin, end = _run(schedule, topology, sizes[:, None], segment_bytes)
    rows = schedule.transfers
    src_host, dst_host = topology.host_index[rows["src"]], topology.host_index[rows["dst"]]
    crossing = np.where(src_host != dst_host, sizes[rows["chunk"]], 0)
    sent, received = np.zeros((2, len(topology.hosts)), np.int64)
    np.add.at(sent, src_host, crossing)
    np.add.at(received, dst_host, crossing)
    return Simulation(schedule, float(end.max(initial=0.0)), begin[:, 0], end[:, 0], sent, received)


def predict(
    schedule: Schedule, topology: Topology, nbytes: ArrayLike, segment_bytes: int = SEGMENT_BYTES
) -> NDArray[np.float64]:
    """[len(nbytes)]: simulate(...).total_s for every size, in one pass."""
    sizes = chunk_nbytes(schedule, np.atleast_1d(np.asarray(nbytes, np.int64)))
    return np.asarray(_run(schedule, topology, sizes, segment_bytes)[1].max(axis=0, initial=0.0))


def _run(schedule: Schedule, topology: Topology, sizes: Ints, segment_bytes: int) -> tuple[Floats, Floats]:
    """(begin, end) of every transfer, each [n_transfers, n_sizes], for all columns of `sizes`, [n_chunks, n_sizes]."""
    if topology.n_ranks != schedule.n_ranks:
        raise InvalidArgument(
            f"simulate: the schedule has {schedule.n_ranks} ranks, the topology {topology.n_ranks}; plan it anew"
        )
    if segment_bytes < 1:
        raise InvalidArgument(f"simulate: segment_bytes is {segment_bytes}; give at least 1")
    order = _in_turn(schedule, _ports(schedule, topology)[:, 0])
    schedule = replace(schedule, transfers=schedule.transfers[order])
    rows = schedule.transfers
    n, n_sizes = len(rows), sizes.shape[1]
    ports, needs = _ports(schedule, topology), _needs(schedule)
    between = topology.host_index[rows["src"]] != topology.host_index[rows["dst"]]
    latency, per_byte, overhead = (column[:, None] for column in _links(schedule, topology))
    reduce_per_byte = np.where(rows["reduce"], 1 / topology.reduce_bytes_per_s, 0.0)[:, None]
    hold_per_byte = per_byte + np.where(between[:, None], 0.0, reduce_per_byte)
    beside_per_byte = np.where(between[:, None], reduce_per_byte, 0.0)
    begin, first, last = np.zeros((3, n + 1, n_sizes))  # row n: what a transfer that needs nothing waits for
    free = np.zeros((int(ports.max(initial=0)) + 1, n_sizes))
    for wave in _waves(ports, needs):
        chunk = sizes[rows["chunk"][wave]].astype(np.float64)
        segment = np.minimum(chunk, segment_bytes)
        start = np.maximum(free[ports[wave]].max(axis=1), first[needs[wave]].max(axis=1))
        leave = start + overhead[wave]
        tail = segment * (per_byte[wave] + reduce_per_byte[wave])
        held = leave + chunk * hold_per_byte[wave]
        done = np.maximum(held + segment * beside_per_byte[wave], last[needs[wave]].max(axis=1) + tail)
        begin[wave], first[wave], last[wave] = start, leave + tail + latency[wave], done + latency[wave]
        free[ports[wave, 0]] = leave + chunk * per_byte[wave]
        free[ports[wave, 1]] = held
    as_given = np.argsort(order)
    return begin[as_given], last[as_given]


def _links(schedule: Schedule, topology: Topology) -> tuple[Floats, Floats, Floats]:
    """(latency_s, seconds per byte, overhead_s) of every transfer."""
    rows = schedule.transfers
    hosts = topology.host_index[rows["src"]] * len(topology.hosts) + topology.host_index[rows["dst"]]
    pairs, which = np.unique(hosts, return_inverse=True)
    of_pair = np.empty((len(pairs), 3))
    for row, pair in zip(of_pair, pairs.tolist(), strict=True):
        here, there = (topology.hosts[index] for index in divmod(pair, len(topology.hosts)))
        link = topology.link(here.ranks[0], there.ranks[0])
        row[:] = link.latency_s, 1 / link.bytes_per_s, link.overhead_s
    figures = of_pair[which]
    again = np.zeros(len(rows), np.bool_)
    order = np.lexsort((rows["dst"], rows["src"], rows["round"]))
    message = rows[["round", "src", "dst"]][order]
    again[order[1:]] = message[1:] == message[:-1]
    return figures[:, 0], figures[:, 1], np.where(again, 0.0, figures[:, 2])


def _ports(schedule: Schedule, topology: Topology) -> Ints:
    """[n_transfers, 2]: the port that sends and the one that receives."""
    src, dst = schedule.transfers["src"].astype(np.int64), schedule.transfers["dst"].astype(np.int64)
    src_host, dst_host = topology.host_index[src], topology.host_index[dst]
    n_out = topology.n_ranks + len(topology.hosts)
    sends = np.where(src_host == dst_host, src, topology.n_ranks + src_host)
    receives = np.where(src_host == dst_host, dst, topology.n_ranks + dst_host)
    return np.stack([sends, n_out + receives], axis=1)


def _in_turn(schedule: Schedule, port: Ints) -> Ints:
    """The order of service: by round; in a round every port's first transfer, then every port's second, .."""
    by_port = np.lexsort((port, schedule.transfers["round"]))
    place = np.arange(len(port))
    sorted_port, sorted_round = port[by_port], schedule.transfers["round"][by_port]
    begins = np.append(True, (np.diff(sorted_port) != 0) | (np.diff(sorted_round) != 0))[: len(port)]
    turn = np.empty(len(port), np.int64)
    turn[by_port] = place - np.maximum.accumulate(np.where(begins, place, 0))
    return np.lexsort((turn, schedule.transfers["round"]))


def _needs(schedule: Schedule) -> Ints:
    """[n_transfers, 2]: the transfers that wrote the value at src and, for a reduce, the one at dst; -1 for none.

    A write never has to wait for an earlier read of the chunk: what it brings was made from what was read."""
    rows = schedule.transfers
    if not len(rows):
        return np.empty((0, 2), np.int64)
    n_rounds = schedule.n_rounds
    dst_place = rows["dst"].astype(np.int64) * schedule.n_chunks + rows["chunk"]
    src_place = rows["src"].astype(np.int64) * schedule.n_chunks + rows["chunk"]
    written = dst_place * n_rounds + rows["round"]
    order = np.argsort(written, kind="stable")

    def last_write(place: Ints) -> Ints:
        before = np.searchsorted(written[order], place * n_rounds + rows["round"]) - 1
        writer = order[before]
        return np.where((before >= 0) & (dst_place[writer] == place), writer, -1)

    return np.stack([last_write(src_place), np.where(rows["reduce"], last_write(dst_place), -1)], axis=1)


def _waves(ports: Ints, needs: Ints) -> list[Ints]:
    """The transfers in groups that share no port and need only earlier groups; on each port they keep their order."""
    of_port = [0] * (int(ports.max(initial=0)) + 1)
    levels = [0] * (len(ports) + 1)  # the last: what a transfer that needs nothing comes after
    for index, ((send, receive), (value, own)) in enumerate(zip(ports.tolist(), needs.tolist(), strict=True)):
        level = max(of_port[send], of_port[receive], levels[value], levels[own]) + 1
        of_port[send] = of_port[receive] = levels[index] = level
    level_of = np.array(levels[:-1], np.int64)
    order = np.argsort(level_of, kind="stable")
    bounds = np.searchsorted(level_of[order], np.arange(1, max(levels) + 2))
    return [order[begin:end] for begin, end in pairwise(bounds.tolist())]
