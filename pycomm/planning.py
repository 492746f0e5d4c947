"""What a group plans from, and what the engine asks it for: choice tables and programs, with the reasons where wanted.

All ranks of a job plan from one JobPlan (agreement.py), so all of them answer the engine alike."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from pycomm import _C, planners, project
from pycomm.calls import CALL_PLANNERS
from pycomm.check import check, check_coded
from pycomm.device_choice import (
    HIERARCHICAL,
    NATIVE,
    Points,
    costs,
    explain_devices,
    has_calls,
    is_measured,
    measured_table,
    seconds_between,
    threshold_table,
)
from pycomm.device_choice import choice_table as device_choice_table
from pycomm.errors import InvalidArgument, PycommWarning, ScheduleError
from pycomm.explain import Explanation, explain, format_nbytes, format_s
from pycomm.own import Own
from pycomm.own import algorithm as own_algorithm
from pycomm.project import CallProgram, Program, project_calls
from pycomm.schedule import Schedule
from pycomm.table import TuningTable
from pycomm.topology import Topology, WireLinks
from pycomm.tuner import Choices, candidates, choice_table, choose

# Groups are often alike: 100 of one shape plan once, not in 0.1 s each.
_choices = lru_cache(maxsize=256)(choice_table)


@lru_cache(maxsize=256)
def _program(
    topology: Topology, rank: int, collective: str, algorithm: str, root: int, own: Own, coded: WireLinks | None
) -> Program:
    registered = {given.name: given.planner for given in own if given.collective == collective}
    known = {**planners.PLANNERS[collective], **registered}
    if algorithm not in known:
        raise InvalidArgument(
            f"{collective} has no algorithm {algorithm!r}; choose from {', '.join(known)}, or give none"
        )
    schedule = known[algorithm](topology, root)
    check(schedule)
    sides = None if coded is None else topology.sides(coded)
    if sides is not None:
        try:
            check_coded(schedule, sides)
        except ScheduleError as error:
            usable = ", ".join(candidates(topology, collective, own, coded, root))
            raise InvalidArgument(f"{error}. With a wire choose from {usable}, or give no algorithm") from None
    program = project.project(schedule, rank, sides)
    # The fingerprint carries the program's name: ranks with different schedules of one name find out.
    return replace(program, algorithm=f"{algorithm}#{schedule.digest()}") if algorithm in registered else program


@lru_cache(maxsize=256)
def _call_program(topology: Topology, rank: int, collective: str) -> CallProgram:
    schedule = CALL_PLANNERS[collective](topology)
    check(schedule.expand())
    return project_calls(schedule, rank)


@dataclass(frozen=True)
class JobPlan:
    """What all ranks of a job plan from. topology: of all ranks, given or measured; None: default figures. table: that
    was found to hold for the job. explains: PYCOMM_EXPLAIN on rank 0. device_topology, hierarchical_nbytes,
    between_hosts, peer_nbytes, max_ctas: what rank 0's PYCOMM_CUDA_* say of tensors on GPUs (agreement.py).
    wire_links: which links a call's wire is on (docs/wire.md)."""

    host_ids: tuple[str, ...]
    topology: Topology | None = None
    table: TuningTable | None = None
    explains: bool = False
    device_topology: Topology | None = None
    hierarchical_nbytes: int | None = None
    between_hosts: str = "auto"
    peer_nbytes: int = 0
    max_ctas: int | None = None
    wire_links: WireLinks = "hosts"

    def of(self, ranks: Sequence[int]) -> tuple[Topology, TuningTable | None]:
        """A group's topology, and the table where its times hold: for the group of all ranks, in their order."""
        if self.topology is None:
            return Topology.from_host_ids([self.host_ids[rank] for rank in ranks]), None
        everyone = list(ranks) == list(range(len(self.host_ids)))
        return (self.topology, self.table) if everyone else (self.topology.select(ranks), None)


class Endpoint(_C.Endpoint):
    """A rank's place in a job, with the plan that the job's ranks agreed on."""

    job: JobPlan


class Planning:
    """What the engine asks for when a collective is used for the first time. Every rank answers alike."""

    def __init__(
        self,
        topology: Topology,
        rank: int,
        table: TuningTable | None,
        explain_as: str | None,
        wire_links: WireLinks = "hosts",
    ) -> None:
        """explain_as: the group's name, where this rank says what it chooses."""
        self.topology = topology
        self.rank = rank
        self.table = table
        self.wire_links = wire_links
        self.own: Own = ()
        self._explain_as = explain_as
        self._chosen: set[str] = set()

    def register(self, given: Schedule | planners.Planner) -> None:
        found = own_algorithm(given, self.topology, self.own)
        if found.collective in self._chosen:
            raise InvalidArgument(
                f"register: this group has chosen among the algorithms of {found.collective} already; register "
                f"{found.name!r} before its first {found.collective} that names none"
            )
        self.own += (found,)

    def choices(self, collective: str, root: int, coded: bool) -> Choices:
        """coded: for calls with a wire, whose times no table has."""
        self._chosen.add(collective)
        return self._choices(collective, root, coded)

    def _choices(self, collective: str, root: int, coded: bool) -> Choices:
        table, links = (None, self.wire_links) if coded else (self.table, None)
        return _choices(self.topology, collective, root, table, self.own, links)

    def program(self, collective: str, algorithm: str, root: int, coded: bool) -> Program:
        links = self.wire_links if coded else None
        found = _program(self.topology, self.rank, collective, algorithm, root, self.own, links)
        if self._explain_as is not None:
            for line in self._explanations(collective, algorithm, root, coded):
                print(f"pycomm: group {self._explain_as!r}: {line}", file=sys.stderr, flush=True)
        return found

    def explain(self, collective: str, nbytes: int, root: int = 0, coded: bool = False) -> Explanation:
        table, links = (None, self.wire_links) if coded else (self.table, None)
        return explain(self.topology, collective, nbytes, root, table, self.own, links)

    def _explanations(self, collective: str, algorithm: str, root: int, coded: bool) -> list[str]:
        """One line for each size class that takes the algorithm."""
        lines, beyond, what = [], 0, f"{collective} with a wire" if coded else collective
        for limit, name in self._choices(collective, root, coded):
            if name == algorithm:
                at = limit if limit is not None else max(2 * beyond, 1 << 20)
                said = _one_line(self.explain(collective, at, root, coded))
                lines.append(f"{what} {_size_class(beyond, limit)}: {said}")
            beyond = limit or beyond
        return lines or [f"{what}: {algorithm}, which the caller named"]


class DevicePlanning:
    """What the CUDA engine asks for, for collectives that it can leave to NCCL or take inside hosts and across in turn
    (device_choice.py). Every rank answers alike."""

    def __init__(
        self,
        topology: Topology,
        rank: int,
        figures: Topology | None = None,
        hierarchical_nbytes: int | None = None,
        explain_as: str | None = None,
        between: str = "auto",
        peer_nbytes: int = 0,
        table: TuningTable | None = None,
        max_ctas: int | None = None,
        wire_links: WireLinks = "hosts",
    ) -> None:
        """figures: the topology of the devices, where one was given. hierarchical_nbytes: from that size on
        hierarchical, whatever that costs. Without either NCCL has all where it joins hosts, and what is inside hosts
        where it does not. explain_as: as Planning's. between: PYCOMM_CUDA_BETWEEN_HOSTS. peer_nbytes: up to that size
        an all_reduce on one host is the peer kernel's. table: where its times hold, as in Planning. max_ctas: the most
        multiprocessors that a collective of NCCL's takes; None: as NCCL likes."""
        self.topology = topology
        self.rank = rank
        self.figures = figures
        self.hierarchical_nbytes = hierarchical_nbytes
        self.between = between
        self.peer_nbytes = peer_nbytes
        self.table = table
        self.max_ctas = max_ctas
        self.wire_links = wire_links
        self._explain_as = explain_as
        self._explained: set[str] = set()

    def select(self, ranks: Sequence[int]) -> DevicePlanning:
        """Of a group of some of the ranks, of which this is one."""
        topology = self.topology.select(ranks)
        figures = None if self.figures is None else topology
        rank = list(ranks).index(self.rank)
        return DevicePlanning(
            topology,
            rank,
            figures,
            self.hierarchical_nbytes,
            between=self.between,
            peer_nbytes=self.peer_nbytes,
            max_ctas=self.max_ctas,
            wire_links=self.wire_links,
        )

    def through_host(self, why: str) -> None:
        """Called on every rank when NCCL has not joined the hosts. Warns (PycommWarning) on rank 0."""
        self.between = "tcp"
        self._explained.clear()
        if self.rank == 0:
            warnings.warn(
                f"pycomm: NCCL cannot connect the hosts, so tensors on GPUs go through host memory and TCP between "
                f"them: {why}. PYCOMM_CUDA_BETWEEN_HOSTS=tcp asks for that without trying, nccl makes it an error.",
                PycommWarning,
                stacklevel=2,
            )

    def choices(self, collective: str, root: int, coded: bool) -> Choices:
        if coded and self.wire_links != "hosts":
            raise InvalidArgument(
                f"{collective}: a wire between racks alone is of CPU tensors; on devices it is between hosts: use a "
                "group whose wire_links are 'hosts'"
            )
        if coded:  # NCCL has no wire
            return ((None, HIERARCHICAL),)
        table, why = self._table(collective)
        if self._explain_as is not None and collective not in self._explained:
            self._explained.add(collective)
            for line in self._lines(collective, table, why):
                print(f"pycomm: group {self._explain_as!r} on devices: {line}", file=sys.stderr, flush=True)
        return table

    def _table(self, collective: str) -> tuple[Choices, str]:
        """The table and, where no costs were compared, why it is this one."""
        if not has_calls(self.topology, collective):
            return ((None, NATIVE),), "NCCL's, since hosts have different numbers of ranks"
        if self.hierarchical_nbytes is not None:
            return threshold_table(self.hierarchical_nbytes), "as PYCOMM_CUDA_HIERARCHICAL_BYTES says"
        points = {} if self.table is None else self.table.device_points(collective)
        if self.between == "tcp":
            return threshold_table(1), "since NCCL is quicker than the host inside hosts, and carries a share to it"
        if is_measured(points):
            return measured_table(points), f"as measured: {_measured(points)}"
        if self.figures is None:
            return ((None, NATIVE),), "NCCL's, since no `pycomm tune --devices` and no PYCOMM_CUDA_TOPOLOGY tells more"
        return device_choice_table(self.figures, collective), ""

    def seconds(self, collective: str, nbytes: int) -> tuple[float, str] | None:
        """Of a collective as it would go, and where the figure is from; None where nothing tells."""
        way = choose(self._table(collective)[0], nbytes)
        points = {} if self.table is None else self.table.device_points(collective)
        if points.get(way):
            return seconds_between(points[way], nbytes), "tuning table"
        if self.figures is None or collective not in CALL_PLANNERS:
            return None
        return float(costs(self.figures, collective, nbytes)[way][0]), "predicted from PYCOMM_CUDA_TOPOLOGY"

    def _lines(self, collective: str, table: Choices, why: str) -> list[str]:
        lines, beyond = [], 0
        for limit, name in table:
            at = limit if limit is not None else max(2 * beyond, 1 << 20)
            said = f"{name}, {why}"
            if not why and self.figures is not None:
                said = _one_line(explain_devices(self.figures, collective, at))
            lines.append(f"{collective} {_size_class(beyond, limit)}: {said}")
            beyond = limit or beyond
        return lines

    def program(self, collective: str, algorithm: str, root: int, coded: bool) -> CallProgram:
        if algorithm != HIERARCHICAL or collective not in CALL_PLANNERS:
            raise InvalidArgument(
                f"{collective} has no algorithm {algorithm!r} on devices; {', '.join(CALL_PLANNERS)} have "
                f"{HIERARCHICAL!r}, and all are NCCL's where none is given"
            )
        return _call_program(self.topology, self.rank, collective)


def _measured(points: Points) -> str:
    """native and hierarchical at each size: "64 KiB 40 us and 31 us, ..."."""
    pairs = zip(points[NATIVE], points[HIERARCHICAL], strict=True)
    return f"{NATIVE} and {HIERARCHICAL} took " + ", ".join(
        f"{format_s(native)} and {format_s(other)} at {format_nbytes(nbytes)}" for (nbytes, native), (_, other) in pairs
    )


def _size_class(beyond: int, limit: int | None) -> str:
    if limit is None:
        return f"above {format_nbytes(beyond)}" if beyond else "of any size"
    return f"of {format_nbytes(beyond + 1) if beyond else '0 B'} to {format_nbytes(limit)}"


def _one_line(found: Explanation) -> str:
    times = ", ".join(
        f"{one.algorithm} {format_s(one.total_s)}"
        + ("" if one.measured_s is None else f" (measured {format_s(one.measured_s)})")
        for one in found.candidates
    )
    return f"{found.choice}; predicted at {format_nbytes(found.nbytes)}: {times}; {found.reason}"


def plan(job: JobPlan, name: str, ranks: Sequence[int], job_rank: int) -> Planning:
    """Planning of a group of these ranks of the job, for one of them."""
    topology, table = job.of(ranks)
    rank = list(ranks).index(job_rank)
    return Planning(topology, rank, table, name if job.explains and rank == 0 else None, job.wire_links)


def plan_devices(job: JobPlan, name: str, ranks: Sequence[int], job_rank: int) -> DevicePlanning:
    """The same for tensors on devices."""
    rank = list(ranks).index(job_rank)
    figures = None if job.device_topology is None else job.device_topology.select(ranks)
    return DevicePlanning(
        figures or Topology.from_host_ids([job.host_ids[one] for one in ranks]),
        rank,
        figures,
        job.hierarchical_nbytes,
        name if job.explains and rank == 0 else None,
        job.between_hosts,
        job.peer_nbytes,
        job.of(ranks)[1],
        job.max_ctas,
        job.wire_links,
    )
