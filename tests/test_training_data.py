"""The corpus: the same windows for every layout, and each bad input refused with its file and its fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spawn import run_ranks
from training_runs import tiny

from training.config import DataConfig
from training.data import Corpus, Prefetcher, open_corpus, open_tokenizer, train_bpe, write_token_shard
from training.errors import ConfigError, DataError
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
    with pytest.raises(DataError, match=r"a.bin holds token 300 somewhere; model.vocab_size is 256"):
        corpus_at(tmp_path / "a.bin")
    rare = np.zeros(1 << 21, dtype=np.uint16)
    rare[1_000_001] = 300  # between those that are looked at when the file is opened
    write_token_shard(tmp_path / "a.bin", rare)
    with pytest.raises(DataError, match=r"a.bin holds token 300 near position 1000000; model.vocab_size is 256"):
        corpus_at(tmp_path / "a.bin").tokens_at(250_000)


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


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in records))
    return path


def test_jsonl_is_one_document_a_line(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"text": "abc", "id": 1}, "\n", {"text": "défg" * 10})
    corpus = corpus_at(file)
    whole = np.concatenate([corpus.tokens_at(w)[:-1] for w in range(corpus.n_train + corpus.n_val)])
    text = ("abc\n" + "défg" * 10).encode()
    assert bytes(whole.astype(np.uint8)) == text[: len(whole)]
    other = open_corpus(DataConfig(str(lines(file, *[{"body": "x" * 9}] * 4)), text_field="body", seq_len=4), 256)
    assert other.n_tokens == 4 * 9 + 3


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"text": "abc"\n', r"a.jsonl, line 2: it is not JSON: Expecting ',' delimiter"),
        ({"body": "x", "id": 3}, r"a.jsonl, line 2: it has no string at 'text', but body, id; set data.text_field"),
        ({"text": 3}, r"a.jsonl, line 2: it has no string at 'text', but text; set"),
        ('["text"]\n', r"a.jsonl, line 2: it has no string at 'text', but list; set"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, second: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        corpus_at(lines(tmp_path / "a.jsonl", {"text": "abc" * 40}, second))


def test_documents_are_told_apart_in_text_and_in_shards(tmp_path: Path) -> None:
    texts = [f"{n}" * n for n in range(1, 9)]
    data = {"document_mask": True, "seq_len": 8, "val_fraction": 0.1}
    jsonl = lines(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    shard = np.array([token for text in texts for token in (*text.encode(), 0)], dtype=np.uint16)
    write_token_shard(tmp_path / "a.bin", shard)
    for path, separator in ((jsonl, ord("\n")), (tmp_path / "a.bin", 0)):
        corpus = open_corpus(DataConfig(str(path), end_of_document=0, **data), 256)
        for window in range(corpus.n_train + corpus.n_val):
            tokens, _, documents = corpus.batch([window])
            assert documents is not None
            ends = (tokens[:-1] == separator).int()
            assert torch.equal(documents.diff(dim=0).int(), ends)  # a document ends with its separator
    with pytest.raises(DataError, match=r"where documents end in .*a.bin is not known; set data.end_of_document"):
        open_corpus(DataConfig(str(tmp_path / "a.bin"), **data), 256)


def test_sources_take_turns_by_weight_and_each_is_read_whole(tmp_path: Path) -> None:
    paths = []
    for name, n_windows in (("a", 30), ("b", 500), ("c", 200)):
        path = tmp_path / f"{name}.npy"
        np.save(path, np.full(4 * n_windows + 1, ord(name)))
        paths.append(str(path))
    config = DataConfig(mix=dict(zip(paths, (1.0, 2.0, 5.0), strict=True)), seq_len=4, val_fraction=0.2)
    corpus = open_corpus(config, 256)
    assert (corpus.n_train, corpus.n_val) == (24 + 400 + 160, 6 + 100 + 40)
    windows = [corpus.train_window(number, seed=3) for number in range(2 * 4096)]
    of_source = [chr(corpus.tokens_at(window)[0]) for window in windows]
    for block in (of_source[:4096], of_source[4096:]):
        assert [block.count(name) for name in "abc"] == [512, 1024, 2560]  # exactly 1 : 2 : 5
    assert of_source[:4096] != of_source[4096:]
    for name, n_train in (("a", 24), ("b", 400), ("c", 160)):  # each source goes epoch by epoch
        mine = [window for window, source in zip(windows, of_source, strict=True) if source == name]
        for first in range(0, len(mine) - n_train, n_train):
            assert len(set(mine[first : first + n_train])) == n_train
    fresh = open_corpus(config, 256)  # a resumed run begins anywhere
    assert [fresh.train_window(number, seed=3) for number in (8191, 5000, 17)] == [
        windows[8191],
        windows[5000],
        windows[17],
    ]
    held_out = [corpus.eval_window(index, 16) for index in range(16)]
    assert [chr(corpus.tokens_at(window)[0]) for window in held_out] == ["a"] * 2 + ["b"] * 4 + ["c"] * 10
    assert not set(held_out) & set(windows) and len(set(held_out)) == 16
    with pytest.raises(
        DataError, match=r"a.npy has 24 windows of 4 tokens to train on, train.global_batch asks for 25"
    ):
        corpus.require(global_batch=200, eval_sequences=8)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), 1e-5])
def test_weights_that_cannot_be_are_refused(tmp_path: Path, weight: float) -> None:
    with pytest.raises(ConfigError, match="a weight is positive and at least 1/4096 of all"):
        open_corpus(DataConfig(mix={"a": 1.0, "b": weight}), 256)


def test_a_byte_pair_vocabulary_is_trained_and_read_back(tmp_path: Path) -> None:
    path, text = tmp_path / "t.json", "wörd after word after word. " * 50
    train_bpe([text], 290, path)
    tokenizer = open_tokenizer(str(path), -1)
    (tokens,) = tokenizer.encode([("here", text.encode())])
    assert tokenizer.vocab_size <= 290 and tokenizer.separator == (0,)
    assert len(tokens) < len(text.encode()) / 2 and tokenizer.decode(tokens.tolist()) == text
    (tmp_path / "in.txt").write_text(text)
    data = DataConfig(str(tmp_path / "in.txt"), tokenizer=str(path), seq_len=4)
    assert open_corpus(data, 290).n_tokens == len(tokens)
    with pytest.raises(
        DataError, match=rf"t.json has {tokenizer.vocab_size} tokens, model.vocab_size is 256; set it to"
    ):
        open_corpus(data, 256)
    (tmp_path / "in.txt").write_bytes(b"one\ntwo\nthr\xffee")
    with pytest.raises(DataError, match=r"in.txt, line 3: byte 0xff is not UTF-8"):
        open_corpus(data, 290)
    with pytest.raises(DataError, match=r"there is no tokenizer at .*gone.json"):
        open_tokenizer(str(tmp_path / "gone.json"), -1)
    with pytest.raises(ConfigError, match=r"data.end_of_document is 70000, .*t.json has \d+ tokens; give one of them"):
        open_tokenizer(str(path), 70000)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad.json is no tokenizer that `tokenizers` reads"):
        open_tokenizer(str(tmp_path / "bad.json"), -1)
    with pytest.raises(ConfigError, match="a byte-level BPE has at least 257 tokens"):
        train_bpe([text], 256, path)


def test_reading_ahead_gives_what_reading_gives(tmp_path: Path) -> None:
    file = shard(tmp_path / "a.txt", bytes(range(1, 82)))
    corpus, ahead = corpus_at(file), corpus_at(file)
    prefetcher = Prefetcher(ahead, lambda position: [[ahead.train_window(position + i, 7) for i in range(3)]], 3)
    for position in (0, 3, 6, 30, 33, 3):  # in order, after a jump forward, and back
        (batch,) = prefetcher.at(position)
        expected = corpus.batch([corpus.train_window(position + i, 7) for i in range(3)])
        assert torch.equal(batch.tokens, expected.tokens) and torch.equal(batch.targets, expected.targets)
    prefetcher.close()

    rare = np.zeros(1 << 21, dtype=np.uint16)
    rare[61] = 300
    write_token_shard(tmp_path / "b.bin", rare)
    bad = corpus_at(tmp_path / "b.bin")
    prefetcher = Prefetcher(bad, lambda position: [[position]], 15)
    prefetcher.at(0)
    with pytest.raises(DataError, match="holds token 300"):  # when its turn comes, not before
        prefetcher.at(15)
    prefetcher.close()
