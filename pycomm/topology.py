"""Where the ranks are and what joins them: hosts, links and their speed. Planners, simulate and the tuner read it.

A rank reaches the ranks of its own host over `inside` (shared memory) and all others through its host's NIC, which all
ranks of the host share, full duplex. The default figures describe an ordinary machine; load() reads better ones."""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pycomm.errors import TopologyError


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Link:
    """A message of b bytes takes overhead_s + b / bytes_per_s on the link and arrives latency_s later."""

    latency_s: float
    bytes_per_s: float
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("latency_s", "overhead_s"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < math.inf):
                raise TopologyError(f"link: {name} is {value!r}; give seconds, 0 or more")
        if not (_is_number(self.bytes_per_s) and 0 < self.bytes_per_s < math.inf):
            raise TopologyError(f"link: bytes_per_s is {self.bytes_per_s!r}; give a positive rate")


SHARED_MEMORY: Final = Link(latency_s=1e-6, bytes_per_s=6e9, overhead_s=2e-7)
TCP: Final = Link(latency_s=50e-6, bytes_per_s=1.2e9, overhead_s=5e-6)
REDUCE_BYTES_PER_S: Final = 8e9


@dataclass(frozen=True)
class Host:
    """One machine: its name, the ranks on it in local-rank order, and the NIC they share."""

    name: str
    ranks: tuple[int, ...]
    nic: Link = TCP

    def __post_init__(self) -> None:
        if not (self.name and self.name.isprintable()):
            raise TopologyError(f"host name {self.name!r}: give a printable name of at least one character")
        if not self.ranks:
            raise TopologyError(f"host {self.name!r} has no ranks; leave it out or give it some")


@dataclass(frozen=True)
class Topology:
    """Hosts that hold ranks 0 .. n_ranks-1, each exactly once. Immutable; equal topologies give equal schedules.

    Raises TopologyError on a rank missing or on two hosts, on two hosts of one name, and on impossible rates."""

    hosts: tuple[Host, ...]
    inside: Link = SHARED_MEMORY
    reduce_bytes_per_s: float = REDUCE_BYTES_PER_S

    def __post_init__(self) -> None:
        if not self.hosts:
            raise TopologyError("topology has no hosts; give at least one")
        if not (_is_number(self.reduce_bytes_per_s) and 0 < self.reduce_bytes_per_s < math.inf):
            raise TopologyError(f"reduce_bytes_per_s is {self.reduce_bytes_per_s!r}; give a positive rate")
        named: set[str] = set()
        holder: dict[int, str] = {}
        for host in self.hosts:
            if host.name in named:
                raise TopologyError(f"two hosts are named {host.name!r}; give each its own name")
            named.add(host.name)
            for rank in host.ranks:
                if rank in holder:
                    raise TopologyError(
                        f"rank {rank} is on host {holder[rank]!r} and on host {host.name!r}; keep it on one"
                    )
                holder[rank] = host.name
        strays = sorted(holder.keys() ^ set(range(len(holder))))
        if strays:
            raise TopologyError(
                f"{len(holder)} ranks must be numbered 0 .. {len(holder) - 1}; missing or out of range: {strays[:8]}"
            )

    @staticmethod
    def from_host_ids(host_ids: Iterable[str], nic: Link = TCP, inside: Link = SHARED_MEMORY) -> Topology:
        """One label per rank, in rank order; ranks of one label share a host, wherever they stand."""
        ranks: dict[str, list[int]] = {}
        for rank, host_id in enumerate(host_ids):
            ranks.setdefault(host_id, []).append(rank)
        return Topology(tuple(Host(name, tuple(members), nic) for name, members in ranks.items()), inside)

    @staticmethod
    def emulated(ranks_per_host: Sequence[int], nic: Link = TCP, inside: Link = SHARED_MEMORY) -> Topology:
        """Hosts host0, host1, .. with that many consecutive ranks each."""
        ids = [f"host{host}" for host, count in enumerate(ranks_per_host) for _ in range(count)]
        return Topology.from_host_ids(ids, nic, inside)

    @cached_property
    def n_ranks(self) -> int:
        return sum(len(host.ranks) for host in self.hosts)

    @cached_property
    def host_index(self) -> NDArray[np.int64]:
        """[n_ranks]: the position in `hosts` of each rank's host."""
        index = np.empty(self.n_ranks, np.int64)
        for position, host in enumerate(self.hosts):
            index[list(host.ranks)] = position
        return index

    @cached_property
    def local_rank(self) -> NDArray[np.int64]:
        """[n_ranks]: the position of each rank on its host."""
        local = np.empty(self.n_ranks, np.int64)
        for host in self.hosts:
            local[list(host.ranks)] = np.arange(len(host.ranks))
        return local

    def host_of(self, rank: int) -> Host:
        self._require(rank)
        return self.hosts[int(self.host_index[rank])]

    def link(self, src: int, dst: int) -> Link:
        """What a message from src to dst crosses: `inside`, or the slower of both hosts' NICs."""
        here, there = self.host_of(src), self.host_of(dst)
        if here is there:
            return self.inside
        return Link(
            max(here.nic.latency_s, there.nic.latency_s),
            min(here.nic.bytes_per_s, there.nic.bytes_per_s),
            max(here.nic.overhead_s, there.nic.overhead_s),
        )

    def by_host(self, first: int = 0) -> NDArray[np.int64]:
        """[n_ranks]: all ranks, host after host, beginning with `first` and the rest of its host."""
        self._require(first)
        start = int(self.host_index[first])
        order = [rank for host in self.hosts[start:] + self.hosts[:start] for rank in host.ranks]
        order.remove(first)
        return np.array([first, *order], np.int64)

    def select(self, ranks: Sequence[int]) -> Topology:
        """The topology of a sub-group, whose rank i is ranks[i] here."""
        for rank in ranks:
            self._require(rank)
        members = {host.name: tuple(i for i, rank in enumerate(ranks) if rank in host.ranks) for host in self.hosts}
        hosts = tuple(Host(host.name, members[host.name], host.nic) for host in self.hosts if members[host.name])
        return Topology(hosts, self.inside, self.reduce_bytes_per_s)

    def fingerprint(self) -> str:
        """16 hexadecimal digits: equal for equal topologies, on every machine."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()[:16]

    def to_toml(self) -> str:
        lines = [f"reduce_bytes_per_s = {float(self.reduce_bytes_per_s)!r}", f"inside = {_link_toml(self.inside)}"]
        for host in self.hosts:
            name = json.dumps(host.name, ensure_ascii=False)
            lines += ["", "[[hosts]]", f"name = {name}", f"ranks = {list(host.ranks)}", f"nic = {_link_toml(host.nic)}"]
        return "\n".join(lines) + "\n"

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_toml(), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Topology:
        """Reads what save() writes. `inside`, `nic` and `reduce_bytes_per_s` may be left out.

        Raises TopologyError where the file is missing, is not TOML, or describes no possible topology."""
        try:
            document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise TopologyError(f"cannot read topology {path}: {error}") from error
        try:
            return _from_document(document)
        except TopologyError as error:
            raise TopologyError(f"topology {path}: {error}") from error

    def _require(self, rank: int) -> None:
        if not 0 <= rank < self.n_ranks:
            raise TopologyError(f"rank {rank} is not in this topology of {self.n_ranks} ranks")


def _link_toml(link: Link) -> str:
    return (
        f"{{ latency_s = {float(link.latency_s)!r}, bytes_per_s = {float(link.bytes_per_s)!r}, "
        f"overhead_s = {float(link.overhead_s)!r} }}"
    )


def _from_document(document: dict[str, Any]) -> Topology:
    _refuse_unknown("topology", document, ("hosts", "inside", "reduce_bytes_per_s"))
    entries = document.get("hosts")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise TopologyError("no [[hosts]] tables; give one for each host, with name and ranks")
    return Topology(
        tuple(_host(entry) for entry in entries),
        _link("inside", document.get("inside"), SHARED_MEMORY),
        document.get("reduce_bytes_per_s", REDUCE_BYTES_PER_S),
    )


def _host(entry: dict[str, Any]) -> Host:
    _refuse_unknown("host", entry, ("name", "ranks", "nic"))
    name, ranks = entry.get("name"), entry.get("ranks")
    if not isinstance(name, str):
        raise TopologyError(f"host name is {name!r}; give a string")
    if not isinstance(ranks, list) or not all(isinstance(r, int) and not isinstance(r, bool) for r in ranks):
        raise TopologyError(f"host {name!r}: ranks is {ranks!r}; give a list of whole numbers")
    return Host(name, tuple(ranks), _link(f"host {name!r}: nic", entry.get("nic"), TCP))


def _link(where: str, entry: object, default: Link) -> Link:
    if entry is None:
        return default
    if not isinstance(entry, dict):
        raise TopologyError(f"{where} is {entry!r}; give a table with latency_s and bytes_per_s")
    _refuse_unknown(where, entry, ("latency_s", "bytes_per_s", "overhead_s"))
    missing = [key for key in ("latency_s", "bytes_per_s") if key not in entry]
    if missing:
        raise TopologyError(f"{where} lacks {missing[0]}; give latency_s and bytes_per_s")
    return Link(entry["latency_s"], entry["bytes_per_s"], entry.get("overhead_s", 0.0))


def _refuse_unknown(where: str, entry: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in entry:
        if key not in known:
            raise TopologyError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")
