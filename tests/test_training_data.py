"""The corpus: the same windows for every layout, and each bad input refused with its file and its fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spawn import run_ranks
from training_runs import tiny

from training.config import DataConfig
from training.data import Corpus, open_corpus, write_token_shard
from training.errors import DataError
from training.trainer import Trainer


def corpus_at(path: Path | str, seq_len: int = 4, vocab_size: int = 256) -> Corpus:
    return open_corpus(DataConfig(str(path), seq_len=seq_len, val_fraction=0.2), vocab_size)


def test_an_epoch_is_every_training_window_once_and_never_a_held_out_one(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(bytes(range(1, 82)))  # 20 windows of 4, and the last target
    corpus = corpus_at(file)
    assert (corpus.n_train, corpus.n_val) == (16, 4)
    for epoch in range(3):
        windows = [corpus.train_window(epoch * 16 + i, seed=5) for i in range(16)]
        assert sorted(windows) == list(range(16))
    first, second = ([corpus.train_window(i, seed) for i in range(16)] for seed in (5, 6))
    assert first != second
    assert [corpus.eval_window(i, 4) for i in range(4)] == [16, 17, 18, 19]
    assert [corpus.eval_window(i, 2) for i in range(2)] == [16, 18]


def test_targets_are_the_next_tokens(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(bytes(range(1, 82)))
    tokens, targets, documents = corpus_at(file).batch([3, 0])
    assert tokens.T.tolist() == [[13, 14, 15, 16], [1, 2, 3, 4]]
    assert torch.equal(targets, tokens + 1)
    assert documents is None


def test_the_standard_library_is_there_by_default() -> None:
    corpus = open_corpus(DataConfig(), 256)
    assert corpus.n_tokens > 1_000_000
    assert corpus.fingerprint() == open_corpus(DataConfig(), 256).fingerprint()


def test_a_folder_of_text_leaves_out_what_is_hidden_or_binary(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a" * 30)
    (tmp_path / "sub" / "b.md").write_text("b" * 30)
    (tmp_path / "c.png").write_bytes(b"\x89PNG\0" + b"c" * 30)
    (tmp_path / ".hidden").write_text("d" * 30)
    corpus = corpus_at(tmp_path)
    assert corpus.n_tokens == 61  # with a line break between two
    assert set(np.concatenate([corpus.tokens_at(w) for w in range(15)]).tolist()) == {ord("a"), ord("b"), ord("\n")}


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_shards_are_read_in_order_and_no_window_spans_two(tmp_path: Path, dtype: Any) -> None:
    write_token_shard(tmp_path / "0.bin", np.arange(0, 11, dtype=dtype))
    np.save(tmp_path / "1.npy", np.arange(1000, 1012, dtype=dtype))
    corpus = corpus_at(tmp_path, vocab_size=1 << 16)
    windows = [corpus.tokens_at(w).tolist() for w in range(corpus.n_train + corpus.n_val)]
    assert windows == [list(range(first, first + 5)) for first in (0, 4, 1000, 1004)]


def shard(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_bad_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no data at .*nowhere; data.path is a file, a folder, or 'stdlib'"):
        corpus_at(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no tokens"):
        corpus_at(tmp_path)
    with pytest.raises(DataError, match="holds no tokens"):
        corpus_at(shard(tmp_path / "empty.txt", b""))
    with pytest.raises(DataError, match="holds 7 tokens, 1 windows of 4; training needs at least 2"):
        corpus_at(shard(tmp_path / "small.txt", b"1234567"))
    with pytest.raises(DataError, match="does not begin with a token shard's header"):
        corpus_at(shard(tmp_path / "foreign.bin", b"\0" * 100))
    with pytest.raises(DataError, match=r"is not a readable \.npy file"):
        corpus_at(shard(tmp_path / "foreign.npy", b"\0" * 100))
    np.save(tmp_path / "floats.npy", np.zeros(100))
    with pytest.raises(DataError, match=r"holds float64 \[100\]; a token shard is integers"):
        corpus_at(tmp_path / "floats.npy")
    with pytest.raises(DataError, match="a shard holds uint16 or uint32"):
        write_token_shard(tmp_path / "x.bin", np.zeros(3))


def test_a_truncated_shard_is_refused_with_both_sizes(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    write_token_shard(file, np.arange(100, dtype=np.uint16))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="says 100 tokens of 2 bytes, 224 bytes in all; it has 223"):
        corpus_at(file)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    shard(tmp_path / "a.txt", b"x" * 100)
    (tmp_path / "gone.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"cannot read .*gone.txt: No such file or directory"):
        corpus_at(tmp_path)


def test_a_token_outside_the_vocabulary_is_refused_with_its_file(tmp_path: Path) -> None:
    write_token_shard(tmp_path / "a.bin", np.full(100, 300, dtype=np.uint16))
    with pytest.raises(DataError, match=r"a.bin holds token 300 near position 8; model.vocab_size is 256"):
        corpus_at(tmp_path / "a.bin").tokens_at(2)


def test_fewer_windows_than_a_batch_are_refused(tmp_path: Path) -> None:
    corpus = corpus_at(shard(tmp_path / "a.txt", b"x" * 81))
    corpus.require(global_batch=16, eval_sequences=4)
    with pytest.raises(DataError, match=r"has 16 windows of 4 tokens to train on, train\.global_batch asks for 17"):
        corpus.require(global_batch=17, eval_sequences=4)
    with pytest.raises(DataError, match=r"has 4 windows of 4 tokens held out, train\.eval_sequences asks for 5"):
        corpus.require(global_batch=16, eval_sequences=5)


def refusal_of_own_data(group: Any, folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        Trainer(tiny(data={"path": str(folder / f"{group.rank}.txt")}), group)
    return str(caught.value)


def test_ranks_that_read_different_data_all_refuse(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"{rank}.txt").write_bytes(bytes([65 + rank]) * 100_000)
    messages = run_ranks(refusal_of_own_data, 2, tmp_path)
    assert all("rank 1 reads other data" in message for message in messages)
