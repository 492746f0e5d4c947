"""What the schedule tests run over: every planner, and topologies of every shape for a number of ranks."""

from pycomm.planners import PLANNERS
from pycomm.schedule import COLLECTIVES
from pycomm.topology import Topology

EVERY_PLANNER = [(collective, algorithm) for collective, planners in PLANNERS.items() for algorithm in planners]


def topologies(n_ranks):
    """One host; two halves; one rank apart; three uneven hosts; ranks dealt out over three hosts; one rank a host."""
    shapes = {(n_ranks,), (n_ranks - n_ranks // 2, n_ranks // 2), (n_ranks - 1, 1)}
    shapes.add((n_ranks - n_ranks // 4 - n_ranks // 2, n_ranks // 4, n_ranks // 2))
    found = [Topology.emulated([count for count in shape if count]) for shape in sorted(shapes)]
    found.append(Topology.from_host_ids(["cab"[rank * rank % 3] for rank in range(n_ranks)]))
    found.append(Topology.from_host_ids(["xyz"[rank % 3] for rank in range(n_ranks)]))
    if n_ranks <= 9:
        found.append(Topology.emulated([1] * n_ranks))
    return found


def plan(collective, algorithm, topology, root=0):
    return PLANNERS[collective][algorithm](topology, root)


def some_roots(collective, n_ranks):
    return sorted({0, n_ranks // 2, n_ranks - 1}) if COLLECTIVES[collective].rooted else [0]
