"""Two levels: each byte crosses a host link as seldom as possible, and shared memory does the rest.

Rail-wise: the k-th rank of every host forms rail k, and the rails carry their parts across hosts at the same time. A
host with fewer ranks plays several rails with one rank, so hosts may be uneven and ranks scattered.
Leader-wise: one rank of each host speaks for it; fewer messages, for small sizes.
Source: Traff & Hunold, Decomposing MPI collectives for exploiting multi-lane communication, CLUSTER 2020."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from pycomm.planners import shapes, switched
from pycomm.schedule import (
    Schedule,
    Transfers,
    in_parallel,
    in_pipeline,
    in_sequence,
    place,
    reverse,
    transfers,
    without_empty_rounds,
)
from pycomm.topology import Topology

TILES: Final = 4

Rail = Sequence[Sequence[int]]  # for each host, the chunks that begin at its rank of this rail


def hierarchical_all_reduce(topology: Topology, root: int = 0) -> Schedule:
    """Rail-wise: reduce_scatter inside, all_reduce of each part across, all_gather inside. On N hosts every host sends
    and gets 2(N-1)/N of the tensor, however many ranks it has."""
    n_hosts, n_rails = len(topology.hosts), _n_rails(topology)
    gather = _gather(topology, [[[rail * n_hosts + host] for host in range(n_hosts)] for rail in range(n_rails)])
    rows = in_sequence(reverse(gather, reduce=True), gather)
    return Schedule("all_reduce", "hierarchical", topology.n_ranks, n_rails * n_hosts, root, rows)


def hierarchical_tiled_all_reduce(topology: Topology, root: int = 0) -> Schedule:
    """The same on TILES parts of the tensor, one behind the other: while one is gathered the next is reduced. More
    messages, but links inside and between hosts hardly wait for each other: for large sizes."""
    tile = hierarchical_all_reduce(topology)
    chunks = np.arange(tile.n_chunks)
    tiles = [place(tile.transfers, range(tile.n_ranks), chunks + t * tile.n_chunks) for t in range(TILES)]
    rows = in_pipeline(tiles, tile.n_rounds // 2)
    return Schedule("all_reduce", "hierarchical_tiled", tile.n_ranks, TILES * tile.n_chunks, root, rows)


def hierarchical_direct_all_reduce(topology: Topology, root: int = 0) -> Schedule:
    """As hierarchical_all_reduce, but across hosts each part goes straight to the rank that sums it, and its sum
    straight to all: no partial sum of several hosts crosses a link, so that a wire codes each contribution and each sum
    once."""
    n_hosts, n_rails = len(topology.hosts), _n_rails(topology)
    rails = [[[rail * n_hosts + host] for host in range(n_hosts)] for rail in range(n_rails)]
    gather = _gather(topology, rails, shapes.pairwise_gather(n_hosts))
    rows = in_sequence(reverse(gather, reduce=True), gather)
    return Schedule("all_reduce", "hierarchical_direct", topology.n_ranks, n_rails * n_hosts, root, rows)


def hierarchical_reduce_scatter(topology: Topology, root: int = 0) -> Schedule:
    """Rail-wise: reduce inside, then across, so that each host gets each of its chunks once from every other host."""
    rows = reverse(_gather(topology, _own_chunks(topology)), reduce=True)
    return Schedule("reduce_scatter", "hierarchical", topology.n_ranks, topology.n_ranks, root, rows)


def hierarchical_direct_reduce_scatter(topology: Topology, root: int = 0) -> Schedule:
    """Rail-wise; across hosts each contribution goes straight to the rank that sums it."""
    gather = _gather(topology, _own_chunks(topology), shapes.pairwise_gather(len(topology.hosts)))
    rows = reverse(gather, reduce=True)
    return Schedule("reduce_scatter", "hierarchical_direct", topology.n_ranks, topology.n_ranks, root, rows)


def leader_reduce_scatter(topology: Topology, root: int = 0) -> Schedule:
    """Leader-wise: one rank of each host sums what its host has for others and exchanges it for what they have for its
    host. One flow between two hosts, whose ranks cannot get ahead of each other."""
    rows = reverse(_leader_gather(topology), reduce=True)
    return Schedule("reduce_scatter", "leader", topology.n_ranks, topology.n_ranks, root, rows)


def hierarchical_all_gather(topology: Topology, root: int = 0) -> Schedule:
    """Rail-wise: all_gather across, then inside, so that each host gets every chunk of the others once."""
    rows = _gather(topology, _own_chunks(topology))
    return Schedule("all_gather", "hierarchical", topology.n_ranks, topology.n_ranks, root, rows)


def hierarchical_direct_all_gather(topology: Topology, root: int = 0) -> Schedule:
    """Rail-wise; across hosts each chunk goes straight from its rank to every other host."""
    rows = _gather(topology, _own_chunks(topology), shapes.pairwise_gather(len(topology.hosts)))
    return Schedule("all_gather", "hierarchical_direct", topology.n_ranks, topology.n_ranks, root, rows)


def leader_all_gather(topology: Topology, root: int = 0) -> Schedule:
    """Leader-wise: all_gather inside, then one rank of each host exchanges its host's chunks with the others' and hands
    out what came. One flow between two hosts, whose ranks cannot get ahead of each other."""
    return Schedule("all_gather", "leader", topology.n_ranks, topology.n_ranks, root, _leader_gather(topology))


def leader_all_reduce(topology: Topology, root: int = 0) -> Schedule:
    """Leader-wise: reduce inside, doubling all_reduce across the leaders in rank order, broadcast inside."""
    hosts = _leaders(topology, root)
    across = place(shapes.doubling_reduce(len(hosts)), sorted(ranks[0] for ranks in hosts), [[0]])
    inside = _broadcast_inside(hosts, [0])
    rows = in_sequence(reverse(inside, reduce=True), across, inside)
    return Schedule("all_reduce", "leader", topology.n_ranks, 1, root, rows)


def leader_split_all_reduce(topology: Topology, root: int = 0) -> Schedule:
    """Leader-wise for large sizes: reduce inside, reduce_scatter and all_gather across the leaders, broadcast inside.
    As few bytes on a host link as rail-wise, in one flow between two hosts, whose ranks cannot get ahead of each other;
    but the leaders alone work for the link."""
    hosts = [host.ranks for host in topology.hosts]
    chunks = range(len(hosts))
    across = place(switched.gather(topology), [ranks[0] for ranks in hosts], [[chunk] for chunk in chunks])
    inside = _broadcast_inside(hosts, chunks)
    rows = in_sequence(reverse(inside, reduce=True), reverse(across, reduce=True), across, inside)
    return Schedule("all_reduce", "leader_split", topology.n_ranks, len(hosts), root, rows)


def rack_leader_all_reduce(topology: Topology, root: int = 0) -> Schedule:
    """Leader-wise over three levels: the leaders of the hosts below one switch combine first, and one of them speaks
    for it: each uplink carries the tensor log2 as often as there are switches, not hosts."""
    hosts = _leaders(topology, root)
    order = topology.hosts_in_order(int(topology.host_index[root]))
    leader = dict(zip(order.tolist(), (ranks[0] for ranks in hosts), strict=True))
    up, speakers = [], []
    for group in switched.top_groups(topology):
        rows = place(shapes.tree_broadcast(len(group)), [leader[host] for host in group.tolist()], [[0]])
        up.append(reverse(rows, reduce=True))
        speakers.append(leader[int(group[0])])
    across = place(shapes.doubling_reduce(len(speakers)), sorted(speakers), [[0]])
    inside, below = _broadcast_inside(hosts, [0]), in_parallel(up)
    rows = in_sequence(reverse(inside, reduce=True), below, across, reverse(below, reduce=False), inside)
    return Schedule("all_reduce", "rack_leader", topology.n_ranks, 1, root, rows)


def hierarchical_tree_all_reduce(topology: Topology, root: int = 0) -> Schedule:
    """Rail-wise: reduce_scatter inside, then up and down a binary tree over the hosts for each chunk, all_gather
    inside. As many bytes per host link as around a ring, in 2 log2 N steps instead of 2N: for many hosts. Every second
    chunk takes the other of two trees (shapes.in_order_reduce), so that all hosts are loaded alike."""
    n_rails = _n_rails(topology)
    n_chunks = n_rails + n_rails % 2
    order = topology.hosts_in_order()
    trees = [
        switched.reduce(topology, lambda n, mirrored=mirrored: shapes.in_order_reduce(n, mirrored), order)[0]  # type: ignore[misc]
        for mirrored in (False, True)
    ]
    scattered, up = [], []
    for host in topology.hosts:
        size = len(host.ranks)
        held = [np.arange(local, n_chunks, size) for local in range(size)]
        scattered.append(reverse(place(shapes.pairwise_gather(size), host.ranks, held), reduce=True))
    for chunk in range(n_chunks):
        players = [host.ranks[chunk % len(host.ranks)] for host in topology.hosts]
        up.append(place(trees[chunk % 2], players, [[chunk]]))
    inside, across = in_parallel(scattered), in_parallel(up)
    rows = in_sequence(inside, across, reverse(across, reduce=False), reverse(inside, reduce=False))
    return Schedule("all_reduce", "hierarchical_tree", topology.n_ranks, n_chunks, root, rows)


def hierarchical_broadcast(topology: Topology, root: int = 0) -> Schedule:
    """Leader-wise: a tree across the hosts, then a tree in each; every host but the root's gets the tensor once."""
    return Schedule("broadcast", "hierarchical", topology.n_ranks, 1, root, _broadcast(topology, root))


def hierarchical_reduce(topology: Topology, root: int = 0) -> Schedule:
    """The broadcast backwards: every host but the root's sends the tensor once."""
    return Schedule(
        "reduce", "hierarchical", topology.n_ranks, 1, root, reverse(_broadcast(topology, root), reduce=True)
    )


def hierarchical_scatter(topology: Topology, root: int = 0) -> Schedule:
    """Leader-wise: the root gives each leader its host's chunks, and each leader hands them out: 2 rounds."""
    return Schedule("scatter", "hierarchical", topology.n_ranks, topology.n_ranks, root, _scatter(topology, root))


def hierarchical_gather(topology: Topology, root: int = 0) -> Schedule:
    """The scatter backwards: 2 rounds; one message from each host to the root."""
    rows = reverse(_scatter(topology, root), reduce=False)
    return Schedule("gather", "hierarchical", topology.n_ranks, topology.n_ranks, root, rows)


def leader_all_to_all(topology: Topology, root: int = 0) -> Schedule:
    """Leader-wise: ranks of one host exchange theirs; what is for others goes to the host's leader, from there to the
    other host's and to its ranks. One message and one flow between two hosts, whose ranks cannot get ahead of each
    other; but the leader alone works for the link."""
    n, n_hosts = topology.n_ranks, len(topology.hosts)
    host, local = topology.host_index, topology.local_rank
    leader = np.array([each.ranks[0] for each in topology.hosts])
    src, dst = (index.ravel() for index in np.mgrid[:n, :n])
    chunk, away = src * n + dst, host[src] != host[dst]
    own = ~away & (src != dst)
    inside = (local[dst] - local[src]) % np.bincount(host)[host[src]]
    out, come = leader[host[src]], leader[host[dst]]
    up, down = away & (src != out), away & (dst != come)
    across = (host[dst] - host[src]) % n_hosts
    rows = in_sequence(
        transfers(0, src[up], out[up], chunk[up]),
        in_parallel(
            [
                transfers(across[away] - 1, out[away], come[away], chunk[away]),
                transfers(inside[own] - 1, src[own], dst[own], chunk[own]),
            ]
        ),
        transfers(0, come[down], dst[down], chunk[down]),
    )
    return Schedule("all_to_all", "leader", n, n * n, root, without_empty_rounds(rows))


def rack_leader_scatter(topology: Topology, root: int = 0) -> Schedule:
    """Leader-wise over three levels: the root gives one leader below each switch what its hosts get, which gives each
    host's leader its part: 3 rounds, one message to each switch."""
    return Schedule("scatter", "rack_leader", topology.n_ranks, topology.n_ranks, root, _rack_scatter(topology, root))


def rack_leader_gather(topology: Topology, root: int = 0) -> Schedule:
    """The scatter backwards: 3 rounds; one message from each switch to the root's host."""
    rows = reverse(_rack_scatter(topology, root), reduce=False)
    return Schedule("gather", "rack_leader", topology.n_ranks, topology.n_ranks, root, rows)


def rack_hierarchical_all_to_all(topology: Topology, root: int = 0) -> Schedule:
    """Rail-wise over three levels: as hierarchical_all_to_all, and between hosts once more: below one switch a piece
    goes to the host on its receiver's rail, which carries it to the other switch together with its neighbours'. Between
    two switches as many bytes in fewer messages, but twice over the hosts' links: for small sizes."""
    n, groups = topology.n_ranks, switched.top_groups(topology)
    host, local = topology.host_index, topology.local_rank
    host_ranks = np.bincount(host)
    group_of, member_of = np.empty((2, len(topology.hosts)), np.int64)
    hosts_of = np.zeros((len(groups), max(map(len, groups))), np.int64)
    for index, group in enumerate(groups):
        group_of[group], member_of[group], hosts_of[index, : len(group)] = index, np.arange(len(group)), group
    members = np.zeros((len(topology.hosts), _n_rails(topology)), np.int64)
    members[host, local] = np.arange(n)
    group_hosts = np.bincount(group_of)
    src, dst = (index.ravel() for index in np.mgrid[:n, :n])
    ours, theirs = group_of[host[src]], group_of[host[dst]]
    rail = local[dst] % host_ranks[host[src]]
    via = members[host[src], rail]
    # The host below our switch from which it leaves for the receiver's: the receiver's own, where that is below it.
    gate = np.where(ours == theirs, host[dst], hosts_of[ours, member_of[host[dst]] % group_hosts[ours]])
    out = np.where(gate == host[dst], dst, members[gate, local[dst] % host_ranks[gate]])
    out = np.where(gate == host[src], via, out)
    chunk = src * n + dst
    inside = (local[via] - local[src]) % host_ranks[host[src]]
    below = (member_of[host[out]] - member_of[host[via]]) % group_hosts[ours]
    across = (theirs - ours) % len(groups)
    last = dst != out
    rows = in_sequence(
        transfers(inside[src != via] - 1, src[src != via], via[src != via], chunk[src != via]),
        transfers(below[via != out] - 1, via[via != out], out[via != out], chunk[via != out]),
        transfers(across[last] - 1, out[last], dst[last], chunk[last]),
    )
    return Schedule("all_to_all", "rack_hierarchical", n, n * n, root, without_empty_rounds(rows))


def hierarchical_all_to_all(topology: Topology, root: int = 0) -> Schedule:
    """Rail-wise: inside each host a piece goes to the rank on its receiver's rail, which carries it across together
    with those of its neighbours: as many bytes between hosts as pairwise, in fewer and larger messages."""
    n, n_hosts = topology.n_ranks, len(topology.hosts)
    host, local = topology.host_index, topology.local_rank
    members = np.zeros((n_hosts, _n_rails(topology)), np.int64)
    members[host, local] = np.arange(n)
    host_ranks = np.bincount(host)
    src, dst = (index.ravel() for index in np.mgrid[:n, :n])
    via = members[host[src], local[dst] % host_ranks[host[src]]]
    inside = (local[via] - local[src]) % host_ranks[host[src]]
    across = (host[dst] - host[src]) % n_hosts
    chunk = src * n + dst
    moves, crosses = inside > 0, across > 0
    rows = in_sequence(
        transfers(inside[moves] - 1, src[moves], via[moves], chunk[moves]),
        transfers(across[crosses] - 1, via[crosses], dst[crosses], chunk[crosses]),
    )
    return Schedule("all_to_all", "hierarchical", n, n * n, root, rows)


def _n_rails(topology: Topology) -> int:
    return max(len(host.ranks) for host in topology.hosts)


def _own_chunks(topology: Topology) -> list[Rail]:
    return [[host.ranks[rail : rail + 1] for host in topology.hosts] for rail in range(_n_rails(topology))]


def _gather(topology: Topology, rails: Sequence[Rail], shape: Transfers | None = None) -> Transfers:
    """Along every rail across hosts, in the shape given or the one that _across() takes; and what came from one host
    goes on inside before what comes from the next, so that both kinds of link work at once. No rank sends a chunk twice
    in one round, so the reversal has no races."""
    n_hosts, stage = len(topology.hosts), _n_rails(topology)
    shape = switched.gather(topology) if shape is None else shape
    came = np.zeros((n_hosts, n_hosts), np.int32)
    came[shape["dst"], shape["chunk"]] = shape["round"] + 1
    order, place_of = came.argsort(axis=1, kind="stable"), np.arange(n_hosts)
    turn = np.empty_like(
        came
    )  # [host, origin]: when origin's chunks go on inside there: one by one, never before they came
    in_order = np.maximum.accumulate(np.take_along_axis(came, order, axis=1) - place_of, axis=1) + place_of
    np.put_along_axis(turn, order, in_order.astype(came.dtype), axis=1)
    across = in_parallel(
        place(shape, [host.ranks[k % len(host.ranks)] for host in topology.hosts], rail) for k, rail in enumerate(rails)
    )
    across["round"] *= stage
    of_rail = [np.concatenate([np.asarray(chunks, np.int64) for chunks in rail]) for rail in rails]
    origin = np.empty(sum(map(len, of_rail)), np.int64)
    for rail in rails:
        for host_index, chunks in enumerate(rail):
            origin[list(chunks)] = host_index
    inside = []
    for host, turns in zip(topology.hosts, turn, strict=True):
        size = len(host.ranks)
        held = [np.concatenate(of_rail[local::size]) for local in range(size)]
        rows = place(shapes.pairwise_gather(size), host.ranks, held)
        rows["round"] += turns[origin[rows["chunk"]]].astype(np.int32) * stage + 1
        inside.append(rows)
    return without_empty_rounds(in_parallel([across, *inside]))


def _leader_gather(topology: Topology) -> Transfers:
    hosts = [host.ranks for host in topology.hosts]
    across = place(switched.gather(topology), [ranks[0] for ranks in hosts], hosts)
    inside, handed_out = [], []
    for ranks in hosts:
        inside.append(place(shapes.pairwise_gather(len(ranks)), ranks, [[rank] for rank in ranks]))
        came = np.setdiff1d(np.arange(topology.n_ranks), ranks)
        handed_out.append(place(shapes.tree_broadcast(len(ranks)), ranks, [came]))
    return in_sequence(in_parallel(inside), across, in_parallel(handed_out))


def _leaders(topology: Topology, root: int) -> list[tuple[int, ...]]:
    """Each host's ranks, leader first, the root's host first: the root leads it, the first rank leads any other."""
    at, *others = topology.hosts_in_order(int(topology.host_index[root])).tolist()
    first = (root, *(rank for rank in topology.hosts[at].ranks if rank != root))
    return [first, *(topology.hosts[host].ranks for host in others)]


def _broadcast(topology: Topology, root: int) -> Transfers:
    hosts = _leaders(topology, root)
    order = topology.hosts_in_order(int(topology.host_index[root]))
    leader = np.empty(len(hosts), np.int64)
    leader[order] = [ranks[0] for ranks in hosts]
    up, _ = switched.reduce(topology, _to_first, order)
    across = place(reverse(up, reduce=False), leader, [[0]])
    return in_sequence(across, _broadcast_inside(hosts, [0]))


def _to_first(n: int) -> tuple[Transfers, int]:
    return reverse(shapes.tree_broadcast(n), reduce=True), 0


def _broadcast_inside(hosts: Sequence[Sequence[int]], chunks: Sequence[int]) -> Transfers:
    return in_parallel(place(shapes.tree_broadcast(len(ranks)), ranks, [chunks]) for ranks in hosts)


def _scatter(topology: Topology, root: int) -> Transfers:
    hosts = _leaders(topology, root)
    across = place(shapes.direct_scatter(len(hosts)), [ranks[0] for ranks in hosts], hosts)
    return in_sequence(across, in_parallel(place(shapes.direct_scatter(len(ranks)), ranks, ranks) for ranks in hosts))


def _rack_scatter(topology: Topology, root: int) -> Transfers:
    hosts = _leaders(topology, root)
    ranks_of = dict(zip(topology.hosts_in_order(int(topology.host_index[root])).tolist(), hosts, strict=True))
    groups = [[ranks_of[host] for host in group.tolist()] for group in switched.top_groups(topology)]
    for group in groups:
        group.sort(key=lambda ranks: root not in ranks)
    groups.sort(key=lambda group: root not in group[0])
    everyone = [[rank for ranks in group for rank in ranks] for group in groups]
    across = place(shapes.direct_scatter(len(groups)), [group[0][0] for group in groups], everyone)
    below = [place(shapes.direct_scatter(len(group)), [ranks[0] for ranks in group], group) for group in groups]
    inside = [place(shapes.direct_scatter(len(ranks)), ranks, ranks) for ranks in hosts]
    return in_sequence(across, in_parallel(below), in_parallel(inside))
