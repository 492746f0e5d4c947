"""Which parameters share a bucket, and in which order buckets start. Pure functions; every rank gets the same."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pycomm.errors import InvalidArgument

_FACTS = ("parameters", "elements", "shapes", "settings")


def pack(nbytes: Sequence[int], most: int, last: int) -> list[int]:
    """[n_buckets]: how many parameters each bucket takes, in order. nbytes: of each parameter's gradient, first ready
    first. A bucket holds at most `most` bytes, or one parameter; the last one, which nothing hides, at most `last`."""
    if not nbytes:
        return []
    tail, held = 1, nbytes[-1]
    while tail < len(nbytes) and held + nbytes[-1 - tail] <= last:
        held += nbytes[-1 - tail]
        tail += 1
    counts: list[int] = []
    filled = 0
    for size in nbytes[: len(nbytes) - tail]:
        if not counts or filled + size > most:
            counts.append(0)
            filled = 0
        counts[-1] += 1
        filled += size
    return [*counts, tail]


def require_leaves(parameters: Sequence[Tensor]) -> None:
    """Raises InvalidArgument for what can have no gradient in a bucket, naming it."""
    seen: set[int] = set()
    for index, parameter in enumerate(parameters):
        what = f"parameter {index} {list(parameter.shape)}"
        if not (parameter.is_leaf and parameter.requires_grad):
            raise InvalidArgument(f"{what} is not a leaf that requires a gradient")
        if id(parameter) in seen:
            raise InvalidArgument(f"{what} is given twice; give each one once")
        seen.add(id(parameter))
        if parameter.device != parameters[0].device:
            raise InvalidArgument(
                f"{what} is on {parameter.device}, parameter 0 on {parameters[0].device}; make buckets for each device"
            )


def require_alike(group: Any, parameters: Sequence[Tensor], settings: str) -> None:
    """Raises InvalidArgument on every rank where ranks have other parameters or settings than rank 0, naming the first
    such rank and what differs. One small all_gather."""
    shapes = ";".join(f"{list(p.shape)} {p.dtype}" for p in parameters)
    mine = [
        len(parameters),
        sum(p.numel() for p in parameters),
        zlib.crc32(shapes.encode()),
        zlib.crc32(settings.encode()),
    ]
    everyone = torch.empty((group.size, len(mine)), dtype=torch.int64)
    group.all_gather(everyone, torch.tensor([mine]))
    differing = (everyone != everyone[0]).any(1).nonzero().flatten().tolist()
    if not differing:
        return
    theirs, firsts = everyone[differing[0]].tolist(), everyone[0].tolist()
    at = next(at for at in range(len(mine)) if theirs[at] != firsts[at])
    counts = f" ({theirs[at]}, not {firsts[at]})" if at < 2 else ""
    raise InvalidArgument(
        f"rank {differing[0]} has other {_FACTS[at]}{counts} than rank 0; give every rank the same parameters in the "
        f"same order, and the same settings. This rank has {settings}"
    )


def agreed_order(group: Any, ready: Sequence[int], n: int) -> list[int]:
    """[n]: rank 0's order of readiness on every rank, with what never was ready last, in reverse. One broadcast."""
    known = set(ready)
    order = torch.tensor([*ready, *(index for index in reversed(range(n)) if index not in known)])
    if group.size > 1 and n:
        group.broadcast(order, 0)
    found: list[int] = order.tolist()
    return found
