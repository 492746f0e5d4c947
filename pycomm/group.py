"""Group: collectives and messages over a set of ranks, on arrays of torch, numpy, CuPy and others, without a copy.

init() makes the first group of a job from torchrun's environment or from any torch.distributed Store; groups of fewer
ranks come from it. Each runs on the C++ engine (csrc/cpu), which asks here for choice tables and programs, once."""

from __future__ import annotations

import atexit
import dataclasses
import os
import time
import warnings
import weakref
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import get_args

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed's, with their types

from pycomm import _C
from pycomm._C import Stats, Work
from pycomm.agreement import agree, fit
from pycomm.errors import InvalidArgument, PycommError, PycommWarning
from pycomm.explain import Explanation, format_nbytes
from pycomm.gpus import nccl_wheel
from pycomm.machine import local_address
from pycomm.planners import PLANNERS, Planner
from pycomm.planning import Endpoint, JobPlan, plan, plan_devices
from pycomm.schedule import Schedule
from pycomm.table import TuningTable
from pycomm.topology import Topology, WireLinks

__all__ = ["Group", "Stats", "Work", "empty", "engine_group", "init"]

DEFAULT_TIMEOUT_S = 300.0


def engine_group(
    endpoint: Endpoint, store: Store, name: str, key: str, ranks: Sequence[int], timeout_s: float
) -> _C.Group:
    """The engine's half of a group, which is all that torch.distributed's backend needs. ranks: the endpoint's ranks,
    in the group's order; all of them call this, with one key, which their other groups do not have."""
    planning = plan(endpoint.job, name, ranks, endpoint.rank)
    return _C.Group(endpoint, store, name, key, list(ranks), planning, timeout_s)


class Group(_C.Group):
    """One rank's membership in a group of ranks 0 .. size-1.

    Arrays are contiguous: torch tensors, numpy arrays, and those of any library with __dlpack__ or, on a CUDA device,
    __cuda_array_interface__. A call's arrays are on the host, or on the one device of this rank, where NCCL does it, in
    the order of their current stream (docs/cuda.md). Every rank calls the same collectives in the
    same order; a call that differs raises CollectiveMismatch on every rank. `op` is one of sum, avg, product, min, max,
    band, bor, bxor (csrc/core/dtype.h). With async_op a Work comes back at once, and the arrays must not be touched
    until its wait(); otherwise the result. `timeout_s` replaces the group's deadline for one call. `algorithm` names a
    planner of pycomm.planners (all ranks the same) instead of the group's own choice.

    `wire` (all_reduce, reduce_scatter, all_gather, all_to_all): "bf16", "fp8", "int8" or "int4" is what float32,
    bfloat16 and float16 values look like between hosts (docs/wire.md has their errors); on one host it changes nothing.
    `wire_nonfinite="raise"`: a result with NaN or infinity raises NonfiniteError, after which the group goes on.

    Errors of every call: InvalidArgument before anything is sent; PeerTimeout, PeerLost and CollectiveMismatch, after
    which the group is broken on every rank; GroupClosed ever after.

    The collectives and messages are the engine's own methods (csrc/torch/module.cc), with no Python in between; it
    checks shapes, dtypes and devices."""

    def __init__(
        self,
        endpoint: Endpoint,
        store: Store,
        name: str,
        key: str,
        ranks: Sequence[int],
        timeout_s: float,
        job: JobPlan | None = None,
    ) -> None:
        self._job = job or endpoint.job
        planning = plan(self._job, name, ranks, endpoint.rank)
        devices = plan_devices(self._job, name, ranks, endpoint.rank)

        def part(store: Store, of_this: list[int], name: str) -> _C.Group:
            return engine_group(endpoint, store, name, f"{key}/{name}", [ranks[rank] for rank in of_this], timeout_s)

        super().__init__(endpoint, store, name, key, list(ranks), planning, timeout_s, devices, nccl_wheel(), part)
        self.topology = planning.topology
        self._planning = planning
        self._devices = devices
        self._endpoint = endpoint
        self._store = store
        self._key = key
        self._ranks = tuple(ranks)  # the endpoint's
        self._n_children = 0
        self.host_ids: tuple[str, ...] = tuple(endpoint.host_ids[rank] for rank in ranks)
        # Also when the interpreter ends: operations under way would let go of their arrays with no Python left.
        weakref.finalize(self, self._closer())

    def __repr__(self) -> str:
        return f"<pycomm.Group {self.name!r}, rank {self.rank} of {self.size}, {len(set(self.host_ids))} host(s)>"

    @property
    def devices_cross_host(self) -> bool:
        """Whether what goes between hosts from GPUs passes through host memory and TCP, since NCCL does not connect
        them or was told not to (docs/cuda.md). Known after the group's first collective on devices."""
        return self._devices.between == "tcp"

    @property
    def wire_links(self) -> WireLinks:
        """On which links a call's `wire` codes: new_group()'s, else PYCOMM_WIRE_LINKS's of rank 0, else "hosts"."""
        return self._job.wire_links

    # Memory.

    def empty(self, *shape: int | Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised tensor, as torch.empty(*shape), in memory that the other ranks of this host map: collectives
        read and write it in place, with no copy through the system (docs/performance.md). Any collective takes any mix
        of such and other tensors, views included. dtype: torch's default where none is given. Its pages are taken now
        and given back with the tensor.
        Raises InvalidArgument where the host has no such memory left."""
        return _empty(self._endpoint, shape, dtype)

    def device_seconds(self, op: str, nbytes: int) -> tuple[float, str] | None:
        """What a collective of nbytes on GPUs is expected to take, by `pycomm tune --devices` or PYCOMM_CUDA_TOPOLOGY,
        and which of them says so; None where neither does. Every rank gets the same."""
        if not self.devices_cross_host:
            return self._devices.seconds(op, nbytes)
        found = self.explanation(op, nbytes)
        chosen = next(each for each in found.candidates if each.algorithm == found.choice)
        return chosen.expected_s, "predicted, through the host"

    # Groups of fewer ranks.

    def new_group(
        self,
        ranks: Sequence[int],
        name: str | None = None,
        *,
        max_ctas: int | None = None,
        wire_links: WireLinks | None = None,
    ) -> Group | None:
        """A group of some of this one's ranks, in the order given; None on the others. Every rank of this group calls
        it, with the same arguments.

        max_ctas: the most multiprocessors of a GPU that a collective of this group takes, and of groups made from it,
        so that the rest computes meanwhile: NCCL's maxCTAs. wire_links: on which links `wire` codes, in it and in
        groups made from it: "hosts", between hosts, or "racks", between hosts of different switches of the topology
        alone (CPU tensors). None: as in this group."""
        if not ranks or len(set(ranks)) != len(ranks) or not all(0 <= rank < self.size for rank in ranks):
            raise InvalidArgument(
                f"new_group in group {self.name!r}: {list(ranks)} are not distinct ranks of 0 .. {self.size - 1}"
            )
        if max_ctas is not None and max_ctas < 1:
            raise InvalidArgument(f"new_group: max_ctas is {max_ctas}; give 1 or more, or None for this group's")
        if wire_links is not None and wire_links not in get_args(WireLinks):
            raise InvalidArgument(
                f"new_group: wire_links is {wire_links!r}; choose from {', '.join(get_args(WireLinks))}"
            )
        if wire_links == "racks" and not self.topology.switches:
            raise InvalidArgument(
                "new_group: wire_links 'racks', but the topology has no switches; give the job one that has them, by "
                "PYCOMM_TOPOLOGY or init(topology=) (docs/topology.md)"
            )
        self._n_children += 1
        job = self._job if max_ctas is None else dataclasses.replace(self._job, max_ctas=max_ctas)
        job = job if wire_links is None else dataclasses.replace(job, wire_links=wire_links)
        return self._child(list(ranks), f"{self._n_children}", name, job)

    def split(self, color: int | None, key: int = 0, name: str | None = None) -> Group | None:
        """One group per color, ranks ordered by (key, rank), as MPI_Comm_split; None for ranks whose color is None."""
        import numpy as np

        mine = np.array([color is not None, 0 if color is None else color, key], np.int64)
        everyone = np.empty((self.size, 3), np.int64)
        self.all_gather(everyone, mine)
        self._n_children += 1
        if color is None:
            return None
        members = [rank for rank in range(self.size) if everyone[rank, 0] and everyone[rank, 1] == color]
        members.sort(key=lambda rank: (int(everyone[rank, 2]), rank))
        return self._child(members, f"{self._n_children}/{color}", name, self._job)

    def replan(self, topology: Topology, table: TuningTable | None = None, name: str | None = None) -> Group:
        """A group of the same ranks that plans from `topology` and, where given, a tuning table's times, and so do the
        groups made from it. Every rank of the job calls it on a group of all of them, with the same.
        Raises InvalidArgument where the group lacks ranks of the job or has them in another order, and TopologyError
        where the topology is not that of its ranks."""
        if self._ranks != tuple(range(len(self._job.host_ids))):
            raise InvalidArgument(
                f"replan in group {self.name!r}: it is not the group of all the job's ranks in their order; "
                "replan that one, and make this one from it"
            )
        job = dataclasses.replace(self._job, topology=fit(topology, self._job.host_ids), table=table)
        self._n_children += 1
        return self._made(list(range(self.size)), f"{self._n_children}", name, job)

    def _child(self, ranks: list[int], suffix: str, name: str | None, job: JobPlan) -> Group | None:
        return self._made(ranks, suffix, name, job) if self.rank in ranks else None

    def _made(self, ranks: list[int], suffix: str, name: str | None, job: JobPlan) -> Group:
        store = PrefixStore(f"group/{suffix}/{'-'.join(map(str, ranks[:4]))}", self._store)
        endpoint_ranks = [self._ranks[rank] for rank in ranks]
        key = f"{self._key}/{suffix}"
        return Group(self._endpoint, store, name or f"{self.name}/{suffix}", key, endpoint_ranks, self.timeout_s, job)

    # Algorithms of one's own.

    def register(self, algorithm: Schedule | Planner) -> None:
        """Makes a schedule, or a planner (topology, root=0) -> Schedule, one of this group's algorithms, under the name
        that its schedule has: `algorithm="name"` runs it, and where it is predicted best the group's own choice takes
        it (docs/own_algorithm.md). Every rank registers the same, before its first call of the collective that names
        no algorithm. Ranks that run different schedules of one name get CollectiveMismatch.

        Raises ScheduleError where the schedule does not keep its collective's promise, InvalidArgument where it is for
        other ranks, its name is taken, or the group has chosen already."""
        self._planning.register(algorithm)

    # Insight and end.

    def explain(self, op: str, nbytes: int, *, wire: str | None = None) -> str:
        """Which schedule a collective of nbytes takes in this group, what the others would cost, and why: a line for
        each candidate, with the predicted time and, where a tuning table has it, the measured one. wire: of the call;
        fewer algorithms can have one (docs/wire.md), their times are those without, and no table has any."""
        limit = self.native_nbytes(op)
        text = str(self.explanation(op, nbytes, wire=wire)) if op in PLANNERS else f"{op} on {self.size} ranks"
        if self.size > 1 and nbytes <= limit:
            text += (
                f"\nAt {format_nbytes(nbytes)} this group takes none of these: inside one host up to "
                f"{format_nbytes(limit)} go through the board, the engine's native "
                "path, where each rank writes once and reads the others."
            )
        return text

    def explanation(self, op: str, nbytes: int, root: int = 0, *, wire: str | None = None) -> Explanation:
        """The same as data: candidates, choice and reason. Where native_nbytes(op) is not below nbytes, none of the
        candidates runs. Raises InvalidArgument for an op that no planner serves."""
        return self._planning.explain(op, nbytes, root, wire is not None and len(self.topology.hosts) > 1)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _empty(endpoint: _C.Endpoint, shape: tuple[int | Sequence[int], ...], dtype: torch.dtype | None) -> torch.Tensor:
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return endpoint.empty([int(size) for size in sizes], dtype or torch.get_default_dtype())  # type: ignore[arg-type]


def empty(*shape: int | Sequence[int], dtype: torch.dtype | None = None, group: Group | None = None) -> torch.Tensor:
    """Group.empty() for a program that has one job: the group's, or without one that of the last pycomm.init() or
    init_process_group("pycomm") of this process. Raises PycommError before the first."""
    endpoint = group._endpoint if group is not None else _last_endpoint
    if endpoint is None:
        raise PycommError(
            "empty: no group yet; call pycomm.init() or torch.distributed.init_process_group('pycomm') first"
        )
    return _empty(endpoint, shape, dtype)


_last_endpoint: Endpoint | None = None  # what empty() without a group takes


def _from_environment(name: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise PycommError(
            f"pycomm.init() reads {name} from the environment, and it is not set. Start the program with "
            "`pycomm launch` or torchrun, or pass store, rank and world_size."
        )
    return value


def make_endpoint(
    store: Store,
    rank: int,
    size: int,
    host_id: str | None,
    timeout_s: float,
    topology: Topology | str | Path | None = None,
) -> Endpoint:
    """This rank's place among `size` ranks, and what they plan from. host_id: an emulated host's label (default
    PYCOMM_HOST_ID, else the machine). topology: as init() takes it. Collective over the store."""
    global _last_endpoint
    label = host_id if host_id is not None else os.environ.get("PYCOMM_HOST_ID", "")
    _last_endpoint = endpoint = Endpoint(store, rank, size, label, local_address(), timeout_s)
    for text in endpoint.warnings:
        warnings.warn(f"pycomm: {text}", PycommWarning, stacklevel=3)
    endpoint.job = agree(store, endpoint, topology, timeout_s)
    return endpoint


def init(
    store: Store | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    *,
    host_id: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    name: str = "world",
    topology: Topology | str | Path | None = None,
) -> Group:
    """The group of all ranks of a job. Every rank calls it.

    Without a store: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun and `pycomm launch` set them. With one:
    any torch.distributed Store, and this rank's place. Ranks with one host_id share memory; others speak TCP.
    timeout_s: deadline of set-up, and of each call that gives none. topology: what the ranks plan from, or a file of it
    in TOML (default PYCOMM_TOPOLOGY, else the links of a tuning table that holds for the job, else default figures); of
    one with switches these alone count beside a table that was measured below them; rank 0's counts.
    Raises PeerTimeout naming the ranks that did not come; InvalidArgument where ranks contradict each other;
    TopologyError where the topology is not that of the job."""
    served = False
    if (store is None) != (rank is None) or (store is None) != (world_size is None):
        raise InvalidArgument("init: give store, rank and world_size, or none of them")
    if store is None or rank is None or world_size is None:
        try:
            rank, world_size = int(_from_environment("RANK")), int(_from_environment("WORLD_SIZE"))
            port = int(_from_environment("MASTER_PORT"))
        except ValueError as error:
            raise InvalidArgument(f"RANK, WORLD_SIZE and MASTER_PORT must be numbers ({error})") from None
        store = _environment_store(rank, world_size, port, timeout_s)
        served = rank == 0 and not _agent_serves_store()
    if not 0 <= rank < world_size:
        raise InvalidArgument(f"init: rank {rank} is not in 0 .. {world_size - 1}")
    # A job may call init() again on the same store: each time gets keys of its own.
    attempt = store.add(f"pycomm/init/{rank}", 1)
    own = PrefixStore(f"pycomm/{attempt}", store)
    endpoint = make_endpoint(own, rank, world_size, host_id, timeout_s, topology)
    group = Group(endpoint, own, name, "world", range(world_size), timeout_s)
    if served and len(set(group.host_ids)) > 1:
        atexit.register(_serve_until_all_left, own, world_size, weakref.ref(group))
    return group


def _agent_serves_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun says so


def _environment_store(rank: int, world_size: int, port: int, timeout_s: float) -> Store:
    host = _from_environment("MASTER_ADDR")
    try:
        return TCPStore(
            host,
            port,
            world_size,
            is_master=rank == 0 and not _agent_serves_store(),
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, OSError) as error:
        raise PycommError(
            f"the store at MASTER_ADDR={host} MASTER_PORT={port} cannot be {'opened' if rank == 0 else 'reached'} by "
            f"rank {rank}: {str(error).splitlines()[0]}. Is the port in use by another job? Choose another MASTER_PORT."
        ) from error


def _serve_until_all_left(store: Store, world_size: int, group: weakref.ref[Group]) -> None:
    """Keeps this process, whose store it is, until every rank's group has left its word there (csrc/cpu/engine.cc,
    close), though not for long: torch prints a C++ stack on each rank that meets a store that ended first."""
    if (open_still := group()) is not None:
        open_still.close()
    left = [f"group/left/{rank}" for rank in range(world_size)]
    patience_s = 0.5 if store.check(["group/broken"]) else 3.0
    end = time.monotonic() + patience_s
    while not store.check(left) and time.monotonic() < end:
        time.sleep(0.005)
