"""Tensors on a device: whether they are, the host's only wait for one, and what its collectives cost.

The order of everything else is that of streams, which the engine keeps (docs/cuda.md)."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

# Of GPUs whose links nobody measured or described, seconds and bytes a second: the order of NVLink's, and of a network
# card's of 200 Gbit/s.
_INSIDE_HOST: Final = (2e-5, 1e11)
_BETWEEN_HOSTS: Final = (4e-5, 2e10)
_SMALL_NBYTES: Final = 1 << 10


def on_device(x: Tensor) -> bool:
    """Whether x is a device's, which works through its streams while the host goes on."""
    return x.device.type != "cpu"


def settle(x: Tensor) -> None:
    """Returns once x's device has done all that it was given: around what is timed, and where mapped memory is
    given up for a larger one."""
    if x.device.type != "cpu":
        torch.get_device_module(x.device).synchronize(x.device)


def reached(x: Tensor) -> Any:
    """An event of x's device: that its current stream has come to here. None on the CPU."""
    if x.device.type == "cpu":
        return None
    return torch.get_device_module(x.device).current_stream(x.device).record_event()


def follow(x: Tensor, event: Any) -> None:
    """What comes next on the current stream of x's device comes after the event, where there is one."""
    if event is not None:
        torch.get_device_module(x.device).current_stream(x.device).wait_event(event)


def collective_cost(group: Any, collective: str, nbytes: int) -> tuple[float, float, str]:
    """(latency_s, bytes_per_s, source) of a collective on devices, up to nbytes of it: from the job's tuning table or
    PYCOMM_CUDA_TOPOLOGY, and without either default figures. Every rank gets the same, and nothing is sent.

    group: a pycomm.Group, or what wraps one as its `group`."""
    inner: Any = getattr(group, "group", group)
    sizes = (_SMALL_NBYTES, max(nbytes, 2 * _SMALL_NBYTES))
    ask = getattr(inner, "device_seconds", None)
    small, large = (None if ask is None else ask(collective, size) for size in sizes)
    if small is None or large is None:
        across = len(set(getattr(inner, "host_ids", ("",)))) > 1
        return *(_BETWEEN_HOSTS if across else _INSIDE_HOST), "default figures for GPUs"
    return small[0], (sizes[1] - sizes[0]) / max(large[0] - small[0], 1e-9), small[1]
