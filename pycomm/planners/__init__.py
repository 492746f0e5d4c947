"""Planners by collective and algorithm: each is a function (topology, root=0) -> Schedule.

A planner of a collective without a root takes one only so that all are called alike. Where predicted times tie, the
one named first is chosen: leader-wise before those whose ranks share a link with a flow each (docs/hosts.md). Tuning
measures in this order, as far as its budget goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from pycomm.planners import (
    bruck,
    direct,
    doubling,
    halving_doubling,
    hierarchical,
    pairwise,
    ring,
    scatter_gather,
    tree,
)
from pycomm.schedule import Schedule
from pycomm.topology import Topology

Planner = Callable[[Topology, int], Schedule]


# On one host these are other planners under another name.
TWO_LEVEL: Final = frozenset(
    {
        "hierarchical",
        "hierarchical_tiled",
        "hierarchical_direct",
        "hierarchical_tree",
        "leader",
        "leader_split",
        "rack_leader",
        "rack_hierarchical",
    }
)

# Without several switches these are other planners under another name.
THREE_LEVEL: Final = frozenset({"rack_leader", "rack_hierarchical"})

# Their ranks exchange whole chunks: each sends what it is about to overwrite, so that a channel must hold some bytes of
# it, as all do. Others would run over channels that hold none.
EXCHANGES: Final = frozenset({"doubling", "leader", "rack_leader"})


def _table(**planners: Planner) -> Mapping[str, Planner]:
    return MappingProxyType(planners)


PLANNERS: Final[Mapping[str, Mapping[str, Planner]]] = MappingProxyType(
    {
        "all_reduce": _table(
            pairwise=pairwise.pairwise_all_reduce,
            doubling=doubling.doubling_all_reduce,
            hierarchical=hierarchical.hierarchical_all_reduce,
            hierarchical_tiled=hierarchical.hierarchical_tiled_all_reduce,
            hierarchical_direct=hierarchical.hierarchical_direct_all_reduce,
            leader=hierarchical.leader_all_reduce,
            leader_split=hierarchical.leader_split_all_reduce,
            rack_leader=hierarchical.rack_leader_all_reduce,
            hierarchical_tree=hierarchical.hierarchical_tree_all_reduce,
            halving_doubling=halving_doubling.halving_doubling_all_reduce,
            ring=ring.ring_all_reduce,
            tree=tree.tree_all_reduce,
        ),
        "reduce_scatter": _table(
            pairwise=pairwise.pairwise_reduce_scatter,
            leader=hierarchical.leader_reduce_scatter,
            hierarchical=hierarchical.hierarchical_reduce_scatter,
            hierarchical_direct=hierarchical.hierarchical_direct_reduce_scatter,
            halving_doubling=halving_doubling.halving_doubling_reduce_scatter,
            ring=ring.ring_reduce_scatter,
        ),
        "all_gather": _table(
            pairwise=pairwise.pairwise_all_gather,
            leader=hierarchical.leader_all_gather,
            hierarchical=hierarchical.hierarchical_all_gather,
            hierarchical_direct=hierarchical.hierarchical_direct_all_gather,
            halving_doubling=halving_doubling.halving_doubling_all_gather,
            ring=ring.ring_all_gather,
        ),
        "all_to_all": _table(
            leader=hierarchical.leader_all_to_all,
            pairwise=pairwise.pairwise_all_to_all,
            bruck=bruck.bruck_all_to_all,
            hierarchical=hierarchical.hierarchical_all_to_all,
            rack_hierarchical=hierarchical.rack_hierarchical_all_to_all,
        ),
        "broadcast": _table(
            tree=tree.tree_broadcast,
            hierarchical=hierarchical.hierarchical_broadcast,
            scatter_gather=scatter_gather.scatter_gather_broadcast,
            chain=ring.chain_broadcast,
        ),
        "reduce": _table(
            tree=tree.tree_reduce,
            hierarchical=hierarchical.hierarchical_reduce,
            scatter_gather=scatter_gather.scatter_gather_reduce,
            chain=ring.chain_reduce,
        ),
        "gather": _table(
            direct=direct.direct_gather,
            tree=tree.tree_gather,
            hierarchical=hierarchical.hierarchical_gather,
            rack_leader=hierarchical.rack_leader_gather,
        ),
        "scatter": _table(
            direct=direct.direct_scatter,
            tree=tree.tree_scatter,
            hierarchical=hierarchical.hierarchical_scatter,
            rack_leader=hierarchical.rack_leader_scatter,
        ),
    }
)
