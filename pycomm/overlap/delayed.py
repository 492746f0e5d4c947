"""Weight gradients put off: backward computes what the layer below waits for, and the rest fills its waits.

    later = WeightGradients()
    y = later.linear(x, weight)              # as F.linear; its backward gives x its gradient at once
    loss(y).backward()                       # the weight's gradient is not computed yet
    later.fill(work)                         # .. but now, while an exchange is under way
    later.flush()                            # all that are left, before the optimizer's step

Source: Qi et al., Zero Bubble Pipeline Parallelism, arXiv:2401.10241 (the split of backward into B and W)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pycomm.errors import InvalidArgument

_TOGETHER_NBYTES = 1 << 20  # a call into autograd takes longer than computing a small gradient


class Pending(Protocol):
    """A Work."""

    def is_completed(self) -> bool: ...
    def wait(self) -> Any: ...


class WeightGradients:
    """A queue of weight gradients, first in first out. Not thread safe.

    together: products of one weight that wait at the same time become one gradient, added up in place in the order in
    which they came; for a weight that is used piece by piece (a stream's chunks), which would cost a pass over it for
    each piece. end_batch() says that a batch's products are all there: only then fill() computes their gradient, and
    those of the next batch become another, so that what fill() had time for changes no bit."""

    def __init__(self, *, together: bool = False) -> None:
        self._together = together
        self._queue: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()
        self._products: dict[Tensor, list[tuple[Tensor, Tensor]]] = {}  # of the batch that has not ended
        self._ended: set[Tensor] = set()  # leaves whose products of an earlier batch wait
        self._n_whole = 0  # how many of the queue, the oldest, will not change any more

    def __len__(self) -> int:
        return len(self._queue)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """F.linear of x [..., d_in] with weight [d_out, d_in] and bias [d_out], whose gradients are put off. Both must
        be leaves."""
        for name, leaf in (("weight", weight), ("bias", bias)):
            if leaf is not None and not leaf.is_leaf:
                raise InvalidArgument(f"the {name} is not a leaf: its gradient would have to go on at once")
        if x.shape[-1] != weight.shape[-1]:
            raise InvalidArgument(
                f"x is {list(x.shape)}, the weight {list(weight.shape)}: the last sizes must be equal"
            )
        if not torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        result: Tensor = _Linear.apply(x, weight.detach(), None if bias is None else bias.detach(), self, weight, bias)  # type: ignore[no-untyped-call]
        return result

    def put(self, leaf: Tensor, compute: Callable[[], Tensor]) -> None:
        """Puts off compute(), the gradient of a leaf."""
        self._queue.append((leaf, compute))

    def put_product(self, leaf: Tensor, rows: Tensor, x: Tensor) -> None:
        """Puts off rowsᵀ x, the gradient of a weight [d_out, d_in], of rows [n, d_out] and x [n, d_in]. Where that of
        an earlier batch still waits it is computed first, so that a weight's inputs of two batches are kept at most."""
        if not self._together:
            self.put(leaf, lambda: rows.T @ x)
            return
        while leaf in self._ended and self.run_one():
            pass
        if leaf in self._products:
            self._products[leaf].append((rows, x))
        else:
            products = self._products[leaf] = [(rows, x)]
            self.put(leaf, lambda: self._sum_of_products(leaf, products))

    def _sum_of_products(self, leaf: Tensor, products: list[tuple[Tensor, Tensor]]) -> Tensor:
        if self._products.get(leaf) is products:
            del self._products[leaf]
        (rows, x), *others = products
        total = rows.T @ x
        for rows, x in others:
            total.addmm_(rows.T, x)
        return total

    def end_batch(self) -> None:
        """All products of this batch are there (together)."""
        self._ended.update(self._products)
        self._products = {}
        self._n_whole = len(self._queue)

    def run_one(self) -> bool:
        """Computes the oldest and adds it to its leaf's .grad, with the leaf's hooks (GradientBuckets', say) as in
        backward; False where there is none."""
        if not self._queue:
            return False
        leaf, compute = self._pop()
        torch.autograd.backward((leaf,), (compute(),))
        return True

    def run_beside(self, work: Pending) -> None:
        """Computes what was put off, one gradient after another, until work is completed; does not wait for it."""
        while (self._n_whole if self._together else self._queue) and not work.is_completed():
            self.run_one()

    def fill(self, work: Pending) -> None:
        """Waits for work, computing what was put off meanwhile."""
        self.run_beside(work)
        work.wait()

    def _pop(self) -> tuple[Tensor, Callable[[], Tensor]]:
        leaf, compute = self._queue.popleft()
        if self._n_whole:
            self._n_whole -= 1
            self._ended.discard(leaf)
        return leaf, compute

    def flush(self) -> None:
        """Computes all that is left. Small gradients go to their leaves together, one of each leaf, in their order."""
        found: dict[Tensor, Tensor] = {}
        while self._queue:
            leaf, compute = self._pop()
            if leaf in found:
                _give(found)
            found[leaf] = compute()
            if sum(each.nbytes for each in found.values()) >= _TOGETHER_NBYTES:
                _give(found)
        _give(found)


def _give(found: dict[Tensor, Tensor]) -> None:
    """Adds each gradient to its leaf's .grad, and forgets them."""
    if found:
        torch.autograd.backward(tuple(found), tuple(found.values()))
        found.clear()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, later: WeightGradients, leaf: Tensor, bias_leaf: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.later, ctx.leaf, ctx.bias_leaf = later, leaf, bias_leaf
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        if ctx.leaf.requires_grad:
            ctx.later.put_product(ctx.leaf, rows, x.detach().flatten(0, -2))
        if ctx.bias_leaf is not None and ctx.bias_leaf.requires_grad:
            ctx.later.put(ctx.bias_leaf, lambda: rows.sum(0))
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None, None, None, None
