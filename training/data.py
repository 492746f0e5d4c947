"""Text and token shards as a stream of training sequences, the same for every layout.

A corpus is cut into windows of seq_len tokens; the last val_fraction of them are held out. Training takes the windows
epoch by epoch, each epoch in another order, which depends on the seed and the epoch alone: sequence number i of a run
is the same window whatever ranks, micro-batches or restarts there are.
"""

from __future__ import annotations

import os
import struct
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.config import DataConfig
from training.errors import DataError

Tokens = np.ndarray[Any, np.dtype[Any]]

# Magic, bytes a token (2 or 4), 0, number of tokens; the tokens follow. All little endian.
_HEADER = struct.Struct("<8sIIQ")
_MAGIC = b"pycomtok"
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


class Corpus:
    """Windows of one or several token streams. tokens_at(window) is [seq_len + 1]: inputs, and targets one further."""

    def __init__(self, streams: Sequence[Tokens], names: Sequence[str], config: DataConfig, vocab_size: int) -> None:
        """Raises DataError where the streams are too short for one training and one held-out window."""
        self._streams = streams
        self._names = names
        self._seq_len = config.seq_len
        self._vocab_size = vocab_size
        counts = [max(0, (len(stream) - 1) // config.seq_len) for stream in streams]
        self._ends = np.cumsum(counts)
        n_windows = int(self._ends[-1])
        self.n_tokens = sum(len(stream) for stream in streams)
        self.n_val = max(1, round(n_windows * config.val_fraction))
        self.n_train = n_windows - self.n_val
        self._order: tuple[tuple[int, int], Tokens] | None = None
        if self.n_train < 1:
            raise DataError(
                f"{config.path} holds {self.n_tokens} tokens, {n_windows} windows of {config.seq_len}; training needs "
                "at least 2, one of them held out: give more data, or a smaller data.seq_len"
            )

    def require(self, global_batch: int, eval_sequences: int) -> None:
        """Raises DataError where the corpus has fewer windows than one batch, or than one evaluation."""
        for what, have, need, key in (
            ("to train on", self.n_train, global_batch, "train.global_batch"),
            ("held out", self.n_val, eval_sequences, "train.eval_sequences"),
        ):
            if have < need:
                raise DataError(
                    f"the data has {have} windows of {self._seq_len} tokens {what}, {key} asks for {need}; give more "
                    f"data or lower {key}"
                )

    def tokens_at(self, window: int) -> Tokens:
        """int64 [seq_len + 1]. Raises DataError for a token outside the model's vocabulary."""
        stream = int(np.searchsorted(self._ends, window, side="right"))
        first = (window - (int(self._ends[stream - 1]) if stream else 0)) * self._seq_len
        tokens = self._streams[stream][first : first + self._seq_len + 1].astype(np.int64)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._vocab_size:
            raise DataError(
                f"{self._names[stream]} holds token {high if high >= self._vocab_size else low} near position {first}; "
                f"model.vocab_size is {self._vocab_size}: use the vocabulary that the file was written with"
            )
        return tokens

    def train_window(self, number: int, seed: int) -> int:
        """The window of sequence number `number` of the run with this seed."""
        epoch, index = divmod(number, self.n_train)
        if self._order is None or self._order[0] != (seed, epoch):
            generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
            self._order = ((seed, epoch), generator.permutation(self.n_train))
        return int(self._order[1][index])

    def eval_window(self, index: int, n_sequences: int) -> int:
        """Window `index` of n_sequences spread evenly over the held-out ones."""
        return self.n_train + index * self.n_val // n_sequences

    def batch(self, windows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens and targets, each int64 [seq_len, len(windows)]."""
        both = torch.from_numpy(np.stack([self.tokens_at(window) for window in windows], axis=1))
        return both[:-1].contiguous(), both[1:].contiguous()

    def fingerprint(self) -> int:
        """A checksum of the number of tokens and of up to 2**22 of each stream: equal corpora have equal ones."""
        value = zlib.crc32(str([len(stream) for stream in self._streams]).encode())
        for stream in self._streams:
            value = zlib.crc32(np.ascontiguousarray(stream[:: max(1, len(stream) >> 22)]).tobytes(), value)
        return value


def open_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    """The corpus at config.path: a text file or a folder of them as bytes, a token shard or a folder of them.

    Raises DataError for a path that is missing, unreadable, empty, or not what its name says."""
    try:
        streams, names = _streams(config.path)
    except OSError as error:
        raise DataError(f"cannot read {error.filename or config.path}: {error.strerror or error}") from error
    if not any(len(stream) for stream in streams):
        raise DataError(
            f"{config.path} holds no tokens; give a text file, a folder of text, or .bin or .npy token shards"
        )
    return Corpus(streams, names, config, vocab_size)


def _streams(path_or_stdlib: str) -> tuple[list[Tokens], list[str]]:
    if path_or_stdlib == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return [_text(path for path in _files(root, _NOT_LIBRARY) if path.suffix == ".py")], [str(root)]
    root = Path(path_or_stdlib)
    if not root.exists():
        raise DataError(f"there is no data at {root}; data.path is a file, a folder, or 'stdlib'")
    files = list(_files(root, set())) if root.is_dir() else [root]
    shards = sorted(path for path in files if path.suffix in (".bin", ".npy"))
    if shards:
        return [_open_shard(path) for path in shards], [str(path) for path in shards]
    return [_text(files)], [str(root)]


def _files(root: Path, skip: set[str]) -> Iterator[Path]:
    """Files below root but hidden ones, ordered by a hash of their names, so that the held-out end is of every kind."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    relative = {path: path.relative_to(root).as_posix() for path in found}
    return iter(sorted(found, key=lambda path: (zlib.crc32(relative[path].encode()), relative[path])))


def _text(files: Iterator[Path] | Sequence[Path]) -> Tokens:
    """The bytes of the files that look like text (no NUL in their first 4 KiB), one after the other."""
    contents = [path.read_bytes() for path in files]
    return np.frombuffer(b"\n".join(text for text in contents if b"\0" not in text[:4096]), dtype=np.uint8)


def write_token_shard(path: Path, tokens: Tokens) -> None:
    """Writes tokens, uint16 or uint32 [n], as a .bin shard that open_corpus() maps into memory."""
    if tokens.dtype not in (np.uint16, np.uint32) or tokens.ndim != 1:
        raise DataError(f"tokens are {tokens.dtype} {list(tokens.shape)}; a shard holds uint16 or uint32 [n]")
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, tokens.itemsize, 0, len(tokens)))
        file.write(tokens.astype(tokens.dtype.newbyteorder("<")).tobytes())


def _open_shard(path: Path) -> Tokens:
    if path.suffix == ".npy":
        try:
            tokens: Tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"{path} is not a readable .npy file: {error}") from error
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(f"{path} holds {tokens.dtype} {list(tokens.shape)}; a token shard is integers [n]")
        return tokens
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or header[:8] != _MAGIC:
        raise DataError(
            f"{path} does not begin with a token shard's header; write it with training.data.write_token_shard"
        )
    _, itemsize, _, n_tokens = _HEADER.unpack(header)
    expected = _HEADER.size + itemsize * n_tokens
    if itemsize not in (2, 4) or path.stat().st_size != expected:
        raise DataError(
            f"{path} says {n_tokens} tokens of {itemsize} bytes, {expected} bytes in all; it has {path.stat().st_size}"
        )
    if n_tokens == 0:
        return np.empty(0, dtype=np.uint16)
    return np.memmap(path, dtype=f"<u{itemsize}", mode="r", offset=_HEADER.size, shape=(n_tokens,))
