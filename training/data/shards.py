"""Token shards: files of tokens that are mapped into memory, .bin with a header of ours, or .npy."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from training.errors import DataError

Tokens = np.ndarray[Any, np.dtype[Any]]

# Magic, bytes a token (2 or 4), 0, number of tokens; the tokens follow. All little endian.
_HEADER = struct.Struct("<8sIIQ")
_MAGIC = b"pycomtok"
SUFFIXES = (".bin", ".npy")


def write_token_shard(path: Path, tokens: Tokens) -> None:
    """Writes tokens, uint16 or uint32 [n], as a .bin shard that open_corpus() maps into memory."""
    if tokens.dtype not in (np.uint16, np.uint32) or tokens.ndim != 1:
        raise DataError(f"tokens are {tokens.dtype} {list(tokens.shape)}; a shard holds uint16 or uint32 [n]")
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, tokens.itemsize, 0, len(tokens)))
        file.write(tokens.astype(tokens.dtype.newbyteorder("<")).tobytes())


def open_shard(path: Path) -> Tokens:
    """The tokens of a shard, integers [n], mapped. Raises DataError for a file that is not what its name says."""
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
