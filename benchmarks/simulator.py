"""The simulator held against measured runs: predicted over measured, on emulated hosts: python benchmarks/simulator.py

Needs root. Hosts are network namespaces whose NICs tc shapes; a set-up is a layout and a rate, such as
"4x2@200mbit": 4 hosts of 2 ranks. The ranks first measure their own links (pycomm.measure, as `pycomm tune` does); the
topology with these figures is all that the simulator gets, nothing is fitted to the collectives. Then algorithms and
sizes take turns: batches of calls one after another, the slowest rank's time, the median of the batches.

A run replaces its own set-ups in results/simulator.json and writes table and plot of all into docs/simulator.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from common import environment, markdown_table, read_json, run_ranks, size_name, write_figures, write_json

import pycomm
from pycomm.discover import survey
from pycomm.measure import measure_links, measured_topology
from pycomm.netns import emulated_hosts, why_unavailable
from pycomm.planners import PLANNERS
from pycomm.simulate import simulate
from pycomm.topology import Topology

SETUPS = (
    *(f"2x2@{rate}" for rate in ("100mbit", "200mbit", "500mbit", "1gbit", "2gbit")),
    *(f"2x4@{rate}" for rate in ("100mbit", "200mbit", "500mbit", "1gbit")),
    *(f"4x2@{rate}" for rate in ("100mbit", "200mbit", "500mbit")),
    *(f"4x4@{rate}" for rate in ("100mbit", "200mbit")),
)
ALGORITHMS = ("ring", "hierarchical", "halving_doubling", "leader")
SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "simulator.md"
LARGE = 1 << 20  # from here on predictions are to be within 15 % of what is measured, below within 30
BATCH_S, BATCHES, MOST_CALLS = 0.05, 5, 20


def measure(store: dist.Store, rank: int, n_ranks: int, host: list[str]) -> dict[str, Any]:
    """What the links measure and {algorithm: {nbytes: seconds of a call}}; the same on every rank."""
    with pycomm.init(store, rank, n_ranks, host_id=host[rank], timeout_s=120) as group:
        found = survey(group)
        links = measure_links(group, found.topology, [machine.boot_id for machine in found.machines], all_pairs=False)
        topology = measured_topology(found.topology, links)
        times: dict[str, dict[int, float]] = {algorithm: {} for algorithm in ALGORITHMS}
        for nbytes in SIZES:
            x = np.ones(nbytes // 4, np.float32)
            calls = {}
            for algorithm in ALGORITHMS:
                first = min(batch(group, x, algorithm, 1) for _ in range(2))
                calls[algorithm] = int(np.clip(BATCH_S / first, 1, MOST_CALLS))
            taken: dict[str, list[float]] = {algorithm: [] for algorithm in ALGORITHMS}
            for _ in range(BATCHES):
                for algorithm in ALGORITHMS:
                    taken[algorithm].append(batch(group, x, algorithm, calls[algorithm]))
            for algorithm in ALGORITHMS:
                times[algorithm][nbytes] = float(np.median(taken[algorithm]))
        return {"topology": topology, "times": times}


def batch(group: pycomm.Group, x: np.ndarray[Any, Any], algorithm: str, n_calls: int) -> float:
    """Seconds of a call: the slowest rank's mean."""
    group.all_reduce(x, "max", algorithm=algorithm)  # the ranks fall into step
    begin = time.perf_counter()
    for _ in range(n_calls):
        group.all_reduce(x, "max", algorithm=algorithm)
    seconds = np.array([(time.perf_counter() - begin) / n_calls])
    group.all_reduce(seconds, "max")
    return float(seconds[0])


def set_up(name: str) -> dict[str, Any]:
    layout, _, rate = name.partition("@")
    n_hosts, per_host = map(int, layout.split("x"))
    names = tuple("abcd"[:n_hosts])
    hosts = [host for host in names for _ in range(per_host)]
    about = environment()
    with emulated_hosts(hosts=names) as network:
        network.shape(rate)
        found = run_ranks(measure, len(hosts), hosts, hosts=hosts, network=network)[0]
    topology: Topology = found["topology"]
    rows = {}
    for algorithm, times in found["times"].items():
        schedule = PLANNERS["all_reduce"][algorithm](topology, 0)
        rows[algorithm] = {
            str(nbytes): {"measured_s": seconds, "predicted_s": simulate(schedule, topology, nbytes).total_s}
            for nbytes, seconds in times.items()
        }
    return {"environment": about, "topology": topology.to_toml(), "all_reduce": rows}


def ratios(setup: dict[str, Any]) -> Iterator[tuple[str, int, float]]:
    """(algorithm, nbytes, predicted / measured)"""
    for algorithm, times in setup["all_reduce"].items():
        for nbytes, one in times.items():
            yield algorithm, int(nbytes), one["predicted_s"] / one["measured_s"]


def is_right(nbytes: int, ratio: float) -> bool:
    off = 0.15 if nbytes >= LARGE else 0.30
    return 1 - off <= ratio <= 1 + off


def table(record: dict[str, Any]) -> str:
    rows = []
    for name, setup in record.items():
        of = {(algorithm, nbytes): ratio for algorithm, nbytes, ratio in ratios(setup)}
        for algorithm in setup["all_reduce"]:
            cells = []
            for nbytes in SIZES:
                ratio = of[algorithm, nbytes]
                cells.append(f"{ratio:.2f}" if is_right(nbytes, ratio) else f"**{ratio:.2f}**")
            rows.append([name, algorithm, *cells])
    return markdown_table(["set-up", "algorithm", *map(size_name, SIZES)], rows)


def summary(record: dict[str, Any]) -> str:
    parts = []
    for wanted in (True, False):
        what = f"from {size_name(LARGE)}, within 15 %" if wanted else f"below {size_name(LARGE)}, within 30 %"
        points = [(n, ratio) for setup in record.values() for _, n, ratio in ratios(setup) if (n >= LARGE) == wanted]
        right = sum(is_right(*point) for point in points)
        middle = float(np.median([ratio for _, ratio in points]))
        parts.append(f"{what}: {right} of {len(points)} points, median {middle:.2f}")
    return f"{len(record)} set-ups. Predicted / measured {'; '.join(parts)}.\n"


def write_page(record: dict[str, Any]) -> None:
    cpus = {f"{s['environment']['cpu']}, {s['environment']['cores']} cores" for s in record.values()}
    parts = [f"{'; '.join(sorted(cpus))}. {summary(record)}", table(record) + "\n"]
    write_figures(PAGE, parts)
    plot(record)


def plot(record: dict[str, Any]) -> None:
    """Predicted over measured, each set-up a panel: docs/simulator.png."""
    from matplotlib.figure import Figure

    columns = 5
    figure = Figure(figsize=(14, 2.4 * -(-len(record) // columns)), layout="constrained")
    grid = figure.subplots(-(-len(record) // columns), columns, sharex=True, sharey=True, squeeze=False)
    for axis, (name, setup) in zip(grid.flat, record.items(), strict=False):
        for algorithm in setup["all_reduce"]:
            points = [(n, ratio) for each, n, ratio in ratios(setup) if each == algorithm]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=algorithm)
        below, above = [SIZES[0] / 2, LARGE / 2], [LARGE / 2, SIZES[-1] * 2]
        axis.fill_between(below, 0.7, 1.3, alpha=0.12, color="black", linewidth=0)
        axis.fill_between(above, 0.85, 1.15, alpha=0.12, color="black", linewidth=0)
        axis.set(xscale="log", yscale="log", ylim=(0.2, 4), title=name)
        axis.set_xticks(SIZES, [size_name(size) for size in SIZES], rotation=60, ha="right", fontsize=7)
        axis.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"], fontsize=7)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in grid.flat[len(record) :]:
        axis.set_axis_off()
    for row in grid:
        row[0].set_ylabel("predicted / measured", fontsize=8)
    grid[0][0].legend(fontsize=6)
    figure.savefig(PAGE.with_suffix(".png"), dpi=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("setups", nargs="*", metavar="SETUP", help=f"of {', '.join(SETUPS)} (default: all)")
    parser.add_argument("--dry", action="store_true", help="print, and leave the record as it is")
    options = parser.parse_args()
    if unknown := set(options.setups) - set(SETUPS):
        parser.error(f"no set-up {', '.join(sorted(unknown))}")
    if (why := why_unavailable()) is not None:
        print(f"simulator.py cannot emulate hosts here: {why}", file=sys.stderr)
        return 2
    record: dict[str, Any] = read_json("simulator")
    for name in options.setups or SETUPS:
        record[name] = set_up(name)
        print(table({name: record[name]}), flush=True)
        if not options.dry:
            record = {key: record[key] for key in SETUPS if key in record}
            write_json("simulator", record)
            write_page(record)
    print(summary(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
