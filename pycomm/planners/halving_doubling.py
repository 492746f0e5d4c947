"""Recursive halving and doubling: as few bytes as a ring in log2 n rounds, for medium sizes; any number of ranks.

Partners far apart meet while pieces are small, so that on hosts of equal size (a power of two) few bytes cross hosts.
Source: Thakur, Rabenseifner & Gropp, Optimization of collective communication operations in MPICH, IJHPCA 19(1),
2005; there the ranks beyond a power of two are folded in, here the halves differ by one."""

from __future__ import annotations

from pycomm.planners import shapes
from pycomm.schedule import Schedule, Transfers, in_sequence, place, reverse
from pycomm.topology import Topology


def halving_doubling_all_reduce(topology: Topology, root: int = 0) -> Schedule:
    """2 ceil(log2 n) rounds; a rank sends 2(n-1)/n of the tensor, a little more or less where halves differ."""
    gather = _gather(topology)
    rows = in_sequence(reverse(gather, reduce=True), gather)
    return Schedule("all_reduce", "halving_doubling", topology.n_ranks, topology.n_ranks, root, rows)


def halving_doubling_reduce_scatter(topology: Topology, root: int = 0) -> Schedule:
    """Recursive halving: ceil(log2 n) rounds; a rank sends (n-1)/n of the input, give or take as above."""
    rows = reverse(_gather(topology), reduce=True)
    return Schedule("reduce_scatter", "halving_doubling", topology.n_ranks, topology.n_ranks, root, rows)


def halving_doubling_all_gather(topology: Topology, root: int = 0) -> Schedule:
    """Recursive doubling: ceil(log2 n) rounds; a rank gets (n-1)/n of the output, each chunk once."""
    return Schedule("all_gather", "halving_doubling", topology.n_ranks, topology.n_ranks, root, _gather(topology))


def _gather(topology: Topology) -> Transfers:
    order = topology.by_host()
    return place(shapes.halving_gather(topology.n_ranks), order, order)
