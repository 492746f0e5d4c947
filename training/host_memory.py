"""What a GPU's memory need not hold all the time, in pinned memory of its host.

Tensors that HostMemory made are at home there, and on the device between prefetch() and release(): the same tensor,
whose memory is another one. Copies are in the order of the device's work, so that nobody waits for them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from training.device import Device
from training.saved_tensors import Saved, SavedTensors


class HostMemory:
    """pycomm.overlap's ShardMemory. Tensors that it did not make are left alone."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._homes: dict[Tensor, Tensor] = {}
        self._away: set[Tensor] = set()  # those that are on the device

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        home = self._device.pinned(shape, dtype).zero_()
        x = home.detach()
        self._homes[x] = home
        return x

    def prefetch(self, x: Tensor) -> None:
        """x is on the device. Returns at once."""
        home = self._homes.get(x)
        if home is not None and x not in self._away:
            x.data = torch.empty(home.shape, dtype=home.dtype, device=self._device.where).copy_(home, non_blocking=True)
            self._away.add(x)

    def release(self, x: Tensor) -> None:
        """x is at home, with what was written into it."""
        if x in self._away:
            self._away.remove(x)
            self._device.bring(x, self._homes[x])
            x.data = self._homes[x]


class HostActivations(SavedTensors):
    """In the host's memory. On a GPU copies run beside its work, and what backward will most likely take next is on its
    way while it computes."""

    def __init__(self, device: Device, parameters: Iterable[Tensor], min_nbytes: int = 1 << 16) -> None:
        super().__init__(parameters, min_nbytes)
        self._device = device
        self._streams = [torch.cuda.Stream(device.where) for _ in range(2)] if device.is_gpu else []
        self._last: weakref.ref[_OnHost] | None = None

    def _place(self, nbytes: int) -> Tensor:
        return self._device.pinned([nbytes], torch.uint8)

    def _save(self, x: Tensor, free: list[Tensor]) -> Saved:
        saved = _OnHost(x, free, self._device, self._streams, self._last)
        self._last = weakref.ref(saved)
        return saved


class _OnHost(Saved):
    def __init__(
        self,
        x: Tensor,
        free: list[Tensor],
        device: Device,
        streams: list[torch.cuda.Stream],
        before: weakref.ref[_OnHost] | None,
    ) -> None:
        """streams: away from the device, and back; [] for what has none. before: what was saved before it."""
        super().__init__(x, free)
        self._device, self._streams, self._before = device, streams, before
        self._back: Tensor | None = None
        if not streams:
            device.bring(x, self.home())
            return
        away, back = streams
        away.wait_stream(torch.cuda.current_stream())
        away.wait_stream(back)  # the place may just be read for the last time
        with torch.cuda.stream(away):
            device.bring(x, self.home())
        x.record_stream(away)
        self._there = away.record_event()

    def fetch(self) -> None:
        """It is on its way back."""
        if self._back is not None:
            return
        back = self._streams[1] if self._streams else None
        if back is None:
            self._back = torch.empty(self._shape, dtype=self._dtype, device=self._device.where).copy_(self.home())
            return
        back.wait_event(self._there)
        with torch.cuda.stream(back):
            self._back = torch.empty(self._shape, dtype=self._dtype, device=self._device.where)
            self._back.copy_(self.home(), non_blocking=True)
        self._arrived = back.record_event()

    def take(self) -> Tensor:
        self.fetch()
        x, self._back = self._back, None
        assert x is not None
        if self._streams:
            torch.cuda.current_stream().wait_event(self._arrived)
            x.record_stream(torch.cuda.current_stream())
        if self._before is not None and (before := self._before()) is not None:
            before.fetch()
        return x
