"""TuningTable: link figures and times of algorithms as `pycomm tune` measured them, and what they hold for.

A table serves jobs of the layout, the switches, the hardware and the engine it was measured with, and refuses others
by name. Its link figures serve every group of such a job, its times the groups of all of the job's ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pycomm.errors import InvalidArgument, TopologyError
from pycomm.hosts import Host, Link, Nic, Switch, is_number
from pycomm.planners import PLANNERS
from pycomm.topology import Topology

FORMAT: Final = 3  # of the file; a reader knows one
_MOST_BYTES: Final = 1 << 62


@dataclass(frozen=True)
class Times:
    """Measured seconds of one algorithm. points: (nbytes, seconds), sizes ascending; nbytes as in
    schedule.chunk_nbytes, the longest buffer that a rank passes in or gets."""

    collective: str
    algorithm: str
    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        sizes = [nbytes for nbytes, _ in self.points]
        if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] > _MOST_BYTES:
            raise InvalidArgument(
                f"{self.collective} {self.algorithm}: sizes {sizes} are not ascending from 1 to {_MOST_BYTES}"
            )
        if not all(0 < seconds < math.inf for _, seconds in self.points):
            raise InvalidArgument(f"{self.collective} {self.algorithm}: a time is not a positive number of seconds")


@dataclass(frozen=True)
class TuningTable:
    """engine: its version and build. hardware: [n_hosts], discover.describe() of each host. topology: of all ranks,
    with measured links. device_times: of tensors on GPUs, where those were measured (device_choice.py)."""

    engine: str
    hardware: tuple[str, ...]
    topology: Topology
    times: tuple[Times, ...]
    device_times: tuple[Times, ...] = ()

    def __post_init__(self) -> None:
        if len(self.hardware) != len(self.topology.hosts):
            raise InvalidArgument(f"{len(self.hardware)} hosts' hardware for {len(self.topology.hosts)} hosts")
        for named in (self.times, self.device_times):
            if len({(times.collective, times.algorithm) for times in named}) < len(named):
                raise InvalidArgument("an algorithm has two lists of times")

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the layout, the switches, the hardware and the engine: what the table holds for."""
        return _digest([layout(self.topology), _switching(self.topology), self.hardware, self.engine], 16)

    def file_name(self) -> str:
        """In a folder of tables; those of one layout begin alike (layout_key)."""
        return f"{layout_key(self.topology)}-{self.fingerprint()}.json"

    def refusal(self, topology: Topology, hardware: Sequence[str], engine: str) -> str | None:
        """Why this table does not hold for a job; None where it does. topology: the job's, whose switches, if it has
        any, must be those that the table was measured below: without them no algorithm that knows racks has times."""
        if layout(topology) != layout(self.topology):
            return f"it is of {_shape(self.topology)}, this job has {_shape(topology)}"
        if topology.switches and _switching(topology) != _switching(self.topology):
            return f"it was measured {_below(self.topology)}; this job's hosts are {_below(topology)}"
        for host, mine, theirs in zip(topology.hosts, hardware, self.hardware, strict=True):
            if mine != theirs:
                return f"it was measured on {theirs}; host {host.name} is {mine}"
        if engine != self.engine:
            return f"it was measured with engine {self.engine}, this is {engine}"
        return None

    def for_hosts(self, topology: Topology) -> Topology:
        """The measured topology under the names of a job's hosts, of the same layout."""
        names = {host.ranks: host.name for host in topology.hosts}
        hosts = tuple(dataclasses.replace(host, name=names[host.ranks]) for host in self.topology.hosts)
        return dataclasses.replace(self.topology, hosts=hosts)

    def points(self, collective: str) -> dict[str, tuple[tuple[int, float], ...]]:
        """What was measured of a collective, by algorithm."""
        return _points(self.times, collective)

    def device_points(self, collective: str) -> dict[str, tuple[tuple[int, float], ...]]:
        """The same on GPUs."""
        return _points(self.device_times, collective)

    def to_json(self) -> str:
        document = {
            "format": FORMAT,
            "engine": self.engine,
            "hardware": self.hardware,
            "topology": topology_to_document(self.topology),
            "times": _times_to_document(self.times),
            "device_times": _times_to_document(self.device_times),
        }
        return json.dumps({**document, "digest": _digest(document, 16)}, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes the file whole or not at all; folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{id(self):x}.partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(path)


def load(path: str | Path) -> TuningTable:
    """Reads what save() writes. Raises InvalidArgument, naming the file, where it is missing or is no such table."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"tuning table {path} cannot be read: {error}; make one with `pycomm tune`") from error
    try:
        return from_json(text)
    except InvalidArgument as error:
        raise InvalidArgument(f"tuning table {path}: {error}; make it anew with `pycomm tune`") from error


def from_json(text: str) -> TuningTable:
    """Raises InvalidArgument where the text is no table of this format, or one that was changed by hand."""
    try:
        document = json.loads(text)
        version = document["format"]
        if version != FORMAT:
            raise InvalidArgument(f"it has format {version!r}, this pycomm reads format {FORMAT}")
        said, digest = document.pop("digest"), _digest(document, 16)
        if said != digest:
            raise InvalidArgument(f"its digest is {said!r}, what it says has {digest!r}: it was changed or is damaged")
        return _from_document(document)
    except InvalidArgument:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise InvalidArgument(f"it is no tuning table ({type(error).__name__}: {error})") from error


def _from_document(document: Mapping[str, Any]) -> TuningTable:
    times, device_times = (_times_from_document(document[name]) for name in ("times", "device_times"))
    for one in times:
        if one.algorithm not in PLANNERS[one.collective]:
            raise InvalidArgument(f"it has times of {one.collective} {one.algorithm}, which no planner makes")
    if unknown := {one.collective for one in device_times} - PLANNERS.keys():
        raise InvalidArgument(f"it has times of {min(unknown)} on devices, which is no collective")
    topology = topology_from_document(document["topology"])
    hardware = tuple(map(str, document["hardware"]))
    return TuningTable(str(document["engine"]), hardware, topology, times, device_times)


def layout(topology: Topology) -> tuple[int, ...]:
    """[n_ranks]: each rank's host, numbered in the order in which they appear: where ranks are, whatever the names."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(host, len(first)) for host in topology.host_index.tolist())


def layout_key(topology: Topology) -> str:
    """8 hexadecimal digits, equal for equal layouts."""
    return _digest(layout(topology), 8)


def _switching(topology: Topology) -> tuple[dict[str, str | None], list[str | None]]:
    """Each switch's parent, and each host's switch in the order of the hosts' lowest ranks."""
    hosts = sorted(topology.hosts, key=lambda host: min(host.ranks))
    parents = {one.name: one.parent for one in sorted(topology.switches, key=lambda one: one.name)}
    return parents, [host.switch for host in hosts]


def _below(topology: Topology) -> str:
    if not topology.switches:
        return "without switches"
    _, switches = _switching(topology)
    names = [switch or "none" for switch in switches]
    return f"below switches {', '.join(names[:8])}{', ..' if len(names) > 8 else ''}"


def _points(times: Sequence[Times], collective: str) -> dict[str, tuple[tuple[int, float], ...]]:
    return {one.algorithm: one.points for one in times if one.collective == collective}


def _times_to_document(times: Sequence[Times]) -> dict[str, dict[str, list[list[float]]]]:
    document: dict[str, dict[str, list[list[float]]]] = {}
    for one in times:
        document.setdefault(one.collective, {})[one.algorithm] = [list(point) for point in one.points]
    return document


def _times_from_document(document: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> tuple[Times, ...]:
    return tuple(
        Times(collective, algorithm, tuple((int(nbytes), float(seconds)) for nbytes, seconds in points))
        for collective, algorithms in document.items()
        for algorithm, points in algorithms.items()
    )


def topology_to_document(topology: Topology) -> dict[str, Any]:
    """For JSON."""
    return dataclasses.asdict(topology)


def topology_from_document(document: dict[str, Any]) -> Topology:
    """Reads what topology_to_document() made. For anything else raises TopologyError, or what Python does of a value of
    another type or beyond what a float holds."""
    hosts = tuple(
        Host(
            host["name"],
            _ranks(host["ranks"]),
            tuple(Nic(nic["name"], _link(nic["link"])) for nic in host["nics"]),
            host["switch"],
            tuple(map(_ranks, host["numa"])),
        )
        for host in document["hosts"]
    )
    switches = tuple(Switch(one["name"], _link(one["uplink"]), one["parent"]) for one in document["switches"])
    return Topology(hosts, _link(document["inside"]), _number(document["reduce_bytes_per_s"]), switches)


def _ranks(found: Sequence[object]) -> tuple[int, ...]:
    ranks = tuple(rank for rank in found if type(rank) is int)
    if len(ranks) < len(found):
        raise TopologyError(f"ranks are {found!r}; give whole numbers")
    return ranks


def _link(fields: Mapping[str, Any]) -> Link:
    return Link(**{name: _number(value) for name, value in fields.items()})


def _number(value: Any) -> float:
    if not is_number(value):
        raise TopologyError(f"{value!r} is not a number")
    float(value)  # OverflowError: JSON has longer integers than fit
    return value  # type: ignore[no-any-return]  # an integer stays one, so that the topology's fingerprint stays


def _shape(topology: Topology) -> str:
    counts = ", ".join(str(len(host.ranks)) for host in topology.hosts[:8])
    more = ", .." if len(topology.hosts) > 8 else ""
    return f"{topology.n_ranks} ranks on {len(topology.hosts)} host(s) ({counts}{more}), placed {_runs(topology)}"


def _runs(topology: Topology) -> str:
    """Host letters in rank order, "aabb"; the first 16."""
    numbers = layout(topology)[:16]
    more = ".." if topology.n_ranks > 16 else ""
    return "".join(chr(ord("a") + number) if number < 26 else "?" for number in numbers) + more


def _digest(value: object, n_digits: int) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:n_digits]
