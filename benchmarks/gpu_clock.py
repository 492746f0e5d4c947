"""Times on a GPU by events, and on the host by its clock where a test runs these benchmarks without a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UPS = 3


@dataclass(frozen=True)
class Clock:
    """device: "cuda" or "cpu". rounds: of each measurement, after WARM_UPS."""

    device: str = "cuda"
    rounds: int = 30

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def elapsed_s(self, run: Callable[[], object]) -> float:
        """Of what run() puts on the current stream; waits for its end."""
        if not self.is_gpu:
            begin_s = time.perf_counter()
            run()
            return time.perf_counter() - begin_s
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def median_s(self, run: Callable[[int], object], prepare: Callable[[int], object] | None = None) -> float:
        """Of run(turn) on the device. prepare(turn) comes before each, off the clock."""
        found = []
        for turn in range(-WARM_UPS, self.rounds):
            if prepare is not None:
                prepare(turn)
            seconds = self.elapsed_s(lambda turn=turn: run(turn))
            if turn >= 0:
                found.append(seconds)
        return statistics.median(found)

    def sets_past_cache(self, nbytes: int) -> int:
        """How many sets of buffers, of so many bytes each, before the first is out of the L2 again."""
        if not self.is_gpu:
            return 2
        l2_nbytes = torch.cuda.get_device_properties(0).L2_cache_size
        return max(3, 3 * l2_nbytes // nbytes + 1)
