"""Shapes over hosts that treat the switches above them: what crosses an uplink crosses it as seldom as possible.

Hosts play as ranks 0 .. n_hosts-1, in the order of topology.hosts; without switches these are the plain shapes. On
every level the groups below one switch are first one player each, then every group goes on alone; groups may be uneven,
and a host that hangs from no switch is a group of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pycomm.planners import shapes
from pycomm.schedule import Transfers, in_parallel, in_sequence, place
from pycomm.topology import Topology

Reduce = Callable[[int], tuple[Transfers, int]]  # n -> (chunk 0 of n ranks combined on one of them, which one)


def gather(topology: Topology) -> Transfers:
    """Chunk i from host i to every other. First across groups, where the k-th hosts of all groups form a rail, then
    inside: every uplink carries each chunk of the other groups once."""
    return _gather(topology.above, np.arange(len(topology.hosts)))


def reduce(topology: Topology, shape: Reduce, order: Sequence[int] | NDArray[np.int64]) -> tuple[Transfers, int]:
    """Chunk 0 of all hosts combined on one of them, and its number: `shape` inside every group, then over the hosts
    that the groups ended on. order: the hosts, group after group (topology.hosts_in_order)."""
    return _reduce(topology.above, shape, np.asarray(order, np.int64))


def top_groups(topology: Topology) -> list[NDArray[np.int64]]:
    """The hosts below each switch of the highest level on which there are several."""
    hosts = np.arange(len(topology.hosts))
    for column in topology.above.T:
        groups = _groups(column, hosts)
        if len(groups) > 1:
            return groups
    return [hosts]


def _groups(column: NDArray[np.int64], hosts: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """By switch, in the order in which they come; hosts with none alone."""
    groups: dict[int, list[int]] = {}
    for host in hosts.tolist():
        switch = int(column[host])
        groups.setdefault(switch if switch >= 0 else -1 - host, []).append(host)
    return [np.array(group) for group in groups.values()]


def _gather(above: NDArray[np.int64], hosts: NDArray[np.int64]) -> Transfers:
    if not above.shape[1]:
        return place(_flat_gather(len(hosts)), hosts, hosts)
    groups = _groups(above[:, 0], hosts)
    if len(groups) == 1:
        return _gather(above[:, 1:], hosts)
    if len(groups) == len(hosts):
        return place(_flat_gather(len(hosts)), hosts, hosts)
    shape = _flat_gather(len(groups))
    across, inside = [], []
    for rail in range(max(map(len, groups))):
        players = [group[rail % len(group)] for group in groups]
        across.append(place(shape, players, [group[rail : rail + 1] for group in groups]))
    for group in groups:
        held: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(above)
        for member, host in enumerate(group):
            held[host] = np.concatenate([other[member :: len(group)] for other in groups])
        inside.append(place(_gather(above[:, 1:], group), np.arange(len(above)), held))
    return in_sequence(in_parallel(across), in_parallel(inside))


def _flat_gather(n: int) -> Transfers:
    """Both shapes load every host alike; halving takes fewer rounds but is even only for powers of two."""
    return shapes.halving_gather(n) if n & (n - 1) == 0 else shapes.ring_gather(n)


def _reduce(above: NDArray[np.int64], shape: Reduce, hosts: NDArray[np.int64]) -> tuple[Transfers, int]:
    groups = _groups(above[:, 0], hosts) if above.shape[1] else [hosts[i : i + 1] for i in range(len(hosts))]
    if len(groups) == 1:
        return (_reduce(above[:, 1:], shape, hosts)) if len(hosts) > 1 else (shape(1)[0], int(hosts[0]))
    inside = [_reduce(above[:, 1:], shape, group) for group in groups]
    leaders = [leader for _, leader in inside]
    across, root = shape(len(groups))
    return in_sequence(in_parallel(rows for rows, _ in inside), place(across, leaders, [[0]])), leaders[root]
