"""What named algorithms cost in a group: blocks of calls that take turns, so that a disturbance meets all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from pycomm.group import Group

BLOCKS: Final = 3

Buffers = Callable[[int], Any]  # an array of that many float32, on the host or on a device, that a group takes


def time_algorithms(
    group: Group,
    collective: str,
    nbytes: int,
    names: Sequence[str],
    calls: Sequence[int],
    n_blocks: int = BLOCKS,
    buffers: Buffers | None = None,
    settle: Callable[[], object] | None = None,
) -> list[float]:
    """Seconds of one call of each algorithm, the same on every rank; every rank calls it with the same.

    nbytes: of the longest buffer, in float32, a whole number of pieces for all ranks. calls: of each algorithm in a
    block. Blocks take turns; the slowest rank's time counts, and the median of the blocks. buffers: None for arrays of
    the host. settle: waits until what was called has ended, where calls return before that."""
    run = _runner(group, collective, nbytes, buffers or _of_host)
    blocks = np.empty((n_blocks, len(names)))
    for name in names:
        run(name)  # plans, and opens connections
    for block in blocks:
        for index, name in enumerate(names):
            if settle:
                settle()
            group.barrier()
            begin = time.perf_counter()
            for _ in range(calls[index]):
                run(name)
            if settle:
                settle()
            block[index] = (time.perf_counter() - begin) / calls[index]
    group.all_reduce(blocks, "max")
    return [float(seconds) for seconds in np.median(blocks, axis=0)]


def rounded(nbytes: int, n_ranks: int) -> int:
    """At least nbytes, in equal pieces of float32 for all ranks."""
    return -(-nbytes // (4 * n_ranks)) * 4 * n_ranks


def slowest(group: Group, seconds: float) -> float:
    """Of all ranks; every rank calls it."""
    value = np.array([seconds])
    group.all_reduce(value, "max")
    return float(value[0])


def _of_host(numel: int) -> Any:
    return np.zeros(numel, np.float32)


def _runner(group: Group, collective: str, nbytes: int, buffers: Buffers) -> Callable[[str], object]:
    """Runs one call of a collective whose longest buffer has nbytes, by a named algorithm, root 0."""
    whole = buffers(nbytes // 4)
    other = buffers(nbytes // 4)
    piece = buffers(nbytes // 4 // group.size)
    at_root = whole if group.rank == 0 else None
    calls: dict[str, Callable[[str], object]] = {
        "all_reduce": lambda name: group.all_reduce(whole, algorithm=name),
        "reduce_scatter": lambda name: group.reduce_scatter(piece, whole, algorithm=name),
        "all_gather": lambda name: group.all_gather(whole, piece, algorithm=name),
        "broadcast": lambda name: group.broadcast(whole, algorithm=name),
        "reduce": lambda name: group.reduce(whole, algorithm=name),
        "gather": lambda name: group.gather(at_root, piece, algorithm=name),
        "scatter": lambda name: group.scatter(piece, at_root, algorithm=name),
        "all_to_all": lambda name: group.all_to_all(other, whole, algorithm=name),
    }
    return calls[collective]
