"""What a run leaves for people while it goes: metrics.jsonl, TensorBoard, W&B, and the loss curve as a picture."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import uuid
from pathlib import Path
from typing import Any

from training.config import Config
from training.errors import ConfigError


class MetricsFile:
    """Appends one JSON object a line. Opened for a run at first_step, it forgets the lines of that step and later ones,
    which an earlier process wrote after its last checkpoint."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(path) if record["step"] < first_step]
        temporary = path.with_name(f".{path.name}")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.rename(path)
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, [] where there is none; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Sinks:
    """Where each record goes on rank 0: metrics.jsonl always, TensorBoard and Weights & Biases where asked for."""

    def __init__(self, config: Config, first_step: int) -> None:
        self._file = MetricsFile(config.run_dir / "metrics.jsonl", first_step)
        self._tensorboard = _tensorboard(config, first_step) if config.monitor.tensorboard else None
        self._wandb = _wandb(config) if config.monitor.wandb else None

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(record)
        flat = _flat(record)
        step = flat.pop("step")
        if self._tensorboard is not None:
            for key, value in flat.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """Nested records by their path: {"a": {"b": 1}} is {"a/b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        inner = {f"{key}/{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
        flat.update(inner)
    return flat


def check_sinks(config: Config) -> None:
    """Raises ConfigError where a sink's package is not installed; it belongs before anything else."""
    for asked, key, package in (
        (config.monitor.tensorboard, "monitor.tensorboard", "tensorboard"),
        (config.monitor.wandb, "monitor.wandb", "wandb"),
    ):
        if asked and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{key} needs the package {package}: pip install {package}, or leave it out")


def _tensorboard(config: Config, first_step: int) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    return SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=first_step)


def _wandb(config: Config) -> Any:
    import wandb

    identity = config.run_dir / "wandb_id"  # a run that is resumed goes on in its own
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex)
    return wandb.init(
        project=config.monitor.wandb_project,
        name=config.name,
        id=identity.read_text(),
        resume="allow",
        dir=str(config.run_dir),
        config=dataclasses.asdict(config),
    )


def plot_losses(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training and held-out loss over steps as a PNG; the file appears complete."""
    from matplotlib.figure import Figure  # slow to import, and only rank 0 draws

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", {"linewidth": 0.8}), ("eval_loss", "held out", {"marker": "o"})):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="cross-entropy [nats per token]", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.rename(path)
