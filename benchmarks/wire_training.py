"""Whether gradients that cross hosts in few bits train as well: python benchmarks/wire_training.py

The bundled trainer on two emulated hosts of one rank each, the same steps from the same seeds with every wire, error
feedback on. Writes results/wire_training.json and prints the table in docs/wire.md: the held-out loss after the last
step, and how far its mean over the seeds is from fp32's in standard deviations of fp32's over the seeds. The curves of
the committed records are plotted into docs/wire_training.png."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import environment, markdown_table, read_json, run_ranks, write_json

import pycomm
from training.presets import load_preset
from training.trainer import Trainer

WIRES = ("none", "bf16", "fp8", "int8", "int4")
RECORDS = ("wire_training", "wire_training_128")  # the committed ones
CURVE_EVERY = 20  # steps whose losses make one point of the recorded curve
EVAL_SEQUENCES = 512  # of 32 tokens: fewer would measure which text they are


def train(
    store: Any, rank: int, n_ranks: int, seed: int, wire: str, bucket_kib: int, steps: int, width: int
) -> dict[str, Any]:
    """Losses and traffic of one run; equal on both ranks but for the bytes."""
    config = load_preset("tiny")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, d_model=width, d_ff=2 * width),
        data=dataclasses.replace(config.data, path="stdlib"),
        train=dataclasses.replace(
            config.train, seed=seed, steps=steps, eval_sequences=EVAL_SEQUENCES, bucket_kib=bucket_kib
        ),
        wire=dataclasses.replace(config.wire, dp=wire),
    )
    torch.set_num_threads(1)
    with pycomm.init(store, rank, n_ranks, timeout_s=300) as group:
        trainer = Trainer(config, group)
        losses, sent = [], 0
        for _ in range(steps):
            result = trainer.train_step()
            losses.append(result.loss)
            sent += result.bytes_between_hosts
        held_out = trainer.evaluate()
        trainer.close()
    points = [statistics.fmean(losses[i : i + CURVE_EVERY]) for i in range(0, steps, CURVE_EVERY)]
    return {"held_out": held_out, "curve": [round(point, 4) for point in points], "bytes_between_hosts": sent}


def plot() -> None:
    """By how much each wire's training loss is above fp32's of the same seed and steps: the seeds' mean, and least to
    most."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2, sharey=True), RECORDS, strict=True):
        record = read_json(name)
        curves = {(run["wire"], run["seed"]): np.array(run["curve"]) for run in record["runs"]}
        wires, seeds = (sorted({key[at] for key in curves}) for at in (0, 1))
        steps = np.arange(1, len(next(iter(curves.values()))) + 1) * record["curve_every"]
        for wire in (each for each in wires if each != "none"):
            off = np.stack([curves[wire, seed] - curves["none", seed] for seed in seeds])
            (line,) = axis.plot(steps, off.mean(0), label=wire, linewidth=1.2)
            axis.fill_between(steps, off.min(0), off.max(0), alpha=0.15, color=line.get_color(), linewidth=0)
        axis.axhline(0, color="black", linewidth=0.8, linestyle=":")
        axis.set(xlabel="step", title=f"rows of {record.get('width', 32)} values, {len(seeds)} seeds")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.axes[0].set_ylabel("training loss above fp32's")
    figure.savefig(Path(__file__).resolve().parents[1] / "docs" / "wire_training.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--wires", default=",".join(WIRES), help="comma-separated; 'none' is fp32 and comes first")
    parser.add_argument(
        "--buckets", default="0", help="train.bucket_kib, comma-separated: each wire with each, so with other blocks"
    )
    parser.add_argument("--width", type=int, default=32, help="d_model; a block of the wire has 128 values")
    parser.add_argument("--results", default="wire_training", help="the name of the file in results/")
    args = parser.parse_args()
    wires, buckets = args.wires.split(","), [int(each) for each in args.buckets.split(",")]
    if wires[0] != "none" or not set(wires) <= set(WIRES):
        parser.error(f"--wires begins with none, and knows {', '.join(WIRES)}")
    if args.seeds < 2:
        parser.error("--seeds: a spread needs at least 2")
    record: dict[str, Any] = {
        "environment": environment(),
        "steps": args.steps,
        "width": args.width,
        "curve_every": CURVE_EVERY,
        "runs": [],
    }
    for seed in range(args.seeds):
        for wire in wires:
            for bucket_kib in buckets[:1] if wire == "none" else buckets:
                result = run_ranks(
                    train, 2, seed, wire, bucket_kib, args.steps, args.width, hosts=["a", "b"], timeout_s=1200
                )[0]
                record["runs"].append({"seed": seed, "wire": wire, "bucket_kib": bucket_kib, **result})
                print(
                    f"seed {seed} wire {wire} buckets {bucket_kib}: held-out loss {result['held_out']:.4f}", flush=True
                )
    held_out = {wire: [run["held_out"] for run in record["runs"] if run["wire"] == wire] for wire in wires}
    sent = {wire: sum(run["bytes_between_hosts"] for run in record["runs"] if run["wire"] == wire) for wire in wires}
    mean, spread = statistics.fmean(held_out["none"]), statistics.stdev(held_out["none"])
    rows = [
        [
            "fp32" if wire == "none" else wire,
            f"{statistics.fmean(losses):.4f}",
            f"{statistics.stdev(losses):.4f}",
            f"{(statistics.fmean(losses) - mean) / spread:+.2f}",
            f"{sent['none'] / sent[wire] * len(losses) / len(held_out['none']):.2f}",
        ]
        for wire, losses in held_out.items()
    ]
    path = write_json(args.results, record)
    plot()
    print(
        markdown_table(["wire", "held-out loss, mean", "stdev over seeds", "off, in fp32 stdevs", "fewer bytes"], rows)
    )
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
