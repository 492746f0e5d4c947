"""Parts that go around a ring of ranks in pieces: as they arrive they are used, as they are made they are sent.

Messages carry tags that no program of a user's has, one for each direction of use; on a link they keep their order, so
one tag serves all pieces. Waits have the group's own deadline. On a device a piece's way out and the next one's way in
are one exchange() on the engine's stream, since NCCL's messages have no tag and the two ends of a link might wait for
each other; this host then waits for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Final, Protocol

from torch import Tensor

from pycomm import devices

_GATHER_TAG: Final = 0x6F7665726C6170
_REDUCE_TAG: Final = _GATHER_TAG + 1


class MessageGroup(Protocol):
    """exchange() is asked of it, or of the group that it wraps as `group`, for tensors on a device alone."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def send(self, x: Tensor, dst: int, tag: int = 0, **options: Any) -> Any: ...
    def recv(self, x: Tensor, src: int | None = None, tag: int = 0, **options: Any) -> Any: ...


def _pieces(part: int, n_rows: int, n_pieces: int) -> list[slice]:
    """Of the whole tensor: the rows of a rank's part, as evenly cut as they go."""
    n = max(1, min(n_pieces, n_rows))
    bounds = [part * n_rows + n_rows * at // n for at in range(n + 1)]
    return [slice(begin, end) for begin, end in pairwise(bounds)]


def gathered(whole: Tensor, own: Tensor, group: MessageGroup, n_pieces: int) -> Iterator[slice]:
    """Fills whole [n * S, ..] with every rank's own [S, ..], and yields each piece's rows as soon as they are there:
    this rank's first, then those of the rank before it, .. All ranks run it to its end."""
    size, n_rows = group.size, own.shape[0]
    following, previous = (group.rank + 1) % size, (group.rank - 1) % size
    parts = [_pieces((group.rank - step) % size, n_rows, n_pieces) for step in range(size)]
    if devices.on_device(own):
        yield from _gathered_on_device(whole, own, group, parts)
        return
    arriving = [[group.recv(whole[rows], previous, _GATHER_TAG, async_op=True) for rows in part] for part in parts[1:]]
    whole[group.rank * n_rows : (group.rank + 1) * n_rows] = own
    sending = [group.send(whole[rows], following, _GATHER_TAG, async_op=True) for rows in parts[0]]
    yield from parts[0]
    for step, part in enumerate(parts[1:], 1):
        for at, rows in enumerate(part):
            arriving[step - 1][at].wait()
            if step < size - 1:
                sending.append(group.send(whole[rows], following, _GATHER_TAG, async_op=True))
            yield rows
    for work in sending:
        work.wait()


def _gathered_on_device(whole: Tensor, own: Tensor, group: MessageGroup, parts: list[list[slice]]) -> Iterator[slice]:
    whole[parts[0][0].start : parts[0][-1].stop] = own
    arriving = [
        _exchange(group, whole[out], whole[rows])
        for before, part in pairwise(parts)
        for out, rows in zip(before, part, strict=True)
    ]
    yield from parts[0]
    for work, rows in zip(arriving, (rows for part in parts[1:] for rows in part), strict=True):
        work.wait()
        yield rows


def _exchange(group: MessageGroup, out: Tensor, into: Tensor) -> Any:
    """Begins to give the next rank `out` and to take `into` from the one before; all ranks in one order."""
    inner: Any = getattr(group, "group", group)
    following, previous = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    return inner.exchange([(out, following)], [(into, previous)], async_op=True)


def reduced(output: Tensor, partial: Callable[[slice], Tensor], group: MessageGroup, n_pieces: int) -> None:
    """output [S, ..]: the sum over ranks of their partial(rows) for this rank's rows of the whole [n * S, ..]. Each
    rank computes every piece once, its own part's last; a part is added up from the next rank on around the ring."""
    size, n_rows = group.size, output.shape[0]
    following, previous = (group.rank + 1) % size, (group.rank - 1) % size
    parts = [_pieces((group.rank - 1 - step) % size, n_rows, n_pieces) for step in range(size)]
    sums = [[output.new_empty((rows.stop - rows.start, *output.shape[1:])) for rows in part] for part in parts[1:]]
    together = devices.on_device(output)
    arriving: list[list[Any]] = [[] for _ in sums]
    if not together:
        arriving = [[group.recv(into, previous, _REDUCE_TAG, async_op=True) for into in part] for part in sums]
    sending = []
    for step, part in enumerate(parts):
        for at, rows in enumerate(part):
            value = partial(rows)
            if step:
                arriving[step - 1][at].wait()
                value = sums[step - 1][at].add_(value)
            if step == size - 1:
                output[rows.start - group.rank * n_rows : rows.stop - group.rank * n_rows] = value
            elif together:
                arriving[step].append(_exchange(group, value.contiguous(), sums[step][at]))
            else:
                sending.append(group.send(value.contiguous(), following, _REDUCE_TAG, async_op=True))
    for work in sending:
        work.wait()
