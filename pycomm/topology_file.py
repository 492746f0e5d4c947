"""Topologies in TOML: what Topology.load() reads and Topology.save() writes.

    reduce_bytes_per_s = 8e9
    inside = { latency_s = 1e-6, bytes_per_s = 6e9 }

    [[switches]]
    name = "rack0"
    uplink = { latency_s = 1e-4, bytes_per_s = 5e9 }

    [[hosts]]
    name = "a"
    ranks = [0, 1, 2, 3]
    switch = "rack0"
    nics = [{ name = "eth0", latency_s = 5e-5, bytes_per_s = 1.2e9, overhead_s = 5e-6 }]
    numa = [[0, 1], [2, 3]]

`nic = { ... }` is one NIC named nic0. All but the hosts' names and ranks, and a switch's name and uplink, may be left
out."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from pycomm.errors import TopologyError
from pycomm.hosts import TCP, Host, Link, Nic, Switch


class Fields(TypedDict, total=False):
    """The arguments of Topology that a file gives."""

    hosts: tuple[Host, ...]
    inside: Link
    reduce_bytes_per_s: float
    switches: tuple[Switch, ...]


def read(path: str | Path) -> Fields:
    """Raises TopologyError where the file is missing, is not TOML, or describes no possible host, link or switch."""
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TopologyError(f"cannot read topology {path}: {error}") from error
    try:
        return _fields(document)
    except TopologyError as error:
        raise TopologyError(f"topology {path}: {error}") from error


def _fields(document: dict[str, Any]) -> Fields:
    _refuse_unknown("topology", document, ("hosts", "switches", "inside", "reduce_bytes_per_s"))
    hosts = _tables(document, "hosts")
    if not hosts:
        raise TopologyError("no [[hosts]] tables; give one for each host, with name and ranks")
    fields: Fields = {
        "hosts": tuple(_host(entry) for entry in hosts),
        "switches": tuple(_switch(entry) for entry in _tables(document, "switches")),
    }
    if "inside" in document:
        fields["inside"] = _link("inside", document["inside"])
    if "reduce_bytes_per_s" in document:
        fields["reduce_bytes_per_s"] = document["reduce_bytes_per_s"]
    return fields


def write(hosts: Iterable[Host], inside: Link, reduce_bytes_per_s: float, switches: Iterable[Switch]) -> str:
    """The same topology gives the same text on every machine."""
    lines = [f"reduce_bytes_per_s = {float(reduce_bytes_per_s)!r}", f"inside = {{ {_link_toml(inside)} }}"]
    for switch in switches:
        lines += ["", "[[switches]]", f"name = {_quoted(switch.name)}", f"uplink = {{ {_link_toml(switch.uplink)} }}"]
        if switch.parent is not None:
            lines.append(f"parent = {_quoted(switch.parent)}")
    for host in hosts:
        lines += ["", "[[hosts]]", f"name = {_quoted(host.name)}", f"ranks = {list(host.ranks)}"]
        nics = ", ".join(f"{{ name = {_quoted(nic.name)}, {_link_toml(nic.link)} }}" for nic in host.nics)
        lines.append(f"nics = [{nics}]")
        if host.switch is not None:
            lines.append(f"switch = {_quoted(host.switch)}")
        if host.numa:
            lines.append(f"numa = {[list(node) for node in host.numa]}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _link_toml(link: Link) -> str:
    return (
        f"latency_s = {float(link.latency_s)!r}, bytes_per_s = {float(link.bytes_per_s)!r}, "
        f"overhead_s = {float(link.overhead_s)!r}"
    )


def _tables(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = document.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise TopologyError(f"no [[{key}]] tables but {key} = {entries!r}; write a [[{key}]] table for each of them")
    return entries


def _host(entry: dict[str, Any]) -> Host:
    _refuse_unknown("host", entry, ("name", "ranks", "nics", "nic", "switch", "numa"))
    name = _string("host name", entry.get("name"))
    where = f"host {name!r}"
    ranks = _whole_numbers(f"{where}: ranks", entry.get("ranks"))
    if "nic" in entry and "nics" in entry:
        raise TopologyError(f"{where} has both nic and nics; keep nics")
    nics: Sequence[Nic] = (Nic("nic0", TCP),)
    if "nic" in entry:
        nics = (Nic("nic0", _link(f"{where}: nic", entry["nic"])),)
    elif "nics" in entry:
        nics = _nics(where, entry["nics"])
    switch = _string(f"{where}: switch", entry["switch"]) if "switch" in entry else None
    numa = entry.get("numa", [])
    if not isinstance(numa, list):
        raise TopologyError(f"{where}: numa is {numa!r}; give a list of ranks for each NUMA node")
    nodes = tuple(_whole_numbers(f"{where}: a NUMA node", node) for node in numa)
    return Host(name, ranks, tuple(nics), switch, nodes)


def _nics(where: str, entries: object) -> list[Nic]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise TopologyError(f"{where}: nics is {entries!r}; give a list of tables with name, latency_s and bytes_per_s")
    found = []
    for entry in entries:
        name = _string(f"{where}: NIC name", entry.get("name"))
        figures = {key: value for key, value in entry.items() if key != "name"}
        found.append(Nic(name, _link(f"{where}: NIC {name!r}", figures)))
    return found


def _switch(entry: dict[str, Any]) -> Switch:
    _refuse_unknown("switch", entry, ("name", "parent", "uplink"))
    name = _string("switch name", entry.get("name"))
    parent = _string(f"switch {name!r}: parent", entry["parent"]) if "parent" in entry else None
    return Switch(name, _link(f"switch {name!r}: uplink", entry.get("uplink")), parent)


def _string(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise TopologyError(f"{where} is {value!r}; give a string")
    return value


def _whole_numbers(where: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
        raise TopologyError(f"{where} is {value!r}; give a list of whole numbers")
    return tuple(value)


def _link(where: str, entry: object) -> Link:
    if not isinstance(entry, dict):
        raise TopologyError(f"{where} is {entry!r}; give a table with latency_s and bytes_per_s")
    _refuse_unknown(where, entry, ("latency_s", "bytes_per_s", "overhead_s"))
    missing = [key for key in ("latency_s", "bytes_per_s") if key not in entry]
    if missing:
        raise TopologyError(f"{where} lacks {missing[0]}; give latency_s and bytes_per_s")
    try:
        return Link(entry["latency_s"], entry["bytes_per_s"], entry.get("overhead_s", 0.0))
    except TopologyError as error:
        raise TopologyError(f"{where}: {error}") from error


def _refuse_unknown(where: str, entry: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in entry:
        if key not in known:
            raise TopologyError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")
