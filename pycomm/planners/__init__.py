"""Planners by collective and algorithm: each is a function (topology, root=0) -> Schedule.

Where a collective has no root the planner takes it only so that all can be called alike. Ties in predicted time go to
the planner named first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from pycomm.planners import ring, tree
from pycomm.schedule import Schedule
from pycomm.topology import Topology

Planner = Callable[[Topology, int], Schedule]

PLANNERS: Final[Mapping[str, Mapping[str, Planner]]] = MappingProxyType(
    {
        "all_reduce": MappingProxyType({"ring": ring.ring_all_reduce, "tree": tree.tree_all_reduce}),
        "reduce_scatter": MappingProxyType({"ring": ring.ring_reduce_scatter}),
        "all_gather": MappingProxyType({"ring": ring.ring_all_gather}),
        "broadcast": MappingProxyType({"tree": tree.tree_broadcast, "chain": ring.chain_broadcast}),
        "reduce": MappingProxyType({"tree": tree.tree_reduce, "chain": ring.chain_reduce}),
        "gather": MappingProxyType({"tree": tree.tree_gather}),
        "scatter": MappingProxyType({"tree": tree.tree_scatter}),
    }
)
