"""What several trainer tests share: small configurations, and the loss curve of one as a function of a group."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from training.config import Config, LayoutConfig
from training.presets import load_preset
from training.trainer import Trainer


def tiny(
    out_dir: Path | str = "unused",
    *,
    tp: int = 1,
    ep: int = 1,
    layout: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **train: Any,
) -> Config:
    """The tiny preset with some fields replaced; keywords that are named nowhere here belong to [train].
    On CPUs, whatever the machine has."""
    config = load_preset("tiny")
    data = {"path": argparse.__file__, **(data or {})}  # some text that is always there
    return dataclasses.replace(
        config,
        out_dir=str(out_dir),
        layout=LayoutConfig(**{"tp": tp, "ep": ep, **(layout or {})}),
        model=dataclasses.replace(config.model, **(model or {})),
        data=dataclasses.replace(config.data, **data),
        train=dataclasses.replace(config.train, **{"device": "cpu", **train}),
    )


def curve(group: Any, config: Config, n_steps: int) -> tuple[list[float], list[float], float]:
    """Loss and gradient norm of each step, and the held-out loss after the last."""
    torch.set_num_threads(1)
    trainer = Trainer(config, group)
    results = [trainer.train_step() for _ in range(n_steps)]
    held_out = trainer.evaluate()
    trainer.close()
    return [result.loss for result in results], [result.grad_norm for result in results], held_out
