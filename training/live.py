"""What a person sees of a run while it goes: a table that lives on a terminal, elsewhere a line every few steps."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_PLAIN_EVERY = 10  # steps between lines where the output is no terminal


class LiveTable:
    def __init__(self, console: Console, n_steps: int) -> None:
        self._console = console
        self._n_steps = n_steps
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._eval_loss: float | None = None

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, record: dict[str, Any]) -> None:
        """record: of one step, as metrics.jsonl has it."""
        self._eval_loss = record.get("eval_loss", self._eval_loss)
        if self._live is not None:
            self._live.update(self._table(record))
        elif record["step"] % _PLAIN_EVERY == 0 or record["step"] in (1, self._n_steps):
            pieces = [piece for name, value in self._figures(record) for piece in ((f"{name} ", "dim"), f"{value}  ")]
            self._console.print(Text.assemble(*pieces), soft_wrap=True)

    def _figures(self, record: dict[str, Any]) -> list[tuple[str, str]]:
        by_axis = ", ".join(f"{axis} {share:.0%}" for axis, share in record["exposed_by_axis"].items())
        figures = [
            ("step", f"{record['step']}/{self._n_steps}"),
            ("loss", f"{record['loss']:.4f}"),
            ("eval", "-" if self._eval_loss is None else f"{self._eval_loss:.4f}"),
            ("grad norm", f"{record['grad_norm']:.2f}"),
            ("tokens/s", f"{record['tokens_per_s']:,.0f}"),
            ("MFU", f"{record['mfu']:.0%}"),
            ("exposed comm", f"{record['exposed_share']:.0%}" + (f" ({by_axis})" if "," in by_axis else "")),
            ("peak memory", f"{record['peak_memory_bytes'] / 2**20:.0f} MiB"),
        ]
        if record.get("bubble_share", 0.0) > 0:  # with a pipeline
            figures.insert(-1, ("bubble", f"{record['bubble_share']:.0%}"))
        if record["slowest_excess_s"] > 0:
            figures.append(("slowest rank", f"{record['slowest_rank']} +{record['slowest_excess_s'] * 1e3:.0f} ms"))
        return figures

    def _table(self, record: dict[str, Any]) -> Table:
        table = Table.grid(padding=(0, 2))
        figures = self._figures(record)
        for row in (figures[:4], figures[4:]):
            table.add_row(*(Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in row))
        return table
