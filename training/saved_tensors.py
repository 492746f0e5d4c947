"""What autograd saves, in other memory until backward takes it: offload.py's files, host_memory.py's pinned memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Saved(ABC):
    """One tensor in a place, which is free again when autograd lets go of it."""

    def __init__(self, x: Tensor, free: list[Tensor]) -> None:
        """free: places, uint8, that hold x's bytes; the last one is taken. What is x stays to be copied to home()."""
        self._place, self._free = free.pop(), free
        self._dtype, self._shape = x.dtype, x.shape

    def home(self) -> Tensor:
        """The place, as x was."""
        return self._place[: math.prod(self._shape) * self._dtype.itemsize].view(self._dtype).view(self._shape)

    @abstractmethod
    def take(self) -> Tensor:
        """x as it was, in memory of its own where it was."""

    def __del__(self) -> None:
        self._free.append(self._place)


class SavedTensors(ABC):
    """Gives each tensor that is saved a place, reusing those of what backward has taken back.

    Tensors smaller than min_nbytes, and parameters (that live on anyway), stay where they are."""

    def __init__(self, parameters: Iterable[Tensor], min_nbytes: int) -> None:
        self._min_nbytes = min_nbytes
        self._kept = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._free: dict[int, list[Tensor]] = {}
        self.nbytes = 0  # of all places

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within it, what autograd saves goes to its place; backward may run anywhere."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, x: Tensor) -> Any:
        if x.nbytes < self._min_nbytes or x.untyped_storage()._cdata in self._kept:
            return x
        free = self._free.setdefault(x.nbytes, [])
        if not free:
            free.append(self._place(x.nbytes))
            self.nbytes += x.nbytes
        return self._save(x, free)

    def _unpack(self, packed: Any) -> Tensor:
        return packed.take() if isinstance(packed, Saved) else packed

    @abstractmethod
    def _place(self, nbytes: int) -> Tensor:
        """uint8 [at least nbytes]."""

    @abstractmethod
    def _save(self, x: Tensor, free: list[Tensor]) -> Saved: ...
