"""What the transfers of a schedule wait for and what they load, on one topology: what simulate and predict share.

A transfer inside a host loads two ports: the sending rank's and the receiving rank's. Between hosts it loads both
hosts' NICs, all of a host's together, and the uplinks between them. Every port is full duplex: out and in are two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pycomm.errors import InvalidArgument
from pycomm.hosts import joined
from pycomm.schedule import Schedule, chunk_nbytes
from pycomm.topology import Topology

SEGMENT_BYTES: Final = 64 << 10  # what a rank passes on at a time (kSegmentBytes in csrc/cpu/interpreter.cc)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Traffic:
    """By transfer ([n], or [n, ..]), in the schedule's order. The last port is no port: it limits nothing."""

    between: NDArray[np.bool_]  # it leaves its host
    ports: NDArray[np.int32]  # [n, n_ports_each]: sending first, then receiving, then uplinks
    port_s_per_byte: Floats  # [n_ports]
    latency_s: Floats
    s_per_byte: Floats  # on the slowest port of its path
    overhead_s: Floats  # 0 but for the first transfer of a message
    needs: Ints  # [n, 2]: see needs()


def traffic(schedule: Schedule, topology: Topology) -> Traffic:
    """Raises InvalidArgument where the topology has other ranks than the schedule."""
    if topology.n_ranks != schedule.n_ranks:
        raise InvalidArgument(
            f"simulate: the schedule has {schedule.n_ranks} ranks, the topology {topology.n_ranks}; plan it anew"
        )
    rows = schedule.transfers
    src_host, dst_host = topology.host_index[rows["src"]], topology.host_index[rows["dst"]]
    between = src_host != dst_host
    latency, s_per_byte, overhead = _links(topology, src_host, dst_host)
    overhead[_again(schedule)] = 0.0
    return Traffic(
        between,
        _ports(schedule, topology, src_host, dst_host),
        _port_s_per_byte(topology),
        latency,
        s_per_byte,
        overhead,
        needs(schedule),
    )


def chunk_sizes(schedule: Schedule, nbytes: int | None, chunk_bytes: ArrayLike | None) -> Ints:
    """[n_chunks]: `nbytes` in near-equal chunks (schedule.chunk_nbytes), or the given sizes.

    Raises InvalidArgument unless exactly one of the two is given, and for sizes that cannot be."""
    if (nbytes is None) == (chunk_bytes is None):
        raise InvalidArgument("simulate: give either nbytes or chunk_bytes")
    sizes = chunk_nbytes(schedule, nbytes) if nbytes is not None else np.asarray(chunk_bytes, np.int64)
    if sizes.shape != (schedule.n_chunks,) or sizes.min() < 0:
        raise InvalidArgument(
            f"simulate: chunk_bytes must be {schedule.n_chunks} sizes of 0 or more, one for each chunk"
        )
    return sizes


def host_bytes(schedule: Schedule, topology: Topology, sizes: Ints) -> tuple[Ints, Ints]:
    """([n_hosts], [n_hosts]): what each host sends to other hosts, and what it gets from them."""
    rows = schedule.transfers
    src_host, dst_host = topology.host_index[rows["src"]], topology.host_index[rows["dst"]]
    crossing = np.where(src_host != dst_host, sizes[rows["chunk"]], 0)
    sent, received = np.zeros((2, len(topology.hosts)), np.int64)
    np.add.at(sent, src_host, crossing)
    np.add.at(received, dst_host, crossing)
    return sent, received


def needs(schedule: Schedule) -> Ints:
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
    in_order = written[order]

    def last_write(place: Ints) -> Ints:
        before = np.searchsorted(in_order, place * n_rounds + rows["round"]) - 1
        writer = order[before]
        return np.where((before >= 0) & (dst_place[writer] == place), writer, -1)

    return np.stack([last_write(src_place), np.where(rows["reduce"], last_write(dst_place), -1)], axis=1)


def before_on_channel(schedule: Schedule) -> Ints:
    """[n_transfers]: the transfer before it from the same rank to the same rank, -1 for none: a channel is FIFO."""
    rows = schedule.transfers
    channel = rows["src"].astype(np.int64) * schedule.n_ranks + rows["dst"]
    order = np.argsort(channel, kind="stable")
    before = np.full(len(rows), -1, np.int64)
    same = channel[order[1:]] == channel[order[:-1]]
    before[order[1:][same]] = order[:-1][same]
    return before


def _again(schedule: Schedule) -> NDArray[np.bool_]:
    """[n_transfers]: not the first of those that go from one rank to one rank in one round: these are one message."""
    before = before_on_channel(schedule)
    rounds = schedule.transfers["round"]
    return np.asarray((before >= 0) & (rounds[before] == rounds))


def _ports(schedule: Schedule, topology: Topology, src_host: Ints, dst_host: Ints) -> NDArray[np.int32]:
    """Ports out: ranks, hosts, switches; then the same in; then none. _port_s_per_byte has them in this order."""
    rows = schedule.transfers
    n_ranks, n_hosts, n_switches = topology.n_ranks, len(topology.hosts), len(topology.switches)
    n_out = n_ranks + n_hosts + n_switches
    inside = src_host == dst_host
    columns = [
        np.where(inside, rows["src"], n_ranks + src_host),
        n_out + np.where(inside, rows["dst"], n_ranks + dst_host),
    ]
    for above in topology.above.T:
        here, there = above[src_host], above[dst_host]
        for switch, first in ((here, 0), (there, n_out)):
            crossed = (here != there) & (switch >= 0)
            columns.append(np.where(crossed, first + n_ranks + n_hosts + switch, 2 * n_out))
    return np.stack(columns, axis=1).astype(np.int32)


def _port_s_per_byte(topology: Topology) -> Floats:
    inside = np.full(topology.n_ranks, 1 / topology.inside.bytes_per_s)
    nics = np.array([1 / host.nic.bytes_per_s for host in topology.hosts])
    uplinks = np.array([1 / switch.uplink.bytes_per_s for switch in topology.switches])
    one_way = np.concatenate([inside, nics, uplinks])
    return np.concatenate([one_way, one_way, [0.0]])


def _links(topology: Topology, src_host: Ints, dst_host: Ints) -> tuple[Floats, Floats, Floats]:
    """Topology.link of every transfer: (latency_s, seconds per byte, overhead_s)."""
    kinds = list({host.nics: None for host in topology.hosts})
    kind_of = {nics: index for index, nics in enumerate(kinds)}
    kind = np.array([kind_of[host.nics] for host in topology.hosts])
    pairs = [joined(here, there) for here in kinds for there in kinds]
    of_pair = np.array([(link.latency_s, 1 / link.bytes_per_s, link.overhead_s) for link in pairs])
    figures = of_pair[kind[src_host] * len(kinds) + kind[dst_host]]
    uplinks = [
        (switch.uplink.latency_s, 1 / switch.uplink.bytes_per_s, switch.uplink.overhead_s)
        for switch in topology.switches
    ]
    of_switch = np.array([*uplinks, (0.0, 0.0, 0.0)])  # the last, which -1 finds: no switch
    for above in topology.above.T:
        here, there = above[src_host], above[dst_host]
        crossed = (here != there)[:, None]
        figures = np.maximum(figures, np.where(crossed, np.maximum(of_switch[here], of_switch[there]), 0.0))
    inside = topology.inside
    figures[src_host == dst_host] = inside.latency_s, 1 / inside.bytes_per_s, inside.overhead_s
    return figures[:, 0].copy(), figures[:, 1].copy(), figures[:, 2].copy()
