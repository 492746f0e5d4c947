"""Arithmetic of index arrays: numpy, since an operation on some thousand takes half of torch's time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycomm.moe.rows import Terms
from pycomm.moe.tables import Counts, Expansion

Ints = NDArray[Any]  # of integers, or truth values


def starts_run(*keys: Ints) -> Ints:
    """Where any of the keys differs from the one before it."""
    starts = np.zeros(len(keys[0]), bool)
    starts[:1] = True
    for key in keys:
        starts[1:] |= key[1:] != key[:-1]
    return starts


def run_bounds(starts: Ints) -> Ints:
    """Where runs begin, and the end of the last one."""
    return np.append(starts.nonzero()[0], len(starts))


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """starts[0], starts[0] + 1, .. lengths[0] of them, then those of starts[1], .."""
    ends = lengths.cumsum()
    indices: Ints = np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
    return indices


def inverse(order: Ints) -> Ints:
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    return position


def terms(source: Ints, rows: Ints, lengths: Ints, most: int) -> Terms:
    return Terms(tensor(source), tensor(rows), tensor(np.append(0, lengths.cumsum())), most)


def by_crossing(crossing: Ints, peer: Ints, n_crossings: int, n_peers: int) -> tuple[Ints, Counts]:
    """The order of items by (crossing, peer), and the counts of each."""
    key = crossing * n_peers + peer
    counts = np.bincount(key, minlength=n_crossings * n_peers).reshape(n_crossings, n_peers)
    return key.argsort(kind="stable"), tuple(tuple(row) for row in counts.tolist())


def by_stage(stage: Ints, source: Ints, rows: Ints, n_stages: int) -> tuple[Expansion, ...]:
    """Of output rows."""
    expansions = []
    for number in range(n_stages):
        to = (stage == number).nonzero()[0]
        expansions.append(Expansion(tensor(to), tensor(source[to]), tensor(rows[to])))
    return tuple(expansions)


def tensor(values: Ints) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int64))
