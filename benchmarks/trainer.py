"""The bundled trainer's step beside plain torch's over Gloo: python benchmarks/trainer.py [SECTION ..]

Four ranks train the same model, from the same weights on the same tokens, in pairs that divide the work alike:

    data parallel     trainer: dp 4            DistributedDataParallel, its own buckets, static graph
    sharded           trainer: dp 4, ZeRO-3    FSDP2: fully_shard() of each block, then of the rest
    pipeline          trainer: pp 4, 1F1B      torch.distributed.pipelining: Schedule1F1B

A section is a preset and where the ranks are: "1host", or two emulated hosts (network namespaces; needs root)
whose NICs have a rate, "default@200mbit". All contenders live in the same processes, one thread a rank, and take turns
of some steps in an order that rotates; a turn's time is the slowest rank's. Losses of all steps are compared: the run
fails where a contender's differ from the first one's by more than LOSS_TOLERANCE. On two hosts three more trainers run
along, beside which stands no plain contender.

With the presets computing is the larger part of a step here, where four ranks share two cores. "communication@200mbit"
is a set-up in which it is the smaller one: 6.9 million parameters (28 MB of gradients), one sequence of 64 tokens a
rank and step. It has no pipelines, whose messages such sequences make small.

A run replaces its own sections in results/trainer.json; training_report.py writes docs/training_figures.md. For
torchtitan see titan.py."""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from common import as_measured, environment, read_json, run_ranks, sections_and_dry, write_json
from plain_torch import Contender, DataParallel, Pipelining, require_plain
from torch import Tensor

import pycomm
from pycomm.netns import emulated_hosts, why_unavailable
from training.config import Config
from training.presets import load_preset
from training.trainer import Trainer

N_RANKS = 4
PRESETS = ("default", "laptop")
COMMUNICATION = "communication"
SECTIONS = [f"{preset}@{where}" for preset in PRESETS for where in ("1host", "1gbit", "200mbit")]
SECTIONS.append(f"{COMMUNICATION}@200mbit")
N_MICRO_BATCHES = 8  # of the pipelines; two sequences each
N_ROUNDS, TURN_S, MOST_STEPS, N_WARM_UP = 7, 0.8, 4, 2
LOSS_TOLERANCE = 1e-4  # relative, in any step; rounding alone differs
WIRE_TOLERANCE = 1e-2  # where gradients cross hosts in 8 bits
PAIRS = {
    "data parallel": ("trainer, dp 4", "DDP"),
    "sharded": ("trainer, ZeRO-3", "FSDP2"),
    "pipeline": ("trainer, pp 4", "torch pipelining"),
}
ALONE = ("trainer, ZeRO-3 inside hosts", "trainer, dp 2 × pp 2", "trainer, dp 4, int8 wire")


def with_layout(config: Config, accumulation: int = 1, **layout: Any) -> Config:
    return dataclasses.replace(
        config,
        layout=dataclasses.replace(config.layout, **layout),
        train=dataclasses.replace(config.train, accumulation=accumulation),
    )


def config_of(name: str) -> Config:
    """Of a preset, or of the set-up whose steps are mostly communication."""
    if name != COMMUNICATION:
        return load_preset(name)
    default = load_preset("default")
    return dataclasses.replace(
        default,
        model=dataclasses.replace(default.model, n_layers=8, d_model=256, d_ff=768),
        data=dataclasses.replace(default.data, seq_len=64),
        train=dataclasses.replace(default.train, global_batch=N_RANKS),
    )


class Ours:
    def __init__(self, config: Config, world: Any) -> None:
        self.trainer = Trainer(config, world)

    def step(self, index: int) -> float:
        assert index == self.trainer.progress.step
        return self.trainer.train_step().loss

    def batches(self, n_steps: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Of this rank, all of a step's micro-batches as one: read before anything is timed."""
        trainer, found = self.trainer, []
        for index in range(n_steps):
            windows = [w for each in trainer._micro_batches(index * trainer.config.train.global_batch) for w in each]
            tokens, targets, _ = trainer.corpus.batch(windows)
            found.append((tokens.mT.contiguous(), targets.mT.contiguous()))
        return lambda index: found[index]


def contenders(config: Config, world: Any, two_hosts: bool) -> Iterator[tuple[str, Contender]]:
    """By name, each with the weights that the trainer starts from."""
    data = Ours(with_layout(config), world)
    weights = {name: p.detach().clone() for name, p in data.trainer.model.named_parameters()}
    n_steps = N_WARM_UP + 1 + N_ROUNDS * MOST_STEPS
    of_rank = data.batches(n_steps)
    yield PAIRS["data parallel"][0], data
    yield PAIRS["data parallel"][1], DataParallel(config, weights, of_rank, sharded=False)
    yield PAIRS["sharded"][0], Ours(with_layout(config, zero=3), world)
    yield PAIRS["sharded"][1], DataParallel(config, weights, of_rank, sharded=True)
    pipelines = config.train.global_batch % N_MICRO_BATCHES == 0
    if pipelines:
        piped = with_layout(config, N_MICRO_BATCHES, pp=N_RANKS)
        pipeline = Ours(piped, world)
        yield PAIRS["pipeline"][0], pipeline
        yield PAIRS["pipeline"][1], Pipelining(piped, weights, pipeline.batches(n_steps))
    if two_hosts:
        yield ALONE[0], Ours(with_layout(config, zero=3, zero_ranks=2), world)
        if pipelines:
            yield ALONE[1], Ours(with_layout(config, 4, pp=2), world)
        wired = with_layout(config)
        yield ALONE[2], Ours(dataclasses.replace(wired, wire=dataclasses.replace(wired.wire, dp="int8")), world)


@contextmanager
def groups(store: Any, rank: int, n_ranks: int, two_hosts: bool) -> Iterator[Any]:
    """A pycomm world that plans for its links as they are, and Gloo's."""
    torch.set_num_threads(1)
    if two_hosts:
        os.environ["GLOO_SOCKET_IFNAME"] = "nic0"
    timeout = timedelta(seconds=60)
    own = dist.PrefixStore("gloo", store)
    dist.init_process_group("gloo", store=own, rank=rank, world_size=n_ranks, timeout=timeout)
    try:
        with pycomm.init(store, rank, n_ranks, timeout_s=60) as first, first.replan(as_measured(first)) as world:
            yield world
    finally:
        dist.destroy_process_group()


def compare(store: Any, rank: int, n_ranks: int, config: Config, two_hosts: bool) -> dict[str, Any]:
    """Seconds of a step in each turn, and the losses, of each contender."""
    with groups(store, rank, n_ranks, two_hosts) as world:
        made = dict(contenders(config, world, two_hosts))
        losses: dict[str, list[float]] = {name: [] for name in made}

        def turn(name: str, n_steps: int) -> float:
            world.barrier()
            begin = time.perf_counter()
            for _ in range(n_steps):
                losses[name].append(made[name].step(len(losses[name])))
            took = torch.tensor([(time.perf_counter() - begin) / n_steps], dtype=torch.float64)
            world.all_reduce(took, "max")
            return float(took)

        n_steps = {}
        for name in made:
            turn(name, N_WARM_UP)  # buckets are laid out, connections open
            n_steps[name] = int(min(max(1, TURN_S / turn(name, 1)), MOST_STEPS))
        times: dict[str, list[float]] = {name: [] for name in made}
        order = list(made)
        for index in range(N_ROUNDS):
            first = index % len(order)
            for name in order[first:] + order[:first]:
                times[name].append(turn(name, n_steps[name]))
        for each in made.values():
            if isinstance(each, Ours):
                each.trainer.close()
    return {"times_s": times, "losses": losses, "n_steps": n_steps}


def section(name: str) -> dict[str, Any]:
    preset, _, where = name.partition("@")
    config = config_of(preset)
    require_plain(config)
    if where == "1host":
        found = run_ranks(compare, N_RANKS, config, False)[0]
    else:
        with emulated_hosts() as network:
            network.shape(where)
            found = run_ranks(compare, N_RANKS, config, True, hosts=["a", "a", "b", "b"], network=network)[0]
    losses = found["losses"]
    least = min(len(each) for each in losses.values())
    base = losses[PAIRS["data parallel"][0]]
    apart = {who: max(abs(a / b - 1) for a, b in zip(each, base, strict=False)) for who, each in losses.items()}
    if any(most > (WIRE_TOLERANCE if who.endswith("wire") else LOSS_TOLERANCE) for who, most in apart.items()):
        raise RuntimeError(f"{name}: losses differ: {apart}")
    return {
        "step_s": {
            who: {"median": round(statistics.median(each), 5), "turns": [round(s, 5) for s in each]}
            for who, each in found["times_s"].items()
        },
        "n_steps": found["n_steps"],
        "losses_apart": {who: float(f"{most:.2g}") for who, most in apart.items()},
        "steps_compared": least,
        "loss_first_last": [round(base[0], 5), round(base[least - 1], 5)],
    }


def main() -> int:
    wanted, dry = sections_and_dry(__doc__ or "", SECTIONS)
    if any(not each.endswith("@1host") for each in wanted) and (why := why_unavailable()) is not None:
        print(f"trainer.py cannot emulate hosts here: {why}", file=sys.stderr)
        return 2
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the store's complaints that addresses have no names
    for name in wanted:
        about, begin = environment(), time.perf_counter()
        found = section(name)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
        for who, each in found["step_s"].items():
            print(f"  {who:<30} {1e3 * each['median']:8.1f} ms  losses within {found['losses_apart'][who]}", flush=True)
        if not dry:
            record = read_json("trainer")
            record[name] = {"environment": about, "result": found}
            write_json("trainer", {key: record[key] for key in SECTIONS if key in record})
    return 0


if __name__ == "__main__":
    sys.exit(main())
