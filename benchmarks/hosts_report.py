"""What results/hosts.json says: tables, what was to be reached, a plot: python benchmarks/hosts_report.py"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, markdown_table, size_name, write_figures
from peers_report import GLOO, MIB, MPICH, figures_table

Entry = dict[str, Any]

KIB = 1 << 10
DOCS = Path(__file__).resolve().parents[1] / "docs"
BARE, CHOICE, RING = "bare C", "pycomm", "pycomm, flat ring"  # as peer_rank.Hosts names them
COLUMNS = (CHOICE, RING, GLOO, MPICH)
HEAD = ("algorithm", "bound, ms", "pycomm, ms", *(f"{who} / bound" for who in COLUMNS), "Gloo / pycomm")


def us(entry: Entry, who: str) -> float | None:
    found = entry["contenders"].get(who)
    return None if found is None else float(found["median_us"])


def times(entry: Entry, who: str, of: str) -> float | None:
    """who's time over of's."""
    upper, lower = us(entry, who), us(entry, of)
    return None if upper is None or lower is None else upper / lower


def cells(entry: Entry) -> list[str]:
    """As HEAD."""
    ratios = [times(entry, who, BARE) for who in COLUMNS] + [times(entry, GLOO, CHOICE)]
    ms = [f"{(us(entry, who) or 0) / 1e3:.2f}" for who in (BARE, CHOICE)]
    return [entry["contenders"][CHOICE].get("algorithm", ""), *ms] + [
        "" if ratio is None else f"{ratio:.2f}" for ratio in ratios
    ]


def table(name: str, entries: Sequence[Entry]) -> str:
    rows = [[f"{entry['collective']} {size_name(entry['nbytes'])}", *cells(entry)] for entry in entries]
    return markdown_table([name, *HEAD], rows)


def headline(record: Mapping[str, Any], nbytes: int) -> str:
    """all_reduce of one size in every section."""
    rows = [
        [name, *cells(entry)]
        for name, each in record.items()
        for entry in each["entries"]
        if (entry["collective"], entry["nbytes"]) == ("all_reduce", nbytes)
    ]
    return markdown_table(["hosts x ranks @ link", *HEAD], rows)


def figures(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached across hosts: of all points in question how many reach it, the median and the worst."""
    points = [(name, entry) for name, each in record.items() for entry in each["entries"]]
    rows = []

    def goal(text: str, wanted: Callable[[str, str, int], bool], who: str, of: str, asked: float, most: bool) -> None:
        chosen = [p for p in points if wanted(p[0], p[1]["collective"], p[1]["nbytes"])]
        found = [(ratio, point) for point in chosen if (ratio := times(point[1], who, of)) is not None]
        if not found:
            return
        worst, (name, entry) = (max if most else min)(found, key=lambda pair: pair[0])
        reached = sum(ratio <= asked if most else ratio >= asked for ratio, _ in found)
        middle = statistics.median(ratio for ratio, _ in found)
        rows.append(
            {
                "figure": f"{text}: {reached} of {len(found)} points, median {middle:.2f}, worst",
                "measured": round(worst, 2),
                "goal": asked,
                "at": f"{name} {entry['collective']} {size_name(entry['nbytes'])}",
                "reached": reached == len(found),
            }
        )

    def reduces(least: int, most: int = 1 << 40, sections: str = "") -> Callable[[str, str, int], bool]:
        return lambda name, what, n: what == "all_reduce" and least <= n <= most and name.startswith(sections)

    goal("all_reduce from 4 MiB / bound", reduces(4 * MIB), CHOICE, BARE, 1.10, True)
    goal("all_reduce of 1 MiB / bound", reduces(MIB, MIB), CHOICE, BARE, 1.25, True)
    goal("all collectives / our flat ring", lambda *_: True, CHOICE, RING, 1.03, True)
    goal("all collectives / MPICH", lambda *_: True, CHOICE, MPICH, 1.0, True)
    for n in (2, 4):
        goal(f"Gloo / all_reduce from 1 MiB, 2x{n}", reduces(MIB, sections=f"2x{n}@"), GLOO, CHOICE, 1.5, False)
    goal("Gloo / all_reduce from 1 MiB, 2x4-scattered", reduces(MIB, sections="2x4-s"), GLOO, CHOICE, 6.0, False)
    goal("Gloo / all_reduce to 4 KiB, 2x4", reduces(0, 4 * KIB, "2x4"), GLOO, CHOICE, 3.0, False)
    for collective in ("all_gather", "all_to_all"):
        goal(f"Gloo / {collective}", lambda _, what, __, c=collective: what == c, GLOO, CHOICE, 1.5, False)  # type: ignore[misc]
    return rows


def plot(record: Mapping[str, Any]) -> None:
    """all_reduce over its bound, a panel for each section: docs/hosts.png."""
    from matplotlib.figure import Figure

    rates = list(dict.fromkeys(name.partition("@")[2] for name in record))
    layouts = list(dict.fromkeys(name.partition("@")[0] for name in record))
    figure = Figure(figsize=(3 * len(layouts), 3 * len(rates)), layout="constrained")
    axes = figure.subplots(len(rates), len(layouts), sharex=True, sharey=True, squeeze=False)
    colours = {CHOICE: "#d62728", RING: "#ff7f0e", GLOO: "#999999", MPICH: "#9467bd"}
    for row, rate in zip(axes, rates, strict=True):
        for axis, layout in zip(row, layouts, strict=True):
            entries = record.get(f"{layout}@{rate}", {"entries": []})["entries"]
            entries = [e for e in entries if e["collective"] == "all_reduce" and e["nbytes"] >= 64 * KIB]
            for who, colour in colours.items():
                ratios = [times(entry, who, BARE) for entry in entries]
                axis.plot([e["nbytes"] for e in entries], ratios, color=colour, marker="o", markersize=3, label=who)
            axis.axhline(1, color="black", linestyle=":", linewidth=1)
            sizes = sorted({e["nbytes"] for e in entries})
            axis.set(xscale="log", ylim=(0.8, 8), yscale="log", title=f"{layout}, {rate}")
            axis.set_xticks(sizes, [size_name(size) for size in sizes], rotation=60, ha="right", fontsize=7)
            axis.set_yticks([1, 1.5, 2, 3, 5, 8], ["1", "1.5", "2", "3", "5", "8"], fontsize=7)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("all_reduce: time / the link's bound", fontsize=8)
    axes[0][0].legend(frameon=False, fontsize=7)
    figure.savefig(DOCS / "hosts.png", dpi=110)


def write_page(record: Mapping[str, Any]) -> None:
    parts = [
        f"{figures_table(figures(record))}\n",
        "![all_reduce over its bound](hosts.png)\n",
    ]
    for name, each in record.items():
        about = each["environment"]
        machine = f"{about['cpu']}, {about['cores']} cores, load {about['load_average_before'][0]}"
        commits = dict.fromkeys(entry["commit"] for entry in each["entries"])
        parts.append(f"{machine}, commit {', '.join(commits)}:\n")
        parts.append(table(name, each["entries"]) + "\n")
    write_figures(DOCS / "hosts.md", parts)


def main() -> None:
    record = json.loads((RESULTS / "hosts.json").read_text())
    print(figures_table(figures(record)))
    write_page(record)
    plot(record)


if __name__ == "__main__":
    main()
