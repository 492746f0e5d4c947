"""What overlapping gains: computation alone, communication alone, one after the other, and both at once.

The effective communication time of a run is what it takes beyond the best computation without communication,
ECT = T - T_compute, and E_overlap = 1 - ECT_overlap / ECT_serial is the share of it that overlapping makes disappear.
Source: Chang et al., FLUX, arXiv:2406.06858, section 2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pycomm import devices
from pycomm.errors import InvalidArgument
from pycomm.explain import format_s


@dataclass(frozen=True)
class Scorecard:
    """Seconds. compute_s: the best computation, not split, nothing beside it. comm_s: its communication alone.
    serial_s: one after the other. together_s: as it runs, overlapped."""

    compute_s: float
    comm_s: float
    serial_s: float
    together_s: float

    @property
    def exposed_s(self) -> float:
        """Communication that nothing hides: ECT of the overlapped run."""
        return max(0.0, self.together_s - self.compute_s)

    @property
    def overlap(self) -> float | None:
        """E_overlap: 1 where all communication is hidden, 0 where overlapping gains nothing, below where it costs.
        None where the serial run takes no longer than computing alone."""
        serial = self.serial_s - self.compute_s
        return 1 - (self.together_s - self.compute_s) / serial if serial > 0 else None

    @property
    def over_limit(self) -> float:
        """T / max(T_compute, T_comm): 1 is the best there can be."""
        return self.together_s / max(self.compute_s, self.comm_s)

    def __str__(self) -> str:
        share = "none to hide" if self.overlap is None else f"E_overlap {self.overlap:.2f}"
        return (
            f"T_compute {format_s(self.compute_s)}, T_comm {format_s(self.comm_s)}, "
            f"T_serial {format_s(self.serial_s)}, T {format_s(self.together_s)}; exposed communication "
            f"{format_s(self.exposed_s)}, {share}, T/max(T_compute, T_comm) {self.over_limit:.3f}"
        )


class ScoredGroup(Protocol):
    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> Any: ...


def measure(
    group: ScoredGroup,
    *,
    compute: Callable[[], object],
    communicate: Callable[[], object],
    serial: Callable[[], object],
    together: Callable[[], object],
    n_rounds: int = 5,
    device: torch.device | str = "cpu",
) -> Scorecard:
    """The four in turns, n_rounds times after one that does not count: medians over the rounds of the slowest rank's
    time. All ranks together; they get the same. Each callable leaves nothing under way, but on `device`, whose end is
    waited for."""
    if n_rounds < 1:
        raise InvalidArgument(f"n_rounds is {n_rounds}; give at least 1")
    like = torch.empty(0, device=device)
    runs = (compute, communicate, serial, together)
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(n_rounds + 1):
        for run, found in zip(runs, times, strict=True):
            devices.settle(like)
            group.all_reduce(torch.zeros(1))  # in step
            begin = time.perf_counter()
            run()
            devices.settle(like)
            took = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
            group.all_reduce(took, "max")
            if turn:
                found.append(float(took))
    return Scorecard(*(statistics.median(found) for found in times))
