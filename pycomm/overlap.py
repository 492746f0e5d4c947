"""Gradients summed over a group bucket by bucket, while backward still computes the rest.

    buckets = GradientBuckets(model.parameters(), group)
    with buckets.no_sync():
        loss(first_micro_batch).backward()       # adds up locally
    loss(last_micro_batch).backward()            # each bucket is reduced as soon as its last gradient is there
    buckets.wait()
    buckets.gradient(parameter)                  # a view of the bucket, on every rank the same bits

Buckets are filled in the reverse order of the parameters, which is about the order in which backward reaches them, and
are started strictly in that order, so every rank starts the same collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pycomm.errors import InvalidArgument


class AllReduceGroup(Protocol):
    """What the buckets need of a group: pycomm.Group, or anything that wraps one. A wire and its residual are given to
    it only where the buckets have one."""

    @property
    def size(self) -> int: ...
    def all_reduce(
        self,
        x: Tensor,
        op: str = "sum",
        *,
        async_op: bool = False,
        wire: str | None = None,
        wire_residual: Tensor | None = None,
    ) -> Any: ...


@dataclass(eq=False)
class _Bucket:
    flat: Tensor
    parameters: list[Tensor]
    residual: Tensor | None  # like flat: what coding lost in the last step, where that is fed back
    missing: int = 0  # gradients that the synchronising backward has not brought yet
    work: Any = None  # of the collective in flight


@dataclass(eq=False)
class _Slot:
    bucket: _Bucket
    gradient: Tensor  # view of bucket.flat in the parameter's shape
    written: bool = field(default=False)  # since the last wait()


class GradientBuckets:
    """Takes each parameter's gradient out of backward, adds it to a flat bucket of dtype, and reduces full buckets.

    The parameters' own .grad is None again after each backward: a micro-batch in bf16 adds up in fp32, and nothing is
    held twice. Not thread safe; several instances may share one backward.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        group: AllReduceGroup,
        *,
        bucket_nbytes: int = 4 << 20,
        dtype: torch.dtype = torch.float32,
        op: str = "sum",
        wire: str | None = None,
        error_feedback: bool = True,
    ) -> None:
        """parameters: leaves that require a gradient, in the order in which forward uses them, equal on every rank.
        A bucket holds at most bucket_nbytes, or one parameter. op, wire: as in Group.all_reduce. error_feedback: with a
        wire, what coding loses in a step is added to the next step's gradients, at the price of as much memory again;
        it needs dtype float32 and op sum or avg."""
        self._group = group
        self._op = op
        self._wire = wire
        self._feeds_back = wire is not None and error_feedback and group.size > 1
        if self._feeds_back and (dtype != torch.float32 or op not in ("sum", "avg")):
            raise InvalidArgument(
                f"error feedback takes float32 buckets and op sum or avg, got {dtype} and {op}; "
                "set error_feedback=False"
            )
        self._sync = True
        self._next = 0  # the bucket to start next
        self._buckets: list[_Bucket] = []
        self._slots: dict[Tensor, _Slot] = {}
        self._fill(list(parameters), bucket_nbytes // dtype.itemsize, dtype)
        self._reset()
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in self._slots]  # type: ignore[no-untyped-call]

    def _fill(self, parameters: list[Tensor], max_numel: int, dtype: torch.dtype) -> None:
        for index, parameter in enumerate(parameters):
            if not (parameter.is_leaf and parameter.requires_grad):
                raise InvalidArgument(
                    f"parameter {index} {list(parameter.shape)} is not a leaf that requires a gradient"
                )
            if any(parameter is other for other in parameters[:index]):
                raise InvalidArgument(f"parameter {index} {list(parameter.shape)} is given twice; give each one once")
        planned: list[list[Tensor]] = []
        filled = 0
        for parameter in reversed(parameters):
            if not planned or filled + parameter.numel() > max_numel:
                planned.append([])
                filled = 0
            planned[-1].append(parameter)
            filled += parameter.numel()
        for members in planned:
            flat = torch.zeros(sum(p.numel() for p in members), dtype=dtype)
            bucket = _Bucket(flat, members, torch.zeros_like(flat) if self._feeds_back else None)
            self._buckets.append(bucket)
            for parameter, piece in zip(members, torch.split(bucket.flat, [p.numel() for p in members]), strict=True):
                self._slots[parameter] = _Slot(bucket, piece.view(parameter.shape))

    @property
    def flats(self) -> list[Tensor]:
        """The buckets' memory, each 1-D; together they hold every gradient once. For norms and scaling."""
        return [bucket.flat for bucket in self._buckets]

    def gradient(self, parameter: Tensor) -> Tensor:
        """The parameter's summed gradient, a view that stays the same memory from step to step."""
        return self._slots[parameter].gradient

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, backward only adds up: for all micro-batches of a step but the last."""
        self._sync = False
        try:
            yield
        finally:
            self._sync = True

    def wait(self) -> None:
        """Returns when every bucket is reduced; then gradient() holds the sums, until the next backward begins.

        A parameter that no backward of this step reached has gradient 0. Raises what the collectives raise."""
        for slot in self._slots.values():
            if not slot.written:
                slot.gradient.zero_()
        while self._next < len(self._buckets):
            self._start_next()
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
        self._reset()

    def close(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _reset(self) -> None:
        self._next = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
            bucket.work = None
        for slot in self._slots.values():
            slot.written = False

    def _take(self, parameter: Tensor) -> None:
        slot = self._slots[parameter]
        bucket = slot.bucket
        if bucket.missing == 0:
            raise RuntimeError(
                f"a gradient {list(parameter.shape)} came for a bucket that is already being reduced; call wait() "
                "after each synchronising backward, or run the earlier ones in no_sync()"
            )
        assert parameter.grad is not None
        if slot.written:
            slot.gradient.add_(parameter.grad)
        else:
            slot.gradient.copy_(parameter.grad)
            slot.written = True
        parameter.grad = None
        if not self._sync:
            return
        bucket.missing -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        if self._group.size == 1:
            return
        if bucket.residual is not None:
            bucket.flat.add_(bucket.residual)
        coding: dict[str, Any] = {} if self._wire is None else {"wire": self._wire, "wire_residual": bucket.residual}
        bucket.work = self._group.all_reduce(bucket.flat, self._op, async_op=True, **coding)
