"""Beside Group's wire= (docs/wire.md): what coding makes of a tensor, and a communication hook for DDP.

pycomm.quantise(x, "int8")                                # what a rank of another host would read
ddp.register_comm_hook(None, pycomm.wire_hook("int8"))    # gradients cross hosts as int8"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import torch.distributed as c10d
from torch._C._distributed_c10d import GradBucket

from pycomm import _C
from pycomm.errors import InvalidArgument

if TYPE_CHECKING:
    from pycomm._C import Array

_CODED: Final = ("float32", "bfloat16", "float16")


def quantise(x: "Array", wire: str) -> "Array":
    """x as a rank reads it that it is sent to with this wire: of the same type, shape and dtype.

    x: a torch CPU tensor or numpy array of float32, bfloat16 or float16, whose blocks of 128 count from its first
    value; a collective's count from the first value of each piece that it cuts its tensor into.
    Raises InvalidArgument for other dtypes, devices and wires."""
    if isinstance(x, np.ndarray):
        _require_coded(x.dtype.name)
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        coded: Any = _C.round_trip(flat, wire).astype(x.dtype).reshape(x.shape)
        return coded  # type: ignore[no-any-return]
    if not isinstance(x, torch.Tensor) or x.device.type != "cpu":
        raise InvalidArgument(f"quantise: takes a torch CPU tensor or a numpy array, got {type(x).__name__}")
    _require_coded(str(x.dtype).removeprefix("torch."))
    values = x.detach().float().contiguous().view(-1).numpy()
    result: Any = torch.from_numpy(_C.round_trip(values, wire)).to(x.dtype).view(x.shape)
    return result  # type: ignore[no-any-return]


def _require_coded(dtype: str) -> None:
    if dtype not in _CODED:
        raise InvalidArgument(f"quantise: codes {', '.join(_CODED)}, not {dtype}")


def wire_hook(
    wire: str, *, error_feedback: bool = True
) -> Callable[[c10d.ProcessGroup | None, GradBucket], torch.futures.Future[torch.Tensor]]:
    """A hook for DistributedDataParallel.register_comm_hook(process_group, hook), None being the default group: each
    gradient bucket is averaged with this wire. The group's CPU tensors must be pycomm's.

    error_feedback: what coding loses in a step is added to the gradients of the next, for which each rank keeps a
    float32 copy of them (buckets of other dtypes go without). One hook serves one model.
    Raises InvalidArgument for an unknown wire; from the hook, for a group of another backend."""
    quantise(np.zeros(0, np.float32), wire)  # refuses an unknown one
    residuals: dict[tuple[int, ...], torch.Tensor] = {}

    def hook(group: c10d.ProcessGroup | None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        chosen = group or c10d.group.WORLD
        backend = None if chosen is None else chosen._get_backend(torch.device("cpu"))
        if not isinstance(backend, _C.Backend):
            raise InvalidArgument("wire_hook: the group's CPU tensors are not pycomm's; make it with backend 'pycomm'")
        gradients = bucket.buffer()
        residual = None
        if error_feedback and gradients.dtype == torch.float32:
            # DDP may cut its buckets anew after the first step; what a bucket that is gone had lost goes with it.
            key = (bucket.index(), gradients.numel())
            residual = residuals.setdefault(key, torch.zeros_like(gradients))
            gradients.add_(residual)
        work = backend.all_reduce_wire(gradients, "avg", wire, residual)
        averaged: torch.futures.Future[torch.Tensor] = work.get_future().then(lambda done: done.value()[0])
        return averaged

    return hook
