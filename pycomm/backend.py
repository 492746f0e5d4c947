"""torch.distributed's backend "pycomm": registered when pycomm is imported, made here, run in csrc/torch/backend.cc.

It serves CPU tensors and those on CUDA devices; the latter meet, over NCCL, when the first of them is communicated.

Three of torch.distributed's functions refuse every backend but some by name before they ask it: monitored_barrier,
split_group and _set_pg_timeout. Importing pycomm puts in their place functions that serve groups whose CPU tensors are
pycomm's, and call torch's own for all others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as c10d
from torch._C._distributed_c10d import Store

from pycomm import _C
from pycomm.gpus import nccl_wheel
from pycomm.group import engine_group, make_endpoint
from pycomm.planning import Endpoint, plan_devices

DEVICES = ("cpu", "cuda")


def create(options: Any, backend_options: Any = None) -> _C.Backend:
    """What init_process_group and new_group call. options: c10d's DistributedBackendOptions.

    The default group makes this rank's endpoint; groups of fewer ranks share it, and so its links and its watch over
    other processes."""
    timeout_s = _seconds(options.timeout)
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    endpoint, of_endpoint = _default_endpoint(), ranks
    if endpoint is None:
        endpoint = make_endpoint(options.store, options.group_rank, options.group_size, None, timeout_s)
        of_endpoint = list(range(options.group_size))
    return _backend(endpoint, options.store, options.group_id or "default", of_endpoint, timeout_s)


def _backend(endpoint: Endpoint, store: Store, name: str, ranks: list[int], timeout_s: float) -> _C.Backend:
    def split(store: Store, of_this: list[int], name: str) -> _C.Group:
        return engine_group(endpoint, store, name, f"c10d/{name}", [ranks[rank] for rank in of_this], timeout_s)

    group = engine_group(endpoint, store, name, f"c10d/{name}", ranks, timeout_s)
    hosts = [endpoint.host_ids[rank] for rank in ranks]
    planning = plan_devices(endpoint.job, name, ranks, endpoint.rank)
    return _C.Backend(group, endpoint, store, nccl_wheel(), hosts, planning, split, _merge)


def _merge(store: Store, rank: int, size: int, name: str, timeout_s: float) -> _C.Backend:
    """The backend of ranks that come from several jobs, or several groups, and know one store."""
    endpoint = make_endpoint(store, rank, size, None, timeout_s)
    return _backend(endpoint, store, name, list(range(size)), timeout_s)


def _default_endpoint() -> Endpoint | None:
    """The default group's, where that runs on pycomm. It is the object that _backend() was given, which its split()
    keeps."""
    world = c10d.group.WORLD
    if world is None:
        return None
    for device in DEVICES:
        try:
            backend = world._get_backend(torch.device(device))
        except RuntimeError:  # its tensors there have no backend
            continue
        if isinstance(backend, _C.Backend):
            endpoint = backend.endpoint
            assert isinstance(endpoint, Endpoint)
            return endpoint
    return None


def _seconds(timeout: Any) -> float:
    return float(timeout.total_seconds()) if hasattr(timeout, "total_seconds") else float(timeout)


def register() -> None:
    """Makes "pycomm" known to torch.distributed, as "cpu:pycomm,cuda:pycomm"."""
    if "pycomm" in c10d.Backend.backend_list:
        return
    c10d.Backend.register_backend("pycomm", create, extended_api=True, devices=list(DEVICES))
    _serve(_monitored_barrier, "monitored_barrier")
    _serve(_split_group, "split_group")
    _serve(_set_pg_timeout, "_set_pg_timeout")


# What torch refuses by name


def _serve(ours: Callable[..., Any], name: str) -> None:
    """Puts ours(torch's function, ...) in the place of torch's function."""
    for module in (c10d, c10d.distributed_c10d):
        theirs = getattr(module, name, None)
        if theirs is not None:
            setattr(module, name, functools.wraps(theirs)(functools.partial(ours, theirs)))


def _is_ours(group: Any) -> bool:
    return isinstance(group, c10d.ProcessGroup) and "cpu:pycomm" in c10d.get_backend_config(group).split(",")


def _monitored_barrier(
    theirs: Callable[..., None],
    group: c10d.ProcessGroup | None = None,
    timeout: timedelta | float | None = None,
    wait_all_ranks: bool = False,
) -> None:
    chosen = group or c10d.group.WORLD
    if not _is_ours(chosen):
        theirs(group, timeout, wait_all_ranks)
        return
    if timeout is None:
        timeout = timedelta(milliseconds=-1)  # the group's
    elif not isinstance(timeout, timedelta):
        timeout = timedelta(seconds=timeout)
    chosen.monitored_barrier(timeout, wait_all_ranks=wait_all_ranks)  # type: ignore[union-attr]


def _split_group(
    theirs: Callable[..., Any],
    parent_pg: c10d.ProcessGroup | None = None,
    split_ranks: list[list[int]] | None = None,
    timeout: timedelta | None = None,
    pg_options: Any | None = None,
    group_desc: str | None = None,
    backend: str | None = None,
) -> c10d.ProcessGroup | None:
    """torch splits groups that are bound to an accelerator; here any."""
    parent = parent_pg or c10d.group.WORLD
    if parent is None or not _is_ours(parent) or parent.bound_device_id is not None:
        filtered = {} if backend is None else {"backend": backend}  # older torch has no such argument
        made: c10d.ProcessGroup | None = theirs(parent_pg, split_ranks, timeout, pg_options, group_desc, **filtered)
        return made
    if not split_ranks or not all(split_ranks):
        raise ValueError(f"split_ranks cannot be None or empty, nor hold an empty group, got {split_ranks}")
    for split in split_ranks:
        if len(set(split)) != len(split) or not all(0 <= rank < parent.size() for rank in split):
            raise ValueError(f"split_ranks holds {split}: not distinct ranks of 0 .. {parent.size() - 1}")
    global_ranks = c10d.get_process_group_ranks(parent)
    mine = None
    for split in split_ranks:
        part = c10d.new_group(
            [global_ranks[rank] for rank in sorted(split)],
            timeout,
            backend,
            pg_options,
            # all ranks agree on the name of a group that all of them make; fewer can only derive one from their ranks
            use_local_synchronization=parent is not c10d.group.WORLD,
            group_desc=group_desc,
        )
        if parent.rank() in split:
            mine = part
    return mine


def _set_pg_timeout(theirs: Callable[..., None], timeout: timedelta, group: c10d.ProcessGroup | None = None) -> None:
    chosen = group or c10d.group.WORLD
    if not _is_ours(chosen):
        theirs(timeout, group)
        return
    chosen.set_timeout(timeout)  # type: ignore[union-attr]
