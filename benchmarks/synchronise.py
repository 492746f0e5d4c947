"""Whether workers that agree seldom, late or in few bits train as well: python benchmarks/synchronise.py

The model, data and steps of wire_training.py on two emulated hosts of one rank each, every choice of [sync] for the
same tokens from the same seeds. Writes results/synchronise.json (runs that are there already, of the same length, are
kept, so that it can be made in pieces), docs/synchronise.png and the table in docs/synchronise.md: the held-out loss
after the last step, how far from synchronous training's of the same seed, and the bytes that crossed hosts."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import torch
from common import environment, markdown_table, read_json, run_ranks, write_figures, write_json

import pycomm
import training.trainer
from training.config import SyncConfig
from training.presets import load_preset
from training.trainer import Trainer

CURVE_EVERY = 20  # steps whose losses make one point of the recorded curve
EVAL_SEQUENCES = 512
AT_ONCE = 4  # runs in one set of ranks, written when all are done
DOCS = Path(__file__).parents[1] / "docs"


def _two(method: str, **more: Any) -> dict[str, Any]:
    return {"method": method, "workers": 2, **more}


# Name: [sync], [wire], [train].
CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "synchronous": ({}, {}, {}),
    "synchronous, 2 micro-batches": ({}, {}, {"accumulation": 2}),
    "synchronous, bf16": ({}, {"dp": "bf16"}, {}),
    "synchronous, fp8": ({}, {"dp": "fp8"}, {}),
    "synchronous, int8": ({}, {"dp": "int8"}, {}),
    "synchronous, int8, smaller buckets": ({}, {"dp": "int8"}, {"bucket_kib": 16}),  # other blocks: other roundings
    "synchronous, int8, smallest buckets": ({}, {"dp": "int8"}, {"bucket_kib": 4}),
    "synchronous, int8, no error feedback": ({}, {"dp": "int8", "error_feedback": False}, {}),
    "stale 1": (_two("stale", staleness=1), {}, {}),
    "stale 4": (_two("stale", staleness=4), {}, {}),
    "stale 1, int8": (_two("stale", staleness=1), {"outer": "int8"}, {}),
    "local SGD, every 10": (_two("local_sgd", every=10), {}, {}),
    "local SGD, every 50": (_two("local_sgd", every=50), {}, {}),
    "local SGD, every 10, int8": (_two("local_sgd", every=10), {"outer": "int8"}, {}),
    "DiLoCo, every 10": (_two("diloco", every=10), {}, {}),
    "DiLoCo, every 50": (_two("diloco", every=50), {}, {}),
    "DiLoCo, every 50, bf16": (_two("diloco", every=50), {"outer": "bf16"}, {}),
    "DiLoCo, every 50, int8": (_two("diloco", every=50), {"outer": "int8"}, {}),
    "DiLoCo, every 50, int4": (_two("diloco", every=50), {"outer": "int4"}, {}),
    "streaming DiLoCo, every 50": (_two("streaming_diloco", every=50), {}, {}),
    "streaming DiLoCo, every 50, int4": (_two("streaming_diloco", every=50), {"outer": "int4"}, {}),
}


def train(store: Any, rank: int, n_ranks: int, seed: int, names: list[str], steps: int) -> list[dict[str, Any]]:
    """One run after another, in one set of ranks that reads the text once."""
    torch.set_num_threads(1)
    read, corpora = training.trainer.open_corpus, dict[str, Any]()

    def read_once(data: Any, vocab_size: int) -> Any:
        if repr(data) not in corpora:
            corpora[repr(data)] = read(data, vocab_size)
        return corpora[repr(data)]

    training.trainer.open_corpus = read_once
    with pycomm.init(store, rank, n_ranks, timeout_s=300) as group:
        return [train_one(group, seed, name, steps) for name in names]


def train_one(group: pycomm.Group, seed: int, name: str, steps: int) -> dict[str, Any]:
    """Losses of the first worker, the held-out loss of the model that all share, and the bytes that this rank sent."""
    sync, wire, more = CHOICES[name]
    config = load_preset("tiny")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path="stdlib"),
        train=dataclasses.replace(config.train, seed=seed, steps=steps, eval_sequences=EVAL_SEQUENCES, **more),
        sync=SyncConfig(**sync),
        wire=dataclasses.replace(config.wire, **wire),
    )
    trainer = Trainer(config, group)
    before = _bytes_between_hosts(trainer)
    losses = [trainer.train_step().loss for _ in range(steps)]
    sent = _bytes_between_hosts(trainer) - before
    held_out = trainer.evaluate()
    trainer.close()
    points = [statistics.fmean(losses[i : i + CURVE_EVERY]) for i in range(0, steps, CURVE_EVERY)]
    return {"held_out": held_out, "curve": [round(point, 4) for point in points], "bytes_between_hosts": sent}


def _bytes_between_hosts(trainer: Trainer) -> int:
    return sum(each.group.stats().bytes_between_hosts for each in trainer.mesh.groups)


def table(runs: list[dict[str, Any]]) -> str:
    """A row for each choice that has run, over the seeds that synchronous training has too."""
    of: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        of.setdefault(run["choice"], {})[run["seed"]] = run
    reference = of["synchronous"]
    rows = []
    for name in CHOICES:
        found = {seed: run for seed, run in sorted(of.get(name, {}).items()) if seed in reference}
        if not found:
            continue
        losses = [run["held_out"] for run in found.values()]
        worse = [100 * (run["held_out"] / reference[seed]["held_out"] - 1) for seed, run in found.items()]
        sent = statistics.fmean(run["bytes_between_hosts"] for run in found.values())
        most = statistics.fmean(reference[seed]["bytes_between_hosts"] for seed in found)
        rows.append(
            [
                name,
                f"{statistics.fmean(losses):.4f}",
                f"{statistics.fmean(worse):+.2f} %",
                " ".join(f"{each:+.2f}" for each in worse),
                f"{sent / 2**20:.2f}",
                f"{most / sent:.1f}",
            ]
        )
    head = ["choice", "held-out loss", "against synchronous", "by seed, %", "MiB between hosts", "fewer bytes"]
    return markdown_table(head, rows)


def plot(runs: list[dict[str, Any]]) -> None:
    """The loss of the first seed's runs by tokens, and the held-out losses of all by bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, costs) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    names = [name for name in CHOICES if any(run["choice"] == name for run in runs)]
    for number, name in enumerate(names):
        mine = [run for run in runs if run["choice"] == name]
        style: Any = {"color": pyplot.cm.tab20(number), "marker": "o^sDvP"[number % 6]}  # type: ignore[attr-defined]
        points = mine[0]["curve"]
        steps = [CURVE_EVERY * (i + 0.5) for i in range(len(points))]
        curves.plot(steps[5:], points[5:], linewidth=0.9, color=style["color"])
        nbytes = [run["bytes_between_hosts"] / 2**20 for run in mine]
        costs.scatter(nbytes, [run["held_out"] for run in mine], s=18, label=name, **style)
    curves.set(xlabel="step", ylabel="training loss of the first worker, seed 0")
    costs.set(xlabel="MiB between hosts", ylabel="held-out loss", xscale="log")
    costs.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(DOCS / "synchronise.png", dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--choices", default=";".join(CHOICES), help="separated by semicolons")
    args = parser.parse_args()
    names, seeds = args.choices.split(";"), [int(each) for each in args.seeds.split(",")]
    if unknown := [each for each in names if each not in CHOICES]:
        parser.error(f"--choices: there is no {unknown[0]!r}; there are {'; '.join(CHOICES)}")
    record: dict[str, Any] = read_json("synchronise")
    if record.get("steps") != args.steps:
        record = {"steps": args.steps, "curve_every": CURVE_EVERY, "runs": []}
    record["environment"] = here = environment()
    for seed in seeds:
        done = {run["choice"] for run in record["runs"] if run["seed"] == seed}
        left = [name for name in names if name not in done]
        for some in (left[i : i + AT_ONCE] for i in range(0, len(left), AT_ONCE)):
            ranks = run_ranks(train, 2, seed, some, args.steps, hosts=["a", "b"], timeout_s=1200)
            for name, *results in zip(some, *ranks, strict=True):
                result = {**results[0], "bytes_between_hosts": sum(each["bytes_between_hosts"] for each in results)}
                record["runs"].append({"seed": seed, "choice": name, **result, "commit": here["commit"]})
                print(f"seed {seed} {name}: held-out loss {result['held_out']:.4f}", flush=True)
            write_json("synchronise", record)
    if any(run["choice"] == "synchronous" for run in record["runs"]):
        write_figures(DOCS / "synchronise.md", [table(record["runs"]) + "\n"])
        plot(record["runs"])


if __name__ == "__main__":
    main()
