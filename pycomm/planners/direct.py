"""Gather and scatter with no rank between: each chunk moves once, between its rank and the root."""

from __future__ import annotations

from pycomm.planners import shapes
from pycomm.schedule import Schedule, Transfers, place, reverse
from pycomm.topology import Topology


def direct_scatter(topology: Topology, root: int = 0) -> Schedule:
    """1 round; the root sends n-1 chunks."""
    return Schedule("scatter", "direct", topology.n_ranks, topology.n_ranks, root, _scatter(topology, root))


def direct_gather(topology: Topology, root: int = 0) -> Schedule:
    """1 round; the root gets n-1 chunks."""
    rows = reverse(_scatter(topology, root), reduce=False)
    return Schedule("gather", "direct", topology.n_ranks, topology.n_ranks, root, rows)


def _scatter(topology: Topology, root: int) -> Transfers:
    order = topology.by_host(root)
    return place(shapes.direct_scatter(topology.n_ranks), order, order)
