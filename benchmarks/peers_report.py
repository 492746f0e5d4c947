"""What results/peers.json says: tables, what was to be reached, a plot: python benchmarks/peers_report.py"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from common import RESULTS, markdown_table, microseconds, size_name

GLOO, TORCH, GROUP, OWN, COPY = "Gloo", "torch.distributed", "Group", "Group, pycomm.empty", "copy"
NULL = "torch.distributed, no-op"
IMPI, IMPI_HEAP, OPEN_MPI, MPICH, ONECCL = "Intel MPI", "Intel MPI, shared heap", "Open MPI", "MPICH", "oneCCL"
ORDINARY_PEERS = (IMPI, OPEN_MPI, MPICH, ONECCL)
COLUMNS = (GLOO, *ORDINARY_PEERS, GROUP, IMPI_HEAP, OWN, TORCH)
TITLES = {GROUP: "pycomm", OWN: "pycomm.empty()", TORCH: "torch.distributed, pycomm", IMPI_HEAP: "Intel MPI heap"}
MIB = 1 << 20
SMALL = 1 << 10

Entry = dict[str, Any]


def median(entry: Entry, name: str) -> float | None:
    found = entry["contenders"].get(name)
    return None if found is None else float(found["median_us"])


def best_peer(entry: Entry) -> float | None:
    times = [t for name in ORDINARY_PEERS if (t := median(entry, name)) is not None]
    return min(times, default=None)


def ratios(entries: Iterable[Entry], name: str, against: Any) -> list[tuple[float, Entry]]:
    """time / the other's time where both were measured; against: a contender's name, or a function of the entry."""
    found = []
    for entry in entries:
        ours = median(entry, name)
        theirs = median(entry, against) if isinstance(against, str) else against(entry)
        if ours is not None and theirs is not None:
            found.append((ours / theirs, entry))
    return found


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def what(entry: Entry) -> str:
    if entry["collective"] == "barrier":
        return "barrier"
    short = {"float32": "", "bfloat16": " bf16"}[entry["dtype"]]
    return f"{entry['collective']} {size_name(entry['nbytes'])}{short}"


def figures(results: Sequence[Entry]) -> list[dict[str, Any]]:
    """What was to be reached, and what was."""
    rows = []

    def row(text: str, measured: float, goal: float, worst: Entry | None, at_most: bool = True) -> None:
        reached = measured <= goal if at_most else measured >= goal
        note = "" if worst is None else what(worst)
        rows.append({"figure": text, "measured": round(measured, 3), "goal": goal, "reached": reached, "at": note})

    for n in sorted({entry["n_ranks"] for entry in results}):
        mine = [entry for entry in results if entry["n_ranks"] == n]
        for name, against, text in (
            (GROUP, best_peer, "pycomm / the best MPI or oneCCL"),
            (OWN, IMPI_HEAP, "pycomm.empty() / Intel MPI's shared heap"),
        ):
            found = ratios(mine, name, against)
            if found:
                worst = max(found, key=lambda pair: pair[0])
                goal = 0.85 if name == GROUP else 1.0
                row(f"{n} ranks: {text}, geometric mean", geometric_mean([r for r, _ in found]), goal, None)
                row(f"{n} ranks: {text}, largest", worst[0], 1.10, worst[1])
                above = sum(ratio > 1.10 for ratio, _ in found)
                row(f"{n} ranks: {text}, points above 1.10 of {len(found)}", above, 0, None)
        found = [(1 / ratio, entry) for ratio, entry in ratios(mine, TORCH, GLOO)]
        if found:
            worst = min(found, key=lambda pair: pair[0])
            row(
                f"{n} ranks: Gloo / pycomm through torch.distributed, geometric mean",
                geometric_mean([r for r, _ in found]),
                10,
                None,
                at_most=False,
            )
            row(f"{n} ranks: Gloo / pycomm through torch.distributed, least", worst[0], 3, worst[1], at_most=False)
        shares = [
            max(through - ours, 0) / null
            for e in mine
            if e["nbytes"] <= SMALL
            and None not in (through := median(e, TORCH), ours := median(e, GROUP), null := median(e, NULL))
        ]
        if shares:
            text = f"{n} ranks: (through torch.distributed - pycomm) / torch's own share, to 1 KiB, geometric mean"
            row(text, geometric_mean([max(share, 1e-3) for share in shares]), 1.0, None)
        limited = [e for e in mine if e.get("limit_us") and e["nbytes"] >= MIB]
        for name in (GROUP, OWN):
            shares = [e["limit_us"] / t for e in limited if (t := median(e, name)) is not None]
            if shares:
                title = TITLES[name]
                row(
                    f"{n} ranks: {title}, share of what memory allows from 1 MiB, geometric mean",
                    geometric_mean(shares),
                    0.9,
                    None,
                    at_most=False,
                )
    return rows


def figures_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [r["figure"], f"{r['measured']:g}", f"{r['goal']:g}", r["at"], "yes" if r["reached"] else "no"] for r in rows
    ]
    return markdown_table(["figure", "measured", "asked", "at", "reached"], cells)


def table(entries: Sequence[Entry], columns: Sequence[str] = COLUMNS) -> str:
    """Median µs of each contender; the share of the memory's limit; pycomm over the best ordinary peer."""
    head = ["median µs", *(TITLES.get(name, name) for name in columns), "% of limit", "pycomm / best peer"]
    rows = []
    for entry in entries:
        times = [median(entry, name) for name in columns]
        ours, best = median(entry, GROUP), best_peer(entry)
        limit = entry.get("limit_us")
        rows.append(
            [
                what(entry),
                *("" if t is None else microseconds(t) for t in times),
                "" if not limit or ours is None else f"{100 * limit / ours:.0f}",
                "" if best is None or ours is None else f"{ours / best:.2f}",
            ]
        )
    return markdown_table(head, rows)


def plot(record: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = record["results"]
    counts = sorted({e["n_ranks"] for e in results})
    shown = [c for c in ("all_reduce", "all_gather", "all_to_all") if any(e["collective"] == c for e in results)]
    figure, axes = pyplot.subplots(len(counts), len(shown), figsize=(5 * len(shown), 4 * len(counts)), squeeze=False)
    styles = {
        GLOO: ("#999999", "o"), IMPI: ("#1f77b4", "s"), OPEN_MPI: ("#2ca02c", "v"), MPICH: ("#9467bd", "D"),
        ONECCL: ("#8c564b", "P"), GROUP: ("#d62728", "^"), OWN: ("#ff7f0e", "*"),
    }  # fmt: skip
    for line, n in zip(axes, counts, strict=True):
        for axis, collective in zip(line, shown, strict=True):
            entries = [e for e in results if (e["n_ranks"], e["collective"], e["dtype"]) == (n, collective, "float32")]
            for name, (colour, marker) in styles.items():
                points = [(e["nbytes"], t) for e in entries if (t := median(e, name)) is not None]
                if points:
                    label = TITLES.get(name, name)
                    axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=label)
            limits = [(e["nbytes"], e["limit_us"]) for e in entries if e.get("limit_us")]
            if limits:
                axis.plot(*zip(*limits, strict=True), color="black", linestyle=":", label="memory's limit")
            sizes = [e["nbytes"] for e in entries]
            axis.set(xscale="log", yscale="log", title=f"{collective}, {n} ranks, float32", ylabel="median µs")
            axis.set_xticks(sizes, [size_name(s) for s in sizes], rotation=60, ha="right", fontsize=7)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False, fontsize=8)
    about = record["environment"]
    figure.suptitle(f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}", fontsize=9, color="#555555")
    figure.tight_layout()
    figure.savefig(RESULTS / "peers.png", dpi=110)


def main() -> None:
    record = json.loads((RESULTS / "peers.json").read_text())
    for n in sorted({e["n_ranks"] for e in record["results"]}):
        print(f"\n{n} ranks\n\n{table([e for e in record['results'] if e['n_ranks'] == n])}")
    print(f"\n{figures_table(figures(record['results']))}")
    plot(record)


if __name__ == "__main__":
    main()
