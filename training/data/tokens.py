"""Tokens of text and text of tokens: bytes, or a byte-pair encoding by the `tokenizers` package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from training.data.shards import Tokens
from training.errors import ConfigError, DataError

END_OF_TEXT = "<|endoftext|>"  # GPT-2's, and that of a vocabulary trained here
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")  # how vocabularies call it


class Tokenizer(Protocol):
    vocab_size: int
    separator: tuple[int, ...]  # between two documents

    def encode(self, documents: Sequence[tuple[str, bytes]]) -> list[Tokens]:
        """The tokens of each document, given with where it is from. Raises DataError for one that is no text."""

    def decode(self, tokens: Sequence[int]) -> str: ...


class Bytes:
    """UTF-8's bytes as tokens; documents are separated by a line break."""

    vocab_size = 256
    separator: tuple[int, ...] = (ord("\n"),)

    def encode(self, documents: Sequence[tuple[str, bytes]]) -> list[Tokens]:
        return [np.frombuffer(content, dtype=np.uint8) for _, content in documents]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


class BytePairs:
    """A vocabulary in a tokenizer.json of Hugging Face's `tokenizers`."""

    def __init__(self, backend: Any, end_of_document: int) -> None:
        """backend: tokenizers.Tokenizer. end_of_document: the separating token; -1: what the vocabulary calls it."""
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size()
        known = [backend.token_to_id(name) for name in _ENDS]
        found = [end_of_document] if end_of_document >= 0 else [each for each in known if each is not None]
        self.separator: tuple[int, ...] = tuple(found[:1])

    def encode(self, documents: Sequence[tuple[str, bytes]]) -> list[Tokens]:
        texts = [as_text(where, content) for where, content in documents]
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        return [np.array(each.ids, dtype=dtype) for each in encoded]

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._backend.decode(list(tokens), skip_special_tokens=False)
        return text


def as_text(where: str, content: bytes) -> str:
    """content decoded. Raises DataError naming the place and line where it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{where}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; convert the file, or set "
            "data.tokenizer to 'bytes'"
        ) from error


def open_tokenizer(tokenizer: str, end_of_document: int) -> Tokenizer:
    """ "bytes", or the vocabulary in a tokenizer.json. Raises ConfigError, DataError for one that cannot be read, or
    that has no such end_of_document."""
    if tokenizer == "bytes":
        return Bytes()
    backend = _tokenizers()
    path = Path(tokenizer)
    if not path.is_file():
        raise DataError(
            f"there is no tokenizer at {path}; data.tokenizer is 'bytes' or a tokenizer.json, which "
            "`pycomm-train prepare` trains"
        )
    try:
        pairs = BytePairs(backend.Tokenizer.from_file(str(path)), end_of_document)
    except Exception as error:  # the package raises nothing narrower
        raise DataError(f"{path} is no tokenizer that `tokenizers` reads: {error}") from error
    if end_of_document >= pairs.vocab_size:
        raise ConfigError(
            f"data.end_of_document is {end_of_document}, {path} has {pairs.vocab_size} tokens; give one of them, or -1 "
            "for the one that the vocabulary calls so"
        )
    return pairs


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-level BPE (Radford et al., GPT-2) of vocab_size tokens, END_OF_TEXT among them, and writes it."""
    package = _tokenizers()
    if vocab_size < 257:
        raise ConfigError(f"model.vocab_size is {vocab_size}; a byte-level BPE has at least 257 tokens")
    backend = package.Tokenizer(package.models.BPE())
    backend.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    backend.save(str(path))


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            "data.tokenizer needs the package `tokenizers`: pip install 'pycomm[tokens]', or use 'bytes'"
        ) from error
    return tokenizers
