"""Which tokens sequence number i of a run is: a function of the data, the seed and i alone.

A source's streams are cut into windows of seq_len tokens; the last val_fraction of them are held out. Training takes
the windows epoch by epoch, each epoch in another order, which depends on the seed and the epoch. Several sources take
turns: of each 4096 sequences, each source has its weight's share, in an order that depends on the seed. So a run goes
on from a number with the same windows, whatever ranks, micro-batches or restarts there are.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.config import DataConfig
from training.data.shards import Tokens
from training.data.streams import Stream, read_streams
from training.data.tokens import Tokenizer, open_tokenizer
from training.errors import ConfigError, DataError

_TURNS = 4096  # sequences in which sources have exactly their shares
_LOOKED_AT = 1 << 20  # tokens of a stream that are compared with the vocabulary at the start


class Batch(NamedTuple):
    """Each int64 [seq_len, B]. documents: equal within a document, None where attention may cross them."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None


class Source:
    """The windows of one path's streams: n_train to train on, then n_val held out."""

    def __init__(self, streams: Sequence[Stream], path: str, config: DataConfig) -> None:
        """Raises DataError where the streams are too short for one training and one held-out window."""
        self.streams, self.path = streams, path
        self._seq_len = config.seq_len
        counts = [max(0, (len(stream.tokens) - 1) // config.seq_len) for stream in streams]
        self._ends = np.cumsum(counts)
        self.n_tokens = sum(len(stream.tokens) for stream in streams)
        self.n_windows = int(self._ends[-1])
        self.n_val = max(1, round(self.n_windows * config.val_fraction))
        self.n_train = self.n_windows - self.n_val
        self._order: tuple[tuple[int, int], Tokens] | None = None
        if not self.n_tokens:
            raise DataError(f"{path} holds no tokens; give text, JSONL, or .bin or .npy token shards")
        if self.n_train < 1:
            raise DataError(
                f"{path} holds {self.n_tokens} tokens, {self.n_windows} windows of {config.seq_len}; training needs "
                "at least 2, one of them held out: give more data, or a smaller data.seq_len"
            )

    def at(self, window: int) -> tuple[Stream, int]:
        """The stream of a window, and where in it the window begins."""
        stream = int(np.searchsorted(self._ends, window, side="right"))
        before = int(self._ends[stream - 1]) if stream else 0
        return self.streams[stream], (window - before) * self._seq_len

    def train_window(self, number: int, key: int) -> int:
        """The window of this source's sequence `number`, under a seed's key."""
        epoch, index = divmod(number, self.n_train)
        if self._order is None or self._order[0] != (key, epoch):
            generator = np.random.Generator(np.random.Philox(key=[key, epoch]))
            self._order = ((key, epoch), generator.permutation(self.n_train))
        return int(self._order[1][index])


class Corpus:
    """Windows of one or several sources, numbered over all of them. train_window() is not thread safe."""

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], config: DataConfig, tokenizer: Tokenizer, vocab: int
    ) -> None:
        self._sources, self._config, self._vocab_size = sources, config, vocab
        self.tokenizer = tokenizer
        self._shares = np.array(weights) / sum(weights)
        self._ends = np.cumsum([source.n_windows for source in sources])
        self._turns: tuple[tuple[int, int], Tokens, Tokens] | None = None
        self._fingerprint: int | None = None
        self.name = ", ".join(source.path for source in sources)
        self.n_tokens = sum(source.n_tokens for source in sources)
        self.n_train = sum(source.n_train for source in sources)
        self.n_val = sum(source.n_val for source in sources)

    def require(self, global_batch: int, eval_sequences: int) -> None:
        """Raises DataError where a source has fewer windows than its part of one batch, or of one evaluation."""
        for source, share in zip(self._sources, self._shares, strict=True):
            for what, have, whole, key in (
                ("to train on", source.n_train, global_batch, "train.global_batch"),
                ("held out", source.n_val, eval_sequences, "train.eval_sequences"),
            ):
                need = int(np.ceil(whole * share - 1e-9))
                if have < need:
                    raise DataError(
                        f"{source.path} has {have} windows of {self._config.seq_len} tokens {what}, {key} asks for "
                        f"{need}; give more data or lower {key}"
                    )

    def _locate(self, window: int) -> tuple[Stream, int]:
        source = int(np.searchsorted(self._ends, window, side="right"))
        return self._sources[source].at(window - (int(self._ends[source - 1]) if source else 0))

    def tokens_at(self, window: int) -> Tokens:
        """int64 [seq_len + 1]: inputs, and targets one further. Raises DataError for a token outside the vocabulary."""
        stream, first = self._locate(window)
        tokens = stream.tokens[first : first + self._config.seq_len + 1].astype(np.int64)
        _check_vocabulary(tokens, stream, f"near position {first}", self._vocab_size)
        return tokens

    def documents_at(self, window: int) -> Tokens:
        """int64 [seq_len]: the document of each input."""
        stream, first = self._locate(window)
        return stream.documents(first, self._config.seq_len)

    def train_window(self, number: int, seed: int) -> int:
        """The window of sequence number `number` of the run with this seed."""
        if len(self._sources) == 1:
            return self._sources[0].train_window(number, seed)
        block, slot = divmod(number, _TURNS)
        if self._turns is None or self._turns[0] != (seed, block):
            counts = _apportion(_TURNS, self._shares)
            generator = np.random.Generator(np.random.Philox(key=[seed | 1 << 63, block]))
            turns = generator.permutation(np.repeat(np.arange(len(counts)), counts))
            nth = np.empty(_TURNS, np.int64)  # which of its source's sequences each slot is
            for source, count in enumerate(counts):
                nth[turns == source] = block * count + np.arange(count)
            self._turns = ((seed, block), turns, nth)
        source, nth_of_source = int(self._turns[1][slot]), int(self._turns[2][slot])
        window = self._sources[source].train_window(nth_of_source, seed | source << 40)
        return window + (int(self._ends[source - 1]) if source else 0)

    def eval_window(self, index: int, n_sequences: int) -> int:
        """Window `index` of n_sequences: each source's share of them, spread evenly over its held-out ones."""
        counts = _apportion(n_sequences, self._shares)
        source = int(np.searchsorted(np.cumsum(counts), index, side="right"))
        nth = index - sum(counts[:source])
        chosen = self._sources[source]
        window = chosen.n_train + nth * chosen.n_val // counts[source]
        return window + (int(self._ends[source - 1]) if source else 0)

    def batch(self, windows: Sequence[int]) -> Batch:
        both = torch.from_numpy(np.stack([self.tokens_at(window) for window in windows], axis=1))
        documents = None
        if self._config.document_mask:
            documents = torch.from_numpy(np.stack([self.documents_at(window) for window in windows], axis=1))
        return Batch(both[:-1].contiguous(), both[1:].contiguous(), documents)

    def fingerprint(self) -> int:
        """A checksum of the number of tokens and of up to 2**22 of each stream: equal corpora have equal ones."""
        if self._fingerprint is None:
            self._fingerprint = self._checksum()
        return self._fingerprint

    def _checksum(self) -> int:
        streams = [stream.tokens for source in self._sources for stream in source.streams]
        value = zlib.crc32(str([len(stream) for stream in streams]).encode())
        for stream in streams:
            value = zlib.crc32(np.ascontiguousarray(stream[:: max(1, len(stream) >> 22)]).tobytes(), value)
        return value


def _check_vocabulary(tokens: Tokens, stream: Stream, where: str, vocab_size: int) -> None:
    low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    if low < 0 or high >= vocab_size:
        token = high if high >= vocab_size else low
        raise DataError(
            f"{stream.name} holds token {token} {where}; model.vocab_size is {vocab_size}: "
            "use the vocabulary that the file was written with"
        )


def _apportion(n: int, shares: Tokens) -> list[int]:
    """n as whole numbers in proportion to shares, by largest remainders; a source that has a share has at least 1 of
    _TURNS, because weights below that are refused."""
    counts = np.floor(n * shares).astype(int)
    for index in np.argsort(counts - n * shares, kind="stable")[: n - int(counts.sum())]:
        counts[index] += 1
    return [int(count) for count in counts]


def open_corpus(config: DataConfig, vocab_size: int) -> Corpus:
    """The corpus at config.path, or of the paths in config.mix.

    Raises DataError for a path that is missing, unreadable, empty, or not what its name says, and for a vocabulary that
    is larger than the model's; ConfigError for weights that cannot be."""
    mix = config.mix or {config.path: 1.0}
    total = sum(mix.values())
    for path, weight in mix.items():
        if not (weight > 0 and weight * _TURNS >= total):
            raise ConfigError(
                f"data.mix gives {path} the weight {weight:g} of {total:g}; a weight is positive and at least "
                f"1/{_TURNS} of all"
            )
    tokenizer = open_tokenizer(config.tokenizer, config.end_of_document)
    if config.tokenizer != "bytes" and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{config.tokenizer} has {tokenizer.vocab_size} tokens, model.vocab_size is {vocab_size}; set it to at "
            f"least {tokenizer.vocab_size}, or train a smaller vocabulary"
        )
    sources = []
    for path in mix:
        try:
            source = Source(read_streams(path, config, tokenizer), path, config)
            for stream in source.streams:  # some of each, before a model is made; all of a window when it is read
                some = stream.tokens[:: 1 + len(stream.tokens) // _LOOKED_AT]
                _check_vocabulary(some, stream, "somewhere", vocab_size)
            sources.append(source)
        except OSError as error:
            raise DataError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
    return Corpus(sources, list(mix.values()), config, tokenizer, vocab_size)
