"""One GPU: the trainer's tokens/s and MFU beside the same model in plain torch, in turns.

    python benchmarks/train_gpu.py                                       # the preset h200_1b
    python benchmarks/train_gpu.py --ways trainer "trainer, a graph"     # and as a CUDA graph

prints a table and writes results/train_<gpu>.json.

Plain torch is benchmarks/plain_torch.py's model trained as nanoGPT trains: fp32 parameters, autocast to bf16, flash
attention, fused AdamW. All are compiled, or with --eager none. Every contender has the same data, batch and
micro-batches. MFU is against monitor.peak_tflops (990: an H200's dense bf16), FLOPs as ModelConfig.flops_per_token()
counts them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS
from plain_torch import GPT
from torch import Tensor, nn

import pycomm
from training.config import Config
from training.optimizer import learning_rate
from training.presets import load_preset
from training.trainer import Trainer

WAYS = ("trainer", "trainer, a graph", "trainer, fp8")
Step = Callable[[int], float]  # a step's loss; it returns when the device is done


def plain(config: Config, device: torch.device, batches: Callable[[int], list[Any]], compiled: bool) -> Step:
    torch.manual_seed(config.train.seed)
    with device:
        model = GPT(config.model, config.data.seq_len)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
    chosen = config.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": chosen.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(chosen.beta1, chosen.beta2),
        eps=chosen.eps,
        fused=True,
    )

    def loss_of(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    run = torch.compile(loss_of) if compiled else loss_of

    def step(index: int) -> float:
        total = torch.zeros((), device=device)
        micro_batches = batches(index)
        for tokens, targets, _ in micro_batches:
            loss = run(tokens.mT.contiguous().to(device), targets.mT.contiguous().to(device)) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), chosen.clip_norm, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(index, config.train.steps, chosen)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    return step


def variant(config: Config, way: str, compiles: bool) -> Config:
    """The trainer's configuration for one of WAYS."""
    chosen = {"trainer": {}, "trainer, a graph": {"cuda_graph": True}, "trainer, fp8": {"matmul": "fp8"}}[way]
    return dataclasses.replace(config, train=dataclasses.replace(config.train, compile=compiles, **chosen))


def measure(
    config: Config, device: torch.device, ways: list[str], n_rounds: int, n_steps: int, compiles: bool
) -> dict[str, Any]:
    """By contender: the median, least and greatest tokens/s of its turns, MFU, losses, and peak memory."""
    on_gpu, report = device.type == "cuda", {}
    with pycomm.init() as world, contextlib.ExitStack() as stack:
        trainers = {}
        for way in ways:
            trainers[way] = stack.enter_context(contextlib.closing(Trainer(variant(config, way, compiles), world)))
        first = trainers[ways[0]]

        def batches(index: int) -> list[Any]:
            return [first.corpus.batch(w) for w in first._micro_batches(index * config.train.global_batch)]

        steps: dict[str, Step] = {
            name: lambda index, trainer=trainer: trainer.train_step().loss for name, trainer in trainers.items()
        }
        steps["plain torch"] = plain(config, device, batches, compiles)
        rates: dict[str, list[float]] = {name: [] for name in steps}
        losses: dict[str, list[float]] = {name: [] for name in steps}
        peaks = dict.fromkeys(steps, 0)
        n_tokens = config.train.global_batch * config.data.seq_len
        done = 0
        for turn in range(n_rounds + 1):  # the first compiles, captures and does not count
            n = n_steps if turn else max(5, n_steps)
            for name, step in steps.items():
                if on_gpu:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                begin = time.perf_counter()
                losses[name] += [step(done + i) for i in range(n)]
                if turn:
                    rates[name].append(n * n_tokens / (time.perf_counter() - begin))
                    peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() if on_gpu else 0)
            done += n
        flops = config.model.flops_per_token(config.data.seq_len)
        for name, found in rates.items():
            rate = statistics.median(found)
            report[name] = {
                "tokens_per_s": rate,
                "least": min(found),
                "greatest": max(found),
                "mfu": rate * flops / (config.monitor.peak_tflops * 1e12) if config.monitor.peak_tflops else None,
                "peak_memory_gib": peaks[name] / 2**30,
                "first_loss": losses[name][0],
                "last_loss": losses[name][-1],
            }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="h200_1b")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["trainer"], help="all share the GPU's memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of each contender's turn")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("train_gpu.py measures a GPU, and torch sees none here")
    os.environ.setdefault("RANK", "0")
    os.environ |= {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    config = load_preset(given.preset)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, device=given.device))
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device("cpu")
    report = measure(config, device, given.ways, given.rounds, given.steps, not given.eager)
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    print(f"{given.preset}: {config.model.n_parameters:,} parameters, {config.data.seq_len} tokens a sequence, {name}")
    for contender, row in report.items():
        mfu = f"MFU {row['mfu']:.1%}  " if row["mfu"] is not None else ""
        turns = f"({row['least']:,.0f} to {row['greatest']:,.0f})"
        print(
            f"{contender:18} {row['tokens_per_s']:12,.0f} tokens/s {turns}  {mfu}"
            f"peak {row['peak_memory_gib']:.1f} GiB  loss {row['first_loss']:.4f} to {row['last_loss']:.4f}"
        )
    if given.device == "cuda":
        path = RESULTS / f"train_{name.lower().replace(' ', '_')}.json"
        path.write_text(
            json.dumps({"preset": given.preset, "torch": torch.__version__, "contenders": report}, indent=1)
        )
        print(f"in {path}")


if __name__ == "__main__":
    main()
