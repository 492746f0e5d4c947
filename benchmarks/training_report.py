"""Writes the trainer's figures from results/*.json into docs/training_figures.md, and their plot:
python benchmarks/training_report.py. A test holds page and results equal."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bubble
from common import RESULTS, markdown_table, write_figures
from peers_report import figures_table
from trainer import ALONE, PAIRS
from training_memory import KINDS, LAYOUTS

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, PLOT = DOCS / "training_figures.md", DOCS / "training_figures.png"
MIB = 1 << 20
Record = dict[str, Any]


def records() -> dict[str, Record]:
    """By name; those that were never measured are missing."""
    names = ("trainer", "torchtitan", "bubble", "exposed", "training_memory", "planner")
    paths = {name: RESULTS / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def stamps(record: Record) -> str:
    """Of sections that were measured one by one."""
    first = next(iter(record.values()))["environment"]
    each = [
        f"{name} {found['environment']['commit']}, load {found['environment']['load_average_before'][0]}"
        for name, found in record.items()
    ]
    return f"{first['cpu']}, {first['cores']} cores, torch {first['torch']}; commits: {'; '.join(each)}."


# Steps beside plain torch's.


def ratios(steps_of: Record) -> Iterator[tuple[str, str, float]]:
    """(section, pair, plain torch's step over the trainer's)."""
    for name, each in steps_of.items():
        steps = each["result"]["step_s"]
        for pair, (ours, theirs) in PAIRS.items():
            if ours in steps:
                yield name, pair, steps[theirs]["median"] / steps[ours]["median"]


def step_table(steps_of: Record) -> str:
    rows = []
    for name, each in steps_of.items():
        steps = each["result"]["step_s"]
        for pair, (ours, theirs) in PAIRS.items():
            if ours not in steps:
                continue
            ms = [1e3 * steps[who]["median"] for who in (ours, theirs)]
            spread = [
                f"{1e3 * min(steps[who]['turns']):.0f} to {1e3 * max(steps[who]['turns']):.0f}"
                for who in (ours, theirs)
            ]
            apart = max(each["result"]["losses_apart"][who] for who in (ours, theirs))
            rows.append(
                [
                    name,
                    pair,
                    f"{ms[0]:.0f}",
                    spread[0],
                    f"{ms[1]:.0f}",
                    spread[1],
                    f"{ms[1] / ms[0]:.2f}",
                    f"{apart:.1e}",
                ]
            )
        rows += [
            [name, f"{who} alone", f"{1e3 * steps[who]['median']:.0f}", "", "", "", "", ""]
            for who in ALONE
            if who in steps
        ]
    head = ["section", "pair", "trainer, ms", "of turns", "torch, ms", "of turns", "torch / trainer", "losses apart"]
    return markdown_table(head, rows)


# The others.


def _named(result: Record) -> str:
    return result["schedule"] + (", a pipeline a host" if result["outermost"] == "dp" else "")


def exposed_table(exposed: Record) -> str:
    rows = [
        [
            f"{preset}, {_named(each)}",
            f"{1e3 * statistics.median(each['step_s']):.0f}",
            f"{1e3 * each['schedule_alone_s']:.0f}",
            f"{each['blocked']:.1%}",
            f"{each['bubble']:.1%}",
            f"{each['exposed']:.1%}",
            f"{each['beyond_schedule']:.1%}",
            ", ".join(f"{axis} {share:.1%}" for axis, share in each["blocked_by_axis"].items()),
        ]
        for preset, found in exposed.items()
        for each in found["results"]
    ]
    head = ["", "step, ms", "schedule alone, ms", "blocked", "bubble", "exposed", "beyond schedule", "blocked by axis"]
    return markdown_table(head, rows)


def estimate_rows(memory: Record) -> Iterator[tuple[str, int, Record, float, float]]:
    """(layout, rank, what was found, the estimate off the process's peak, the same of both beyond the base)."""
    sections = [memory[section]["results"] for section in LAYOUTS if section in memory]
    layouts = [(name, ranks) for section in sections for name, ranks in section.items()]
    for name, ranks in layouts:
        for rank, each in enumerate(ranks):
            peak, estimate, base = max(each["making"], each["steps"]), each["estimate"]["total"], each["base"]
            yield name, rank, each, estimate / peak - 1, (estimate - base) / (peak - base) - 1


def estimate_table(memory: Record) -> str:
    """Of each layout the rank whose estimate is farthest off."""
    rows = []
    for name in dict.fromkeys(each[0] for each in estimate_rows(memory)):
        of_layout = [each for each in estimate_rows(memory) if each[0] == name]
        _, rank, found, off, beyond = max(of_layout, key=lambda each: abs(each[3]))
        values = (found["base"], found["making"], found["steps"], found["counted"], found["estimate"]["total"])
        rows.append([name, str(rank), *(f"{nbytes / MIB:.0f}" for nbytes in values), f"{off:+.1%}", f"{beyond:+.1%}"])
    head = ["MiB", "rank", "base", "process, made", "process, steps", "counted", "estimate", "off the process"]
    return markdown_table([*head, "off beyond the base"], rows)


def zero3(memory: Record) -> dict[str, float]:
    """Bytes of the largest rank: total / ranks, a layer's parameters, the bound, and what was found, the process's
    beyond its base."""
    ranks = memory["zero3"]["results"]
    share, layer = 16 * ranks[0]["n_parameters"] / len(ranks), 4 * max(each["block_numel"] for each in ranks)
    return {
        "share": share,
        "layer": layer,
        "bound": 1.1 * share + layer,
        "counted": max(each["counted"] for each in ranks),
        **{key: max(each[key] - each["base"] for each in ranks) for key in ("steps", "making")},
        **{kind: max(each["beyond_base"][kind] for each in ranks) for kind in KINDS},
    }


def zero3_table(memory: Record) -> str:
    found = zero3(memory)
    rows = [
        [what, f"{found[key] / MIB:.1f}", f"{found[key] / found['bound']:.2f}"]
        for what, key in (
            ("counted", "counted"),
            ("process in steps, beyond its base", "steps"),
            ("of it anonymous memory", "anonymous"),
            ("of it pages of files: libraries' code", "files"),
            ("of it shared memory of the groups", "shared"),
            ("process while made, beyond its base", "making"),
        )
    ]
    title = (
        f"total / ranks {found['share'] / MIB:.1f} MiB, a layer's parameters {found['layer'] / MIB:.1f}, "
        f"bound {found['bound'] / MIB:.1f}"
    )
    return markdown_table([title, "MiB", "over the bound"], rows)


def planner_table(planner: Record) -> str:
    rows = []
    for name, each in planner.items():
        for index, (layout, off) in enumerate(zip(each["result"]["layouts"], each["result"]["off"], strict=True)):
            rows.append(
                [
                    name if index == 0 else "",
                    f"{layout['place']} of {layout['of']}",
                    layout["name"],
                    f"{1e3 * layout['predicted_s']:.0f}",
                    f"{1e3 * layout['measured_s']:.0f}",
                    f"{off:+.1%}",
                    f"{each['result']['first_over_best']:.3f}" if index == 0 else "",
                ]
            )
    return markdown_table(["set-up", "place", "layout", "predicted, ms", "measured, ms", "off", "first / best"], rows)


# What was to be reached.


def figures(found: dict[str, Record]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def goal(figure: str, measured: float, asked: float, at: str, most: bool) -> None:
        reached = measured <= asked if most else measured >= asked
        rows.append({"figure": figure, "measured": round(measured, 3), "goal": asked, "at": at, "reached": reached})

    if "trainer" in found:
        all_pairs = list(ratios(found["trainer"]))
        for pair in PAIRS:
            name, _, least = min((each for each in all_pairs if each[1] == pair), key=lambda each: each[2])
            goal(f"plain torch's step / the trainer's, {pair}, least", least, 1.0, name, False)
        for name, pair, ratio in all_pairs:
            if name.endswith("@200mbit"):
                goal(f"the same on the slow link, {pair}", ratio, 2.0, name, False)
        for name, each in found["trainer"].items():
            steps = each["result"]["step_s"]
            if name.endswith("@200mbit"):
                ratio = steps["DDP"]["median"] / steps[ALONE[-1]]["median"]
                goal("the same on the slow link, data parallel, gradients in int8 on the wire", ratio, 2.0, name, False)
    if "bubble" in found:
        lengths = sorted({size["rank_s"] for size in found["bubble"].values()})
        for rank_s, name in itertools.product(lengths, ("1f1b", "interleaved", "zb_h1", "zbv")):
            off = [
                (abs(each["bubble"] / each["formula"] - 1), f"p {each['ranks']}, m {each['micro_batches']}")
                for size in found["bubble"].values()
                for each in size["results"]
                if each["schedule"] == name and size["rank_s"] == rank_s
            ]
            worst, at = max(off)
            goal(f"bubble off the formula, {name}, a rank's forward {1e3 * rank_s:.0f} ms, most", worst, 0.10, at, True)
    if "exposed" in found:
        for preset, each in found["exposed"].items():
            best = min(each["results"], key=lambda one: one["exposed"])
            goal(f"exposed communication, {preset}", best["exposed"], 0.10, _named(best), True)
    if "training_memory" in found:
        memory = found["training_memory"]
        if "zero3" in memory:
            bound = zero3(memory)
            goal("ZeRO-3 counted / bound", bound["counted"] / bound["bound"], 1.0, "", True)
            goal("ZeRO-3 anonymous memory in steps / bound", bound["anonymous"] / bound["bound"], 1.0, "", True)
            goal("ZeRO-3 process in steps, beyond its base / bound", bound["steps"] / bound["bound"], 1.0, "", True)
        off = [(abs(off), f"{name}, rank {rank}") for name, rank, _, off, _ in estimate_rows(memory)]
        within = sum(each <= 0.10 for each, _ in off)
        if off:
            what = f"estimate off the process's peak: {within} of {len(off)} ranks within, most"
            goal(what, *_at(max(off), 0.10), True)
    if "planner" in found:
        setups = found["planner"]
        off = [(abs(each["result"]["off"][0]), name) for name, each in setups.items()]
        within = sum(each <= 0.15 for each, _ in off)
        goal(f"first choice's step off its prediction: {within} of {len(off)} within, most", *_at(max(off), 0.15), True)
        off = [
            (abs(each), f"{name}, {layout['name']}")
            for name, setup in setups.items()
            for each, layout in zip(setup["result"]["off"], setup["result"]["layouts"], strict=True)
        ]
        within = sum(each <= 0.15 for each, _ in off)
        goal(f"any layout's step off its prediction: {within} of {len(off)} within, most", *_at(max(off), 0.15), True)
        first = [(each["result"]["first_over_best"], name) for name, each in setups.items()]
        goal("first choice / measured best of all that were trained, most", *_at(max(first), 1.10), True)
    return rows


def _at(worst: tuple[float, str], asked: float) -> tuple[float, float, str]:
    return worst[0], asked, worst[1]


def page(found: dict[str, Record]) -> list[str]:
    parts = [f"{figures_table(figures(found))}\n", f"![step times, bubbles, predictions]({PLOT.name})\n"]
    if "trainer" in found:
        parts += [
            "## Steps beside plain torch's\n",
            f"{step_table(found['trainer'])}\n",
            f"{stamps(found['trainer'])}\n",
        ]
    if "torchtitan" in found:
        titan = found["torchtitan"]
        ends = "" if titan["status"] == 0 else f", in {titan['at']}: `{titan['says']}`"
        parts.append(
            f"torchtitan {titan['version']} on CPU (`{titan['tried']}`): exit status {titan['status']}{ends}\n"
        )
    if "bubble" in found:
        parts += ["## Bubbles\n", f"{bubble.table(found['bubble'])}\n", f"{stamps(found['bubble'])}\n"]
    if "exposed" in found:
        parts += ["## Exposed communication\n", f"{exposed_table(found['exposed'])}\n", f"{stamps(found['exposed'])}\n"]
    if "training_memory" in found:
        memory = found["training_memory"]
        parts.append("## Memory\n")
        if "zero3" in memory:
            parts.append(f"{zero3_table(memory)}\n")
        parts.append(f"{estimate_table(memory)}\n")
        parts.append(stamps(memory) + "\n")
    if "planner" in found:
        parts += ["## The planner\n", f"{planner_table(found['planner'])}\n", f"{stamps(found['planner'])}\n"]
    return parts


def plot(found: dict[str, Record]) -> None:
    """Ratios of steps, bubbles beside theory, and predictions beside measured steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    steps, bubbles, planned = figure.subplots(1, 3)
    if "trainer" in found:
        names = list(found["trainer"])
        for index, pair in enumerate(PAIRS):
            heights = {name: ratio for name, each, ratio in ratios(found["trainer"]) if each == pair}
            at = [names.index(name) + 0.27 * (index - 1) for name in heights]
            steps.bar(at, list(heights.values()), 0.25, label=pair)
        steps.axhline(1, color="black", linewidth=0.8, linestyle=":")
        steps.set_xticks(range(len(names)), names, rotation=20)
        steps.set_title("plain torch's step / the trainer's, 4 ranks", fontsize=10)
        steps.legend(fontsize=8)
    if "bubble" in found:
        sizes = found["bubble"].items()
        results = [each for _, size in sizes for each in size["results"]]
        labels = [f"{each['schedule']}\n{name}" for name, size in sizes for each in size["results"]]
        bubbles.bar(range(len(results)), [100 * each["bubble"] for each in results], 0.6, label="measured")
        theory = [100 * each["formula"] for each in results]
        bubbles.scatter(range(len(results)), theory, color="black", marker="_", s=120, label="theory", zorder=3)
        bubbles.set_xticks(range(len(results)), labels, fontsize=6, rotation=60)
        bubbles.set_title("bubble, % of the step", fontsize=10)
        bubbles.legend(fontsize=8)
    if "planner" in found:
        for name, each in found["planner"].items():
            layouts = each["result"]["layouts"]
            measured, predicted = ([1e3 * one[key] for one in layouts] for key in ("measured_s", "predicted_s"))
            planned.plot(measured, predicted, "o", markersize=4, label=name)
        low, high = planned.get_xlim()
        planned.fill_between([low, high], [0.85 * low, 0.85 * high], [1.15 * low, 1.15 * high], alpha=0.12)
        planned.set(xlabel="measured step, ms", ylabel="predicted, ms", xlim=(low, high))
        planned.set_title("the planner, and 15 % either way", fontsize=10)
        planned.legend(fontsize=6)
    for axes in (steps, bubbles, planned):
        axes.grid(alpha=0.3)
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    found = records()
    print(figures_table(figures(found)))
    write_figures(PAGE, page(found))
    plot(found)


if __name__ == "__main__":
    main()
