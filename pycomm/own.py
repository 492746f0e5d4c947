"""Algorithms of a user's own: a schedule or a planner, checked, for one group (docs/own_algorithm.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pycomm.check import check
from pycomm.errors import InvalidArgument
from pycomm.planners import PLANNERS, Planner
from pycomm.schedule import COLLECTIVES, Schedule
from pycomm.topology import Topology


@dataclass(frozen=True)
class Algorithm:
    """What a user registered: planner(topology, root) gives a checked schedule of this collective and name. root: the
    only one that it serves; None: every one."""

    collective: str
    name: str
    planner: Planner
    root: int | None = None


Own = tuple[Algorithm, ...]


def algorithm(given: Schedule | Planner, topology: Topology, taken: Sequence[Algorithm]) -> Algorithm:
    """`given` as an algorithm for `topology`, named as its schedule is. A schedule of a collective with a root serves
    that root alone; a planner serves every one.

    Raises ScheduleError where check() refuses the schedule, and InvalidArgument where it has other ranks than the
    topology, or its name is a planner's of pycomm.planners or one of `taken`."""
    schedule = given if isinstance(given, Schedule) else given(topology, 0)
    name = f"{schedule.collective}/{schedule.algorithm}"
    if not schedule.algorithm or "#" in schedule.algorithm:
        raise InvalidArgument(f"register: {schedule.algorithm!r} cannot be a name; give one without '#'")
    if schedule.n_ranks != topology.n_ranks:
        raise InvalidArgument(
            f"register: {name} has {schedule.n_ranks} ranks, the group {topology.n_ranks}; plan it for this group"
        )
    if schedule.algorithm in PLANNERS.get(schedule.collective, ()):
        raise InvalidArgument(f"register: {name} is one of pycomm.planners; name yours otherwise")
    if any((schedule.collective, schedule.algorithm) == (other.collective, other.name) for other in taken):
        raise InvalidArgument(f"register: {name} is registered already; name this one otherwise")
    check(schedule)
    if not isinstance(given, Schedule):
        return Algorithm(schedule.collective, schedule.algorithm, given)
    root = schedule.root if COLLECTIVES[schedule.collective].rooted else None
    return Algorithm(schedule.collective, schedule.algorithm, _fixed(schedule, root), root)


def _fixed(schedule: Schedule, served: int | None) -> Planner:
    def planner(topology: Topology, root: int = 0) -> Schedule:
        if served not in (None, root):
            raise InvalidArgument(
                f"{schedule.collective}/{schedule.algorithm} was registered for root {served}, not for "
                f"{root}; register a planner, or call it with that root"
            )
        return schedule

    return planner
