"""The timeline in docs/overlap.png from the traces in results/overlap.json: python benchmarks/overlap_plot.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def plot(record: dict[str, Any]) -> None:
    """One row of each section that has a trace: backward's layers above, the buckets under way below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in ("sleeping", "computing") if name in record]
    if not names:
        return
    figure, axes = pyplot.subplots(len(names), 1, figsize=(9, 2.2 * len(names)), squeeze=False, sharex=True)
    for axis, name in zip(axes[:, 0], names, strict=True):
        trace = record[name]["result"]["trace"]
        axis.broken_barh(
            [(1e3 * a, 1e3 * (b - a)) for a, b in trace["compute"]], (1.1, 0.8), facecolor="tab:blue", edgecolor="white"
        )
        ends = [0.0]
        for number, (begin, end, nbytes) in enumerate(trace["buckets"]):
            runs_from = max(begin, ends[-1])  # the engine runs a group's collectives one after another
            shade = "tab:orange" if number % 2 else "goldenrod"
            axis.broken_barh([(1e3 * begin, 1e3 * (runs_from - begin))], (0.1, 0.15), facecolor="lightgray")
            axis.broken_barh([(1e3 * runs_from, 1e3 * (end - runs_from))], (0.1, 0.8), facecolor=shade)
            ends.append(end)
            if end - runs_from > 0.03:
                middle = 1e3 * (runs_from + end) / 2
                axis.text(middle, 0.5, f"{nbytes >> 10} KiB", ha="center", va="center", size=7)
        axis.set_yticks([0.5, 1.5], ["buckets", "backward"])
        axis.axvline(1e3 * max(b for _, b in trace["compute"]), color="black", linewidth=0.8, linestyle=":")
        axis.set_title(f"{name}: {len(trace['buckets'])} buckets on a link of 200 Mbit/s", size=9)
    axes[-1, 0].set_xlabel("ms from the beginning of backward; dotted: its end; gray: started, not yet its turn")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "overlap.png", dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    plot(json.loads((ROOT / "benchmarks" / "results" / "overlap.json").read_text()))
