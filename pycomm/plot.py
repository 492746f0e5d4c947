"""Space-time diagrams of simulated schedules, with matplotlib (the extra `plot`: pip install pycomm[plot])."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pycomm.errors import PycommError
from pycomm.simulate import Simulation
from pycomm.topology import Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TRANSFERS = 20_000  # a line for each: beyond, a picture shows nothing and takes minutes


def space_time(run: Simulation, topology: Topology, axes: Axes) -> None:
    """Draws each transfer as a line from its sender when it begins to its receiver when it ends: time in ms to the
    right, ranks downwards, host after host. Solid lines are reductions, dashed ones copies; transfers between hosts are
    dark. What never ends, since a link has failed, is a dot where it would have begun, or at the left edge.

    Raises PycommError for more than MOST_TRANSFERS transfers."""
    rows = run.schedule.transfers
    if len(rows) > MOST_TRANSFERS:
        raise PycommError(
            f"{run.schedule.collective}/{run.schedule.algorithm} has {len(rows)} transfers, more than a space-time "
            f"diagram can show ({MOST_TRANSFERS}); draw it for fewer ranks"
        )
    order = topology.by_host()
    height = np.empty(topology.n_ranks, np.int64)
    height[order] = np.arange(topology.n_ranks)
    between = topology.host_index[rows["src"]] != topology.host_index[rows["dst"]]
    ended = np.isfinite(run.end_s)
    for crosses, color in ((False, "#e0a13a"), (True, "#1f4e79")):
        for reduces, style in ((True, "-"), (False, "--")):
            kind = ended & (between == crosses) & (rows["reduce"] == reduces)
            if not kind.any():
                continue
            label = f"{'reduce' if reduces else 'copy'} {'between hosts' if crosses else 'inside a host'}"
            begin, end = run.begin_s[kind] * 1e3, run.end_s[kind] * 1e3
            src, dst = height[rows["src"][kind]], height[rows["dst"][kind]]
            lines = axes.plot(np.stack([begin, end]), np.stack([src, dst]), style, color=color, linewidth=0.8)
            lines[0].set_label(label)
    if not ended.all():
        begun = np.where(np.isfinite(run.begin_s[~ended]), run.begin_s[~ended], 0.0) * 1e3
        axes.plot(begun, height[rows["src"][~ended]], "x", color="#c00000", label="never ends")
    hosts = topology.host_index[order]
    for edge in np.flatnonzero(np.diff(hosts)):
        axes.axhline(edge + 0.5, color="#b0b0b0", linewidth=0.6)
    axes.set_yticks(range(topology.n_ranks), [f"{topology.host_of(rank).name}: {rank}" for rank in order.tolist()])
    axes.set_ylim(topology.n_ranks - 0.5, -0.5)
    axes.set_xlabel("ms")
    axes.set_ylabel("host: rank")
    axes.set_title(f"{run.schedule.collective}, {run.schedule.algorithm}: {run.total_s * 1e3:.4g} ms predicted")
    if len(rows):
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")


def save_space_time(run: Simulation, topology: Topology, path: str | Path) -> None:
    """Writes the diagram to `path`, in the format its suffix names (.png, .svg, .pdf).

    Raises PycommError where matplotlib is missing or does not know the format."""
    figure = _figure_class()(figsize=(10, max(3.0, 0.28 * topology.n_ranks)), layout="constrained")
    space_time(run, topology, figure.add_subplot())
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise PycommError(f"cannot write {path}: {error}") from error


def _figure_class() -> Any:
    """matplotlib's Figure, without pyplot: no display, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PycommError(
            f"a diagram needs matplotlib ({error}); install it with pip install 'pycomm[plot]'"
        ) from error
    return Figure
