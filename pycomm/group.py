"""Group: collectives and messages over a set of ranks, on torch CPU tensors and numpy arrays, without a copy.

init() makes the first group of a job from torchrun's environment or from any torch.distributed Store; groups of fewer
ranks come from it. Each runs on the C++ engine (csrc/cpu), which asks here for choice tables and programs, once."""

from __future__ import annotations

import os
import socket
import warnings
import weakref
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed's, with their types

from pycomm import _C
from pycomm._C import Stats, Work
from pycomm.check import check, check_coded
from pycomm.errors import InvalidArgument, PycommError, PycommWarning, ScheduleError
from pycomm.explain import explain, format_nbytes
from pycomm.planners import PLANNERS
from pycomm.project import Program, project
from pycomm.topology import Topology
from pycomm.tuner import Choices, candidates, choice_table

__all__ = ["Group", "Stats", "Work", "empty", "engine_group", "init"]

DEFAULT_TIMEOUT_S = 300.0


# Groups are often alike: 100 of one shape plan once, not in 0.1 s each.
_choices = lru_cache(maxsize=256)(choice_table)


@lru_cache(maxsize=256)
def _program(topology: Topology, rank: int, collective: str, algorithm: str, root: int, coded: bool) -> Program:
    planners = PLANNERS[collective]
    if algorithm not in planners:
        raise InvalidArgument(
            f"{collective} has no algorithm {algorithm!r}; choose from {', '.join(planners)}, or give none"
        )
    schedule = planners[algorithm](topology, root)
    check(schedule)
    if not coded:
        return project(schedule, rank)
    try:
        check_coded(schedule, topology.host_index)
    except ScheduleError as error:
        usable = ", ".join(candidates(topology, collective, coded))
        raise InvalidArgument(f"{error}. With a wire choose from {usable}, or give no algorithm") from None
    return project(schedule, rank, topology.host_index)


class Planning:
    """What the engine asks for when a collective is used for the first time. Every rank answers alike."""

    def __init__(self, topology: Topology, rank: int) -> None:
        self.topology = topology
        self.rank = rank

    def choices(self, collective: str, root: int, coded: bool) -> Choices:
        return _choices(self.topology, collective, root, coded)

    def program(self, collective: str, algorithm: str, root: int, coded: bool) -> Program:
        return _program(self.topology, self.rank, collective, algorithm, root, coded)


def plan(endpoint: _C.Endpoint, ranks: Sequence[int]) -> Planning:
    """Planning of a group of these ranks of the endpoint, for the endpoint's own."""
    topology = Topology.from_host_ids([endpoint.host_ids[rank] for rank in ranks])
    return Planning(topology, list(ranks).index(endpoint.rank))


def engine_group(
    endpoint: _C.Endpoint, store: Store, name: str, key: str, ranks: Sequence[int], timeout_s: float
) -> _C.Group:
    """The engine's half of a group, which is all that torch.distributed's backend needs. ranks: the endpoint's ranks,
    in the group's order; all of them call this, with one key, which their other groups do not have."""
    return _C.Group(endpoint, store, name, key, list(ranks), plan(endpoint, ranks), timeout_s)


class Group(_C.Group):
    """One rank's membership in a group of ranks 0 .. size-1.

    Arrays are contiguous torch CPU tensors or C-contiguous numpy arrays. Every rank calls the same collectives in the
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
        self, endpoint: _C.Endpoint, store: Store, name: str, key: str, ranks: Sequence[int], timeout_s: float
    ) -> None:
        planning = plan(endpoint, ranks)
        super().__init__(endpoint, store, name, key, list(ranks), planning, timeout_s)
        self.topology = planning.topology
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

    # Memory.

    def empty(self, *shape: int | Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised tensor, as torch.empty(*shape), in memory that the other ranks of this host map: collectives
        read and write it in place, with no copy through the system (docs/performance.md). Any collective takes any mix
        of such and other tensors, views included. dtype: torch's default where none is given. Its pages are taken now
        and given back with the tensor.
        Raises InvalidArgument where the host has no such memory left."""
        return _empty(self._endpoint, shape, dtype)

    # Groups of fewer ranks.

    def new_group(self, ranks: Sequence[int], name: str | None = None) -> Group | None:
        """A group of some of this one's ranks, in the order given; None on the others. Every rank of this group calls
        it, with the same ranks."""
        if not ranks or len(set(ranks)) != len(ranks) or not all(0 <= rank < self.size for rank in ranks):
            raise InvalidArgument(
                f"new_group in group {self.name!r}: {list(ranks)} are not distinct ranks of 0 .. {self.size - 1}"
            )
        self._n_children += 1
        return self._child(list(ranks), f"{self._n_children}", name)

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
        return self._child(members, f"{self._n_children}/{color}", name)

    def _child(self, ranks: list[int], suffix: str, name: str | None) -> Group | None:
        if self.rank not in ranks:
            return None
        store = PrefixStore(f"group/{suffix}/{'-'.join(map(str, ranks[:4]))}", self._store)
        endpoint_ranks = [self._ranks[rank] for rank in ranks]
        key = f"{self._key}/{suffix}"
        return Group(self._endpoint, store, name or f"{self.name}/{suffix}", key, endpoint_ranks, self.timeout_s)

    # Insight and end.

    def explain(self, op: str, nbytes: int) -> str:
        """Which schedule a collective of nbytes takes in this group, what the others would cost, and why."""
        limit = self.native_nbytes(op)
        text = str(explain(self.topology, op, nbytes)) if op in PLANNERS else f"{op} on {self.size} ranks"
        if self.size > 1 and nbytes <= limit:
            text += (
                f"\nAt {format_nbytes(nbytes)} this group takes none of these: inside one host up to "
                f"{format_nbytes(limit)} go through the board, the engine's native "
                "path, where each rank writes once and reads the others."
            )
        return text

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


_last_endpoint: _C.Endpoint | None = None  # what empty() without a group takes


def _from_environment(name: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise PycommError(
            f"pycomm.init() reads {name} from the environment, and it is not set. Start the program with "
            "`pycomm launch` or torchrun, or pass store, rank and world_size."
        )
    return value


def local_address() -> str:
    """The addresses other hosts reach this one at, one per NIC (docs/tcp.md): PYCOMM_ADDRESS, else the one that routes
    to MASTER_ADDR, else loopback. Nothing is sent."""
    if given := os.environ.get("PYCOMM_ADDRESS"):
        return given
    master = os.environ.get("MASTER_ADDR")
    if master is None:
        return "127.0.0.1"
    try:
        family, kind, protocol, _, to = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(to)  # chooses a route and an address; datagram sockets send nothing here
            return str(probe.getsockname()[0])
    except OSError as error:
        raise PycommError(
            f"no route to MASTER_ADDR={master} ({error}); set PYCOMM_ADDRESS to this host's address"
        ) from error


def make_endpoint(store: Store, rank: int, size: int, host_id: str | None, timeout_s: float) -> _C.Endpoint:
    """This rank's place among `size` ranks. host_id: an emulated host's label (default PYCOMM_HOST_ID, else the
    machine). Collective over the store."""
    global _last_endpoint
    label = host_id if host_id is not None else os.environ.get("PYCOMM_HOST_ID", "")
    _last_endpoint = _C.Endpoint(store, rank, size, label, local_address(), timeout_s)
    for text in _last_endpoint.warnings:
        warnings.warn(f"pycomm: {text}", PycommWarning, stacklevel=3)
    return _last_endpoint


def init(
    store: Store | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    *,
    host_id: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    name: str = "world",
) -> Group:
    """The group of all ranks of a job. Every rank calls it.

    Without a store: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun and `pycomm launch` set them. With one:
    any torch.distributed Store, and this rank's place. Ranks with one host_id share memory; others speak TCP.
    timeout_s: deadline of set-up, and of each call that gives none.
    Raises PeerTimeout naming the ranks that did not come; InvalidArgument where ranks contradict each other."""
    if (store is None) != (rank is None) or (store is None) != (world_size is None):
        raise InvalidArgument("init: give store, rank and world_size, or none of them")
    if store is None or rank is None or world_size is None:
        try:
            rank, world_size = int(_from_environment("RANK")), int(_from_environment("WORLD_SIZE"))
            port = int(_from_environment("MASTER_PORT"))
        except ValueError as error:
            raise InvalidArgument(f"RANK, WORLD_SIZE and MASTER_PORT must be numbers ({error})") from None
        store = _environment_store(rank, world_size, port, timeout_s)
    if not 0 <= rank < world_size:
        raise InvalidArgument(f"init: rank {rank} is not in 0 .. {world_size - 1}")
    # A job may call init() again on the same store: each time gets keys of its own.
    attempt = store.add(f"pycomm/init/{rank}", 1)
    own = PrefixStore(f"pycomm/{attempt}", store)
    endpoint = make_endpoint(own, rank, world_size, host_id, timeout_s)
    return Group(endpoint, own, name, "world", range(world_size), timeout_s)


def _environment_store(rank: int, world_size: int, port: int, timeout_s: float) -> Store:
    host = _from_environment("MASTER_ADDR")
    # torchrun's agent serves the store itself and says so here.
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return TCPStore(
            host,
            port,
            world_size,
            is_master=rank == 0 and not served,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, OSError) as error:
        raise PycommError(
            f"the store at MASTER_ADDR={host} MASTER_PORT={port} cannot be {'opened' if rank == 0 else 'reached'} by "
            f"rank {rank}: {str(error).splitlines()[0]}. Is the port in use by another job? Choose another MASTER_PORT."
        ) from error
