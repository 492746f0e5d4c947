"""torch.distributed on pycomm: `import pycomm.distributed as dist` in place of `import torch.distributed as dist`.

It is torch.distributed itself: every name, default and error is torch's, and so are the process groups, so that code
that imports torch.distributed (DDP, FSDP2, DTensor, checkpointing) meets the same ones. What differs:

* a backend that is not named is "pycomm" for CPU tensors, and torch's own for an accelerator that pycomm lacks;
* split_group works on CPU groups, where torch asks for an accelerator;
* monitored_barrier works, which torch keeps for Gloo.

Subpackages (torch.distributed.fsdp, .tensor, .checkpoint, ...) are imported from torch as ever.
"""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as _torch
from torch.distributed.device_mesh import DeviceMesh

import pycomm  # noqa: F401  (registers the backend)

__all__ = sorted(name for name in dir(_torch) if not name.startswith("_"))


def __getattr__(name: str) -> Any:
    try:
        return getattr(_torch, name)
    except AttributeError:
        raise AttributeError(f"neither pycomm.distributed nor torch.distributed has {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch)})


@functools.wraps(_torch.get_default_backend_for_device)
def get_default_backend_for_device(device: str | torch.device) -> str:
    kind = torch.device(device).type
    if kind in _torch.Backend.backend_capability["pycomm"]:
        return "pycomm"
    return _torch.get_default_backend_for_device(device)


def _default_backend() -> str:
    """One backend for CPU tensors and one for those of the accelerator that this machine has, if any."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    backends = {
        kind: get_default_backend_for_device(kind) for kind in ("cpu", accelerator and accelerator.type) if kind
    }
    if set(backends.values()) == {"pycomm"}:
        return "pycomm"
    return ",".join(f"{kind}:{backend}" for kind, backend in backends.items())


@functools.wraps(_torch.init_process_group)
def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
    _torch.init_process_group(_default_backend() if backend is None else backend, *args, **kwargs)


@functools.wraps(_torch.device_mesh.init_device_mesh)
def init_device_mesh(*args: Any, **kwargs: Any) -> DeviceMesh:
    if not _torch.is_initialized():
        init_process_group()
    return _torch.device_mesh.init_device_mesh(*args, **kwargs)


@functools.wraps(_torch.split_group)
def split_group(
    parent_pg: _torch.ProcessGroup | None = None,
    split_ranks: list[list[int]] | None = None,
    timeout: timedelta | None = None,
    pg_options: Any | None = None,
    group_desc: str | None = None,
    backend: str | None = None,
) -> _torch.ProcessGroup | None:
    parent = parent_pg or _torch.group.WORLD
    if parent is None or (parent.bound_device_id is not None and torch.accelerator.is_available()):
        filtered = {} if backend is None else {"backend": backend}  # older torch has no such argument
        return _torch.split_group(parent_pg, split_ranks, timeout, pg_options, group_desc, **filtered)
    if not split_ranks or not all(split_ranks):
        raise ValueError(f"split_ranks cannot be None or empty, nor hold an empty group, got {split_ranks}")
    global_ranks = _torch.get_process_group_ranks(parent)
    mine = None
    for split in split_ranks:
        part = _torch.new_group(
            [global_ranks[rank] for rank in sorted(split)],
            timeout,
            backend,
            pg_options,
            # all ranks agree on the name of a group that all of them make; fewer can only derive one from their ranks
            use_local_synchronization=parent is not _torch.group.WORLD,
            group_desc=group_desc,
        )
        if parent.rank() in split:
            mine = part
    return mine


@functools.wraps(_torch.monitored_barrier)
def monitored_barrier(
    group: _torch.ProcessGroup | None = None, timeout: timedelta | None = None, wait_all_ranks: bool = False
) -> None:
    chosen = group or _torch.group.WORLD
    if not isinstance(chosen, _torch.ProcessGroup) or "pycomm" not in _torch.get_backend_config(chosen):
        _torch.monitored_barrier(group, timeout, wait_all_ranks)  # torch's own, or its error
        return
    limit = timeout or _torch.default_pg_timeout
    chosen.monitored_barrier(limit, wait_all_ranks=wait_all_ranks)  # type: ignore[attr-defined]  # torch's stubs lack it
