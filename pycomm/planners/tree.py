"""Binomial trees: the fewest rounds, for small messages. Ranks are taken host after host from the root on, so whole
subtrees stay inside a host where host sizes allow.

Source: Thakur, Rabenseifner & Gropp, Optimization of collective communication operations in MPICH, IJHPCA 19(1),
2005."""

from __future__ import annotations

from pycomm.planners import shapes
from pycomm.schedule import Schedule, Transfers, in_sequence, place, reverse
from pycomm.topology import Topology


def tree_all_reduce(topology: Topology, root: int = 0) -> Schedule:
    """Reduce to rank 0, then broadcast: 2 ceil(log2 n) rounds; a rank sends the tensor up to ceil(log2 n) times."""
    down = _broadcast(topology, 0)
    return Schedule("all_reduce", "tree", topology.n_ranks, 1, root, in_sequence(reverse(down, reduce=True), down))


def tree_broadcast(topology: Topology, root: int = 0) -> Schedule:
    """ceil(log2 n) rounds; the root sends the tensor ceil(log2 n) times."""
    return Schedule("broadcast", "tree", topology.n_ranks, 1, root, _broadcast(topology, root))


def tree_reduce(topology: Topology, root: int = 0) -> Schedule:
    """The broadcast tree backwards: ceil(log2 n) rounds; each rank but the root sends the tensor once."""
    return Schedule("reduce", "tree", topology.n_ranks, 1, root, reverse(_broadcast(topology, root), reduce=True))


def tree_scatter(topology: Topology, root: int = 0) -> Schedule:
    """ceil(log2 n) rounds; the root sends every chunk but its own once, inner ranks pass on those of their subtree."""
    return Schedule("scatter", "tree", topology.n_ranks, topology.n_ranks, root, _scatter(topology, root))


def tree_gather(topology: Topology, root: int = 0) -> Schedule:
    """The scatter tree backwards: ceil(log2 n) rounds, the root gets every chunk once."""
    rows = reverse(_scatter(topology, root), reduce=False)
    return Schedule("gather", "tree", topology.n_ranks, topology.n_ranks, root, rows)


def _broadcast(topology: Topology, root: int) -> Transfers:
    return place(shapes.tree_broadcast(topology.n_ranks), topology.by_host(root), [[0]])


def _scatter(topology: Topology, root: int) -> Transfers:
    order = topology.by_host(root)
    return place(shapes.tree_scatter(topology.n_ranks), order, order)
