"""What a gradient bucket is, what it needs of a group, and what a compression hook gets and gives (buckets.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


class Waits(Protocol):
    def wait(self) -> Any: ...


class BucketGroup(Protocol):
    """What the buckets need of a group: pycomm.Group, or anything that wraps one; all_gather, broadcast and explanation
    are called once. A wire and its residual are given only where the buckets have one."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_reduce(self, x: Tensor, op: str = "sum", **options: Any) -> Any: ...
    def reduce_scatter(self, output: Tensor, input: Tensor, op: str = "sum", **options: Any) -> Any: ...
    def all_gather(self, output: Tensor, input: Tensor) -> Any: ...
    def broadcast(self, x: Tensor, root: int = 0) -> Any: ...
    def explanation(self, op: str, nbytes: int) -> Any: ...


@dataclass(eq=False)
class Bucket:
    """What a compression hook gets. flat: 1-D, the gradients of `parameters`, one after another; index: the same bucket
    has the same from step to step."""

    index: int
    flat: Tensor
    parameters: list[Tensor]
    residual: Tensor | None = None  # like flat: what coding lost in the last step, where that is fed back
    missing: int = 0  # gradients that the synchronising backward has not brought yet
    work: Any = None  # of the collective in flight


Hook = Callable[[Bucket, BucketGroup], Waits]


class Landed:
    """A Work and what is to be done with its result, for hooks: wait() waits, then calls `then`."""

    def __init__(self, work: Waits, then: Callable[[], object]) -> None:
        self._work, self._then = work, then

    def wait(self) -> None:
        self._work.wait()
        self._then()


@dataclass(eq=False)
class Slot:
    index: int  # of the parameter
    gradient: Tensor  # in the parameter's shape; from the first wait() on a view of its bucket
    residual: Tensor | None = None  # the same, where coding's loss is fed back
    bucket: Bucket | None = None
    written: bool = field(default=False)  # since the last wait()
    counted: bool = field(default=False)  # as brought by the synchronising backward
