"""Memory in a mapped file: optimizer state and saved activations that the kernel may write out when memory is short.

The file is unlinked as soon as it is open, so nothing stays behind, whatever ends the process. Pages go to the disk
when the kernel wants their memory and come back when they are touched, reading ahead; sequential use is said to it."""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.errors import ConfigError

Allocate = Callable[[torch.Size], Tensor]  # fp32 zeros of a shape


def in_memory(shape: torch.Size) -> Tensor:
    return torch.zeros(shape)


def in_file(folder: Path) -> Allocate:
    """An Allocate whose tensors lie in files in folder. Raises ConfigError where it cannot be written."""
    _writable(folder)
    return lambda shape: _mapped(folder, math.prod(shape) * 4).view(torch.float32)[: math.prod(shape)].view(shape)


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder}: {error.strerror}; set train.offload_dir to a disk with room"
        ) from error


def _mapped(folder: Path, nbytes: int) -> Tensor:
    """uint8 [at least nbytes] of zeros in a file of its own."""
    nbytes = max(64, nbytes + -nbytes % 64)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(nbytes)
            pages = mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise ConfigError(f"no room for {nbytes} bytes in {folder}: {error.strerror}; set train.offload_dir") from error
    pages.madvise(mmap.MADV_SEQUENTIAL)
    return torch.frombuffer(pages, dtype=torch.uint8)  # keeps the mapping


class ActivationFile:
    """Puts what autograd saves into files, reusing the place of what backward has taken back.

    Tensors smaller than min_nbytes, and parameters (that live on anyway), stay where they are."""

    def __init__(self, folder: Path, parameters: Iterable[Tensor], min_nbytes: int = 1024) -> None:
        _writable(folder)
        self._folder, self._min_nbytes = folder, min_nbytes
        self._kept = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._free: dict[int, list[Tensor]] = {}
        self.nbytes = 0  # of all places

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within it, what autograd saves goes into the file; backward may run anywhere."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, x: Tensor) -> Any:
        if x.nbytes < self._min_nbytes or x.untyped_storage()._cdata in self._kept:
            return x
        free = self._free.setdefault(x.nbytes, [])
        if not free:
            free.append(_mapped(self._folder, x.nbytes))
            self.nbytes += x.nbytes
        place = _Place(free.pop(), free)
        place.pages[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        return place, x.dtype, x.shape

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        place, dtype, shape = packed
        return place.pages[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape).clone()


class _Place:
    """Pages that become free again when autograd lets go of them."""

    def __init__(self, pages: Tensor, free: list[Tensor]) -> None:
        self.pages, self._free = pages, free

    def __del__(self) -> None:
        self._free.append(self.pages)
