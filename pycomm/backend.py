"""torch.distributed's backend "pycomm": registered when pycomm is imported, made here, run in csrc/torch/backend.cc."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as c10d
from torch._C._distributed_c10d import Store

from pycomm import _C
from pycomm.group import engine_group, make_endpoint


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


def _backend(endpoint: _C.Endpoint, store: Store, name: str, ranks: list[int], timeout_s: float) -> _C.Backend:
    def split(store: Store, of_this: list[int], name: str) -> _C.Group:
        return engine_group(endpoint, store, name, [ranks[rank] for rank in of_this], timeout_s)

    return _C.Backend(engine_group(endpoint, store, name, ranks, timeout_s), split, endpoint)


def _default_endpoint() -> _C.Endpoint | None:
    """The default group's, where that runs on pycomm."""
    world = c10d.group.WORLD
    if world is None:
        return None
    try:
        backend = world._get_backend(torch.device("cpu"))
    except RuntimeError:  # its CPU tensors have no backend
        return None
    return backend.endpoint if isinstance(backend, _C.Backend) else None


def _seconds(timeout: Any) -> float:
    return float(timeout.total_seconds()) if hasattr(timeout, "total_seconds") else float(timeout)


def register() -> None:
    """Makes "pycomm" known to torch.distributed, for CPU tensors."""
    if "pycomm" not in c10d.Backend.backend_list:
        c10d.Backend.register_backend("pycomm", create, extended_api=True, devices=["cpu"])
