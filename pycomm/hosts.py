"""What a topology is made of: links, the NICs of a host, hosts, and the switches between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from pycomm.errors import TopologyError


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require_name(what: str, name: object) -> None:
    if not (isinstance(name, str) and name and name.isprintable()):
        raise TopologyError(f"{what} name {name!r}: give a printable name of at least one character")


@dataclass(frozen=True)
class Link:
    """A message of b bytes takes overhead_s + b / bytes_per_s on the link and arrives latency_s later."""

    latency_s: float
    bytes_per_s: float
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("latency_s", "overhead_s"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value < math.inf):
                raise TopologyError(f"link: {name} is {value!r}; give seconds, 0 or more")
        if not (is_number(self.bytes_per_s) and 0 < self.bytes_per_s < math.inf):
            raise TopologyError(f"link: bytes_per_s is {self.bytes_per_s!r}; give a positive rate")


SHARED_MEMORY: Final = Link(latency_s=1e-6, bytes_per_s=6e9, overhead_s=2e-7)
TCP: Final = Link(latency_s=50e-6, bytes_per_s=1.2e9, overhead_s=5e-6)


def slowest(links: Iterable[Link]) -> Link:
    """A path over all of `links`: the largest latency and overhead, the smallest rate.

    The latency of a link is that of a message which crosses it from rank to rank, so latencies do not add up."""
    path = tuple(links)
    return Link(
        max(link.latency_s for link in path),
        min(link.bytes_per_s for link in path),
        max(link.overhead_s for link in path),
    )


@dataclass(frozen=True)
class Nic:
    """One network interface of a host, full duplex. NIC i of a host speaks to NIC i of another (docs/tcp.md)."""

    name: str
    link: Link

    def __post_init__(self) -> None:
        _require_name("NIC", self.name)


def joined(here: Sequence[Nic], there: Sequence[Nic]) -> Link:
    """What a message between two hosts of these NICs has: NIC i speaks to NIC i and each gets what it can carry, so
    rates add up; where one host has fewer, its NICs speak to several (docs/tcp.md). Latency and overhead are the
    largest."""
    rates_here, rates_there = ([nic.link.bytes_per_s for nic in nics] for nics in (here, there))
    path = slowest(nic.link for nics in (here, there) for nic in nics)
    if len(here) == len(there):
        return Link(path.latency_s, sum(map(min, rates_here, rates_there)), path.overhead_s)
    return Link(path.latency_s, min(sum(rates_here), sum(rates_there)), path.overhead_s)


@dataclass(frozen=True)
class Switch:
    """What the hosts and switches below it share towards the rest: `uplink`, full duplex, to the switch `parent`, or to
    the core, which limits nothing. A rack is a switch, and so is a site at the end of a WAN."""

    name: str
    uplink: Link
    parent: str | None = None

    def __post_init__(self) -> None:
        _require_name("switch", self.name)


@dataclass(frozen=True)
class Host:
    """One machine: its name, its ranks in local-rank order, its NICs, which its ranks share, and the switch it hangs
    from. numa: the ranks by NUMA node, where that is known; empty where it is not.

    Raises TopologyError for impossible names, no ranks or NICs, two NICs of one name, and NUMA nodes that do not hold
    each rank of the host once."""

    name: str
    ranks: tuple[int, ...]
    nics: tuple[Nic, ...] = (Nic("nic0", TCP),)
    switch: str | None = None
    numa: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        _require_name("host", self.name)
        if not self.ranks:
            raise TopologyError(f"host {self.name!r} has no ranks; leave it out or give it some")
        if not self.nics:
            raise TopologyError(f"host {self.name!r} has no NICs; give at least one, or leave nics out")
        names = [nic.name for nic in self.nics]
        for name in names:
            if names.count(name) > 1:
                raise TopologyError(f"host {self.name!r}: two NICs are named {name!r}; give each its own name")
        if self.numa and sorted(rank for node in self.numa for rank in node) != sorted(self.ranks):
            raise TopologyError(
                f"host {self.name!r}: numa is {[list(node) for node in self.numa]}; each of the host's ranks "
                f"{list(self.ranks)} must be on exactly one NUMA node"
            )

    @cached_property
    def nic(self) -> Link:
        """All NICs together, over which large messages are striped: their rates added, the largest latency and
        overhead."""
        links = [nic.link for nic in self.nics]
        together = slowest(links)
        return Link(together.latency_s, sum(link.bytes_per_s for link in links), together.overhead_s)
