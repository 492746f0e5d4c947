"""The planner's predictions beside measured steps: python benchmarks/planner.py [SECTION ..]

On each set-up of emulated hosts (network namespaces; needs root) the ranks measure their links, plan as
`pycomm-train plan` does, and train in the first FIRST meshes of the plan and in LOWER of those ranked lower, from the
next one to the last, which all take turns. Reported for each layout: its rank in the plan, predicted and measured step,
and for each set-up what its first choice takes over the measured best of all.

    2x4@1gbit      2 hosts of 4 ranks, layers that sleep as long as their FLOPs take at FLOPS_PER_S (sleeping.py): each
                   of more ranks than cores has a core of its own, and the rate is known. What is held against the
                   planner is its account of pipelines, exchanges and what they hide behind computation.
    2x1@1gbit-real one rank a core, real computation, at the rate that the planner itself measures

Context parallel layouts are left out: their exchange is within computation that sleeping replaces.
A run replaces its own sections in results/planner.json; training_report.py writes docs/training_figures.md."""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from common import as_measured, environment, read_json, run_ranks, sections_and_dry, write_json
from sleeping import by_flops, put_to_sleep

import pycomm
from pycomm.netns import emulated_hosts, why_unavailable
from training.config import Config, LayoutConfig
from training.layer_rate import planning_flops
from training.metered import MeteredGroup, on_rank_0
from training.plan_layout import Plan, search
from training.presets import load_preset
from training.step_result import StepResult
from training.trainer import Trainer

FLOPS_PER_S = 10e9
SLEEPING = ("1x4", "1x8", "2x2@1gbit", "2x2@200mbit", "2x4@1gbit", "2x4@200mbit", "4x2@1gbit", "4x1@200mbit")
REAL = ("1x2-real", "2x1@1gbit-real", "2x1@200mbit-real")
SECTIONS = SLEEPING + REAL
FIRST, LOWER = 3, 3  # layouts of the plan that are trained
N_ROUNDS, N_WARM_UP = 4, 2


def trained(n_planned: int) -> list[int]:
    """Places in the plan: the first ones, and some of the others with equal steps between them."""
    lower = range(FIRST, n_planned)
    n = min(LOWER, len(lower))
    return [*range(min(FIRST, n_planned)), *(lower[round(i * (len(lower) - 1) / max(1, n - 1))] for i in range(n))]


def planned(config: Config, world: Any, flops_per_s: float) -> list[dict[str, Any]]:
    """Layouts of the plan: settings, and what is predicted; the same on every rank."""

    def plan() -> list[dict[str, Any]]:
        begin = time.perf_counter()
        found: Plan = search(config, world.topology, flops_per_s)
        took_s = time.perf_counter() - begin
        return [
            {
                "name": str(each),
                "place": place + 1,
                "of": len(found.fitting),
                "layout": dataclasses.asdict(each.config.layout),
                "accumulation": each.config.train.accumulation,
                "predicted_s": each.time.total_s,
                "parts_s": each.time.parts,
                "planned_in_s": took_s,
            }
            for place in trained(len(found.fitting))
            for each in [found.fitting[place][0]]
        ]

    result: list[dict[str, Any]] = on_rank_0(MeteredGroup(world, "world"), plan)
    return result


def run(store: Any, rank: int, n_ranks: int, config: Config, real: bool) -> tuple[float, list[dict[str, Any]], str]:
    """The rate, the layouts of the plan with the steps that were measured, and the topology that was planned for."""
    torch.set_num_threads(1)
    with pycomm.init(store, rank, n_ranks, timeout_s=60) as first, first.replan(as_measured(first)) as world:
        rate = torch.tensor([planning_flops(config) if real else FLOPS_PER_S], dtype=torch.float64)
        world.all_reduce(rate, "min")
        layouts = planned(config, world, float(rate))
        trainers: list[Trainer] = []
        for each in layouts:
            train = dataclasses.replace(config.train, accumulation=each["accumulation"])
            chosen = dataclasses.replace(config, layout=LayoutConfig(**each["layout"]), train=train)
            trainer = Trainer(chosen, world)
            if not real:
                put_to_sleep(trainer, by_flops(chosen, trainer.mesh.layout, FLOPS_PER_S))
            trainers.append(trainer)
        results: list[list[tuple[float, StepResult]]] = [[] for _ in trainers]
        for turn in range(N_WARM_UP + N_ROUNDS):
            for trainer, found in zip(trainers, results, strict=True):
                world.barrier()
                begin = time.perf_counter()
                step = trainer.train_step()
                step_s = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
                world.all_reduce(step_s, "max")
                if turn >= N_WARM_UP:
                    found.append((float(step_s), step))
        for each, found in zip(layouts, results, strict=True):
            each["steps_s"] = [round(step_s, 5) for step_s, _ in found]
            axes = {axis for _, step in found for axis in step.blocked_by_axis_s}
            each["blocked_s"] = {
                axis: round(statistics.median(s.blocked_by_axis_s.get(axis, 0.0) for _, s in found) / n_ranks, 5)
                for axis in sorted(axes)
            }
        for trainer in trainers:
            trainer.close()
        topology = world.topology.to_toml()
    return float(rate), layouts, topology


def section(name: str) -> dict[str, Any]:
    where, _, kind = name.partition("-")
    layout, _, rate = where.partition("@")
    n_hosts, per_host = map(int, layout.split("x"))
    config = load_preset("default")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=argparse.__file__),  # some text that is always there and soon read
        train=dataclasses.replace(config.train, eval_sequences=8),
        plan=dataclasses.replace(config.plan, show=99, max_cp=1),
        layout=LayoutConfig(tp_overlap="auto" if kind else "never"),  # a layer that sleeps is not split
    )
    hosts = [host for host in "abcd"[:n_hosts] for _ in range(per_host)]
    with emulated_hosts(hosts=tuple("abcd"[:n_hosts])) if n_hosts > 1 else nullcontext() as network:
        if network is not None:
            network.shape(rate)
        args = (config, bool(kind))
        place = {"hosts": hosts, "network": network} if network is not None else {}
        flops_per_s, layouts, topology = run_ranks(run, len(hosts), *args, **place, timeout_s=220)[0]
    for each in layouts:
        each["measured_s"] = round(statistics.median(each["steps_s"]), 5)
        each["predicted_s"] = round(each["predicted_s"], 5)
        each["parts_s"] = {part: round(s, 5) for part, s in each["parts_s"].items()}
        each["layout"] = {k: v for k, v in each["layout"].items() if v != getattr(LayoutConfig(), k)}
    best = min(each["measured_s"] for each in layouts)
    return {
        "flops_per_s": flops_per_s,
        "topology": topology.splitlines(),
        "layouts": layouts,
        "first_over_best": round(layouts[0]["measured_s"] / best, 4),
        "off": [round(each["predicted_s"] / each["measured_s"] - 1, 4) for each in layouts],
    }


def main() -> int:
    wanted, dry = sections_and_dry(__doc__ or "", SECTIONS)
    if any("@" in each for each in wanted) and (why := why_unavailable()) is not None:
        print(f"planner.py cannot emulate hosts here: {why}", file=sys.stderr)
        return 2
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the store's complaints that addresses have no names
    for name in wanted:
        about, begin = environment(), time.perf_counter()
        found = section(name)
        print(
            f"{name}: {time.perf_counter() - begin:.0f} s, {found['flops_per_s'] / 1e9:.1f} GFLOP/s; first choice "
            f"{found['first_over_best']:.3f} of the measured best",
            flush=True,
        )
        for each, off in zip(found["layouts"], found["off"], strict=True):
            print(
                f"  {each['place']:2}. {each['name']:<55} predicted {1e3 * each['predicted_s']:7.1f}  measured "
                f"{1e3 * each['measured_s']:7.1f} ms  {off:+.1%}\n      parts {each['parts_s']}\n"
                f"      blocked {each['blocked_s']}",
                flush=True,
            )
        if not dry:
            record = read_json("planner")
            record[name] = {"environment": about, "result": found}
            write_json("planner", {key: record[key] for key in SECTIONS if key in record})
    return 0


if __name__ == "__main__":
    sys.exit(main())
