"""Large broadcasts and reductions by pieces, so that the root does not send or get the tensor more than about once.

Source: Barnett, Gupta, Payne, Shuler, van de Geijn & Watts, Interprocessor collective communication library
(InterCom), SHPCC 1994; the reduction: Rabenseifner, Optimization of collective reduction operations, ICCS 2004."""

from __future__ import annotations

from pycomm.planners import shapes
from pycomm.schedule import COLLECTIVES, Schedule, Transfers, first_copies, in_sequence, place, reverse
from pycomm.topology import Topology


def scatter_gather_broadcast(topology: Topology, root: int = 0) -> Schedule:
    """Scatter down a tree, then all_gather around the ring: ceil(log2 n) + n-1 rounds; no rank gets a chunk twice."""
    return Schedule("broadcast", "scatter_gather", topology.n_ranks, topology.n_ranks, root, _broadcast(topology, root))


def scatter_gather_reduce(topology: Topology, root: int = 0) -> Schedule:
    """The same backwards: reduce_scatter around the ring, then gather up the tree."""
    rows = reverse(_broadcast(topology, root), reduce=True)
    return Schedule("reduce", "scatter_gather", topology.n_ranks, topology.n_ranks, root, rows)


def _broadcast(topology: Topology, root: int) -> Transfers:
    n, order = topology.n_ranks, topology.by_host(root)
    rows = place(in_sequence(shapes.tree_scatter(n), shapes.ring_gather(n)), order, order)
    return first_copies(rows, COLLECTIVES["broadcast"].start(n, n, root))
