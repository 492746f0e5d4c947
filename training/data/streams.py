"""Files as token streams whose documents are known: text files, folders, JSONL and token shards."""

from __future__ import annotations

import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.config import DataConfig
from training.data.shards import SUFFIXES, Tokens, open_shard
from training.data.tokens import Tokenizer
from training.errors import DataError

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
_JSONL = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Stream:
    """Tokens [n] one after the other; name says where they are from. starts: where each document begins, int64; None
    where each end_of_document token (-1: none) ends one, itself included."""

    tokens: Tokens
    name: str
    starts: Tokens | None = None
    end_of_document: int = -1

    def documents(self, first: int, n: int) -> Tokens:
        """int64 [n], equal for tokens first, first + 1, .. of one document, and only for those."""
        if self.starts is not None:
            return np.searchsorted(self.starts, np.arange(first, first + n), side="right").astype(np.int64)
        ends = (self.tokens[first : first + n] == self.end_of_document).astype(np.int64)
        return np.cumsum(ends) - ends


def read_streams(path: str, config: DataConfig, tokenizer: Tokenizer) -> list[Stream]:
    """The streams at a path: one for each shard, or one for all documents. Raises DataError, OSError."""
    shards = _shards(path)
    if not shards:
        return [_joined(list(read_documents(path, config.text_field)), path, tokenizer)]
    if config.document_mask and config.end_of_document < 0:
        raise DataError(
            f"data.document_mask is set, but where documents end in {shards[0]} is not known; set data.end_of_document "
            "to the token that ends one"
        )
    return [Stream(open_shard(shard), str(shard), None, config.end_of_document) for shard in shards]


def read_documents(path: str, field: str) -> Iterator[tuple[str, bytes]]:
    """Where each document is from, and its bytes: a text file, or the string at `field` of a line of JSON."""
    for file in _files(path):
        if file.suffix in _JSONL:
            yield from _json_lines(file, field)
            continue
        content = file.read_bytes()
        if b"\0" not in content[:4096]:  # not text
            yield str(file), content


def _shards(path: str) -> list[Path]:
    return [] if path == "stdlib" else sorted(file for file in _files(path) if file.suffix in SUFFIXES)


def _files(path: str) -> list[Path]:
    """The files at a path; "stdlib": Python's own source."""
    if path == "stdlib":
        return [file for file in _below(Path(sysconfig.get_paths()["stdlib"]), _NOT_LIBRARY) if file.suffix == ".py"]
    root = Path(path)
    if not root.exists():
        raise DataError(f"there is no data at {root}; data.path is a file, a folder, or 'stdlib'")
    return _below(root, set()) if root.is_dir() else [root]


def _below(root: Path, skip: set[str]) -> list[Path]:
    """Files below root but hidden ones, ordered by a hash of their names, so that the held-out end is of every kind."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    relative = {path: path.relative_to(root).as_posix() for path in found}
    return sorted(found, key=lambda path: (zlib.crc32(relative[path].encode()), relative[path]))


def _json_lines(file: Path, field: str) -> Iterator[tuple[str, bytes]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: it is not JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise DataError(f"{where}: it has no string at {field!r}, but {keys or 'nothing'}; set data.text_field")
            yield where, record[field].encode()


def _joined(documents: Sequence[tuple[str, bytes]], path: str, tokenizer: Tokenizer) -> Stream:
    """All documents in one stream, the tokenizer's separator after each but the last."""
    encoded = tokenizer.encode(documents)
    separator = np.array(tokenizer.separator, dtype=encoded[0].dtype if encoded else np.uint8)
    pieces: list[Tokens] = []
    for tokens in encoded:
        pieces += [tokens, separator]
    starts = np.cumsum([0, *(len(tokens) + len(separator) for tokens in encoded[:-1])]).astype(np.int64)
    return Stream(np.concatenate(pieces[:-1]) if pieces else np.empty(0, np.uint8), path, starts)
