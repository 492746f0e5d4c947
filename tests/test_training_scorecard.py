"""The trainer's scorecard measures and leaves the run as it was."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from spawn import run_ranks
from training_runs import tiny

from training.config import SyncConfig
from training.errors import ConfigError
from training.scorecard import _n_sequences, score, scorecard
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


def of_workers_and_stages(group: Any) -> tuple[int, int, str]:
    workers = dataclasses.replace(tiny(), sync=SyncConfig("local_sgd", workers=2))
    with contextlib.closing(Trainer(workers, group)) as trainer:
        sizes = _n_sequences(trainer), len(trainer._batches.at(0)[0].tokens[0])
    with pytest.raises(ConfigError) as caught:
        score(tiny(layout={"pp": 2}), group)
    return *sizes, str(caught.value)


def test_workers_have_their_part_of_a_batch_and_a_pipeline_is_refused() -> None:
    for measured, trained, message in run_ranks(of_workers_and_stages, 2):
        assert measured == trained == 4
        assert "layout.pp is 2; set layout.pp to 1" in message
