"""Memory in mapped files: shards, optimizer state and saved activations that need not be in memory all the time.

A file is unlinked as soon as it is mapped, so nothing stays behind, whatever ends the process. What is released leaves
this process's memory; its pages are the kernel's to write out when memory is short, and come back when they are
touched, or ahead of that where it is said that they will be."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.errors import ConfigError
from training.saved_tensors import Saved, SavedTensors

_LIBC = ctypes.CDLL(None)


class FileMemory:
    """Tensors in files of a folder: pycomm.overlap's ShardMemory. Tensors that it did not make are left alone."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError where the folder cannot be written."""
        _writable(folder)
        self._folder = folder
        self._nbytes: dict[int, int] = {}  # of each mapping, by its address

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Raises ConfigError where the disk has no room."""
        numel = math.prod(shape)
        pages = _mapped(self._folder, numel * dtype.itemsize)
        self._nbytes[pages.data_ptr()] = pages.nbytes
        return pages.view(dtype)[:numel].view(*shape)

    def prefetch(self, x: Tensor) -> None:
        """The kernel begins to read x from the disk, if it is not in memory. Returns at once."""
        self._advise(x, mmap.MADV_WILLNEED)

    def release(self, x: Tensor) -> None:
        """x leaves this process's memory; it keeps its values."""
        self._advise(x, mmap.MADV_DONTNEED)

    def _advise(self, x: Tensor, advice: int) -> None:
        # Only of a mapped file: other memory loses its values by MADV_DONTNEED.
        nbytes = self._nbytes.get(x.data_ptr())
        if nbytes is not None:
            _advise(x.data_ptr(), nbytes, advice)


def _advise(address: int, nbytes: int, advice: int) -> None:
    _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice)


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
    """uint8 [at least nbytes] of zeros in a file of its own, which has its place on the disk and no descriptor."""
    nbytes = max(64, nbytes + -nbytes % 64)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk is an error here, not a SIGBUS later
            return torch.from_file(file.name, shared=True, size=nbytes, dtype=torch.uint8)
    except OSError as error:
        raise ConfigError(f"no room for {nbytes} bytes in {folder}: {error.strerror}; set train.offload_dir") from error


class ActivationFile(SavedTensors):
    """In files of a folder. What backward will most likely take next is read ahead, where the kernel wrote it out."""

    def __init__(self, folder: Path, parameters: Iterable[Tensor], min_nbytes: int = 1024) -> None:
        """Raises ConfigError where the folder cannot be written."""
        super().__init__(parameters, min_nbytes)
        _writable(folder)
        self._folder = folder
        self._last: weakref.ref[_InFile] | None = None

    def _place(self, nbytes: int) -> Tensor:
        return _mapped(self._folder, nbytes)

    def _save(self, x: Tensor, free: list[Tensor]) -> Saved:
        saved = _InFile(x, free, self._last)
        self._last = weakref.ref(saved)
        return saved


class _InFile(Saved):
    def __init__(self, x: Tensor, free: list[Tensor], before: weakref.ref[_InFile] | None) -> None:
        """before: what was saved before it."""
        super().__init__(x, free)
        self._before = before
        self.home().copy_(x)
        self.advise(mmap.MADV_DONTNEED)

    def take(self) -> Tensor:
        before = self._before() if self._before is not None else None
        if before is not None:
            before.advise(mmap.MADV_WILLNEED)
        x = self.home().clone()
        self.advise(mmap.MADV_DONTNEED)
        return x

    def advise(self, advice: int) -> None:
        _advise(self._place.data_ptr(), self._place.nbytes, advice)
