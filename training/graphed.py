"""A step as a CUDA graph: the host hands over one thing instead of thousands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from training.device import Device
from training.errors import ConfigError

_WARM_UP: Final = 3  # runs without a graph: what is laid out, planned, allocated or compiled in the first ones is there


class Graphed:
    """work(*inputs) gives a tensor; it reads nothing else that changes, and from run to run in the same memory. The
    first runs are not captured, and all of them happen. A result stands until the next call."""

    def __init__(self, device: Device, work: Callable[..., Tensor]) -> None:
        """To be made before anything that work uses. Raises ConfigError where the device has no graphs."""
        if not device.late:
            raise ConfigError("train.cuda_graph needs GPUs, this run's ranks are CPUs; set it to false")
        device.leave_default_stream()
        self._device, self._work = device, work
        self._n_runs = 0
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        self._n_runs += 1
        if self._n_runs <= _WARM_UP:
            return self._work(*inputs)
        if self._replay is None:
            self._inputs = [torch.empty_like(x) for x in inputs]
            self._replay = self._device.capture(lambda: self._work(*self._inputs))
        for x, new in zip(self._inputs, inputs, strict=True):
            x.copy_(new, non_blocking=True)
        return self._replay()
