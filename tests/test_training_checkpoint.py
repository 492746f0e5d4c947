"""Checkpoints: a bit-equal continuation, whole or absent on the disk, and refused when damaged or foreign."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spawn import run_ranks
from training_runs import tiny

from training import checkpoint_files
from training.config import Config, SyncConfig
from training.data import open_corpus
from training.errors import CheckpointError, DataError, DivergenceError
from training.metered import SLOW_S
from training.run import run
from training.trainer import Trainer

MOE = {"n_experts": 4, "top_k": 2}
RING = {"tp_overlap": "always"}  # not as it is timed
BIASED = {**MOE, "router": "sigmoid", "router_bias": True, "router_bias_speed": 0.05}


def train_and_save(group: Any, config: Config, until: int, save_at: int) -> Any:
    """Trains from the newest checkpoint (or the start) until a step, saving at one; losses, then every master."""
    torch.set_num_threads(1)
    trainer = Trainer(config, group)
    trainer.resume()
    losses = []
    while trainer.progress.step < until:
        losses.append(trainer.train_step().loss)
        if trainer.progress.step == save_at:
            trainer.save()
    masters = {name: master.numpy().copy() for name, master in trainer.optimizer.masters.items()}
    trainer.close()
    return losses, masters


@pytest.mark.parametrize(
    ("n_ranks", "layout"),
    [(1, {}), (4, {"tp": 2, "ep": 2, "layout": RING, "model": BIASED}), (1, {"precision": "bf16", "accumulation": 2})],
    ids=["one rank", "all axes", "bf16"],
)
def test_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path: Path, n_ranks: int, layout: Any) -> None:
    config = tiny(tmp_path, **layout)
    whole = run_ranks(train_and_save, n_ranks, config, 8, 5)
    resumed = run_ranks(train_and_save, n_ranks, config, 8, -1)
    for (losses, masters), (resumed_losses, resumed_masters) in zip(whole, resumed, strict=True):
        assert resumed_losses == losses[5:]
        for name in masters:
            assert np.array_equal(masters[name], resumed_masters[name]), name


def test_a_checkpoint_resumes_in_another_layout(tmp_path: Path) -> None:
    """With a mix of sources, whose turns go on, and biased routers, whose biases do."""
    file = tmp_path / "b.jsonl"
    file.write_text("".join(json.dumps({"text": "some line " * n}) + "\n" for n in range(100)))
    data = {"mix": {argparse.__file__: 1.0, str(file): 2.0}, "document_mask": True}
    whole, _ = run_ranks(train_and_save, 1, tiny(tmp_path, model=BIASED, data=data), 8, 5)[0]
    other, _ = run_ranks(train_and_save, 4, tiny(tmp_path, tp=2, ep=2, model=BIASED, data=data), 8, -1)[0]
    np.testing.assert_allclose(other, whole[5:], rtol=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs of a tiny run with a checkpoint of step 2."""
    out_dir = tmp_path_factory.mktemp("runs")
    run_ranks(train_and_save, 1, tiny(out_dir), 2, 2)
    return out_dir


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy of saved to damage; the path of its checkpoint."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    newest = checkpoint_files.latest(tiny(tmp_path).run_dir)
    assert newest is not None
    return newest


def truncate(folder: Path) -> None:
    file = folder / "exp_avg.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    file = folder / "parameters.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


def cut_state(folder: Path) -> None:
    file = folder / "state.json"
    file.write_text(file.read_text()[:50])


def remove_a_file(folder: Path) -> None:
    (folder / "exp_avg_sq.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"exp_avg.safetensors is damaged: it has \d+ bytes instead of \d+; delete its checkpoint folder"),
        (flip_a_bit, "parameters.safetensors is damaged: its checksum is not"),
        (cut_state, "state.json is damaged: it is not what was written"),
        (remove_a_file, "is damaged: No such file or directory: .*exp_avg_sq.safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_left_alone(damaged: Path, damage: Any, message: str) -> None:
    damage(damaged)
    before = {file.name: file.read_bytes() for file in damaged.iterdir()}
    with pytest.raises(CheckpointError, match=message):
        checkpoint_files.read_state(damaged)
    assert {file.name: file.read_bytes() for file in damaged.iterdir()} == before


def refusal(group: Any, config: Config) -> str:
    trainer = Trainer(config, group)
    with pytest.raises(CheckpointError) as caught:
        trainer.resume()
    trainer.close()
    return str(caught.value)


def refusal_before_the_model_is_made(group: Any, config: Config) -> str:
    with pytest.raises(CheckpointError) as caught:
        Trainer(config, group)
    return str(caught.value)


def test_every_rank_hears_of_a_damaged_checkpoint(damaged: Path) -> None:
    truncate(damaged)
    messages = run_ranks(refusal, 2, tiny(damaged.parents[2]))
    assert messages[0] == messages[1]
    assert "is damaged" in messages[0]


def test_a_checkpoint_of_another_model_is_refused(saved: Path) -> None:
    message = run_ranks(refusal_before_the_model_is_made, 1, tiny(saved, model={"d_ff": 128}))[0]
    assert "is of another model: d_ff is 64 there and 128 here; choose another name for this run" in message


def write_state(folder: Path, **changes: Any) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, **changes}))


def test_another_format_is_refused(damaged: Path) -> None:
    write_state(damaged, format=99)
    with pytest.raises(CheckpointError, match="has checkpoint format 99, this program reads 1"):
        checkpoint_files.read_state(damaged)


def save_without_space(group: Any, config: Config) -> tuple[str, list[str]]:
    """Saves with a disk that fails while the second file is written; the error, and what is in the folder then."""
    trainer = Trainer(config, group)
    trainer.train_step()
    written = []
    whole_save = checkpoint_files.save_file

    def failing_save(tensors: Any, path: Path) -> None:
        written.append(path)
        if len(written) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        whole_save(tensors, path)

    checkpoint_files.save_file = failing_save
    try:
        with pytest.raises(CheckpointError) as caught:
            trainer.save()
    finally:
        checkpoint_files.save_file = whole_save
    group.all_reduce(torch.zeros(1))  # rank 0 has cleaned up before the others look
    trainer.close()
    return str(caught.value), [path.name for path in (config.run_dir / "checkpoints").iterdir()]


def test_a_failed_save_leaves_nothing_and_every_rank_raises(tmp_path: Path) -> None:
    for message, left in run_ranks(save_without_space, 2, tiny(tmp_path)):
        assert "No space left on device" in message and "nothing of it was kept" in message
        assert left == []


def test_a_folder_that_a_killed_process_left_is_no_checkpoint_and_goes(damaged: Path) -> None:
    run_dir = damaged.parents[1]
    leftover = damaged.with_name(".step_00000007")
    leftover.mkdir()
    (leftover / "parameters.safetensors").write_bytes(b"half")
    assert checkpoint_files.latest(run_dir) == damaged
    run_ranks(train_and_save, 1, tiny(damaged.parents[2]), 3, 3)
    assert not leftover.exists()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    config = tiny(tmp_path, keep_checkpoints=2)
    for step in (1, 2, 3):
        run_ranks(train_and_save, 1, config, step, step)
    names = sorted(path.name for path in (config.run_dir / "checkpoints").iterdir())
    assert names == ["step_00000002", "step_00000003"]


def resumed_losses(group: Any, config: Config) -> tuple[list[float], list[float], str]:
    """The last losses of a run, those that it goes on with, and what is said of a jump in its first step then."""
    torch.set_num_threads(1)
    trainer = Trainer(config, group)
    for _ in range(12):
        trainer.train_step()
    trainer.save()
    before = list(trainer.divergence.recent_losses)
    trainer.close()
    trainer = Trainer(config, group)
    trainer.resume()
    after = list(trainer.divergence.recent_losses)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(30.0)
    with pytest.raises(DivergenceError) as caught:
        trainer.train_step()
    trainer.close()
    return before, after, str(caught.value)


def test_a_jump_is_seen_in_the_first_step_after_a_resume(tmp_path: Path) -> None:
    """By each of two workers against its own losses."""
    config = dataclasses.replace(tiny(tmp_path, steps=13), sync=SyncConfig("local_sgd", workers=2, every=4))
    of_ranks = run_ranks(resumed_losses, 2, config)
    for before, after, said in of_ranks:
        assert len(before) == 12 and after == before
        assert said.startswith("step 13: the loss jumped from ")
    assert of_ranks[0][0] != of_ranks[1][0]


def refused_run(group: Any, config: Config) -> str:
    with pytest.raises(DataError) as caught:
        run(config, group)
    return str(caught.value)


def test_other_tokens_at_the_same_path_are_refused_and_at_another_one_taken(tmp_path: Path) -> None:
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("some text of a file\n" * 500)
    other.write_text("same text of a file\n" * 500)
    config = tiny(tmp_path, steps=3, data={"path": str(path)})
    run_ranks(train_and_save, 1, config, 2, 2)
    newest = checkpoint_files.latest(config.run_dir)
    assert newest is not None
    before, now = (open_corpus(dataclasses.replace(config.data, path=str(each)), 256) for each in (path, other))
    checkpoint_files.require_same_data(newest, config, before.fingerprint())
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(other)))
    checkpoint_files.require_same_data(newest, elsewhere, now.fingerprint())
    assert any("data.path" in change for change in checkpoint_files.changed_since(newest, elsewhere))
    other.rename(path)
    said = run_ranks(refused_run, 1, config)[0]
    assert said.startswith(f"{str(path)!r} holds other tokens than when {newest} was written")
    assert said.endswith("(for 'stdlib': that Python version), or give the new ones another data.path")


class Deadlines:
    """A group that records the deadline of each collective."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.seen: list[tuple[str, float | None]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.group, name)
        if name not in ("all_reduce", "all_gather", "broadcast", "send", "recv"):
            return found

        def call(*given: Any, **options: Any) -> Any:
            self.seen.append((name, options.get("timeout_s")))
            return found(*given, **options)

        return call


def deadlines(group: Any, config: Config) -> dict[str, list[tuple[str, float | None]]]:
    """Of the world's collectives, those that workers wait in for each other."""
    torch.set_num_threads(1)
    trainer = Trainer(config, group)
    trainer.train_step()
    watched = trainer.mesh.world.group = Deadlines(group)  # type: ignore[assignment]
    found = {}
    for what in (trainer.evaluate, trainer.save, trainer.resume):
        watched.seen = []
        what()
        found[what.__name__] = watched.seen
    trainer.close()
    return found


def test_who_waits_for_a_slow_worker_or_a_disk_has_its_deadline(tmp_path: Path) -> None:
    """A broadcast of what rank 0 just announced need not."""
    config = dataclasses.replace(tiny(tmp_path), sync=SyncConfig("local_sgd", workers=2, every=4))
    for found in run_ranks(deadlines, 2, config):
        assert found["evaluate"] == [("all_reduce", SLOW_S)]
        for what in ("save", "resume"):
            assert len(found[what]) > 3
            late = [call for call in zip(found[what], found[what][1:], strict=False) if call[1][1] != SLOW_S]
            assert found[what][0][1] == SLOW_S
            assert all(call == (("broadcast", SLOW_S), ("broadcast", None)) for call in late), late
