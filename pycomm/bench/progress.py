"""How far a run is: with rich a bar on the terminal that takes the rows, otherwise a line for each case on standard
error. (Under `pycomm launch` only standard output is the terminal itself.)"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any


class Progress:
    """show: False on ranks that print nothing."""

    def __init__(self, n_cases: int, show: bool) -> None:
        self._n, self._done, self._show = n_cases, 0, show
        self._bar: Any = None
        if show and sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(),
                transient=True,
                redirect_stdout=False,  # rows are printed between stop() and start(), whole whatever their width
                redirect_stderr=False,
            )
            self._task = self._bar.add_task("", total=n_cases)
            self._bar.start()

    def begin(self, label: str) -> None:
        """A case is measured from now on."""
        if self._bar is not None:
            self._bar.update(self._task, description=label, completed=self._done)
        elif self._show:
            print(f"[{self._done + 1}/{self._n}] {label}", file=sys.stderr, flush=True)
        self._done += 1

    def print(self, *lines: str) -> None:
        """Lines for standard output, with the bar out of their way."""
        if not self._show:
            return
        if self._bar is not None:
            self._bar.stop()
        print(*lines, sep="\n", flush=True)
        if self._bar is not None:
            self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
