"""What the schedule tests run over: every planner, and topologies of every shape for a number of ranks."""

from dataclasses import replace

from pycomm.planners import PLANNERS
from pycomm.schedule import COLLECTIVES
from pycomm.topology import Link, Switch, Topology

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
    if n_ranks >= 3:
        found.append(in_racks(n_ranks))
    return found


def in_racks(n_ranks):
    """Hosts of 1 and 2 ranks in uneven racks, two of them at one site, dealt out; the last host on the core."""
    ids = [f"h{rank * 2 // 3}" for rank in range(n_ranks)]
    hosts = [replace(host, switch="abc"[i * i % 3]) for i, host in enumerate(Topology.from_host_ids(ids).hosts)]
    hosts[-1] = replace(hosts[-1], switch=None)
    used = {host.switch for host in hosts}
    uplinks = {"s": Link(1e-3, 1e8, 1e-5), "a": Link(1e-4, 1e9), "b": Link(1e-4, 2e9), "c": Link(2e-4, 1e9)}
    parents = {"a": "s", "b": "s"}
    return Topology(
        tuple(hosts),
        switches=tuple(
            Switch(name, link, parents.get(name)) for name, link in uplinks.items() if name in used or name == "s"
        ),
    )


def plan(collective, algorithm, topology, root=0):
    return PLANNERS[collective][algorithm](topology, root)


def some_roots(collective, n_ranks):
    return sorted({0, n_ranks // 2, n_ranks - 1}) if COLLECTIVES[collective].rooted else [0]
