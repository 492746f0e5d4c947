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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pycomm.errors import InvalidArgument
from pycomm.explain import format_nbytes, format_s
from pycomm.overlap import cost
from pycomm.overlap.cost import LinkCost
from pycomm.overlap.ring import gathered, reduced

MAX_PIECES: Final = 8
PIECE_LOSS: Final = 0.1  # of the link, to latency
START_S: Final = 2e-5  # of the computing thread, to send and receive one more piece
MARGIN: Final = 0.95  # of the unsplit time that the split one must be predicted to stay below


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
    _require_product(x, weight, group, gathers=True)
    result: Tensor = _GatherMatmul.apply(x, weight, group, plan or MatmulPlan(1, "as called"))  # type: ignore[no-untyped-call]
    return result


def matmul_reduce_scatter(x: Tensor, weight: Tensor, group: RingGroup, plan: MatmulPlan | None = None) -> Tensor:
    """This rank's part of the sum over ranks of F.linear(x, weight): x [S, .., K], weight [N, K] to [S/n, .., N].

    Split, part r is added up in the order of ranks r+1, r+2, .., r, in x's type. plan: of plan_matmul_reduce_scatter();
    None takes one piece of each part. Every rank gives shapes whose results are equal, and one plan."""
    _require_product(x, weight, group, gathers=False)
    result: Tensor = _MatmulScatter.apply(x, weight, group, plan or MatmulPlan(1, "as called"))  # type: ignore[no-untyped-call]
    return result


def _require_product(x: Tensor, weight: Tensor, group: RingGroup, gathers: bool) -> None:
    if weight.dim() != 2 or x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        raise InvalidArgument(f"x is {list(x.shape)}, weight {list(weight.shape)}; they must be [S, .., K] and [N, K]")
    if x.dtype != weight.dtype:
        raise InvalidArgument(f"x is {x.dtype}, weight {weight.dtype}; give one type")
    if not gathers and x.shape[0] % group.size:
        raise InvalidArgument(
            f"x has {x.shape[0]} rows, which {group.size} ranks cannot share evenly; pad to a multiple of {group.size}"
        )


# The plan.


def plan_all_gather_matmul(
    x: Tensor, weight: Tensor, group: RingGroup, link: str | LinkCost = "predicted"
) -> MatmulPlan:
    """Whether all_gather_matmul of these shapes gains by overlapping, and with how many pieces. All ranks together, and
    they get the same plan: products are timed here, the link is as `link` says (GradientBuckets). Keep the plan for
    all calls of these shapes."""
    rows = torch.zeros((x.shape[0] * group.size, *x.shape[1:]), dtype=x.dtype)
    return _plan(group, "all_gather", rows, weight.detach(), rows.nbytes, link)


def plan_matmul_reduce_scatter(
    x: Tensor, weight: Tensor, group: RingGroup, link: str | LinkCost = "predicted"
) -> MatmulPlan:
    """As plan_all_gather_matmul(), for matmul_reduce_scatter."""
    nbytes = x.numel() // x.shape[-1] * weight.shape[0] * x.itemsize
    return _plan(group, "reduce_scatter", torch.zeros_like(x.detach()), weight.detach(), nbytes, link)


def _plan(
    group: RingGroup, collective: str, rows: Tensor, weight: Tensor, nbytes: int, link: str | LinkCost
) -> MatmulPlan:
    cost.require_source(link)
    n = group.size
    if n == 1:
        return MatmulPlan(0, "one rank has nothing to exchange")
    spare = cost.spare_cores(group)
    if spare is not None and spare < 1:
        return MatmulPlan(0, "runs unsplit: all ranks share one host whose cores compute, and copying needs one too")
    found = cost.found(group, link, collective, nbytes, lambda each: _run(group, collective, each))
    # Of a ring each rank sends n-1 parts, as of the collective, whose n-1 latencies are in found.latency_s.
    hop_s = found.latency_s / (n - 1) + START_S
    part_s = nbytes / (n - 1) / found.bytes_per_s
    n_pieces = max(1, min(MAX_PIECES, int(part_s * PIECE_LOSS / hop_s), rows.shape[0] // n))
    piece = rows[: max(1, rows.shape[0] // n // n_pieces)]
    times = torch.tensor([_time(lambda: F.linear(rows, weight)), _time(lambda: F.linear(piece, weight))])
    group.all_reduce(times, "max")
    whole_s, piece_s = times.tolist()
    unsplit_s = found.seconds(nbytes) + whole_s
    split_s = ring_s(n, n_pieces, piece_s, part_s / n_pieces + hop_s)
    facts = (
        f"{collective} of {format_nbytes(nbytes)} {format_s(found.seconds(nbytes))}, product {format_s(whole_s)} "
        f"({format_s(n * n_pieces * piece_s)} in {n * n_pieces} pieces): unsplit {format_s(unsplit_s)}, "
        f"split {format_s(split_s)}; {found.source}"
    )
    if split_s > MARGIN * unsplit_s:
        return MatmulPlan(0, f"runs unsplit, since overlapping would not gain: {facts}")
    return MatmulPlan(n_pieces, f"overlaps in {n_pieces} piece(s) a part: {facts}")


def ring_s(n_ranks: int, n_pieces: int, product_s: float, hop_s: float) -> float:
    """A ring of n_ranks parts in n_pieces each: all products and the last piece's way, or all ways and one product."""
    return max(n_ranks * n_pieces * product_s + hop_s, (n_ranks - 1) * n_pieces * hop_s + product_s)


def _run(group: RingGroup, collective: str, x: Tensor) -> None:
    each = x.numel() // group.size
    if collective == "all_gather":
        group.all_gather(x[: each * group.size], torch.zeros(each))
    else:
        group.reduce_scatter(torch.zeros(each), x[: each * group.size])


def _time(call: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        call()
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


def _gather_matmul(x: Tensor, weight: Tensor, group: RingGroup, n_pieces: int) -> tuple[Tensor, Tensor]:
    """(F.linear(all_gather(x), weight), all_gather(x)); weight [N, K]."""
    if n_pieces == 0 or group.size == 1:
        whole = x if group.size == 1 else _all_gather(x, group)
        return F.linear(whole, weight), whole
    whole = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    y = x.new_empty((*whole.shape[:-1], weight.shape[0]))
    for rows in gathered(whole, x, group, n_pieces):
        y[rows] = F.linear(whole[rows], weight)
    return y, whole


def _matmul_scatter(x: Tensor, weight: Tensor, group: RingGroup, n_pieces: int) -> Tensor:
    """reduce_scatter(F.linear(x, weight)); weight [N, K]."""
    if n_pieces == 0 or group.size == 1:
        y = F.linear(x, weight)
        return y if group.size == 1 else _reduce_scatter(y, group)
    output = x.new_empty((x.shape[0] // group.size, *x.shape[1:-1], weight.shape[0]))
    reduced(output, lambda rows: F.linear(x[rows], weight), group, n_pieces)
    return output


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """[N, K] of grad [S, .., N] and x [S, .., K]."""
    return grad.flatten(0, -2).T @ x.flatten(0, -2)


class _GatherMatmul(torch.autograd.Function):
    """Keeps this rank's part of x alone and gathers it again in backward, as sequence parallelism's memory needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: RingGroup, plan: MatmulPlan) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.plan = group, plan
        return _gather_matmul(x, weight, group, plan.n_pieces)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        group, plan = ctx.group, ctx.plan
        grad = grad.contiguous()
        again = None
        whole = x
        if ctx.needs_input_grad[1] and group.size > 1:  # arrives while the other product is computed
            whole = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
            again = group.all_gather(whole, x.contiguous(), async_op=True)
        of_x = _matmul_scatter(grad, weight.T, group, plan.n_pieces) if ctx.needs_input_grad[0] else None
        if again is not None:
            again.wait()
        return of_x, _weight_gradient(grad, whole) if ctx.needs_input_grad[1] else None, None, None


class _MatmulScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: RingGroup, plan: MatmulPlan) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.plan = group, plan
        return _matmul_scatter(x, weight, group, plan.n_pieces)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        of_x, whole = _gather_matmul(grad.contiguous(), weight.T, ctx.group, ctx.plan.n_pieces)
        return (
            of_x if ctx.needs_input_grad[0] else None,
            _weight_gradient(whole, x) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )
