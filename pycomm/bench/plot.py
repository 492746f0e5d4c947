"""--png: bus bandwidth along the sizes, or time where a size has no bandwidth to speak of."""

from __future__ import annotations

import importlib.util
from itertools import groupby
from pathlib import Path
from typing import Any

from pycomm.errors import InvalidArgument
from pycomm.explain import format_nbytes


def require_matplotlib() -> None:
    """Raises InvalidArgument without it: before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidArgument("--png needs matplotlib: pip install 'pycomm[bench]', or leave --png out")


def plot(record: dict[str, Any], path: Path) -> None:
    """A pair of axes for each collective and type: median time and bus bandwidth of every library, the roofline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def kind(row: dict[str, Any]) -> tuple[str, str]:
        return row["collective"], row["dtype"]

    groups = [(key, list(rows)) for key, rows in groupby(sorted(record["rows"], key=kind), kind)]
    figure, axes = pyplot.subplots(len(groups), 2, figsize=(11, 3.6 * len(groups)), squeeze=False, layout="constrained")
    for line, ((collective, dtype), rows) in zip(axes, groups, strict=True):
        libraries = dict.fromkeys(name for row in rows for name in row["timings"])
        for library in libraries:
            points = [
                (max(row["nbytes"], 1), row["timings"][library][row["native"]], row)
                for row in rows
                if library in row["timings"]
            ]
            for series in _series(points):
                x, timings = [p[0] for p in series], [p[1] for p in series]
                marker = "o" if library == "pycomm" else "s"
                name = library if points[0][2]["pair"] is None else f"{library} {series[0][2]['pair']}"
                line[0].plot(x, [t["p50_us"] for t in timings], marker=marker, markersize=3, label=name)
                line[1].plot(x, [t["busbw_GBps"] for t in timings], marker=marker, markersize=3, label=name)
        limits = [(row["nbytes"], row["roofline_us"]) for row in rows if row["roofline_us"]]
        if limits:
            line[0].plot(*zip(*limits, strict=True), color="black", linestyle=":", label="roofline")
        ticks = sorted({max(row["nbytes"], 1) for row in rows})
        for axis, what in zip(line, ("median time (us)", "bus bandwidth (GB/s)"), strict=True):
            axis.set(xscale="log", yscale="log", title=f"{collective}, {dtype}", ylabel=what)
            axis.set_xticks(ticks, [format_nbytes(size) for size in ticks], rotation=60, ha="right", fontsize=7)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        line[0].legend(frameon=False, fontsize=8)
    about = record["machine"]
    hosts = len(set(record["host_ids"]))
    layout = (
        f"{record['n_ranks']} ranks, {hosts} host(s), {about['cpu']}, {about['cores']} cores, torch {about['torch']}"
    )
    figure.suptitle(layout, fontsize=9, color="#555555")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _series(points: list[Any]) -> list[list[Any]]:
    """Points of one line: those of one pair of ranks, operation and root."""

    def line(point: Any) -> str:
        return str([point[2][name] for name in ("pair", "op", "root")])

    return [list(group) for _, group in groupby(sorted(points, key=lambda p: (line(p), p[0])), line)]
