"""Rings and open rings (chains), host after host, so that each host link is crossed once a round however the ranks are
placed.

Source: Patarasuk & Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, JPDC 69(2), 2009."""

from __future__ import annotations

from pycomm.planners import shapes
from pycomm.schedule import Schedule, Transfers, in_sequence, place, reverse
from pycomm.topology import Topology


def ring_all_reduce(topology: Topology, root: int = 0) -> Schedule:
    """2(n-1) rounds; each rank, and each host, sends 2(n-1)/n of the tensor."""
    gather = _gather(topology)
    rows = in_sequence(reverse(gather, reduce=True), gather)
    return Schedule("all_reduce", "ring", topology.n_ranks, topology.n_ranks, root, rows)


def ring_reduce_scatter(topology: Topology, root: int = 0) -> Schedule:
    """n-1 rounds; each rank sends (n-1)/n of the input."""
    rows = reverse(_gather(topology), reduce=True)
    return Schedule("reduce_scatter", "ring", topology.n_ranks, topology.n_ranks, root, rows)


def ring_all_gather(topology: Topology, root: int = 0) -> Schedule:
    """n-1 rounds; each rank sends (n-1)/n of the output."""
    return Schedule("all_gather", "ring", topology.n_ranks, topology.n_ranks, root, _gather(topology))


def chain_broadcast(topology: Topology, root: int = 0) -> Schedule:
    """n-1 rounds in which the engine's segments flow as through one pipe; each rank but the last sends the tensor once.

    Source: the pipelined chain of Pjesivac-Grbovic et al., Performance analysis of MPI collective operations, 2007."""
    return Schedule("broadcast", "chain", topology.n_ranks, 1, root, _chain(topology, root))


def chain_reduce(topology: Topology, root: int = 0) -> Schedule:
    """The broadcast chain backwards: n-1 rounds; each rank but the root sends the tensor once."""
    return Schedule("reduce", "chain", topology.n_ranks, 1, root, reverse(_chain(topology, root), reduce=True))


def _gather(topology: Topology) -> Transfers:
    order = topology.by_host()
    return place(shapes.ring_gather(topology.n_ranks), order, order)


def _chain(topology: Topology, root: int) -> Transfers:
    return place(shapes.chain_broadcast(topology.n_ranks), topology.by_host(root), [[0]])
