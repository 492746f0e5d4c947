"""pycomm.Group whose torch tensors count as a device's, over a fake NCCL (tests/cc/fake_nccl): what pycomm.overlap and
pycomm.moe do with tensors of GPUs, where there is none."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fake_nccl import build
from spawn import run_ranks
from torch import Tensor

from pycomm import Group, devices
from pycomm.moe import static
from pycomm.overlap.pool import Pool


class OnFakeDevice:
    """A tensor by DLPack, as memory of the device. Its stream is the host's own thread, so that what torch does with it
    comes in order, and what the engine does on its own stream comes late."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, stream: Any = None, **options: Any) -> Any:
        return self._tensor.__dlpack__(**options)


def _moved(value: Any) -> Any:
    return OnFakeDevice(value) if isinstance(value, Tensor) else value


class Watched:
    """A Work. The memory of its tensors is in use until wait(), which no host may need."""

    def __init__(self, work: Any, group: DeviceGroup, tensors: Sequence[Any]) -> None:
        self._work, self._group = work, group
        self.source = work.source
        group.in_use[self] = {x.untyped_storage().data_ptr() for x in tensors if isinstance(x, Tensor)}

    def wait(self, timeout_s: float | None = None) -> None:
        assert timeout_s is None, "a wait with a limit is the host's"
        self._work.wait()
        self._group.in_use.pop(self, None)

    def is_completed(self) -> bool:
        done: bool = self._work.is_completed()
        return done


class DeviceGroup(Group):
    """Of a group's ranks, by of(). calls: names of what was called, in order."""

    in_use: dict[Watched, set[int]]
    calls: list[str]

    @classmethod
    def of(cls, group: Group) -> DeviceGroup:
        made = group.new_group(range(group.size))
        assert made is not None
        made.__class__ = cls
        assert isinstance(made, DeviceGroup)
        made.in_use, made.calls = {}, []
        return made

    def _made(self, *arguments: Any) -> Group:
        made = super()._made(*arguments)
        made.__class__ = DeviceGroup
        assert isinstance(made, DeviceGroup)
        made.in_use, made.calls = self.in_use, self.calls
        return made

    def _call(self, name: str, given: tuple[Any, ...], options: dict[str, Any]) -> Any:
        self.calls.append(name)
        moved = {key: _moved(value) for key, value in options.items()}
        result = getattr(super(), name)(*map(_moved, given), **moved)
        if options.get("async_op"):
            return Watched(result, self, [*given, *options.values()])
        return given[0]

    def all_reduce(self, *given: Any, **options: Any) -> Any:
        return self._call("all_reduce", given, options)

    def broadcast(self, *given: Any, **options: Any) -> Any:
        return self._call("broadcast", given, options)

    def all_gather(self, *given: Any, **options: Any) -> Any:
        return self._call("all_gather", given, options)

    def reduce_scatter(self, *given: Any, **options: Any) -> Any:
        return self._call("reduce_scatter", given, options)

    def all_to_all(self, *given: Any, **options: Any) -> Any:
        return self._call("all_to_all", given, options)

    def symmetric_memory(self, like: Any, *given: Any) -> Any:
        self.calls.append("symmetric_memory")
        return super().symmetric_memory(_moved(like), *given)

    def exchange(self, sends: Any = (), receives: Any = (), **options: Any) -> Any:
        self.calls.append("exchange")
        pairs = [[(_moved(x), rank) for x, rank in each] for each in (sends, receives)]
        work = super().exchange(*pairs, **options)
        return Watched(work, self, [x for x, _ in [*sends, *receives]])


@contextmanager
def on_device(group: DeviceGroup) -> Iterator[None]:
    """Within it, all tensors count as the device's, and no memory may be given up that an operation uses."""
    before, empty, readable = devices.on_device, Pool.empty, static._readable

    def checked(pool: Pool, x: Tensor) -> None:
        address = x.untyped_storage().data_ptr()
        assert not any(address in used for used in group.in_use.values()), "memory given up under an operation"
        empty(pool, x)

    devices.on_device, Pool.empty = (lambda x: True), checked  # type: ignore[method-assign]
    static._readable = lambda x: False
    try:
        yield
    finally:
        devices.on_device, Pool.empty = before, empty  # type: ignore[method-assign]
        static._readable = readable


def run_device_groups(fn: Callable[..., Any], n_ranks: int, *args: Any, **options: Any) -> list[Any]:
    """run_ranks(), with fn(group, of_devices, *args): a group of the host's memory, and a DeviceGroup."""
    library = str(build())
    environment = {"PYCOMM_NCCL_LIB": library, "PYCOMM_TEST_DEVICE": library, **options.pop("environment", {})}
    return run_ranks(_rank, n_ranks, fn, args, environment=environment, **options)


def _rank(group: Group, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    ctypes.CDLL(os.environ["PYCOMM_TEST_DEVICE"]).fake_device_delay(100)
    made = DeviceGroup.of(group)
    try:
        return fn(group, made, *args)
    finally:
        made.close()
