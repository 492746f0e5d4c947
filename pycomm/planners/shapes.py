"""The shapes planners are made of: transfers on ranks 0 .. n-1 that know no topology.

A gather shape carries chunk i from rank i to every other rank, a broadcast shape chunk 0 from rank 0 to all, a scatter
shape chunk i from rank 0 to rank i; each brings every chunk to every rank at most once, so `reverse` gives their
reductions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pycomm.schedule import Transfers, in_parallel, in_sequence, reverse, transfers, without_empty_rounds


def ring_gather(n: int) -> Transfers:
    """Each rank passes on to the next rank what it got last: n-1 rounds."""
    step, rank = np.mgrid[: n - 1, :n]
    return transfers(step, rank, (rank + 1) % n, (rank - step) % n)


def pairwise_gather(n: int) -> Transfers:
    """In round t each rank gives its own chunk to the rank t+1 further on: n-1 rounds, none waits for another."""
    step, rank = np.mgrid[: n - 1, :n]
    return transfers(step, rank, (rank + step + 1) % n, rank)


def halving_gather(n: int) -> Transfers:
    """Partners in two halves exchange all they hold, then each half goes on alone: ceil(log2 n) rounds.

    The far exchange comes first, while little is held, so most bytes stay between neighbours. Halves may differ by one:
    the rank without a partner gives its chunks to the last rank of the other half and needs none from there. Ranks send
    chunks in the order in which they got them: none waits for a later one, and reversed, what goes on comes first."""
    parts: list[Transfers] = []

    def meet(round: int, ranks: list[int], held: list[NDArray[np.int64]]) -> None:
        if len(ranks) < 2:
            return
        half = (len(ranks) + 1) // 2
        near, far = held[:half], held[half:]
        for i in range(len(far)):
            parts.append(transfers(round, ranks[i], ranks[half + i], near[i]))
            parts.append(transfers(round, ranks[half + i], ranks[i], far[i]))
        pairs = list(zip(near, far, strict=False))
        met_near = [np.concatenate(pair) for pair in pairs] + near[len(far) :]
        met_far = [np.concatenate(pair[::-1]) for pair in pairs]
        if len(near) > len(far):
            parts.append(transfers(round, ranks[half - 1], ranks[-1], near[-1]))
            met_far[-1] = np.concatenate([met_far[-1], near[-1]])
        meet(round + 1, ranks[:half], met_near)
        meet(round + 1, ranks[half:], met_far)

    meet(0, list(range(n)), [np.array([rank]) for rank in range(n)])
    return in_parallel(parts)


def doubling_reduce(n: int) -> Transfers:
    """Partners exchange and combine chunk 0, whole, at distances 1, 2, 4, ..: log2 n rounds to all ranks' sum on every
    rank. Ranks beyond a power of two give theirs to a partner first and get the sum last: two rounds more."""
    power = 1 << (n.bit_length() - 1)
    rank = np.arange(power)
    rounds = [transfers(0, rank, rank ^ (1 << bit), 0, True) for bit in range(power.bit_length() - 1)]
    fold = transfers(0, np.arange(power, n), np.arange(n - power), 0, True)
    return in_sequence(fold, *rounds, reverse(fold, reduce=False))


def chain_broadcast(n: int) -> Transfers:
    """Rank after rank; the engine's segments make it a pipeline: n-1 rounds, each rank sends once."""
    rank = np.arange(n - 1)
    return transfers(rank, rank, rank + 1, 0)


def tree_broadcast(n: int) -> Transfers:
    """Binomial tree: ceil(log2 n) rounds, the far half first."""
    round, first, half, _ = _halves(n)
    return transfers(round, first, half, 0)


def in_order_reduce(n: int, mirrored: bool = False) -> tuple[Transfers, int]:
    """Chunk 0 of all ranks combined up a binary tree, and the rank it ends on: each rank gets it from at most two and
    sends it once, 2 ceil(log2 n) rounds. Ranks stand in order (left subtree, rank, right subtree) and every second one
    is a leaf, in the mirrored tree of an even n the others: two trees, each for half of the data, load all ranks alike.

    Source: Sanders, Speck & Traff, Two-tree algorithms for full bandwidth broadcast, reduction and scan, Parallel
    Computing 35(12), 2009; for odd n they shift the second tree by one, which leaves one rank an inner node of both."""
    rows: list[tuple[int, int, int]] = []  # (depth, child, parent)
    parts = [(0, n, 0, -1)]
    root = 0
    while parts:
        first, count, depth, parent = parts.pop()
        left = (1 << (count.bit_length() - 1)) - 1
        middle = first + left
        if parent >= 0:
            rows.append((depth, middle, parent))
        else:
            root = middle
        parts += [(first, left, depth + 1, middle)] if left else []
        parts += [(middle + 1, count - left - 1, depth + 1, middle)] if count > left + 1 else []
    depths, child, parent_of = np.array(rows, np.int64).reshape(-1, 3).T
    round = 2 * (depths.max(initial=0) - depths) + (child > parent_of)
    if mirrored and n % 2:
        child, parent_of, root = (child + 1) % n, (parent_of + 1) % n, (root + 1) % n
    elif mirrored:
        child, parent_of, root = n - 1 - child, n - 1 - parent_of, n - 1 - root
    return without_empty_rounds(transfers(round, child, parent_of, 0, True)), root


def tree_scatter(n: int) -> Transfers:
    """Binomial tree, each message with all chunks of the subtree below it."""
    return in_parallel(transfers(round, first, half, np.arange(half, end)) for round, first, half, end in _halves(n).T)


def direct_scatter(n: int) -> Transfers:
    """Rank 0 gives each rank its chunk, all in one round."""
    rank = np.arange(1, n)
    return transfers(0, 0, rank, rank)


def _halves(n: int) -> NDArray[np.int64]:
    """[4, n-1]: (round, first, half, end) for each [first, end) split at half, from [0, n) down to single ranks."""
    splits: list[tuple[int, int, int, int]] = []
    parts = [(0, n)]
    round = 0
    while parts:
        open_parts = [(first, (first + end + 1) // 2, end) for first, end in parts if end - first > 1]
        splits += [(round, first, half, end) for first, half, end in open_parts]
        parts = [part for first, half, end in open_parts for part in ((first, half), (half, end))]
        round += 1
    return np.array(splits, np.int64).reshape(-1, 4).T
