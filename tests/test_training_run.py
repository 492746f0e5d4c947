"""The program as a person meets it: run, resume, sample, Ctrl-C, and errors in one line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from spawn import run_ranks
from training_runs import tiny

from training import checkpoint_files
from training.config import Config
from training.metrics import MetricsFile, read_metrics
from training.presets import load_preset
from training.run import run
from training.trainer import Trainer

ROOT = Path(__file__).parents[1]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "training", *arguments]


def train(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """python -m training ... as one rank, which no launcher started."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment, **options
    )


def test_a_run_leaves_its_files_resumes_and_samples(tmp_path: Path) -> None:
    out = ("--out-dir", str(tmp_path), "--data.path", argparse.__file__)
    first = train("run", "tiny", *out, "--train.steps", "10")
    assert first.returncode == 0, first.stderr
    assert "a new run" in first.stdout and "Communication: none; there was one rank." in first.stdout
    run_dir = tmp_path / "tiny"
    assert {path.name for path in run_dir.iterdir()} == {
        "checkpoints", "loss.png", "metrics.jsonl", "report.txt", "sample.txt",
    }  # fmt: skip
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")

    second = train("run", "tiny", *out, "--train.steps", "15")
    assert second.returncode == 0, second.stderr
    assert "resumed at step 10" in second.stdout and "train.steps was 10, is 15" in second.stdout
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 16))
    assert [record["step"] for record in records if "eval_loss" in record] == [10, 15]
    assert records[-1]["loss"] < records[0]["loss"]

    third = train("run", "tiny", *out, "--train.steps", "15")
    assert third.returncode == 0, third.stderr
    assert "It is complete: 15 steps were asked for. Train further with --train.steps N." in third.stdout

    sample = train("sample", "tiny", *out, "--sample.prompt", "import ", "--sample.n-tokens", "9")
    assert sample.returncode == 0, sample.stderr
    assert sample.stdout.startswith("import ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "defualt"), "error: there is no preset 'defualt'; the nearest is 'default'"),
        (("rum", "tiny"), "error: there is no command 'rum'; the nearest is 'run'"),
        (("run", "tiny", "--data.path", "/nonexistent"), "error: there is no data at /nonexistent"),
        (("run", "tiny", "--layout.tp", "3"), "error: layout.tp (3) does not divide the ranks (1)"),
        (("run", "tiny", "--model.n-layer", "3"), "--model.n-layers"),
        (("sample", "tiny", "--out-dir", "/nonexistent"), "has no checkpoint; train it with"),
    ],
)
def test_what_a_user_can_put_right_is_said_without_a_traceback(arguments: tuple[str, ...], message: str) -> None:
    result = train(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_stops_after_a_step_with_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    steps = ("--out-dir", str(tmp_path), "--train.steps", "100000", "--train.checkpoint-every", "100000")
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    with subprocess.Popen(command("run", "tiny", *steps), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "step 10/" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 130
    done = read_metrics(metrics)[-1]["step"]
    assert f"Interrupted after step {done}; the checkpoint is complete. Run again to resume." in rest
    newest = checkpoint_files.latest(tmp_path / "tiny")
    assert newest is not None and checkpoint_files.read_state(newest)["step"] == done
    resumed = train("run", "tiny", "--out-dir", str(tmp_path), "--train.steps", str(done + 2))
    assert f"resumed at step {done}" in resumed.stdout
    assert resumed.returncode == 0, resumed.stderr


def test_metrics_written_after_the_checkpoint_are_forgotten_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    file = MetricsFile(path, first_step=3)
    file.write({"step": 3, "again": True})
    file.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def run_config(group: Any, config: Config) -> None:
    run(config, group)


def test_the_report_says_what_was_communicated(tmp_path: Path) -> None:
    config = tiny(tmp_path, steps=4)
    run_ranks(run_config, 4, config, hosts=["a", "a", "b", "b"])
    report = " ".join((config.run_dir / "report.txt").read_text().split())
    assert "4 ranks (dp 4 × tp 1) to step 4: 4 steps and 1,024 tokens" in report
    assert "MiB inside hosts" in report and "between them, all 4 ranks on 2 hosts together" in report
    assert "hidden behind compute" in report and "all_reduce" in report
    records = read_metrics(config.run_dir / "metrics.jsonl")
    n_parameter_bytes = 4 * 28_832
    for record in records:
        moved = record["bytes_inside_hosts"] + record["bytes_between_hosts"]
        assert moved >= 2 * 3 * n_parameter_bytes  # no all_reduce over 4 ranks sends less: 2 (n-1)/n of it a rank
        assert record["bytes_between_hosts"] >= 2 * n_parameter_bytes  # each host must send and receive the sum
        assert 0.0 <= record["exposed_share"] <= 1.0


def first_losses(group: Any) -> dict[str, list[float]]:
    """Of the small presets as they are written, but for a smaller batch of text that is always there."""
    torch.set_num_threads(1)
    losses = {}
    for preset in ("default", "laptop", "moe"):
        config = load_preset(preset)
        train = dataclasses.replace(config.train, device="cpu", global_batch=2 * config.train.accumulation)
        data = dataclasses.replace(config.data, path=argparse.__file__)
        train = dataclasses.replace(train, eval_sequences=2)
        trainer = Trainer(dataclasses.replace(config, train=train, data=data), group)
        losses[preset] = [trainer.train_step().loss for _ in range(2)]
        trainer.close()
    return losses


def test_small_presets_train() -> None:
    first, second = run_ranks(first_losses, 2)
    assert first == second and first.keys() == {"default", "laptop", "moe"}
    for losses in first.values():
        assert losses[0] == pytest.approx(math.log(256), abs=0.5)  # what is new knows next to nothing
        assert losses[1] != losses[0]


def fails_on_rank_1(group: Any, config: Config) -> None:
    if group.rank == 1:
        raise ValueError("rank 1 broke")
    run(config, group)


def test_one_ranks_exception_surfaces(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="rank 1 broke"):
        run_ranks(fails_on_rank_1, 2, tiny(tmp_path))
