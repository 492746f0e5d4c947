"""torch.distributed on pycomm: `import pycomm.distributed as dist` in place of `import torch.distributed as dist`.

It is torch.distributed itself: every name, default and error is torch's, and so are the process groups, so that code
that imports torch.distributed (DDP, FSDP2, DTensor, checkpointing) meets the same ones. What differs:

* a backend that is not named is "pycomm" for CPU tensors, and torch's own for an accelerator that pycomm lacks;
* monitored_barrier and split_group work on CPU groups (from `import pycomm` on in torch.distributed as well).

Subpackages (torch.distributed.fsdp, .tensor, .checkpoint, ...) are imported from torch as ever.
"""

from __future__ import annotations

import functools
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
