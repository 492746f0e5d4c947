"""What a run leaves for people while it goes: a live line, metrics.jsonl, and the loss curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from training.machine import peak_memory_bytes
from training.trainer import StepResult

_PLAIN_EVERY = 10  # steps between lines where the output is no terminal


class MetricsFile:
    """Appends one JSON object a line. Opened for a run at first_step, it forgets the lines of that step and later ones,
    which an earlier process wrote after its last checkpoint."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(path) if record["step"] < first_step]
        temporary = path.with_name(f".{path.name}")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.rename(path)
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, [] where there is none; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class ProgressLine:
    """One line that lives on a terminal; elsewhere (a pipe, a file) a plain line every few steps."""

    def __init__(self, console: Console, n_steps: int, world_size: int) -> None:
        self._console = console
        self._n_steps = n_steps
        self._world_size = world_size
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._eval_loss: float | None = None

    def __enter__(self) -> ProgressLine:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def evaluated(self, loss: float) -> None:
        self._eval_loss = loss

    def show(self, result: StepResult) -> None:
        text = Text.assemble(
            ("step ", "dim"), f"{result.step}/{self._n_steps}",
            ("  loss ", "dim"), (f"{result.loss:.4f}", "bold"),
            ("  eval ", "dim"), "-" if self._eval_loss is None else f"{self._eval_loss:.4f}",
            ("  tokens/s ", "dim"), f"{result.n_tokens / result.step_s:,.0f}",
            ("  exposed comm ", "dim"), f"{result.exposed_share(self._world_size):.0%}",
            ("  peak memory ", "dim"), f"{peak_memory_bytes() / 2**20:.0f} MiB",
        )  # fmt: skip
        if self._live is not None:
            self._live.update(text)
        elif result.step % _PLAIN_EVERY == 0 or result.step in (1, self._n_steps):
            self._console.print(text, soft_wrap=True)


def plot_losses(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training and held-out loss over steps as a PNG; the file appears complete."""
    from matplotlib.figure import Figure  # slow to import, and only rank 0 draws

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", {"linewidth": 0.8}), ("eval_loss", "held out", {"marker": "o"})):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="cross-entropy [nats per token]", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.rename(path)
