"""Sequence parallel products whose operand or result crosses the ranks piece by piece, while other pieces are computed.

    y = all_gather_matmul(x, weight, group)        # F.linear(all_gather(x), weight): [S/n, .., K] to [S, .., N]
    z = matmul_reduce_scatter(y, weight, group)    # reduce_scatter(F.linear(y, weight)): [S, .., K] to [S/n, .., N]

Each one's backward is the other one, so backward overlaps as forward does. Both go around a ring: a rank sends its own
part on and multiplies it while the next part arrives; a partial sum is added to and sent on. Parts are cut into pieces,
so that the first product need not wait for a whole part. Where overlapping would lose they run unsplit: MatmulPlan says
which, and why.

Source: Wang et al., Overlap Communication with Dependent Computation via Decomposition, ASPLOS 2023; the operators are
those of Korthikanti et al., arXiv:2205.05198, section 4.2.2.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pycomm import devices
from pycomm.errors import InvalidArgument
from pycomm.explain import format_nbytes, format_s
from pycomm.overlap import cost
from pycomm.overlap.cost import LinkCost
from pycomm.overlap.delayed import WeightGradients
from pycomm.overlap.ring import gathered, reduced
from pycomm.overlap.ring_time import RingTime


class RingGroup(Protocol):
    """What the products need of a group: pycomm.Group, or anything that wraps one."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_reduce(self, x: Tensor, op: str = "sum") -> Any: ...
    def all_gather(self, output: Tensor, input: Tensor, **options: Any) -> Any: ...
    def reduce_scatter(self, output: Tensor, input: Tensor, op: str = "sum", **options: Any) -> Any: ...
    def send(self, x: Tensor, dst: int, tag: int = 0, **options: Any) -> Any: ...
    def recv(self, x: Tensor, src: int | None = None, tag: int = 0, **options: Any) -> Any: ...
    def explanation(self, op: str, nbytes: int) -> Any: ...


@dataclass(frozen=True)
class MatmulPlan:
    """How one product runs. n_pieces: of each rank's part; 0: unsplit, the collective and then the product (or the
    other way round). why: for people."""

    n_pieces: int
    why: str


def all_gather_matmul(x: Tensor, weight: Tensor, group: RingGroup, plan: MatmulPlan | None = None) -> Tensor:
    """F.linear of all ranks' x, one after another, with weight: x [S/n, .., K], weight [N, K] to [S, .., N].

    Equal to the unsplit product, but for what a matrix product's rounding depends on its number of rows. plan: of
    plan_all_gather_matmul(); None takes one piece of each part. Every rank gives an x of one shape and one plan."""
    return all_gather_matmuls(x, [weight], group, plan)[0]


def all_gather_matmuls(
    x: Tensor,
    weights: Sequence[Tensor],
    group: RingGroup,
    plan: MatmulPlan | None = None,
    *,
    keep: bool = False,
    later: WeightGradients | None = None,
) -> tuple[Tensor, ...]:
    """all_gather_matmul() with several weights [N_i, K], for one gather: each [S, .., N_i].

    keep: the gathered x for the weights' gradients, n times as much memory, instead of gathering it again in backward.
    later: puts the weights' gradients off; the weights must be leaves then."""
    for weight in weights:
        _require_product(x, weight, group, later, gathers=True)
    plan = plan or MatmulPlan(1, "as called")
    result: tuple[Tensor, ...] = _GatherMatmul.apply(x, group, plan, keep, later, *weights)  # type: ignore[no-untyped-call]
    return result


def matmul_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    group: RingGroup,
    plan: MatmulPlan | None = None,
    *,
    later: WeightGradients | None = None,
) -> Tensor:
    """This rank's part of the sum over ranks of F.linear(x, weight): x [S, .., K], weight [N, K] to [S/n, .., N].

    Split, part r is added up in the order of ranks r+1, r+2, .., r, in x's type. plan: of plan_matmul_reduce_scatter();
    None takes one piece of each part. Every rank gives shapes whose results are equal, and one plan. later: as in
    all_gather_matmuls()."""
    _require_product(x, weight, group, later, gathers=False)
    plan = plan or MatmulPlan(1, "as called")
    result: Tensor = _MatmulScatter.apply(x, group, plan, later, weight)  # type: ignore[no-untyped-call]
    return result


def _require_product(x: Tensor, weight: Tensor, group: RingGroup, later: WeightGradients | None, gathers: bool) -> None:
    if weight.dim() != 2 or x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        raise InvalidArgument(f"x is {list(x.shape)}, weight {list(weight.shape)}; they must be [S, .., K] and [N, K]")
    if x.dtype != weight.dtype:
        raise InvalidArgument(f"x is {x.dtype}, weight {weight.dtype}; give one type")
    if later is not None and not weight.is_leaf:
        raise InvalidArgument("the weight is not a leaf: its gradient would have to go on at once")
    if not gathers and x.shape[0] % group.size:
        raise InvalidArgument(
            f"x has {x.shape[0]} rows, which {group.size} ranks cannot share evenly; pad to a multiple of {group.size}"
        )


# The plan.


def plan_all_gather_matmul(
    x: Tensor, weight: Tensor | Sequence[Tensor], group: RingGroup, link: str | LinkCost = "predicted"
) -> MatmulPlan:
    """Whether all_gather_matmul (of several weights: all_gather_matmuls) gains by overlapping, and with how many
    pieces. All ranks together, and they get the same plan: products are timed here (which waits for a device), the link
    is as `link` says (GradientBuckets). Keep the plan for all calls of these shapes."""
    weights = [weight] if isinstance(weight, Tensor) else weight
    rows = torch.zeros((x.shape[0] * group.size, *x.shape[1:]), dtype=x.dtype, device=x.device)
    return _plan(group, "all_gather", rows, weights, rows.nbytes, link)


def plan_matmul_reduce_scatter(
    x: Tensor, weight: Tensor, group: RingGroup, link: str | LinkCost = "predicted"
) -> MatmulPlan:
    """As plan_all_gather_matmul(), for matmul_reduce_scatter."""
    nbytes = x.numel() // x.shape[-1] * weight.shape[0] * x.itemsize
    return _plan(group, "reduce_scatter", torch.zeros_like(x.detach()), [weight], nbytes, link)


def _plan(
    group: RingGroup, collective: str, rows: Tensor, weights: Sequence[Tensor], nbytes: int, link: str | LinkCost
) -> MatmulPlan:
    cost.require_source(link)
    n = group.size
    if n == 1:
        return MatmulPlan(0, "one rank has nothing to exchange")
    spare = cost.spare_cores(group, rows)
    if spare is not None and spare < 1:
        return MatmulPlan(0, "runs unsplit: all ranks share one host whose cores compute, and copying needs one too")
    found = cost.found(group, link, collective, nbytes, lambda each: _run(group, collective, each), rows)
    ring = RingTime(n, rows.shape[0], nbytes, found)
    n_pieces = ring.n_pieces
    piece = rows[: max(1, rows.shape[0] // n // n_pieces)]
    times = torch.tensor([_time(rows, weights), _time(piece, weights)])
    group.all_reduce(times, "max")
    whole_s, piece_s = times.tolist()
    facts = (
        f"{collective} of {format_nbytes(nbytes)} {format_s(found.seconds(nbytes))}, product {format_s(whole_s)} "
        f"({format_s(n * n_pieces * piece_s)} in {n * n_pieces} pieces): unsplit {format_s(ring.unsplit_s(whole_s))}, "
        f"split {format_s(ring.split_s(n_pieces, piece_s))}; {found.source}"
    )
    if not ring.gains(n_pieces, piece_s, whole_s):
        return MatmulPlan(0, f"runs unsplit, since overlapping would not gain: {facts}")
    return MatmulPlan(n_pieces, f"overlaps in {n_pieces} piece(s) a part: {facts}")


def _run(group: RingGroup, collective: str, x: Tensor) -> None:
    each = x.numel() // group.size
    if collective == "all_gather":
        group.all_gather(x[: each * group.size], x.new_zeros(each))
    else:
        group.reduce_scatter(x.new_zeros(each), x[: each * group.size])


def _time(rows: Tensor, weights: Sequence[Tensor]) -> float:
    times = []
    for _ in range(4):
        devices.settle(rows)
        begin = time.perf_counter()
        for weight in weights:
            F.linear(rows, weight.detach())
        devices.settle(rows)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


# The products. Parts and pieces are along the first dimension.


def _all_gather(x: Tensor, group: RingGroup) -> Tensor:
    output = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    group.all_gather(output, x.contiguous())
    return output


def _reduce_scatter(x: Tensor, group: RingGroup) -> Tensor:
    output = x.new_empty((x.shape[0] // group.size, *x.shape[1:]))
    group.reduce_scatter(output, x.contiguous())
    return output


def _gather_matmul(
    x: Tensor, weights: Sequence[Tensor], group: RingGroup, n_pieces: int
) -> tuple[list[Tensor], Tensor]:
    """F.linear(all_gather(x), weight) of each, and all_gather(x); weights [N_i, K]."""
    if n_pieces == 0 or group.size == 1:
        whole = x if group.size == 1 else _all_gather(x, group)
        return [F.linear(whole, weight) for weight in weights], whole
    whole = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    ys = [x.new_empty((*whole.shape[:-1], weight.shape[0])) for weight in weights]
    for rows in gathered(whole, x, group, n_pieces):
        for y, weight in zip(ys, weights, strict=True):
            y[rows] = F.linear(whole[rows], weight)
    return ys, whole


def _matmul_scatter(xs: Sequence[Tensor], weights: Sequence[Tensor], group: RingGroup, n_pieces: int) -> Tensor:
    """reduce_scatter of the sum of F.linear(x, weight) over pairs; x [S, .., K_i], weight [N, K_i]."""

    def partial(rows: slice) -> Tensor:
        total = F.linear(xs[0][rows], weights[0])
        for x, weight in zip(xs[1:], weights[1:], strict=True):
            total += F.linear(x[rows], weight)
        return total

    n_rows = xs[0].shape[0]
    if n_pieces == 0 or group.size == 1:
        y = partial(slice(0, n_rows))
        return y if group.size == 1 else _reduce_scatter(y, group)
    output = xs[0].new_empty((n_rows // group.size, *xs[0].shape[1:-1], weights[0].shape[0]))
    reduced(output, partial, group, n_pieces)
    return output


def _weight_gradient(
    leaf: Tensor, needed: bool, grad: Tensor, x: Tensor, later: WeightGradients | None
) -> Tensor | None:
    """[N, K] of grad [S, .., N] and x [S, .., K], where it is needed; None also where it is put off."""
    if not needed:
        return None
    if later is None:
        return grad.flatten(0, -2).T @ x.flatten(0, -2)
    later.put(leaf, lambda: grad.flatten(0, -2).T @ x.detach().flatten(0, -2))
    return None


class _GatherMatmul(torch.autograd.Function):
    """Keeps this rank's part of x alone and gathers it again in backward, as sequence parallelism's memory needs, or
    the whole."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: RingGroup, plan: MatmulPlan, keep: bool, later: Any, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ys, whole = _gather_matmul(x, weights, group, plan.n_pieces)
        ctx.save_for_backward(whole if keep else x, *weights)
        ctx.group, ctx.plan, ctx.keep, ctx.later, ctx.leaves = group, plan, keep, later, weights
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        whole, *weights = ctx.saved_tensors
        group, needed = ctx.group, ctx.needs_input_grad
        grads = tuple(grad.contiguous() for grad in grads)
        again = None
        if any(needed[5:]) and not ctx.keep and group.size > 1:  # arrives while the other product is computed
            x, whole = whole, whole.new_empty((whole.shape[0] * group.size, *whole.shape[1:]))
            again = group.all_gather(whole, x.contiguous(), async_op=True)
        transposed = [weight.T for weight in weights]
        of_x = _matmul_scatter(grads, transposed, group, ctx.plan.n_pieces) if needed[0] else None
        if again is not None:
            again.wait()
        of_weights = [
            _weight_gradient(leaf, need, grad, whole, ctx.later)
            for leaf, need, grad in zip(ctx.leaves, needed[5:], grads, strict=True)
        ]
        return of_x, None, None, None, None, *of_weights


class _MatmulScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RingGroup, plan: MatmulPlan, later: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.plan, ctx.later, ctx.leaf = group, plan, later, weight
        return _matmul_scatter([x], [weight], group, plan.n_pieces)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, whole = _gather_matmul(grad.contiguous(), [weight.T], ctx.group, ctx.plan.n_pieces)
        of_weight = _weight_gradient(ctx.leaf, ctx.needs_input_grad[4], whole, x, ctx.later)
        return of_x[0] if ctx.needs_input_grad[0] else None, None, None, None, of_weight
