"""What one rank lacks is said, with the rank's number, and every rank ends with it: none waits, none is silent."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spawn import run_ranks
from training_runs import tiny

import pycomm
import training.__main__ as program
from pycomm.errors import PeerLost
from training import offload, ready, trainer
from training.config import Config
from training.data import open_corpus, write_token_shard
from training.device import Device
from training.errors import CheckpointError, ConfigError, TrainingError, common
from training.metered import MeteredGroup, on_every_rank, on_rank_0
from training.trainer import Trainer


def full(descriptor: int, offset: int, nbytes: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def refusals(group: Any, folder: Path) -> list[tuple[str, int | None]]:
    """What starting says where rank 1 alone lacks something, and which rank says it."""
    torch.set_num_threads(1)
    said: list[tuple[str, int | None]] = []

    def refused(config: Config) -> None:
        with pytest.raises(TrainingError) as caught:
            Trainer(config, group)
        said.append((str(caught.value), caught.value.said_by))

    path = folder / "there.txt" if group.rank == 0 else folder / "gone.txt"
    refused(tiny(data={"path": str(path)}))
    if group.rank == 1:
        ready.process_nbytes = lambda dtype: 1 << 40
    refused(tiny(memory_gib=100))
    ready.process_nbytes = lambda dtype: 0
    (folder / "file").touch()
    below = folder / ("own" if group.rank == 0 else "file") / "offload"
    refused(tiny(offload_optimizer=True, offload_dir=str(below)))
    refused(tiny(offload_activations=True, offload_dir=str(below)))
    whole = offload.os.posix_fallocate
    if group.rank == 1:
        offload.os.posix_fallocate = full
    refused(tiny(layout={"zero": 1}, offload_optimizer=True, offload_dir=str(folder)))
    offload.os.posix_fallocate = whole
    refused(tiny(data={"path": "/nonexistent"}))
    group = group.split(group.rank)
    trainer.choose_device = lambda asked, world: Device(torch.device("meta"), late=True)
    refused(tiny(layout={"zero": 1}, offload_optimizer=True, data={"path": "/nonexistent"}))
    group.close()
    return said


def test_every_rank_hears_what_one_lacks_before_training(tmp_path: Path) -> None:
    (tmp_path / "there.txt").write_text("some text\n" * 1000)
    first, second = run_ranks(refusals, 2, tmp_path)
    assert first == second
    assert {said_by for _, said_by in first} == {0}
    expected = (
        "rank 1: there is no data at .*gone.txt",
        "rank 1: a rank of pipeline stage 0 needs about .* train.memory_gib allows 100",
        "rank 1: cannot write to .*offload: Not a directory; set train.offload_dir",
        "rank 1: cannot write to .*offload: Not a directory; set train.offload_dir",
        "rank 1: no room for .*: No space left on device; set train.offload_dir",
        "there is no data at /nonexistent",  # which all lack
        "train.offload_optimizer on GPUs is of whole parameters, layout.zero is 1",  # before the data is looked at
    )
    for (text, _), pattern in zip(first, expected, strict=True):
        assert re.match(pattern, text), text


def outcomes(group: Any) -> list[Any]:
    """Of agreements where the ranks of a set fail, each with words of its own."""
    world, found = MeteredGroup(group, "world"), []

    def action(failing: set[int]) -> int:
        if group.rank in failing:
            raise CheckpointError("x" * (10 + group.rank))
        return 7 + group.rank

    for failing in (set[int](), {1}, {1, 2}, {0, 1, 2}):
        try:
            found.append(on_every_rank(world, lambda failing=failing: action(failing)))
        except CheckpointError as error:
            found.append((str(error), error.said_by))
    try:
        on_rank_0(world, lambda: action({0}))
    except CheckpointError as error:
        found.append((str(error), error.said_by))
    return found


def test_outcomes_are_agreed_on() -> None:
    for rank, found in enumerate(run_ranks(outcomes, 3)):
        assert found[0] == 7 + rank
        texts = ("rank 1: " + "x" * 11, "rank 1: " + "x" * 11, "x" * 10, "x" * 10)
        assert found[1:] == [(text, 0) for text in texts]


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "printed"),
    [
        (0, 0, ConfigError("bad"), "rank 0: error: bad\n"),
        (3, 1, ConfigError("bad"), "rank 3: error: bad\n"),
        (0, 0, common(ConfigError("bad")), "error: bad\n"),
        (3, 1, common(ConfigError("bad")), ""),
        (2, 0, common(ConfigError("bad"), 2), "rank 2: error: bad\n"),
        (3, 1, common(ConfigError("bad"), 2), ""),
    ],
)
def test_a_rank_says_what_no_other_says_for_it(
    rank: int, local_rank: int, error: TrainingError, printed: str, capsys: Any, monkeypatch: Any
) -> None:
    def fail(*given: Any) -> None:
        raise error

    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(program, "_do", fail)
    assert program.main(["run", "tiny"]) == program.USAGE_ERROR
    assert capsys.readouterr().err == printed
    # Before ranks meet, each host may have another file system: its first rank speaks.
    assert program.main(["run", "/nonexistent.toml"]) == program.USAGE_ERROR
    said = capsys.readouterr().err
    assert said.startswith("error: cannot read" if rank == 0 else f"rank {rank}: error: cannot read") or local_rank == 1
    assert (said == "") == (local_rank == 1)


def program_there(group: Any, arguments: list[str]) -> tuple[int, str]:
    """The program's status and what it says, with this group as its world."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(group.rank), LOCAL_RANK=str(group.rank), WORLD_SIZE=str(group.size))
    pycomm.init = lambda: contextlib.nullcontext(group)  # type: ignore[assignment]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            return program.main(arguments), said.getvalue()
        except PeerLost:
            return -1, said.getvalue()


def test_a_token_that_one_rank_finds_while_training_is_said_by_that_rank(tmp_path: Path) -> None:
    shard = tmp_path / "a.bin"
    tokens = np.zeros(1 << 21, dtype=np.uint16)
    write_token_shard(shard, tokens)
    config = tiny(data={"path": str(shard)})
    corpus = open_corpus(config.data, config.model.vocab_size)
    second_of_rank_1 = 8 + 4  # the first of its sequences in the second step
    first = corpus.train_window(second_of_rank_1, config.train.seed) * config.data.seq_len
    assert first % 2 == 0
    tokens[first + 1] = 300  # every other one is looked at when the file is opened
    write_token_shard(shard, tokens)
    run = f"run tiny --train.device cpu --data.path {shard} --out-dir {tmp_path} --monitor.peak-tflops 1"
    (waiting, _), (status, said) = run_ranks(program_there, 2, run.split())
    assert (waiting, status) == (-1, program.USAGE_ERROR)
    assert re.fullmatch(r"rank 1: error: .*a.bin holds token 300 near position \d+; .*\n", said), said
