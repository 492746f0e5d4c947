"""The trainer's scorecard measures and leaves the run as it was."""

from __future__ import annotations

from typing import Any

import torch
from spawn import run_ranks
from training_runs import tiny

from training.scorecard import scorecard
from training.trainer import Trainer


def scored(group: Any, before: bool) -> tuple[list[float], list[float]]:
    torch.set_num_threads(1)
    trainer = Trainer(tiny(), group)
    card = scorecard(trainer, n_rounds=1) if before else None
    losses = [trainer.train_step().loss for _ in range(3)]
    trainer.close()
    return losses, [] if card is None else [card.compute_s, card.comm_s, card.serial_s, card.together_s]


def test_a_scorecard_before_the_first_step_changes_nothing() -> None:
    measured = run_ranks(scored, 2, True, hosts=["a", "b"])
    plain = run_ranks(scored, 2, False, hosts=["a", "b"])
    assert [losses for losses, _ in measured] == [losses for losses, _ in plain]
    assert measured[0][1] == measured[1][1] and min(measured[0][1]) > 0
