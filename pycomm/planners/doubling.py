"""Recursive doubling: an all_reduce in as few rounds as there can be, each of the whole tensor; for small sizes.

Both partners of a round combine the same two values. They come to the same bits because the engine puts the lower
rank's first, and the ranks stand in their own order, so that all members of a block are below all of the next.
Source: Thakur, Rabenseifner & Gropp, Optimization of collective communication operations in MPICH, IJHPCA 19(1),
2005."""

from __future__ import annotations

from pycomm.planners import shapes
from pycomm.schedule import Schedule
from pycomm.topology import Topology


def doubling_all_reduce(topology: Topology, root: int = 0) -> Schedule:
    """log2 n rounds, two more where n is no power of two; a rank sends the tensor in each."""
    n = topology.n_ranks
    return Schedule("all_reduce", "doubling", n, 1, root, shapes.doubling_reduce(n))
