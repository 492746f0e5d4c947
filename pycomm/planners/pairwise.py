"""Every rank exchanges with every other itself, one pair of partners a round: nothing is passed on, so no message waits
for another, and a reduction needs no scratch. Best inside a host and for all_to_all of large pieces.

Source: Thakur, Rabenseifner & Gropp, Optimization of collective communication operations in MPICH, IJHPCA 19(1),
2005 (pairwise exchange)."""

from __future__ import annotations

import numpy as np

from pycomm.planners import shapes
from pycomm.schedule import Schedule, Transfers, in_sequence, place, reverse, transfers
from pycomm.topology import Topology


def pairwise_all_reduce(topology: Topology, root: int = 0) -> Schedule:
    """2(n-1) rounds, of which only two wait for each other; each rank sends 2(n-1)/n of the tensor."""
    gather = _gather(topology)
    rows = in_sequence(reverse(gather, reduce=True), gather)
    return Schedule("all_reduce", "pairwise", topology.n_ranks, topology.n_ranks, root, rows)


def pairwise_reduce_scatter(topology: Topology, root: int = 0) -> Schedule:
    """n-1 rounds; each rank sends (n-1)/n of the input."""
    rows = reverse(_gather(topology), reduce=True)
    return Schedule("reduce_scatter", "pairwise", topology.n_ranks, topology.n_ranks, root, rows)


def pairwise_all_gather(topology: Topology, root: int = 0) -> Schedule:
    """n-1 rounds; each rank sends its own chunk n-1 times."""
    return Schedule("all_gather", "pairwise", topology.n_ranks, topology.n_ranks, root, _gather(topology))


def pairwise_all_to_all(topology: Topology, root: int = 0) -> Schedule:
    """n-1 rounds; each rank sends (n-1)/n of its input, every piece straight to its receiver."""
    n, order = topology.n_ranks, topology.by_host()
    step, position = np.mgrid[: n - 1, :n]
    src, dst = order[position], order[(position + step + 1) % n]
    return Schedule("all_to_all", "pairwise", n, n * n, root, transfers(step, src, dst, src * n + dst))


def _gather(topology: Topology) -> Transfers:
    order = topology.by_host()
    return place(shapes.pairwise_gather(topology.n_ranks), order, order)
