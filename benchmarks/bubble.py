"""The pipeline's bubble beside theory: python benchmarks/bubble.py [SIZE ..]

The trainer's own pipeline on one host, a stage a rank (two with interleaved and ZBV), whose layers sleep as long in
forward as for the gradient of their input and of their weights (sleeping.py), so that computing needs no core. All
schedules take turns. The bubble is the part of the slowest rank's step, from the first forward to the last weight
gradient, in which it does not compute: 1 - m (F + B + W) / T. Theory, for F = B = W and m micro-batches on p ranks:

    1f1b          (p - 1) / (m + p - 1)                      PipeDream-Flush, arXiv:2006.09503
    interleaved   (p - 1) / (v m + p - 1), v chunks          arXiv:2104.04473
    zb_h1         (p - 1)(F + B - W) idle                    arXiv:2401.10241, table 2
    zbv           (p - 1) F / 2 idle, v = 2                  arXiv:2405.15362: none from a rank's first action to its
                                                             last; before, the V is filled by half a rank's forwards

"schedule" is what training/schedules.py's check() counts for the very list of actions that runs. "an action" is how
much longer than that the step takes, over the actions of a rank: starting one costs what it costs (autograd, messages,
a rank that wakes), however long it computes. "p2m8" and the like have a rank sleep 160 ms for each third of a
micro-batch, the "-long" ones 800 ms, beside which that is little: what is left is the lists' own.
A run replaces its own sizes in results/bubble.json; training_report.py writes docs/training_figures.md."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from common import environment, markdown_table, read_json, run_ranks, sections_and_dry, write_json
from sleeping import PARTS, Seconds, put_to_sleep

import pycomm
from training import schedules
from training.config import Config
from training.pipeline import Scales
from training.presets import load_preset
from training.trainer import Trainer

SCHEDULES: tuple[tuple[schedules.Name, int], ...] = (
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("zb_h1", 1),
    ("zbv", 1),
)
N_ROUNDS = 3


@dataclass(frozen=True)
class Size:
    """rank_s: that a rank sleeps for a micro-batch's forward, and as long for each half of backward."""

    n_ranks: int
    n_micro_batches: int
    rank_s: float = 0.160


SIZES = {
    "p4m8": Size(4, 8),
    "p4m16": Size(4, 16),
    "p2m8": Size(2, 8),
    "p4m8-long": Size(4, 8, 0.800),
    "p2m8-long": Size(2, 8, 0.800),
}


def config_of(name: schedules.Name, chunks: int, n_ranks: int, n_micro_batches: int) -> Config:
    tiny = load_preset("tiny")
    return dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, n_layers=2 * n_ranks),
        layout=dataclasses.replace(tiny.layout, pp=n_ranks, schedule=name, chunks=chunks),
        train=dataclasses.replace(tiny.train, global_batch=n_micro_batches, accumulation=n_micro_batches),
    )


def run(store: Any, rank: int, n_ranks: int, size: Size) -> dict[str, list[float]]:
    """Seconds of each schedule's steps."""
    torch.set_num_threads(1)
    each = size.rank_s / 2  # a rank has two layers
    took = dict.fromkeys(PARTS, Seconds()) | {"feed_forward": Seconds(each, each, each)}
    with pycomm.init(store, rank, n_ranks, timeout_s=60) as world:
        trainers = {}
        for name, chunks in SCHEDULES:
            trainers[name] = Trainer(config_of(name, chunks, n_ranks, size.n_micro_batches), world)
            put_to_sleep(trainers[name], took)
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for turn in range(N_ROUNDS + 1):  # the first does not count
            for name, trainer in trainers.items():
                batches = trainer._batches.at(0)
                trainer.optimizer.begin()
                world.barrier()
                begin = time.perf_counter()
                trainer.pipeline.step(batches, Scales(1.0, 0.0), trainer.optimizer)
                step_s = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
                trainer.optimizer.wait()
                world.all_reduce(step_s, "max")
                if turn:
                    times[name].append(float(step_s))
        for trainer in trainers.values():
            trainer.close()
    return times


def theory(name: schedules.Name, chunks: int, p: int, m: int) -> tuple[float, float]:
    """The bubble by the formula and by the schedule's own check, for F = B = W."""
    units = {"gpipe": 3.0, "1f1b": 3.0, "interleaved": 3.0 / chunks, "zb_h1": 1.0, "zbv": 0.5}  # of (p - 1) F
    idle = units[name] * (p - 1)
    schedule = schedules.plan(name, p, m, chunks)
    makespan = schedules.check(schedule).makespan / schedule.placement.n_chunks
    return idle / (3 * m + idle), 1 - 3 * m / makespan


def section(size: Size) -> list[dict[str, Any]]:
    times = run_ranks(run, size.n_ranks, size, timeout_s=580)[0]
    entries = []
    for name, chunks in SCHEDULES:
        formula, schedule = theory(name, chunks, size.n_ranks, size.n_micro_batches)
        step_s = statistics.median(times[name])
        entries.append(
            {
                "schedule": name,
                "chunks": 2 if name == "zbv" else chunks,
                "ranks": size.n_ranks,
                "micro_batches": size.n_micro_batches,
                "step_s": [round(s, 5) for s in times[name]],
                "bubble": round(1 - 3 * size.n_micro_batches * size.rank_s / step_s, 5),
                "formula": round(formula, 5),
                "of_schedule": round(schedule, 5),
            }
        )
    return entries


def main() -> None:
    wanted, dry = sections_and_dry(__doc__ or "", SIZES)
    for name in wanted:
        about, size = environment(), SIZES[name]
        new = {name: {"environment": about, "rank_s": size.rank_s, "results": section(size)}}
        print(table(new), flush=True)
        if not dry:
            record = read_json("bubble") | new
            write_json("bubble", {key: record[key] for key in SIZES if key in record})


def table(record: dict[str, Any]) -> str:
    """Bubbles in percent of the step."""
    rows = []
    for size in record.values():
        for each in size["results"]:
            step_s, m = statistics.median(each["step_s"]), each["micro_batches"]
            schedule_s = 3 * m * size["rank_s"] / (1 - each["of_schedule"])
            n_actions = m * each["chunks"] * (3 if each["schedule"] in schedules.SPLIT else 2)
            rows.append(
                [
                    f"{each['schedule']}" + (f" × {each['chunks']}" if each["chunks"] > 1 else ""),
                    str(each["ranks"]),
                    str(m),
                    f"{1e3 * size['rank_s'] / each['chunks']:.0f}",
                    f"{1e3 * step_s:.0f}",
                    f"{each['bubble']:.1%}",
                    f"{each['formula']:.1%}",
                    f"{each['of_schedule']:.1%}",
                    f"{each['bubble'] / each['formula'] - 1:+.1%}",
                    f"{1e3 * (step_s - schedule_s) / n_actions:.2f}",
                ]
            )
    head = [
        "schedule",
        "p",
        "m",
        "F, ms",
        "step, ms",
        "bubble",
        "formula",
        "schedule's",
        "off formula",
        "an action, ms",
    ]
    return markdown_table(head, rows)


if __name__ == "__main__":
    main()
