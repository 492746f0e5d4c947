"""Where the ranks are and what joins them: hosts, links and their speed. Planners, simulate and the tuner read it.

A rank reaches the ranks of its own host over `inside` (shared memory) and all others through its host's NICs, which all
ranks of the host share, and through the uplinks of the switches between them, which all hosts below share; everything
full duplex. The default figures describe an ordinary machine; load() reads better ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from pycomm import topology_file
from pycomm.errors import TopologyError
from pycomm.hosts import SHARED_MEMORY, TCP, Host, Link, Nic, Switch, is_number, joined, slowest

__all__ = ["REDUCE_BYTES_PER_S", "SHARED_MEMORY", "TCP", "Host", "Link", "Nic", "Switch", "Topology", "WireLinks"]

WireLinks = Literal["hosts", "racks"]  # between hosts; between hosts that hang from different switches alone

REDUCE_BYTES_PER_S: Final = 8e9


@dataclass(frozen=True)
class Topology:
    """Hosts that hold ranks 0 .. n_ranks-1, each exactly once. Immutable; equal topologies give equal schedules.

    Raises TopologyError on a rank missing or on two hosts, on two hosts or switches of one name, on switches that do
    not exist or stand in a circle, and on impossible rates."""

    hosts: tuple[Host, ...]
    inside: Link = SHARED_MEMORY
    reduce_bytes_per_s: float = REDUCE_BYTES_PER_S
    switches: tuple[Switch, ...] = ()

    def __post_init__(self) -> None:
        if not self.hosts:
            raise TopologyError("topology has no hosts; give at least one")
        if not (is_number(self.reduce_bytes_per_s) and 0 < self.reduce_bytes_per_s < math.inf):
            raise TopologyError(f"reduce_bytes_per_s is {self.reduce_bytes_per_s!r}; give a positive rate")
        self._check_switches()
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

    def _check_switches(self) -> None:
        named = {switch.name: switch for switch in self.switches}
        if len(named) < len(self.switches):
            names = [switch.name for switch in self.switches]
            twice = next(name for name in names if names.count(name) > 1)
            raise TopologyError(f"two switches are named {twice!r}; give each its own name")
        below: list[tuple[str, str | None]] = [(f"switch {switch.name!r}", switch.parent) for switch in self.switches]
        below += [(f"host {host.name!r}", host.switch) for host in self.hosts]
        for what, above in below:
            if above is not None and above not in named:
                raise TopologyError(f"{what} hangs from switch {above!r}, which is not among {list(named)[:8]}")
        for switch in self.switches:
            seen, above = [switch.name], switch.parent
            while above is not None:
                if above in seen:
                    circle = " -> ".join([*seen[seen.index(above) :], above])
                    raise TopologyError(f"switches stand in a circle: {circle}; leave out the parent of one of them")
                seen.append(above)
                above = named[above].parent

    @staticmethod
    def from_host_ids(host_ids: Iterable[str], nic: Link = TCP, inside: Link = SHARED_MEMORY) -> Topology:
        """One label per rank, in rank order; ranks of one label share a host, wherever they stand."""
        ranks: dict[str, list[int]] = {}
        for rank, host_id in enumerate(host_ids):
            ranks.setdefault(host_id, []).append(rank)
        nics = (Nic("nic0", nic),)
        return Topology(tuple(Host(name, tuple(members), nics) for name, members in ranks.items()), inside)

    @staticmethod
    def emulated(ranks_per_host: Sequence[int], nic: Link = TCP, inside: Link = SHARED_MEMORY) -> Topology:
        """Hosts host0, host1, .. with that many consecutive ranks each."""
        ids = [f"host{host}" for host, count in enumerate(ranks_per_host) for _ in range(count)]
        return Topology.from_host_ids(ids, nic, inside)

    # Where ranks are.

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
    def rack_index(self) -> NDArray[np.int64]:
        """[n_ranks]: equal for ranks whose hosts hang from one switch. A host that hangs from none is its own rack."""
        switches = {switch.name: position for position, switch in enumerate(self.switches)}
        alone = len(self.switches)
        of_host = [alone + index if h.switch is None else switches[h.switch] for index, h in enumerate(self.hosts)]
        return np.array(of_host, np.int64)[self.host_index]

    def sides(self, links: WireLinks) -> NDArray[np.int64]:
        """[n_ranks]: different for ranks that have a link of that class between them."""
        return self.host_index if links == "hosts" else self.rack_index

    @cached_property
    def local_rank(self) -> NDArray[np.int64]:
        """[n_ranks]: the position of each rank on its host."""
        local = np.empty(self.n_ranks, np.int64)
        for host in self.hosts:
            local[list(host.ranks)] = np.arange(len(host.ranks))
        return local

    @cached_property
    def above(self) -> NDArray[np.int64]:
        """[n_hosts, depth]: the positions in `switches` of those above each host, the core's child first; -1 where
        there are no more. A message between two hosts crosses the uplinks of the columns in which they differ."""
        index = {switch.name: position for position, switch in enumerate(self.switches)}
        chains: list[list[int]] = []
        for host in self.hosts:
            chain, name = [], host.switch
            while name is not None:
                chain.append(index[name])
                name = self.switches[index[name]].parent
            chains.append(chain[::-1])
        above = np.full((len(chains), max(map(len, chains))), -1, np.int64)
        for row, chain in zip(above, chains, strict=True):
            row[: len(chain)] = chain
        return above

    def host_of(self, rank: int) -> Host:
        self._require(rank)
        return self.hosts[int(self.host_index[rank])]

    def uplinks(self, src: int, dst: int) -> tuple[Switch, ...]:
        """The switches whose uplinks a message from rank src to rank dst crosses: outwards first, then inwards."""
        self._require(src)
        self._require(dst)
        here, there = self.above[self.host_index[[src, dst]]]
        differ = here != there
        crossed = [*here[differ & (here >= 0)][::-1], *there[differ & (there >= 0)]]
        return tuple(self.switches[position] for position in crossed)

    def link(self, src: int, dst: int) -> Link:
        """What a message from src to dst crosses: `inside`, or both hosts' NICs and the uplinks between them, of which
        the slowest counts (hosts.slowest)."""
        here, there = self.host_of(src), self.host_of(dst)
        if here is there:
            return self.inside
        return slowest([joined(here.nics, there.nics), *(switch.uplink for switch in self.uplinks(src, dst))])

    def hosts_in_order(self, first: int = 0) -> NDArray[np.int64]:
        """[n_hosts]: positions in `hosts`, switch after switch on every level, beginning with host `first` and its
        neighbours."""
        columns = [*self.above.T, np.arange(len(self.hosts))]
        keys = [(column - column[first]) % (int(column.max()) + 2) for column in columns]
        return np.lexsort(keys[::-1])

    def by_host(self, first: int = 0) -> NDArray[np.int64]:
        """[n_ranks]: all ranks, host after host (see hosts_in_order), beginning with `first` and the rest of its
        host."""
        self._require(first)
        order = [rank for host in self.hosts_in_order(int(self.host_index[first])) for rank in self.hosts[host].ranks]
        order.remove(first)
        return np.array([first, *order], np.int64)

    # Other forms.

    def select(self, ranks: Sequence[int]) -> Topology:
        """The topology of a sub-group, whose rank i is ranks[i] here: with the hosts and switches that it still has."""
        for rank in ranks:
            self._require(rank)
        new = {rank: position for position, rank in enumerate(ranks)}
        members = [tuple(sorted(new[rank] for rank in host.ranks if rank in new)) for host in self.hosts]
        kept = [index for index, here in enumerate(members) if here]
        hosts = []
        for index in kept:
            host = self.hosts[index]
            numa = (tuple(new[rank] for rank in node if rank in new) for node in host.numa)
            hosts.append(Host(host.name, members[index], host.nics, host.switch, tuple(node for node in numa if node)))
        in_use = set(self.above[kept].ravel().tolist())
        switches = tuple(switch for index, switch in enumerate(self.switches) if index in in_use)
        return Topology(tuple(hosts), self.inside, self.reduce_bytes_per_s, switches)

    def fingerprint(self) -> str:
        """16 hexadecimal digits: equal for equal topologies, on every machine."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()[:16]

    def to_toml(self) -> str:
        return topology_file.write(self.hosts, self.inside, self.reduce_bytes_per_s, self.switches)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_toml(), encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Topology:
        """Reads what save() writes (topology_file has the format).

        Raises TopologyError where the file is missing, is not TOML, or describes no possible topology."""
        fields = topology_file.read(path)
        try:
            return Topology(**fields)
        except TopologyError as error:
            raise TopologyError(f"topology {path}: {error}") from error

    def _require(self, rank: int) -> None:
        if not 0 <= rank < self.n_ranks:
            raise TopologyError(f"rank {rank} is not in this topology of {self.n_ranks} ranks")
