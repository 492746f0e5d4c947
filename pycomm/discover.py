"""survey(group): what every rank finds out about its machine, gathered into one Topology that all ranks agree on.

Hosts are those of the group: ranks that share memory, PYCOMM_HOST_ID's labels included. Links get the rates that the
interfaces state and otherwise the default figures; what is not known is said in `unknown`, one line each. measure.py
replaces stated and default figures by measured ones."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pycomm.gpus import Gpu, find_gpus
from pycomm.machine import Interface, Machine, this_machine
from pycomm.topology import SHARED_MEMORY, TCP, Host, Link, Nic, Topology

__all__ = ["Survey", "Topology", "describe", "discover", "survey"]

if TYPE_CHECKING:
    from pycomm.group import Group


@dataclass(frozen=True)
class Survey:
    """topology: of the group's ranks. machines: [n_ranks], each rank's own view. gpus: of each host, by its position in
    topology.hosts. unknown: what could not be found out, with the reason, one line each."""

    topology: Topology
    machines: tuple[Machine, ...]
    gpus: tuple[tuple[Gpu, ...], ...]
    unknown: tuple[str, ...]

    def machine_of(self, host: int) -> Machine:
        """The first rank's view of the host at this position."""
        return self.machines[self.topology.hosts[host].ranks[0]]

    def hardware(self) -> tuple[str, ...]:
        """[n_hosts]: what a measurement on each host depends on, as text; equal on equal machines."""
        return tuple(describe(self.machine_of(host), gpus) for host, gpus in enumerate(self.gpus))


def discover(group: Group | None = None) -> Topology:
    """The topology of a group's ranks; without a group, of this process alone.

    With a group every rank calls it, and all get the same. Raises PycommError where MASTER_ADDR is given and there is
    no route to it."""
    return survey(group).topology


# topology.py knows no system to ask; pycomm.Topology, which comes from here, has this way to make one as well.
Topology.discover = staticmethod(discover)  # type: ignore[attr-defined]


def survey(group: Group | None = None) -> Survey:
    """discover() with all that was found: see there."""
    gpus, unknown_gpus = find_gpus()
    if group is None:
        machine = this_machine(in_a_job="MASTER_ADDR" in os.environ or "PYCOMM_ADDRESS" in os.environ)
        host_ids: tuple[str, ...] = (os.environ.get("PYCOMM_HOST_ID") or machine.host_id,)
        return _merge(host_ids, [_pack(machine, gpus, unknown_gpus)])
    return _merge(group.host_ids, gather_bytes(group, _pack(this_machine(), gpus, unknown_gpus)))


def describe(machine: Machine, gpus: Sequence[Gpu]) -> str:
    """The machine as far as it bears on measured times: "AMD EPYC, 2 cores, eth0 (ena), 8 NVIDIA H200"."""
    links = ", ".join(_describe_interface(machine.interface(name)) for name in machine.carriers)
    n_cores = sum(len(cores) for _, cores in machine.numa) or len(machine.cores)
    cards = "".join(f", {n} {name}" for name, n in sorted(Counter(gpu.name for gpu in gpus).items()))
    return f"{machine.cpu}, {n_cores} cores, {links or 'no link'}{cards}"


def _describe_interface(interface: Interface) -> str:
    rate = "" if interface.bytes_per_s is None else f", {interface.bytes_per_s * 8 / 1e6:.0f} Mbit/s"
    return f"{interface.name} ({interface.driver}{rate})"


def _pack(machine: Machine, gpus: tuple[Gpu, ...], unknown: tuple[str, ...]) -> bytes:
    machine = dataclasses.replace(machine, unknown=machine.unknown + unknown)
    return json.dumps({"machine": dataclasses.asdict(machine), "gpus": [dataclasses.asdict(g) for g in gpus]}).encode()


def _unpack(data: bytes) -> tuple[Machine, tuple[Gpu, ...]]:
    document: dict[str, Any] = json.loads(data)
    fields = document["machine"]
    fields["interfaces"] = tuple(
        Interface(**{**one, "addresses": tuple(one["addresses"])}) for one in fields["interfaces"]
    )
    fields["numa"] = tuple((node, tuple(cores)) for node, cores in fields["numa"])
    for name in ("cores", "carriers", "unknown"):
        fields[name] = tuple(fields[name])
    return Machine(**fields), tuple(Gpu(**{**one, "peers": tuple(one["peers"])}) for one in document["gpus"])


def gather_bytes(group: Group, mine: bytes) -> list[bytes]:
    """Every rank's bytes, by rank; their lengths may differ. All ranks together."""
    sizes = np.empty(group.size, np.int64)
    group.all_gather(sizes, np.array([len(mine)], np.int64))
    everyone = np.empty(int(sizes.sum()), np.uint8)
    group.all_gather(everyone, np.frombuffer(mine, np.uint8), counts=sizes.tolist())
    ends = np.cumsum(sizes).tolist()
    return [everyone[end - size : end].tobytes() for end, size in zip(ends, sizes.tolist(), strict=True)]


def _merge(host_ids: tuple[str, ...], entries: list[bytes]) -> Survey:
    """One survey from the hosts' names, by rank, and every rank's facts: the same on every rank."""
    found = [_unpack(entry) for entry in entries]
    machines = tuple(machine for machine, _ in found)
    plain = Topology.from_host_ids(host_ids)
    unknown: list[str] = []
    hosts = [_host(host, machines, unknown) for host in plain.hosts]
    unknown += _shared_machines(plain, machines)
    gpus = tuple(found[host.ranks[0]][1] for host in plain.hosts)
    return Survey(Topology(tuple(hosts), SHARED_MEMORY), machines, gpus, tuple(dict.fromkeys(unknown)))


def _host(host: Host, machines: tuple[Machine, ...], unknown: list[str]) -> Host:
    here = f"host {host.name}"
    for rank in host.ranks:
        unknown += [f"{here}: {text}" for text in machines[rank].unknown]
    machine = machines[host.ranks[0]]
    nics = []
    for name in machine.carriers:
        interface = machine.interface(name)
        if interface.bytes_per_s is None:
            unknown.append(f"{here}: the rate of {name}: {interface.why}; {_rate(TCP.bytes_per_s)} is assumed")
        nics.append(Nic(name, Link(TCP.latency_s, interface.bytes_per_s or TCP.bytes_per_s, TCP.overhead_s)))
    if not nics:
        unknown.append(f"{here}: its NICs: none carries this job's addresses; {_rate(TCP.bytes_per_s)} is assumed")
    return dataclasses.replace(host, nics=tuple(nics) or host.nics, numa=_numa(host, machines, unknown))


def _numa(host: Host, machines: tuple[Machine, ...], unknown: list[str]) -> tuple[tuple[int, ...], ...]:
    nodes = {rank: machines[rank].numa_node for rank in host.ranks}
    free = [rank for rank, node in nodes.items() if node is None]
    if free:
        cores = "have cores of several; pin each rank to one" if machines[free[0]].numa else "cannot tell"
        unknown.append(f"host {host.name}: the NUMA nodes of ranks {', '.join(map(str, free))}: they {cores}")
        return ()
    members: dict[int, list[int]] = {}
    for rank, node in sorted(nodes.items(), key=lambda item: (item[1] or 0, item[0])):
        members.setdefault(node or 0, []).append(rank)
    return tuple(tuple(ranks) for ranks in members.values())


def _shared_machines(topology: Topology, machines: tuple[Machine, ...]) -> list[str]:
    """Hosts of one boot id are emulated: they share cores, and what is measured between them is this machine's."""
    together: dict[str, list[str]] = {}
    for host in topology.hosts:
        together.setdefault(machines[host.ranks[0]].boot_id, []).append(host.name)
    return [
        f"a real network between hosts {', '.join(names)}: they are one machine (one boot id)"
        for names in together.values()
        if len(names) > 1
    ]


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:.4g} Gbit/s"
