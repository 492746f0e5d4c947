"""torch's profiler over chosen steps: one Chrome trace for each rank, to open in Perfetto or chrome://tracing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from training.config import MonitorConfig


class StepProfiler:
    """Records monitor.profile_steps steps from monitor.profile_first; before() and after() stand around each step."""

    def __init__(self, folder: Path, monitor: MonitorConfig, rank: int) -> None:
        self._first, self._last = monitor.profile_first, monitor.profile_first + monitor.profile_steps - 1
        self._path = folder / f"steps_{self._first}-{self._last}_rank_{rank}.json"
        self._profiler: profile | None = None

    def before(self, step: int) -> None:
        if step == self._first:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = profile(activities=activities)
            self._profiler.start()

    def after(self, step: int) -> None:
        if step == self._last:
            self.close()

    def close(self) -> None:
        """Writes what was recorded, if anything is being recorded."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(str(self._path))
            self._profiler = None
