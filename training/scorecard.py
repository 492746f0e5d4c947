"""What overlapping gains in a training step: pycomm.overlap's scorecard of one micro-batch of random tokens.

`pycomm-train scorecard [PRESET]` prints it, as `pycomm bench overlap` prints that of a collective alone."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from pycomm.overlap import Scorecard, measure
from training.config import Config
from training.errors import ConfigError, common
from training.machine import share_cores
from training.trainer import Trainer

if TYPE_CHECKING:
    from pycomm.group import Group


def score(config: Config, world: Group) -> None:
    """Prints the scorecard of a step of a new model; trains nothing and writes nothing."""
    _require_no_pipeline(config)
    share_cores(world)
    with contextlib.closing(Trainer(config, world)) as trainer:
        card = scorecard(trainer)
        sequences = _n_sequences(trainer)
    if world.rank == 0:
        print(f"{config.name}, a micro-batch of {sequences} x {config.data.seq_len} tokens a rank: {card}")


def _require_no_pipeline(config: Config) -> None:
    if config.layout.pp > 1:
        raise common(
            ConfigError(
                f"a scorecard is of a step without a pipeline, layout.pp is {config.layout.pp}; set layout.pp to 1 "
                "(with layout.auto: plan.max_pp)"
            )
        )


def _n_sequences(trainer: Trainer) -> int:
    """Of a rank's micro-batch."""
    train = trainer.config.train
    return train.global_batch // (trainer.mesh.layout.n_data * train.accumulation)


def scorecard(trainer: Trainer, n_rounds: int = 3) -> Scorecard:
    """Forward and backward of a micro-batch, the reduction of its gradients, one after the other, and overlapped.

    All ranks together. What tensor and expert parallelism exchange inside the layers counts as computation: it cannot
    be taken out. The model and the optimizer's state stay as they are, but for the residuals of a wire: call it before
    the first step or after the last. Raises ConfigError for a run with a pipeline."""
    config, optimizer = trainer.config, trainer.optimizer
    _require_no_pipeline(config)
    random = torch.Generator().manual_seed(config.train.seed)
    shape = (config.data.seq_len, _n_sequences(trainer))
    tokens, targets = (
        trainer.device.put(torch.randint(config.model.vocab_size, shape, generator=random)) for _ in range(2)
    )

    def backward() -> None:
        cross_entropy, balance = trainer.model.loss(tokens, targets)
        (cross_entropy / tokens.numel() + balance).backward()

    def compute() -> None:
        with optimizer.no_sync():
            backward()

    def serial() -> None:
        compute()
        optimizer.wait()

    def together() -> None:
        backward()
        optimizer.wait()

    together()  # the first step lays the buckets out
    return measure(
        trainer.mesh.world,
        compute=compute,
        communicate=optimizer.wait,
        serial=serial,
        together=together,
        n_rounds=n_rounds,
        device=trainer.device.where,
    )
