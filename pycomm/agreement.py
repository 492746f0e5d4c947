"""What a job's ranks agree on at set-up: the topology that was given and the tuning table that was found.

Rank 0 reads files, checks that they are of this job, and hands them to the others through the store.

| variable | meaning |
|---|---|
| PYCOMM_TOPOLOGY | a topology in TOML (topology_file.py); of one with switches, these alone beside a table that holds |
| PYCOMM_CUDA_TOPOLOGY | the same of GPUs and what joins them: which way their collectives take (device_choice.py) |
| PYCOMM_CUDA_HIERARCHICAL_BYTES | from how many bytes on they go inside hosts and across in turn, instead of that |
| PYCOMM_CUDA_BETWEEN_HOSTS | what joins hosts for GPUs' tensors: nccl, tcp, auto: tcp where NCCL cannot |
| PYCOMM_CUDA_PEER_BYTES | up to that size an all_reduce on one host is the peer kernel's; 0, the default: none |
| PYCOMM_CUDA_MAX_CTAS | the most multiprocessors that a collective of NCCL's takes |
| PYCOMM_TUNE_FILE | the tuning table; empty: none |
| PYCOMM_TUNE_DIR | the folder of tables, searched where no file is named; else XDG_CACHE_HOME/pycomm, ~/.cache/pycomm |
| PYCOMM_WIRE_LINKS | hosts, or racks: on which links a call's `wire` codes (docs/wire.md); racks needs a topology |
| PYCOMM_EXPLAIN | 1: a line on the stderr of a group's rank 0 for each size class that comes into use (planning.py) |

Rank 0's variables count; a rank whose PYCOMM_TOPOLOGY is another one says so. What a wrong one raises on rank 0 the
others raise as well."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Final

from torch._C._distributed_c10d import PrefixStore, Store

from pycomm import _C, planners, project
from pycomm.discover import describe
from pycomm.errors import InvalidArgument, PeerLost, PeerTimeout, PycommWarning, TopologyError
from pycomm.gpus import find_gpus
from pycomm.machine import this_machine
from pycomm.planning import JobPlan
from pycomm.table import from_json, layout_key, load, topology_from_document, topology_to_document
from pycomm.topology import Topology, WireLinks

_HASH: Final = re.compile("-[0-9a-f]{6,8}$")  # what the engine appends to a host's name


def agree(store: Store, endpoint: _C.Endpoint, topology: Topology | str | Path | None, timeout_s: float) -> JobPlan:
    """The job's plan, the same on every rank. Collective over the store. topology: as init() takes it.

    Raises TopologyError on every rank where rank 0's topology cannot be read or is not one of this job. Warns
    (PycommWarning) on rank 0 where a table is refused, and on ranks whose topology is not rank 0's, which stands."""
    own, limit = PrefixStore("planning", store), timedelta(seconds=timeout_s)
    if endpoint.rank == 0:
        return _lead(own, endpoint, topology, limit)
    job = json.loads(_await(own, ["job"], limit, "rank 0")[0])
    if job["error"]:
        raise TopologyError(job["error"])
    if job["asks_hardware"] and endpoint.rank in _first_ranks(endpoint.host_ids):
        own.set(f"hardware/{endpoint.rank}", describe(this_machine(), find_gpus()[0]))
    led = topology_from_document(job["topology"]) if job["topology"] else None
    _compare(endpoint, topology, led)
    (text,) = _await(own, ["table"], limit, "rank 0")
    return _job_plan(endpoint, led, text, job)


def table_folder() -> Path:
    """Where tables are kept: PYCOMM_TUNE_DIR, else XDG_CACHE_HOME/pycomm, else ~/.cache/pycomm.

    Raises InvalidArgument where there is none of these."""
    if folder := os.environ.get("PYCOMM_TUNE_DIR"):
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pycomm"
    except RuntimeError as error:
        raise InvalidArgument(f"{error} Set PYCOMM_TUNE_DIR to a folder for tuning tables.") from error


@cache
def engine_version() -> str:
    """The version, and a digest of what measured times depend on: the engine's binary, planners and projection."""
    digest = hashlib.sha256()
    folder = Path(str(planners.__file__)).parent
    for path in [Path(str(_C.__file__)), Path(str(project.__file__)), *sorted(folder.glob("*.py"))]:
        digest.update(path.read_bytes())
    try:
        version = importlib.metadata.version("pycomm")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        version = "0"
    return f"{version}+{digest.hexdigest()[:12]}"


def _given(topology: Topology | str | Path | None) -> Topology | None:
    """What init() was given, else what PYCOMM_TOPOLOGY names. Raises TopologyError where the file is none."""
    named = topology if topology is not None else os.environ.get("PYCOMM_TOPOLOGY") or None
    return named if named is None or isinstance(named, Topology) else Topology.load(named)


def _lead(own: Store, endpoint: _C.Endpoint, topology: Topology | str | Path | None, limit: timedelta) -> JobPlan:
    """Rank 0's part."""
    plain = Topology.from_host_ids(endpoint.host_ids)
    explains = os.environ.get("PYCOMM_EXPLAIN", "0") not in ("", "0")
    job: dict[str, Any] = {"error": "", "topology": None, "asks_hardware": False, "explains": explains}
    files = _table_files(plain)
    try:
        given = _given(topology)
        led = given and fit(given, endpoint.host_ids)
        job |= {"topology": led and topology_to_document(led), "asks_hardware": bool(files)}
        job |= _device_settings(endpoint.host_ids)
        job["wire_links"] = _wire_links(led)
    except (TopologyError, InvalidArgument) as error:
        job["error"] = str(error)
        raise
    finally:
        own.set("job", json.dumps(job))
    text = ""
    try:
        if files:
            firsts = _first_ranks(endpoint.host_ids)
            own.set("hardware/0", describe(this_machine(), find_gpus()[0]))
            keys = [f"hardware/{rank}" for rank in firsts]
            hardware = _await(own, keys, limit, f"one of ranks {', '.join(map(str, firsts))}")
            text = _find_table(files, with_switches(plain, led) if led else plain, hardware)
    finally:
        own.set("table", text)
    return _job_plan(endpoint, led, text, job)


def _device_settings(host_ids: Sequence[str]) -> dict[str, Any]:
    """What the environment says of collectives on GPUs. Raises TopologyError, InvalidArgument."""
    path, nbytes, peer_nbytes, max_ctas = (
        os.environ.get(f"PYCOMM_CUDA_{name}") or None
        for name in ("TOPOLOGY", "HIERARCHICAL_BYTES", "PEER_BYTES", "MAX_CTAS")
    )
    if max_ctas is not None and not (max_ctas.isdecimal() and int(max_ctas)):
        raise InvalidArgument(f"PYCOMM_CUDA_MAX_CTAS={max_ctas!r} is not a number of multiprocessors from 1")
    for name, given in (("HIERARCHICAL", nbytes), ("PEER", peer_nbytes)):
        if given is not None and not given.isdecimal():
            raise InvalidArgument(f"PYCOMM_CUDA_{name}_BYTES={given!r} is not a number of bytes")
    between = os.environ.get("PYCOMM_CUDA_BETWEEN_HOSTS") or "auto"
    if between not in ("auto", "nccl", "tcp"):
        raise InvalidArgument(f"PYCOMM_CUDA_BETWEEN_HOSTS={between!r} is none of auto, nccl, tcp")
    return {
        "between_hosts": between,
        "peer_nbytes": int(peer_nbytes or 0),  # no GPU has run the kernel yet, nor shown where it wins
        "device_topology": path and topology_to_document(fit(Topology.load(path), host_ids)),
        "hierarchical_nbytes": nbytes and int(nbytes),
        "max_ctas": max_ctas and int(max_ctas),
    }


def _wire_links(topology: Topology | None) -> WireLinks:
    """What the environment says. Raises InvalidArgument."""
    links = os.environ.get("PYCOMM_WIRE_LINKS") or "hosts"
    if links == "hosts":
        return "hosts"
    if links != "racks":
        raise InvalidArgument(f"PYCOMM_WIRE_LINKS={links!r} is none of hosts, racks")
    if topology is None or not topology.switches:
        raise InvalidArgument(
            "PYCOMM_WIRE_LINKS=racks needs a topology with switches; give it by PYCOMM_TOPOLOGY or init(topology=) "
            "(docs/topology.md)"
        )
    return "racks"


def _await(own: Store, keys: list[str], limit: timedelta, whose: str) -> list[str]:
    """What was set under the keys. Raises PeerTimeout where it does not come, PeerLost where the store goes.

    Asks again and again, since wait() keeps a store that ranks share as threads from the rank that is to answer."""
    until, pause = time.monotonic() + limit.total_seconds(), 0.0005
    try:
        while time.monotonic() < until:
            if own.check(keys):
                return [own.get(key).decode() for key in keys]
            time.sleep(pause)
            pause = min(2 * pause, 0.02)
    except RuntimeError as error:  # torch.distributed's errors of a store
        raise PeerLost(
            f"set-up: the job's store ended before {whose} said what the job plans from "
            f"({str(error).splitlines()[0]}); see the error of the rank that serves it, rank 0 as a rule"
        ) from None
    raise PeerTimeout(
        f"set-up: {whose} did not say within {limit.total_seconds():g} s what the job plans from; see that rank's own "
        "error"
    )


def _job_plan(endpoint: _C.Endpoint, led: Topology | None, text: str, job: dict[str, Any]) -> JobPlan:
    host_ids = tuple(endpoint.host_ids)
    table = from_json(text) if text else None
    topology = led
    if table is not None and (led is None or led.switches):  # its switches are the table's (TuningTable.refusal)
        measured = table.for_hosts(Topology.from_host_ids(host_ids))
        topology = measured if led is None else with_switches(measured, led)
    devices = topology_from_document(job["device_topology"]) if job["device_topology"] else None
    return JobPlan(
        host_ids,
        topology,
        table,
        job["explains"],
        devices,
        job["hierarchical_nbytes"],
        job["between_hosts"],
        job["peer_nbytes"],
        job["max_ctas"],
        job["wire_links"],
    )


def _first_ranks(host_ids: Sequence[str]) -> list[int]:
    """The first rank of each host."""
    return [rank for rank, host in enumerate(host_ids) if host not in host_ids[:rank]]


def _table_files(topology: Topology) -> list[Path]:
    """The file that was named, else those of this layout."""
    named = os.environ.get("PYCOMM_TUNE_FILE")
    if named is not None:
        return [Path(named)] if named else []
    try:
        return sorted(table_folder().glob(f"{layout_key(topology)}-*.json"))
    except InvalidArgument:  # nowhere to keep tables, so there are none
        return []


def _find_table(files: list[Path], topology: Topology, hardware: Sequence[str]) -> str:
    """The first table that holds for the job, as JSON; "" after a warning of why the first one does not. topology: with
    the switches that were given."""
    refused = []
    for path in files:
        try:
            table = load(path)
        except InvalidArgument as error:
            refused.append(str(error))
            continue
        reason = table.refusal(topology, hardware, engine_version())
        if reason is None:
            return table.to_json()
        refused.append(f"tuning table {path}: {reason}; measure again with `pycomm tune`")
    warnings.warn(
        f"pycomm: {refused[0]}. Until then the model chooses, with the link figures that were given, or else default "
        "ones.",
        PycommWarning,
        stacklevel=6,
    )
    return ""


def _compare(endpoint: _C.Endpoint, topology: Topology | str | Path | None, led: Topology | None) -> None:
    """Warns where this rank's topology is not rank 0's."""
    try:
        given = _given(topology)
        if given is None or fit(given, endpoint.host_ids) == led:
            return
        mine = f"is {given.fingerprint()}"
    except TopologyError as error:
        mine = f"cannot be used ({error})"
    theirs, instead = ("rank 0 was given none", "default link figures")
    if led is not None:
        theirs, instead = f"rank 0's is {led.fingerprint()}", "rank 0's"
    warnings.warn(
        f"pycomm: rank {endpoint.rank}'s topology {mine}, {theirs}; all ranks plan from {instead}. "
        "Give every rank the same.",
        PycommWarning,
        stacklevel=5,
    )


def with_switches(topology: Topology, given: Topology) -> Topology:
    """The topology, with the switches of another one of the same hosts, by their names, and where they hang from."""
    switch = {host.name: host.switch for host in given.hosts}
    hosts = tuple(replace(host, switch=switch[host.name]) for host in topology.hosts)
    return replace(topology, hosts=hosts, switches=given.switches)


def fit(topology: Topology, host_ids: Sequence[str]) -> Topology:
    """A topology that someone wrote, under the names of a job's hosts. "b1" stands for "b1-5f3e9a01" as well, the
    engine's name for it, unless there are two.

    Raises TopologyError for a host without ranks in the job, and where ranks are missing or on another host."""
    if topology.n_ranks != len(host_ids):
        raise TopologyError(
            f"the topology has ranks 0 .. {topology.n_ranks - 1}, this job 0 .. {len(host_ids) - 1}; "
            "write one with the job's ranks"
        )
    named = {name: name for name in host_ids}
    for name in dict.fromkeys(host_ids):
        short = _HASH.sub("", name)
        if short not in host_ids:
            named[short] = name if short not in named else ""
    hosts = []
    for host in topology.hosts:
        name = named.get(host.name) or named.get(_HASH.sub("", host.name), "")
        if not name:
            known = ", ".join(list(dict.fromkeys(host_ids))[:8])
            raise TopologyError(f"the topology's host {host.name!r} has no ranks in this job; its hosts are {known}")
        for rank in host.ranks:
            if host_ids[rank] != name:
                raise TopologyError(
                    f"the topology has rank {rank} on host {host.name!r}, and it runs on {host_ids[rank]!r}; "
                    "correct the file, or start the ranks in its order"
                )
        hosts.append(replace(host, name=name))
    return replace(topology, hosts=tuple(hosts))
