"""Latency and rate of links, measured with a group's own messages.

Pairs of ranks, and then of hosts, are measured in rounds (pairs.py). What a host's ranks get together, or one of them
alone if that is more, sending and receiving at once, is the shared-NIC figure: planners reckon with it, since a
schedule drives links both ways."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from pycomm.errors import InvalidArgument
from pycomm.hosts import TCP, Link, Nic
from pycomm.pairs import Pair, circle, host_rounds, link_rounds, pair_rounds
from pycomm.topology import Topology

if TYPE_CHECKING:
    from pycomm.group import Group

ALL_PAIRS_UP_TO: Final = 16  # ranks; above, pairs of hosts and one pair inside each stand for the rest
SLOWER: Final = 0.7  # a path below this share of both its NICs' rates has something slower between them

_END, _ECHO, _BURST, _TO_PEER, _FROM_PEER = range(5)
_PING_BYTES, _PING_FRAME_BYTES = 8, 100  # and, about, with its headers
_LEAST_BYTES = 1 << 10  # of one transfer: less is headers
_PIECE_BYTES = 4 << 20  # larger transfers are several messages
_MOST_BYTES = 256 << 20  # of one transfer
_REPEATS = 3
_PINGS = 7  # series of them
_TOGETHER = 6  # times as long as one transfer: shapers let bursts through, here 2 % of 0.3 s at 200 Mbit/s

Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Links:
    """Measured links of a group; NaN where nothing was measured.

    latency_s, overhead_s, bytes_per_s: [n_ranks, n_ranks], from row to column: of 8 bytes one way; of each message
    that follows another; of one transfer at a time. host_bytes_per_s: [n_hosts, n_hosts], what a row's ranks, or
    one of them, send to the column's while those send back. reduce_bytes_per_s: of the slowest rank's sums, float32."""

    latency_s: Matrix
    overhead_s: Matrix
    bytes_per_s: Matrix
    host_bytes_per_s: Matrix
    reduce_bytes_per_s: float


def measure_links(
    group: Group,
    topology: Topology,
    machines: Sequence[str],
    *,
    all_pairs: bool | None = None,
    target_s: float = 0.05,
) -> Links:
    """Measures a group's links; every rank calls it, and all get the same.

    topology: the group's (discover.survey): NICs below the default rate have a stated one, and what crosses them is not
    taken for faster, since a shaper lets the first bytes through at once. machines: [n_ranks], the id of the machine
    that each rank is on. all_pairs: None for groups of up to ALL_PAIRS_UP_TO ranks. target_s: seconds that one transfer
    is to take; a pair takes some tens of that, or on the slowest links some tens of messages."""
    if topology.n_ranks != group.size:
        raise InvalidArgument(f"measure_links: {topology.n_ranks} ranks in the topology, {group.size} in the group")
    n = group.size
    if all_pairs is None:
        all_pairs = n <= ALL_PAIRS_UP_TO
    stated = _stated(topology)
    figures = np.full((3, n, n), np.nan)
    for pairs in pair_rounds(circle(n), machines) if all_pairs else link_rounds(topology, machines):
        group.barrier()
        for pair in pairs:
            if group.rank == pair[0]:
                _lead(group, pair, target_s, float(stated[tuple(topology.host_index[list(pair)])]), figures)
            elif group.rank == pair[1]:
                _follow(group, pair[0])
    np.nan_to_num(figures, copy=False, nan=-1.0)  # each pair's are its leader's
    group.all_reduce(figures, "max")
    figures[figures < 0] = np.nan
    latency, overhead, rate = figures
    together = np.minimum(stated, _host_rates(group, topology, machines, rate, target_s))
    slowest = np.array([_reduce_rate()])
    group.all_reduce(slowest, "min")
    return Links(latency, overhead, rate, together, float(slowest[0]))


def measured_topology(topology: Topology, links: Links) -> Topology:
    """The topology with measured figures: `inside` what the quicker quarter of pairs on one host reaches, since what
    else runs on their cores only ever adds, and each host's NICs as fast as its ranks together were towards the host
    they reach fastest. Several NICs keep their shares of it."""
    same = topology.host_index[:, None] == topology.host_index
    hosts = []
    for index, host in enumerate(topology.hosts):
        rates = np.concatenate([links.host_bytes_per_s[index], links.host_bytes_per_s[:, index]])
        if np.isnan(rates).all():
            hosts.append(host)
            continue
        mine = topology.host_index == index
        latency, overhead = (float(np.nanmin(figure[mine][:, ~mine])) for figure in (links.latency_s, links.overhead_s))
        scale = float(np.nanmax(rates)) / host.nic.bytes_per_s
        nics = tuple(Nic(nic.name, Link(latency, nic.link.bytes_per_s * scale, overhead)) for nic in host.nics)
        hosts.append(dataclasses.replace(host, nics=nics))
    inside = topology.inside
    if not np.isnan(links.latency_s[same]).all():
        figures = ((links.latency_s, 0.25), (links.bytes_per_s, 0.75), (links.overhead_s, 0.25))
        inside = Link(*(float(np.nanquantile(figure[same], share)) for figure, share in figures))
    return dataclasses.replace(topology, hosts=tuple(hosts), inside=inside, reduce_bytes_per_s=links.reduce_bytes_per_s)


def slow_paths(topology: Topology, links: Links) -> list[str]:
    """Pairs of hosts between which something slower than both NICs must stand that the topology has no switch for, one
    line each. Pairs that were not measured are passed over."""
    measured = measured_topology(topology, links)
    found = []
    for a, b in combinations(range(len(topology.hosts)), 2):
        if topology.uplinks(topology.hosts[a].ranks[0], topology.hosts[b].ranks[0]):
            continue
        rate = float(np.fmin(links.host_bytes_per_s[a, b], links.host_bytes_per_s[b, a]))
        least = min(measured.hosts[a].nic.bytes_per_s, measured.hosts[b].nic.bytes_per_s)
        if rate < SLOWER * least:
            found.append(
                f"what stands between hosts {topology.hosts[a].name} and {topology.hosts[b].name}: the path carries "
                f"{rate / least:.0%} of what their NICs carry elsewhere; if they share an uplink, write it as a switch"
            )
    return found


# One pair: the lower rank leads and tells the other what to do, [what, bytes, times]


def _lead(group: Group, pair: Pair, target_s: float, stated: float, figures: NDArray[np.float64]) -> None:
    """Improves [latency_s, overhead_s, bytes_per_s] of both directions: the least times and the highest rates stay.
    stated: bytes per second that the pair's NICs carry at most."""
    peer = pair[1]
    buffer = np.ones(_PIECE_BYTES, np.uint8)  # written, so that its pages are its own
    opened_s = _order(group, peer, buffer, _ECHO, _PING_BYTES, 1)  # opens the connection
    repeats = 10 if opened_s < target_s else 1
    rtt = _order(group, peer, buffer, _ECHO, _PING_BYTES, repeats) / repeats
    ping = _PING_FRAME_BYTES / stated  # seconds at least, once a shaper's burst is spent
    repeats = int(np.clip(target_s / 10 / max(rtt, 2 * ping), repeats, 500))
    # The least: what else runs on a core, and ranks that wake up, only ever add.
    echoes = _within(2 * target_s, _PINGS, partial(_order, group, peer, buffer, _ECHO, _PING_BYTES, repeats))
    rtt = min(echoes) / repeats
    n_burst, burst = 8, _order(group, peer, buffer, _BURST, _PING_BYTES, 8)
    if max(burst - rtt, 8 * ping) < target_s:
        n_burst = 64
        burst = min(_within(2 * target_s, _PINGS, partial(_order, group, peer, buffer, _BURST, _PING_BYTES, n_burst)))
    both = (slice(2), [pair[0], peer], [peer, pair[0]])
    figures[both] = np.fmin(figures[both], [[rtt / 2], [max(0.0, burst - rtt) / (n_burst - 1)]])
    most = int(np.clip(4 * stated * target_s, _LEAST_BYTES, _MOST_BYTES))
    for what, src, dst in ((_TO_PEER, pair[0], peer), (_FROM_PEER, peer, pair[0])):
        rate = _rate(partial(_transfer, group, peer, buffer, what), most, target_s, rtt)
        figures[2, src, dst] = np.fmax(figures[2, src, dst], min(stated, rate))
    _order(group, peer, buffer, _END, 0, 0)


def _rate(transfer: Callable[[int], float], most: int, target_s: float, rtt: float) -> float:
    """Bytes per second of transfers that take target_s, from half of it on: the median of several. They grow until it
    does, so that one that was held up is not taken for a long one. most: bytes of one."""
    nbytes = _LEAST_BYTES
    while True:
        seconds = transfer(nbytes) - rtt
        if seconds >= target_s / 2 or nbytes == most:
            again = _within(2 * _REPEATS * target_s, _REPEATS - 1, partial(transfer, nbytes))
            seconds = median([seconds, *(one - rtt for one in again)])
            if seconds >= target_s / 2 or nbytes == most:
                return nbytes / max(seconds, 1e-9)
        nbytes = min(most, int(nbytes * np.clip(target_s / max(seconds, 1e-9), 2, 4)))


def _stated(topology: Topology) -> Matrix:
    """[n_hosts, n_hosts]: bytes per second that two hosts' NICs carry at most; infinite where they state nothing below
    the default, and inside hosts."""
    rates = np.array([host.nic.bytes_per_s for host in topology.hosts])
    rates[rates >= TCP.bytes_per_s] = np.inf
    stated: Matrix = np.minimum.outer(rates, rates)
    np.fill_diagonal(stated, np.inf)
    return stated


def _within(limit_s: float, times: int, measure: Callable[[], float]) -> list[float]:
    """The seconds of so many measurements, or of as many as begin within limit_s, one at least."""
    taken: list[float] = []
    while not taken or (len(taken) < times and sum(taken) < limit_s):
        taken.append(measure())
    return taken


def _transfer(group: Group, peer: int, buffer: NDArray[np.uint8], what: int, nbytes: int) -> float:
    """Seconds until nbytes (rounded to whole messages of one size) have arrived."""
    times = -(-nbytes // _PIECE_BYTES)
    return _order(group, peer, buffer, what, nbytes // times, times) * (nbytes / (nbytes // times * times))


def _order(group: Group, peer: int, buffer: NDArray[np.uint8], what: int, nbytes: int, times: int) -> float:
    """Has the peer take part, and does the leader's half; seconds from before the order's first message to the last."""
    group.send(np.array([what, nbytes, times], np.int64), peer)
    begin = time.perf_counter()
    data, ping = buffer[:nbytes], buffer[:_PING_BYTES]
    if what == _ECHO:
        for _ in range(times):
            group.send(data, peer)
            group.recv(data, peer)
    elif what in (_BURST, _TO_PEER):
        for _ in range(times):
            group.send(data, peer)
        group.recv(ping, peer)
    elif what == _FROM_PEER:
        group.send(ping, peer)
        for _ in range(times):
            group.recv(data, peer)
    return time.perf_counter() - begin


def _follow(group: Group, leader: int) -> None:
    buffer = np.ones(_PIECE_BYTES, np.uint8)  # written, so that its pages are its own
    ping = buffer[:_PING_BYTES]
    order = np.empty(3, np.int64)
    while True:
        group.recv(order, leader)
        what, nbytes, times = order.tolist()
        data = buffer[:nbytes]
        if what == _END:
            return
        if what == _ECHO:
            for _ in range(times):
                group.recv(data, leader)
                group.send(data, leader)
        elif what in (_BURST, _TO_PEER):
            for _ in range(times):
                group.recv(data, leader)
            group.send(ping, leader)
        else:
            group.recv(ping, leader)
            for _ in range(times):
                group.send(data, leader)


# Hosts as a whole


def _host_rates(group: Group, topology: Topology, machines: Sequence[str], rate: Matrix, target_s: float) -> Matrix:
    """[n_hosts, n_hosts]: bytes per second from a host to another, both ways at once; NaN where the two did not meet.
    Of all ranks together, or of one alone where that is more: flows that share a slow link may take turns and leave it
    idle, and one may not fill a fast link. rate: [n_ranks, n_ranks], of one transfer at a time."""
    n_hosts, most_flows = len(topology.hosts), max(len(host.ranks) for host in topology.hosts)
    # The first opens connections and lets windows grow, as that of one flow does: several have left them small.
    tries = [(most_flows, 1), (most_flows, _TOGETHER)]
    if most_flows > 1:
        tries += [(1, 1), *[(1, _TOGETHER)] * (2 if n_hosts == 2 else 1)]  # more hosts meet more than once
    sent, taken = np.zeros((2, len(tries), n_hosts, n_hosts))  # bytes, seconds
    own_host = int(topology.host_index[group.rank])
    # Written before anybody begins: new pages take time, and a send is done before its bytes have crossed, so that who
    # began late, while the others' bytes came in, would seem to have a faster link.
    pieces = np.ones((2, _PIECE_BYTES), np.uint8)
    for pairs in host_rounds(topology, machines):
        meets = next((pair for pair in pairs if own_host in pair), None)
        for index, (flows, length) in enumerate(tries):
            seconds = length * target_s
            peers, nbytes = _flows(group.rank, topology, meets, rate, seconds, flows) if meets else ([], 0)
            group.barrier()
            if meets:
                way = (index, own_host, sum(meets) - own_host)
                sent[way], taken[way] = _exchange(group, peers, pieces, nbytes)
    group.all_reduce(sent, "sum")
    group.all_reduce(taken, "max")
    rates = np.divide(sent, taken, out=np.full_like(sent, np.nan), where=taken > 0)
    rates = rates[[length == _TOGETHER for _, length in tries]]
    best: Matrix = np.fmax.reduce(rates)
    return best


def _flows(
    rank: int, topology: Topology, meets: Pair, rate: Matrix, seconds: float, most: int
) -> tuple[list[int], int]:
    """(the ranks that this one exchanges with, bytes each way) for the two hosts' exchange to take so long, over as
    many flows as the larger host has ranks, at most so many."""
    here, there = (topology.hosts[host].ranks for host in meets)
    n_flows = min(most, max(len(here), len(there)))
    flows = [(here[i % len(here)], there[i % len(there)]) for i in range(n_flows)]
    alone = float(np.nanmax([rate[np.ix_(here, there)], rate[np.ix_(there, here)].T]))
    nbytes = int(np.clip(seconds * alone, _LEAST_BYTES, _MOST_BYTES)) // n_flows
    return [other if rank == one else one for one, other in flows if rank in (one, other)], max(1, nbytes)


def _exchange(group: Group, peers: Sequence[int], pieces: NDArray[np.uint8], nbytes: int) -> tuple[int, float]:
    """(bytes sent, seconds) of this rank's flows with all peers at once, nbytes each way (rounded to whole messages of
    one size). pieces: [2, _PIECE_BYTES], what is sent and where all that comes goes."""
    times = -(-nbytes // _PIECE_BYTES)
    out, into = pieces[:, : nbytes // times]
    begin = time.perf_counter()
    works = []
    for _ in range(times):
        works += [group.recv(into, peer, async_op=True) for peer in peers]
        works += [group.send(out, peer, async_op=True) for peer in peers]
    for work in works:
        work.wait()
    return len(peers) * times * len(out), time.perf_counter() - begin


def _reduce_rate() -> float:
    """Bytes per second of float32 sums of pieces that stay in the cache, as the engine's kernels make them."""
    total, piece = np.ones((2, 1 << 16), np.float32)
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        np.add(total, piece, out=total)
        seconds.append(time.perf_counter() - begin)
    return float(total.nbytes / median(seconds))
