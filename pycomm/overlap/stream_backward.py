"""The expert stream's backward (stream.py): pieces of a graph that a thread of the stream's own computes.

Begin -> Rows (of each chunk) -> the caller's experts -> Hold (of each chunk) -> End. Between Begin, Rows, and between
Hold and End, go tickets: 0-dim tensors that only order the graph. The gradients themselves are computed on the record's
thread: End asks for all combines, Hold waits for its own, Rows asks for its dispatch, Begin waits for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Part:
    """A chunk's tokens, and the pieces of its graph that the thread runs: leaves -> rows, and out -> y."""

    x: Tensor
    topk_idx: Tensor
    weights: Tensor
    dispatched: Any = None  # without its graph
    rows: Any = None
    kept: list[Tensor] = dataclasses.field(default_factory=list)  # what else of dispatch() combine() may use
    leaves: list[Tensor] = dataclasses.field(default_factory=list)  # the same without its graph
    out: Any = None
    y: Any = None


class Record:
    def __init__(self, order: Tensor, parts: list[Part]) -> None:
        self.order, self.parts = order, parts
        self._thread: ThreadPoolExecutor | None = None
        self.combines: dict[int, Future[Any]] = {}  # gradients of a chunk's output, then of its part.leaves
        self._dispatches: dict[int, Future[Any]] = {}
        self._of_rows: dict[int, Tensor | None] = {}
        self._next = -1  # dispatches go from the last chunk to the first, whichever gradient comes first

    def start_combines(self, grad: Tensor) -> None:
        grads = grad[self.order].tensor_split(len(self.parts))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pycomm-stream")
        self._next = len(self.parts) - 1
        for index in reversed(range(len(self.parts))):
            part = self.parts[index]
            self.combines[index] = self._thread.submit(_gradients, [part.y], [part.out, *part.leaves], [grads[index]])

    def bring(self, index: int, grad: Tensor | None) -> None:
        """The gradient of a chunk's rows; None where no expert's output depended on them."""
        assert self._thread is not None
        self._of_rows[index] = grad
        while self._next in self._of_rows:
            self._dispatches[self._next] = self._thread.submit(self._to_tokens, self._next)
            self._next -= 1

    def _to_tokens(self, index: int) -> tuple[Tensor | None, ...]:
        part, grad = self.parts[index], self._of_rows.pop(index)
        grads = [torch.zeros_like(part.rows) if grad is None else grad, *self.combines[index].result()[1:]]
        return _gradients([part.rows, *part.kept], [part.x, part.weights], grads)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The gradients of x and the weights."""
        for index in reversed(range(self._next + 1)):
            if index not in self._of_rows:
                self.bring(index, None)
        found = [self._dispatches[index].result() for index in range(len(self.parts))]
        assert self._thread is not None
        self._thread.shutdown()
        of_x = [_or_zeros(part.x, grads[0]) for part, grads in zip(self.parts, found, strict=True)]
        of_weights = [_or_zeros(part.weights, grads[1]) for part, grads in zip(self.parts, found, strict=True)]
        return self._in_order(of_x), self._in_order(of_weights)

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        found = torch.cat(parts)
        return torch.empty_like(found).index_copy_(0, self.order, found)


def _gradients(
    outputs: list[Tensor], inputs: list[Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Of the outputs with regard to each input, None for those that need none."""
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad and grad is not None]
    wanted = [each for each in inputs if each.requires_grad]
    if not pairs or not wanted:
        return (None,) * len(inputs)
    known, theirs = [out for out, _ in pairs], [grad for _, grad in pairs]
    found = iter(torch.autograd.grad(known, wanted, theirs, allow_unused=True))
    return tuple(next(found) if each.requires_grad else None for each in inputs)


def without_graph(dispatched: Any) -> tuple[Any, list[Tensor], list[Tensor]]:
    """(a copy of dispatched whose tensors are leaves, those that stood in it beside rows, the leaves instead)."""
    values = {field.name: getattr(dispatched, field.name) for field in dataclasses.fields(dispatched)}
    kept = {
        name: value
        for name, value in values.items()
        if name != "rows" and isinstance(value, Tensor) and value.requires_grad
    }
    leaves = {name: value.detach().requires_grad_() for name, value in kept.items()}
    copy = dataclasses.replace(dispatched, rows=dispatched.rows.detach(), **leaves)
    return copy, list(kept.values()), list(leaves.values())


def _or_zeros(like: Tensor, grad: Tensor | None) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _ticket(like: Tensor) -> Tensor:
    return like.new_zeros(())


class Begin(torch.autograd.Function):
    """A ticket for each chunk's Rows, and one for End, so that backward comes here after all of them."""

    @staticmethod
    def forward(ctx: Any, record: Record, n: int, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        ctx.record = record
        return tuple(_ticket(x) for _ in range(n + 1))

    @staticmethod
    def backward(ctx: Any, *tickets: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        return None, None, *ctx.record.finish()


class Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: Record, index: int, ticket: Tensor) -> Tensor:
        ctx.record, ctx.index = record, index
        rows: Tensor = record.parts[index].rows.detach()
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        ctx.record.bring(ctx.index, grad)
        return None, None, _ticket(grad)


class Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: Record, index: int, out: Tensor) -> Tensor:
        ctx.record, ctx.index = record, index
        return _ticket(out)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[None, None, Tensor | None]:
        return None, None, ctx.record.combines[ctx.index].result()[0]


class End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: Record, y: Tensor, *tickets: Tensor) -> Tensor:
        ctx.record, ctx.n = record, len(tickets)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.record.start_combines(grad)
        return None, None, *(_ticket(grad) for _ in range(ctx.n))
