"""Memory of tensors that lie whole for a while, kept for the next ones of the same size.

A flat of parameters is whole while a module computes, its gradient until it is reduced. Through malloc() that memory
goes back to the kernel and comes again page by page, or is broken up by small tensors that outlive it: ZeRO-3's heap
grew by a flat with each block of a forward. Devices have an allocator of that kind already, which gives memory out
again in the order of the stream that it was taken on; who empties a tensor has made that stream wait for its
collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pycomm import _C, devices


class Pool:
    """Not thread safe. Keeps most_nbytes that nothing uses; what is given back beyond that is freed."""

    def __init__(self, most_nbytes: int) -> None:
        self._most_nbytes = most_nbytes
        self._nbytes = 0
        self._spare: dict[int, list[Tensor]] = {}  # by bytes: empty tensors whose storages have so many

    @property
    def nbytes(self) -> int:
        """Of what it keeps."""
        return self._nbytes

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        x = torch.empty(0, dtype=dtype, device=device)
        numel = torch.Size(shape).numel()
        self._fill(x, numel * dtype.itemsize)
        return x.set_(x.untyped_storage(), 0, torch.Size(shape)).zero_()  # type: ignore[call-overload,no-any-return]

    def fill(self, x: Tensor) -> None:
        """x, and all that views its storage, has memory, with any values; its storage was empty."""
        self._fill(x, x.numel() * x.itemsize)

    def empty(self, x: Tensor) -> None:
        """The memory of x's storage is taken from it, and from all that views it."""
        storage = x.untyped_storage()
        nbytes = storage.nbytes()
        if devices.on_device(x) or self._nbytes + nbytes > self._most_nbytes:
            storage.resize_(0)
        elif nbytes:
            spare = torch.empty(0, dtype=torch.uint8)
            _C.swap_memory(x, spare)
            self._spare.setdefault(nbytes, []).append(spare)
            self._nbytes += nbytes

    def _fill(self, x: Tensor, nbytes: int) -> None:
        if not devices.on_device(x) and self._spare.get(nbytes):
            _C.swap_memory(x, self._spare[nbytes].pop())
            self._nbytes -= nbytes
        else:
            x.untyped_storage().resize_(nbytes)
