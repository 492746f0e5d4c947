"""`pycomm tune --devices`: what collectives on GPUs cost, whole and inside hosts and across in turn."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from pycomm.calls import CALL_PLANNERS
from pycomm.device_choice import HIERARCHICAL, NATIVE, has_calls
from pycomm.errors import InvalidArgument
from pycomm.table import Times
from pycomm.timing import Buffers, rounded, slowest, time_algorithms

if TYPE_CHECKING:
    from pycomm.group import Group

DEVICE_SIZES: Final = tuple(1 << power for power in range(12, 28, 2))
_GROWTH: Final = 4  # from one to the next, and of what it takes at most
_WAYS: Final = (NATIVE, HIERARCHICAL)
_BLOCKS: Final = 5
_BLOCK_S: Final = 2.5e-3  # what a block of calls is to take
_LEAST_CALLS: Final = 4


@dataclass(frozen=True)
class Device:
    """What is measured on. zeros: an array of that many float32; settle: waits until what was called has ended."""

    zeros: Buffers
    settle: Callable[[], object]


def own_device() -> Device:
    """The GPU of this rank: LOCAL_RANK's. Raises InvalidArgument where torch sees none."""
    import torch

    n_devices = torch.cuda.device_count()
    if n_devices == 0:
        raise InvalidArgument(
            "tune --devices: torch sees no GPU here; leave --devices out, or start it on hosts that have one"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % n_devices)
    torch.cuda.set_device(device)
    return Device(partial(torch.zeros, device=device), partial(torch.cuda.synchronize, device))


def tune_devices(group: Group, device: Device, budget_s: float) -> tuple[Times, ...]:
    """Times both ways at DEVICE_SIZES, the small ones first, the first one whatever it takes and others while budget_s
    lasts; every rank calls it, and all get the same. Sizes that are left out go as the nearest.

    Raises InvalidArgument where there is nothing to choose: on one host, where hosts have different numbers of ranks,
    and where the host carries between them."""
    if not any(has_calls(group.topology, collective) for collective in CALL_PLANNERS):
        raise InvalidArgument(
            "tune --devices: NCCL does every collective of this layout whole, so there is nothing to measure; the "
            "other way is for several hosts with as many ranks each"
        )
    first_array = device.zeros(1)
    group.all_reduce(first_array)  # after it the group knows what joins the hosts
    device.settle()
    if group.devices_cross_host:
        raise InvalidArgument(
            "tune --devices: NCCL does not connect these hosts, so collectives go hierarchically at every size, and "
            "there is nothing to choose"
        )
    begin, spent_s = time.perf_counter(), 0.0
    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for nbytes in DEVICE_SIZES:
        size = rounded(nbytes, group.size)
        before_s, spent_s = spent_s, slowest(group, time.perf_counter() - begin)
        if points and spent_s + _GROWTH * (spent_s - before_s) > budget_s:
            break
        for collective in CALL_PLANNERS:
            first = time_algorithms(group, collective, size, _WAYS, [1, 1], 1, device.zeros, device.settle)
            calls = [max(_LEAST_CALLS, round(_BLOCK_S / seconds)) for seconds in first]
            well = time_algorithms(group, collective, size, _WAYS, calls, _BLOCKS, device.zeros, device.settle)
            for way, seconds in zip(_WAYS, well, strict=True):
                points.setdefault((collective, way), []).append((size, seconds))
    return tuple(Times(collective, way, tuple(sizes)) for (collective, way), sizes in points.items())
