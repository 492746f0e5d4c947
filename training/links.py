"""The groups of a layout on a topology, and how long their collectives take: a layout's communication without a rank.

All groups of an axis exchange at the same time, so a NIC or an uplink that several of them cross gives each an equal
part of its rate. What other axes do meanwhile is not counted."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pycomm
from training.layout import Layout

Groups = NDArray[np.int64]  # [n_groups, n_ranks of each]
_NBYTES = tuple(4**power for power in range(4, 21))  # predicted at; times between are linear, as those of one algorithm
# Dimensions of the ranks as [pp, replica, ep, cp, tp] (training/mesh.py) that each group of a mesh spans.
_SPANS = {"tp": (4,), "cp": (3,), "ep": (2,), "dp": (1, 2, 3), "stage": (1, 2, 3, 4), "expert_replicas": (1, 3, 4)}
_OVER_TP: dict[str, dict[str, tuple[int, ...]]] = {  # by layout.experts_over_tp
    "none": {},
    "spread": {"ep": (2, 4), "expert_replicas": (1, 3)},
    "split": {"expert_replicas": (1, 3)},
}


def groups_of(layout: Layout) -> dict[str, Groups]:
    """By the names of training.mesh.AXES; "tied" and "pp" depend on where stages are: tied() and between_stages()."""
    ranks = _grid(layout)
    spans = _SPANS | _OVER_TP[layout.experts_over_tp]
    return {name: _spanning(ranks, dimensions) for name, dimensions in spans.items()}


def tied(layout: Layout, last: int) -> Groups:
    """The ranks of the first and the last stage that sum the gradient of the embedding's table."""
    return np.sort(_spanning(_grid(layout)[[0, last]], (0, 1, 2, 3)), 1)


def around_cp(layout: Layout) -> Groups:
    """Pairs of ranks next to each other in the context parallel ring, the last and the first too."""
    ranks = np.moveaxis(_grid(layout), 3, 0)
    return np.stack([ranks, np.roll(ranks, -1, 0)], -1).reshape(-1, 2)


def between_stages(layout: Layout, here: int, there: int) -> Groups:
    """Pairs of ranks of two pipeline ranks, of which the first sends to the second."""
    ranks = _grid(layout)
    return np.stack([ranks[here], ranks[there]], -1).reshape(-1, 2)


def _grid(layout: Layout) -> Groups:
    within = (layout.ep, layout.cp, layout.tp)
    if layout.outermost == "pp":
        return np.arange(layout.n_ranks).reshape(layout.pp, layout.replicas, *within)
    return np.arange(layout.n_ranks).reshape(layout.replicas, layout.pp, *within).swapaxes(0, 1)


def _spanning(ranks: Groups, dimensions: tuple[int, ...]) -> Groups:
    n = len(dimensions)
    moved = np.moveaxis(ranks, dimensions, range(-n, 0))
    return moved.reshape(-1, int(np.prod(moved.shape[-n:])))


class Links:
    """Seconds of collectives on a topology, by pycomm's closed form (pycomm.costs: the fastest candidate's time)."""

    def __init__(self, topology: Any) -> None:
        """topology: pycomm.Topology of all ranks."""
        self.topology = topology
        self._of_groups: dict[tuple[Any, ...], NDArray[np.float64]] = {}
        self._of_topology: dict[tuple[Any, ...], NDArray[np.float64]] = {}

    def seconds(self, groups: Groups, collective: str, nbytes: float) -> float:
        """Of the slowest of the groups, which all run the collective at once. nbytes as pycomm.costs has it: the
        longest buffer that a rank passes in or gets. 0.0 for groups of one rank and for no groups."""
        if groups.size == 0 or groups.shape[1] == 1 or nbytes <= 0:
            return 0.0
        key = (groups.tobytes(), groups.shape, collective)
        if key not in self._of_groups:
            sends = collective == "send"
            times = [self._times(each, "broadcast" if sends else collective) for each in self._distinct(groups, sends)]
            self._of_groups[key] = np.max(times, axis=0)
        return float(np.interp(nbytes, _NBYTES, self._of_groups[key]))

    def send_s(self, pairs: Groups, nbytes: float) -> float:
        """Of a message from the first rank of each pair to the second, all pairs at once: a link carries what leaves a
        host beside what comes there."""
        return self.seconds(pairs, "send", nbytes)

    def _times(self, topology: Any, collective: str) -> NDArray[np.float64]:
        key = (*_shape(topology), collective)
        if key not in self._of_topology:
            self._of_topology[key] = pycomm.costs(topology, collective, _NBYTES).predicted_s.min(axis=0)
        return self._of_topology[key]

    def _distinct(self, groups: Groups, sends: bool) -> list[Any]:
        """The topology of each group, with its part of what it shares; one for those that are alike. sends: groups are
        pairs, of which the first rank sends."""
        topology = self.topology
        hosts_of = topology.host_index[groups]

        def crossing(hosts: list[int]) -> int:
            """The groups that cross what is around some hosts; of messages those of the busier direction."""
            inside = np.isin(hosts_of, hosts)
            if sends:
                return int(max((inside[:, 0] & ~inside[:, 1]).sum(), (~inside[:, 0] & inside[:, 1]).sum()))
            return int((inside.any(1) & ~inside.all(1)).sum())

        climbing = {
            switch.name: crossing([host for host in self._hosts() if index in topology.above[host]])
            for index, switch in enumerate(topology.switches)
        }
        parts = dataclasses.replace(
            topology,
            hosts=tuple(
                dataclasses.replace(
                    host, nics=tuple(dataclasses.replace(nic, link=_part(nic.link, n)) for nic in host.nics)
                )
                for index, host in enumerate(topology.hosts)
                for n in [crossing([index])]
            ),
            switches=tuple(
                dataclasses.replace(switch, uplink=_part(switch.uplink, climbing[switch.name]))
                for switch in topology.switches
            ),
        )
        found = {}
        for group in groups.tolist():
            each = parts.select(group)
            found.setdefault(_shape(each), each)
        return list(found.values())

    def _hosts(self) -> range:
        return range(len(self.topology.hosts))


def _part(link: Any, n: int) -> Any:
    return dataclasses.replace(link, bytes_per_s=link.bytes_per_s / max(1, n))


def _shape(topology: Any) -> tuple[Any, ...]:
    """Equal for topologies that differ in names alone."""
    names = [switch.name for switch in topology.switches]
    hosts = tuple(
        (host.ranks, tuple(nic.link for nic in host.nics), names.index(host.switch) if host.switch else -1, host.numa)
        for host in topology.hosts
    )
    uplinks = tuple((each.uplink, names.index(each.parent) if each.parent else -1) for each in topology.switches)
    return hosts, topology.inside, topology.reduce_bytes_per_s, uplinks
