"""How much of a step the ranks wait for communication: DP x TP x PP on two emulated hosts: python benchmarks/exposed.py

Eight ranks, dp 2 x tp 2 x pp 2, of four to a host (network namespaces; needs root), 1 Gbit/s between the
hosts. Here are fewer cores than ranks, so layers sleep (sleeping.py) instead of computing; everything that communicates
is real, and so is the optimizer. As that needs cores too, time runs slower by the ranks a core has, K: a layer sleeps K
times as long as one process alone needed for it on one core at a rank's widths (measured first), and the link has 1/K
of its rate. Shares of a step are then those of ranks with a core each; latency alone is not stretched.

From the trainer's own metrics: `blocked` is the ranks' time in calls that wait, by axis. A pipeline waits also when
nothing is sent: what the schedule leaves idle with the same actions and no communication (schedules.check()) is the
bubble. The rest of `blocked` is exposed communication. Beside it, without the trainer's counters: the step's time over
that of the schedule alone.

"default" has micro-batches of one sequence, 256 tokens; "default-long" is the same model with four, a batch of 64: as
many exchanges, each beside four times the work, and of four times the bytes. Each schedule runs with its stages on
different hosts, whose messages cross the link, and with a whole pipeline on each host (layout.outermost "dp"), when
sums of gradients do.

A run replaces its own set-ups in results/exposed.json; training_report.py writes docs/training_figures.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from typing import Any, Literal

import torch
from common import as_measured, environment, read_json, run_ranks, sections_and_dry, write_json
from sleeping import Seconds, alone, put_to_sleep

import pycomm
from pycomm.netns import emulated_hosts, why_unavailable
from training import schedules
from training.config import Config
from training.layout import resolve_layout, stages_of
from training.presets import load_preset
from training.step_result import StepResult
from training.trainer import Trainer

RATE_MBIT = 1000
HOSTS = ["a"] * 4 + ["b"] * 4
SETUPS = {"default": ("default", 16), "default-long": ("default", 64), "laptop": ("laptop", 16)}  # preset, batch
SCHEDULES: tuple[schedules.Name, ...] = ("1f1b", "zb_h1", "zbv")
OUTERMOST: tuple[Literal["pp", "dp"], ...] = ("pp", "dp")
N_STEPS, N_WARM_UP = 9, 2
N_MICRO_BATCHES = 8


def config_of(setup: str, schedule: schedules.Name, outermost: Literal["pp", "dp"]) -> Config:
    preset, global_batch = SETUPS[setup]
    config = load_preset(preset)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=argparse.__file__),  # some text that is always there and soon read
        layout=dataclasses.replace(config.layout, tp=2, pp=2, schedule=schedule, outermost=outermost),
        train=dataclasses.replace(
            config.train, global_batch=global_batch, accumulation=N_MICRO_BATCHES, eval_sequences=8
        ),
    )


def measured_alone(store: Any, rank: int, n_ranks: int, config: Config) -> dict[str, Seconds]:
    torch.set_num_threads(1)
    with pycomm.init(store, rank, n_ranks, timeout_s=60) as world:
        return alone(world, config, resolve_layout(config, len(HOSTS)))


def run(store: Any, rank: int, n_ranks: int, configs: list[Config], took: dict[str, Seconds]) -> list[list[StepResult]]:
    """Steps of each configuration, which take turns."""
    torch.set_num_threads(1)
    with pycomm.init(store, rank, n_ranks, timeout_s=60) as first, first.replan(as_measured(first)) as world:
        trainers = [Trainer(config, world) for config in configs]
        for trainer in trainers:
            put_to_sleep(trainer, took)
        results: list[list[StepResult]] = [[] for _ in trainers]
        for turn in range(N_WARM_UP + N_STEPS):
            for trainer, found in zip(trainers, results, strict=True):
                world.barrier()
                step = trainer.train_step()
                if turn >= N_WARM_UP:
                    found.append(step)
        for trainer in trainers:
            trainer.close()
    return results


def schedule_alone(config: Config, took: dict[str, Seconds]) -> tuple[float, float]:
    """Seconds of a step's actions when nothing that is sent takes time, and the share of it that a rank idles."""
    stages, layout = stages_of(config), config.layout
    last = stages.placement.n_stages - 1
    n_layers = [len(stages.layers(stage)) for stage in range(last + 1)]
    layer = [took["attention"], took["feed_forward"]]
    forward, backward, weights = (
        [n * sum(getattr(each, kind) for each in layer) for n in n_layers] for kind in ("forward", "input", "weight")
    )
    forward[0] += took["embedding"].forward
    backward[0] += took["embedding"].input + took["embedding"].weight
    forward[last] += took["head"].total
    schedule = schedules.plan(layout.schedule, layout.pp, config.train.accumulation, layout.chunks)
    timing = schedules.check(schedule, forward, backward, weights)
    return timing.makespan, statistics.mean(timing.idle) / timing.makespan


def entry(config: Config, took: dict[str, Seconds], steps: list[StepResult]) -> dict[str, Any]:
    n = len(HOSTS)
    makespan, idle = schedule_alone(config, took)
    step_s = statistics.median(each.step_s for each in steps)
    axes = sorted({axis for each in steps for axis in each.blocked_by_axis_s})
    by_axis = {
        axis: statistics.median(each.blocked_by_axis_s.get(axis, 0.0) / (each.step_s * n) for each in steps)
        for axis in axes
    }
    blocked = statistics.median(each.share(each.blocked_s, n) for each in steps)
    bubble = idle * makespan / step_s
    return {
        "schedule": config.layout.schedule,
        "outermost": config.layout.outermost,
        "step_s": [round(each.step_s, 5) for each in steps],
        "schedule_alone_s": round(makespan, 5),
        "blocked": round(blocked, 4),
        "blocked_by_axis": {axis: round(share, 4) for axis, share in by_axis.items()},
        "bubble": round(bubble, 4),
        "exposed": round(blocked - bubble, 4),
        "beyond_schedule": round(1 - makespan / step_s, 4),
        "bytes_between_hosts": steps[-1].bytes_between_hosts,
        "bytes_inside_hosts": steps[-1].bytes_inside_hosts,
    }


def main() -> int:
    wanted, dry = sections_and_dry(__doc__ or "", SETUPS)
    if (why := why_unavailable()) is not None:
        print(f"exposed.py cannot emulate hosts here: {why}", file=sys.stderr)
        return 2
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the store's complaints that addresses have no names
    for setup in wanted:
        about = environment()
        configs = [config_of(setup, schedule, each) for schedule in SCHEDULES for each in OUTERMOST]
        slower = len(HOSTS) / len(os.sched_getaffinity(0))
        alone_s = run_ranks(measured_alone, 1, configs[0])[0]
        took = {part: Seconds(*(slower * s for s in dataclasses.astuple(each))) for part, each in alone_s.items()}
        with emulated_hosts() as network:
            network.shape(f"{RATE_MBIT / slower:g}mbit")
            found = run_ranks(run, len(HOSTS), configs, took, hosts=HOSTS, network=network, timeout_s=400)[0]
        entries = [entry(config, took, steps) for config, steps in zip(configs, found, strict=True)]
        for each in entries:
            print(f"{setup} {json.dumps({k: v for k, v in each.items() if k != 'step_s'})}", flush=True)
            print(f"   steps {each['step_s'][:5]}", flush=True)
        if not dry:
            record = read_json("exposed")
            parts = {part: [round(s, 6) for s in dataclasses.astuple(each)] for part, each in alone_s.items()}
            record[setup] = {
                "environment": about,
                "micro_batches": N_MICRO_BATCHES,
                "alone_s": parts,
                "slower": slower,
            }
            record[setup]["results"] = entries
            write_json("exposed", {key: record[key] for key in SETUPS if key in record})
    return 0


if __name__ == "__main__":
    sys.exit(main())
