"""Where a rank computes: on its CPU, or on a GPU, to which the host hands work that it looks at a step later.

All that the two differ in is here: which device a rank has, how batches get there and values come back, what a group is
given, how time is measured, and how much memory there is. Everything else makes its tensors on Device.where.

With PYCOMM_TEST_DEVICE (csrc/torch/device_side.h) the device is host memory, which groups take for a device's."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from pycomm.overlap import InMemory
from training.errors import ConfigError, common

if TYPE_CHECKING:
    from pycomm.group import Group

_NORM_NUMEL = 1 << 18  # the norm copies what it reads in fp64: of 56 MiB at once in 229 ms, in such pieces in 19 ms
_NORM_NUMEL_GPU = 1 << 24  # a launch for each piece; 128 MiB of fp64


def dtype_of(precision: Literal["fp32", "bf16"]) -> torch.dtype:
    """Of parameters and activations: train.precision, export.precision."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


@dataclass(frozen=True)
class Device:
    """Of one rank. late: the host hands a whole step over before it looks at the values of the one before, so that the
    device never runs out of work; a CPU has done its work when the call returns."""

    where: torch.device
    late: bool = False

    @property
    def is_gpu(self) -> bool:
        return self.where.type == "cuda"

    def making(self) -> AbstractContextManager[Any]:
        """Within it, tensors that name no device are made on this one."""
        return self.where

    def array(self, x: Tensor) -> Any:
        """What a group is given for a tensor of this device."""
        return _OnTestDevice(x) if self.late and not self.is_gpu else x

    # Batches there, values back.

    @overload
    def staged(self, x: Tensor) -> Tensor: ...
    @overload
    def staged(self, x: Tensor | None) -> Tensor | None: ...
    def staged(self, x: Tensor | None) -> Tensor | None:
        """x in the memory that put() copies from without a wait."""
        return x.pin_memory() if x is not None and self.is_gpu else x

    @overload
    def put(self, x: Tensor) -> Tensor: ...
    @overload
    def put(self, x: Tensor | None) -> Tensor | None: ...
    def put(self, x: Tensor | None) -> Tensor | None:
        """x on the device."""
        return None if x is None else x.to(self.where, non_blocking=True)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the host, uninitialised, that a GPU reads and writes itself."""
        return torch.empty(*shape, dtype=dtype, device="cpu", pin_memory=self.is_gpu)

    def bring(self, x: Tensor, home: Tensor) -> None:
        """x to pinned memory, in the order of the device's work."""
        home.copy_(x, non_blocking=True)

    def fetch(self, x: Tensor) -> Fetched:
        """x on its way to the host."""
        return Fetched(self, x)

    def leave_default_stream(self) -> None:
        """From now on this thread's work is on a stream that capture() can capture."""
        if self.is_gpu:
            torch.cuda.set_stream(torch.cuda.Stream(self.where))

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """run as a graph: what is returned does its work again, on the same memory, and gives its result."""
        if not self.is_gpu:
            return run
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: the one that reads batches ahead does.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    def synchronize(self) -> None:
        """Returns when the device has done all that it was given."""
        if self.is_gpu:
            torch.cuda.synchronize(self.where)

    # What it has, and what was used.

    @property
    def norm_numel(self) -> int:
        """Numbers of a gradient that its norm takes at a time."""
        return _NORM_NUMEL_GPU if self.is_gpu else _NORM_NUMEL

    def free_nbytes(self) -> int | None:
        """Of a GPU's memory, what no process has now; None for a CPU, whose memory others have claims to."""
        return torch.cuda.mem_get_info(self.where)[0] if self.is_gpu else None


HOST = Device(torch.device("cpu"))


class Fetched:
    """A tensor on its way from a device; value() waits for it, on the host."""

    def __init__(self, device: Device, x: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._x = x
        if device.is_gpu:
            self._x = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
            self._x.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def value(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._x


class Span:
    """From its making to stop(): of the host's time, or on a GPU of its current stream's."""

    def __init__(self, device: Device) -> None:
        self._events: list[torch.cuda.Event] = []
        self._is_gpu = device.is_gpu
        self._s = -time.perf_counter()
        self._mark()

    def _mark(self) -> None:
        if self._is_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)

    def stop(self) -> None:
        self._s += time.perf_counter()
        self._mark()

    def is_over(self) -> bool:
        """Whether seconds() need not wait."""
        return not self._is_gpu or self._events[-1].query()

    def seconds(self) -> float:
        if not self._is_gpu:
            return self._s
        self._events[-1].synchronize()
        return self._events[0].elapsed_time(self._events[-1]) / 1e3


class Waits:
    """Seconds that computation waits for communication: the host's in calls that block, on a GPU those of its stream,
    which are known when it has come past them."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._total_s = 0.0
        self._open: deque[Span] = deque()

    @contextmanager
    def counting(self) -> Iterator[None]:
        if self._device.is_gpu and torch.cuda.is_current_stream_capturing():
            yield  # a graph has no times of its own
            return
        span = Span(self._device)
        try:
            yield
        finally:
            span.stop()
            self._open.append(span)

    def until_now_s(self) -> float:
        """Of those that are over."""
        while self._open and self._open[0].is_over():
            self._total_s += self._open.popleft().seconds()
        return self._total_s


class DeviceMemory(InMemory):
    """Ordinary memory of a device: pycomm.overlap's ShardMemory."""

    def __init__(self, device: Device) -> None:
        self._where = device.where

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self._where)


class _OnTestDevice:
    """A CPU tensor as an array of a device."""

    def __init__(self, x: Tensor) -> None:
        self._x = x.detach()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, stream: Any = None, **options: Any) -> Any:
        return self._x.__dlpack__(**options)


def choose_device(asked: Literal["auto", "cpu", "cuda"], world: Group) -> Device:
    """This rank's device, which is torch's current one from then on; all ranks together, and all get the same kind.

    Raises ConfigError on every rank where GPUs are asked for and some rank has none of its own."""
    if asked == "cpu":
        return HOST
    if os.environ.get("PYCOMM_TEST_DEVICE"):
        return Device(torch.device("cpu"), late=True)
    local_rank, n_gpus = _local_rank(world), torch.cuda.device_count() if torch.cuda.is_available() else 0
    mine = local_rank if n_gpus > 1 else 0  # a launcher may show each rank its own alone
    numbers = torch.empty(world.size, 2, dtype=torch.int64)
    world.all_gather(numbers, torch.tensor([[n_gpus, int(mine < n_gpus)]]))
    without = (numbers[:, 1] == 0).nonzero().flatten().tolist()
    if without:
        if asked == "auto":
            return HOST
        rank = without[0]
        raise common(
            ConfigError(
                f"train.device is 'cuda', but rank {rank} has no GPU of its own: torch {torch.__version__} sees "
                f"{int(numbers[rank, 0])} there; start as many ranks a host as it has GPUs, install a CUDA build of "
                "torch, or set train.device to 'cpu'"
            )
        )
    torch.cuda.set_device(mine)
    return Device(torch.device("cuda", mine), late=True)


def device_here(asked: Literal["auto", "cpu", "cuda"]) -> Device:
    """The device of a program that is no rank: the first GPU, where there is one."""
    return HOST if asked == "cpu" or not torch.cuda.is_available() else Device(torch.device("cuda", 0), late=True)


def _local_rank(world: Group) -> int:
    """This rank's number among those of its machine: LOCAL_RANK, or by the kernel's boot id."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    same = of_this_machine(world)
    return sum(same[: world.rank])


def of_this_machine(world: Group) -> list[bool]:
    """Of each rank, whether it is on this rank's machine (its kernel has the same boot id: emulated hosts are one)."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()[:36].ljust(36)
    all_ids = torch.empty(world.size, 36, dtype=torch.uint8)
    own_id = torch.frombuffer(bytearray(boot_id), dtype=torch.uint8).unsqueeze(0)
    world.all_gather(all_ids, own_id)
    found: list[bool] = (all_ids == own_id).all(1).tolist()
    return found
