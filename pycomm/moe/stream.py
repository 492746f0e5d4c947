"""dispatch -> experts -> combine as a stream of chunks: while one is computed, others are on their way.

    stream = ep.stream(x, topk_idx, topk_weights)
    for chunk in stream:
        chunk.output = my_experts(chunk.rows.split(chunk.sizes))
    y = stream.output                                        # [T, H]

A chunk is a stage of the plan (plan.py). All dispatches start before the first chunk, each combine when the last
chunk that it needs is computed; the engine moves them while Python computes. In backward the chunks come the other way
round: all of combine's backward starts at once, and each of dispatch's when its chunk's gradient is there. A token's
outputs are added up in the order of an unsplit run, so y has its bits where the experts' products do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pycomm import devices
from pycomm.errors import InvalidArgument
from pycomm.moe.movement import Arriving, Movement
from pycomm.moe.planning import Planned
from pycomm.moe.rows import empty_rows, spread_rows
from pycomm.moe.tables import ExchangePlan
from pycomm.moe.transport import Reducing


class Later(Protocol):
    """What puts off gradients until flush(): pycomm.overlap.WeightGradients."""

    def end_batch(self) -> None: ...
    def run_beside(self, work: Any) -> None: ...
    def flush(self) -> None: ...


@dataclass(eq=False)
class Chunk:
    """rows [n, H]: those of the first of `experts`, then of the second, .., each in (source rank, token) order.
    experts: those of this rank, by their local number, that the chunk may have rows of; where experts are cut each is
    in one chunk alone. output: set by the loop's body, one row for each of rows, of the same type."""

    index: int
    rows: Tensor
    experts: range
    expert_counts: Tensor  # int64 [len(experts)]: rows of each
    sizes: tuple[int, ...]  # the same as numbers
    output: Tensor | None = None


class ExpertStream:
    """One batch of tokens. Iterated once, to the end; then output is there. All ranks together: one that leaves the
    loop, by an exception or early, breaks the group, and the others raise GroupClosed with its rank and chunk."""

    def __init__(
        self, moves: Movement, planned: Planned, x: Tensor, weights: Tensor, later: Later | None, flush: bool
    ) -> None:
        self._moves, self._x, self._weights = moves, x, weights
        self.plan, self.why, self._slot_weights = planned.plan, planned.why, planned.slot_weights
        self._later, self._flush = later, flush
        self._output: Tensor | None = None
        self._begun = False
        self._at = 0  # the chunk that the loop is in; their number where it has ended

    @property
    def n_chunks(self) -> int:
        """In how many parts rows cross; the loop has two chunks more where tokens are cut."""
        return self.plan.n_chunks

    @property
    def output(self) -> Tensor:
        """[T, H] in the outputs' type, after the loop."""
        if self._output is None:
            raise RuntimeError("the stream has no output before its loop has ended")
        return self._output

    def __iter__(self) -> Iterator[Chunk]:
        if self._begun:
            raise RuntimeError("a stream runs once; make another one")
        self._begun = True
        try:
            yield from self._chunks()
        except BaseException as error:
            if self._at == len(self.plan.crossing_of_stage):  # all has been exchanged: nobody waits for this rank
                raise
            what = f"failed in its stream, {type(error).__name__}: {error}"
            if isinstance(error, GeneratorExit):
                what = "left its stream's loop, by an exception there or early; see that rank's output for why"
            waits, n = self._moves.waits, len(self.plan.crossing_of_stage)
            waits.abandon(f"moe: rank {waits.group.rank} of {waits.group.size}, chunk {self._at + 1} of {n}: it {what}")
            raise

    def _chunks(self) -> Iterator[Chunk]:
        plan, moves, builds = self.plan, self._moves, torch.is_grad_enabled()
        record = _Record(moves, plan, self._x, self._weights, self._later, self._flush)
        tickets: tuple[Any, ...] = ()
        if builds:  # on every rank, so that all meet in backward
            anchor = torch.empty(0, requires_grad=True)
            tickets = _Begin.apply(record, self._x, self._weights, anchor)  # type: ignore[no-untyped-call]
        x, weights = self._x.detach(), self._weights.detach()
        held: list[Tensor] = []
        slot_weights = self._slot_weights
        arriving_weights = None if slot_weights is not None else moves.start_weights("stream, dispatch", plan, weights)
        record.arriving = moves.begin_expand("stream, dispatch", plan, plan.out, x, range(plan.n_chunks))
        record.fill(record.arriving, first=True)
        expert_out = empty_rows(moves.memory, x, plan.n_out)
        of_out: Tensor | None = None
        reducing: Reducing | None = None

        def summing() -> Reducing:
            nonlocal of_out
            of_slots = arriving_weights() if arriving_weights else slot_weights
            assert of_slots is not None
            of_out = of_slots[plan.slot_of_out]
            home = weights.flatten()[plan.home_weights]
            begun = moves.begin_reduce("stream, combine", plan, plan.back, expert_out, of_out, home)
            record.fill(begun)
            return begun

        for index, stage in enumerate(record.stages):
            with torch.no_grad():
                rows = record.arriving.stage(stage)
            if builds:
                rows = _Rows.apply(record, index, rows, tickets[index])  # type: ignore[no-untyped-call]
            experts = plan.stage_experts[stage]
            counts = plan.stage_counts[stage, experts.start : experts.stop]
            self._at = index
            sizes = plan.stage_sizes[stage][experts.start : experts.stop]
            chunk = Chunk(index, rows, experts, counts, sizes)
            yield chunk
            out = _checked(chunk)
            spread_rows(expert_out, out.detach(), plan.out.expansions[stage].to)
            if builds and out.requires_grad:
                held.append(_Hold.apply(record, index, out))  # type: ignore[no-untyped-call]
            if (crossing := plan.crossing_of_stage[stage]) is not None:
                reducing = reducing or summing()
                reducing.leave(crossing)
        record.arriving.finish()
        record.arriving = None
        reducing = reducing or summing()
        y = reducing.finish()
        self._at = len(plan.crossing_of_stage)
        if builds:
            y = _End.apply(record, expert_out, of_out, y, *tickets[len(plan.crossing_of_stage) :], *held)  # type: ignore[no-untyped-call]
        self._output = y


def _in_turn(plan: ExchangePlan, later: Later | None) -> tuple[int, ...]:
    """The plan's stages in the order of the loop. Where weight gradients are put off they are what backward computes
    beside its last crossings, so that all that stays on the host may come last in the loop, and in backward first,
    beside the first crossings: T with backward 353 -> 335 ms (benchmarks/overlap.py, stream, the two in turns)."""
    stages = tuple(range(len(plan.crossing_of_stage)))
    return (*stages[1:], 0) if later is not None and plan.crossing_of_stage[0] is None else stages


def _checked(chunk: Chunk) -> Tensor:
    out, rows = chunk.output, chunk.rows
    if out is None or out.shape != rows.shape or out.dtype != rows.dtype:
        got = "nothing" if out is None else f"{out.dtype} {list(out.shape)}"
        raise InvalidArgument(
            f"chunk {chunk.index} has rows {rows.dtype} {list(rows.shape)} and {got} as output; set chunk.output in "
            "the loop, one row for each, of the same type"
        )
    return out


# Backward. Begin -> Rows (of each chunk) -> the caller's experts -> Hold (of each chunk) -> End. Between Begin, Rows,
# and between Hold and End, go tickets: 0-dim tensors that only order the graph. Autograd runs what was made last first,
# so that chunks come from the last to the first; the record holds every rank to that order.


class _Record:
    """One batch between its forward and the end of its backward. next: the chunk whose turn it is in backward."""

    def __init__(
        self, moves: Movement, plan: ExchangePlan, x: Tensor, weights: Tensor, later: Later | None, flush: bool
    ) -> None:
        self.moves, self.plan, self.weights_shape = moves, plan, weights.shape
        self._later, self._flush, self._on_device = later, flush, devices.on_device(x)
        self.stages = _in_turn(plan, later if torch.is_grad_enabled() and plan.n_chunks else None)
        self.arriving: Arriving | None = None
        self.next = -1
        self._expanded: Tensor | None = None  # gradients of chunk `next`'s outputs

    def fill(self, crossings: Arriving | Reducing, *, first: bool = False) -> None:
        """Waits for the crossings compute what earlier batches put off. first: others are waited for after them; of a
        device, whose host learns late what is done, only the last waits do."""
        if self._later is not None and not (first and self._on_device):
            crossings.meanwhile(self._later.run_beside)

    def begin(self, grad: Tensor, expert_out: Tensor, weights: Tensor) -> None:
        plan, stage = self.plan, "backward of stream"
        self._expert_out, self._weights = expert_out, weights
        self._of_weights = torch.zeros_like(weights)
        self._of_rows = torch.zeros_like(expert_out)
        self.next = len(plan.crossing_of_stage) - 1
        order = [each for each in reversed(plan.crossing_of_stage) if each is not None]
        self.arriving = self.moves.begin_expand(f"{stage}, combine", plan, plan.back, grad.contiguous(), order)
        self.fill(self.arriving, first=True)
        self._reducing = self.moves.begin_reduce(f"{stage}, dispatch", plan, plan.out, self._of_rows, None, None)
        self.fill(self._reducing)

    def gradient_of_output(self, index: int) -> Tensor:
        self._come_to(index)
        return self._expand()

    def take(self, index: int, grad: Tensor | None) -> None:
        """The gradient of a chunk's rows; None where no expert's output depended on them."""
        self._come_to(index)
        self._expand()
        if grad is not None:
            spread_rows(self._of_rows, grad, self.plan.out.expansions[self.stages[index]].to)
        crossing = self.plan.crossing_of_stage[self.stages[index]]
        if crossing is not None:
            self._reducing.leave(crossing)
        self.next, self._expanded = index - 1, None

    def finish(self) -> tuple[Tensor, Tensor]:
        """The gradients of x and the weights."""
        self._come_to(-1)
        assert self.arriving is not None
        self.arriving.finish()
        slots = torch.empty_like(self._of_weights).index_copy_(0, self.plan.slot_of_out, self._of_weights)
        arriving = self.moves.start_back("backward of stream, dispatch", self.plan, slots)
        if self._later is not None:  # while those and the last sums cross
            self._later.end_batch()
            if self._flush:
                self._later.flush()
        x = self._reducing.finish()
        weights = arriving().view(self.weights_shape)
        del self.arriving, self._reducing, self._expert_out, self._weights, self._of_rows, self._of_weights
        return x, weights

    def _expand(self) -> Tensor:
        if self._expanded is None:
            assert self.arriving is not None
            stage = self.stages[self.next]
            self._expanded = self.arriving.stage_weighted(stage, self._weights, self._expert_out, self._of_weights)
        return self._expanded

    def _come_to(self, index: int) -> None:
        if index > self.next:
            raise RuntimeError(
                f"backward reached chunk {index} of a stream after chunk {self.next + 1}: its rows or output were used "
                "outside of its turn in the loop; use stream.output instead"
            )
        while self.next > index:
            self.take(self.next, None)


def _ticket(like: Tensor) -> Tensor:
    return like.new_zeros(())


class _Begin(torch.autograd.Function):
    """A ticket for each chunk's Rows, and one for End, so that backward comes here after all of them."""

    @staticmethod
    def forward(ctx: Any, record: _Record, x: Tensor, weights: Tensor, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.record = record
        record.moves.backwards.expect(ctx)
        return tuple(_ticket(x) for _ in range(len(record.plan.crossing_of_stage) + 1))

    @staticmethod
    def backward(ctx: Any, *tickets: Tensor) -> tuple[None, Tensor, Tensor, None]:
        with ctx.record.moves.backwards.reached(ctx):
            return None, *ctx.record.finish(), None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: _Record, index: int, rows: Tensor, ticket: Tensor) -> Tensor:
        ctx.record, ctx.index = record, index
        record.moves.backwards.expect(ctx)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor]:
        with ctx.record.moves.backwards.reached(ctx):
            ctx.record.take(ctx.index, grad)
        return None, None, None, _ticket(grad)


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: _Record, index: int, out: Tensor) -> Tensor:
        ctx.record, ctx.index = record, index
        record.moves.backwards.expect(ctx)
        return _ticket(out)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[None, None, Tensor]:
        with ctx.record.moves.backwards.reached(ctx):
            return None, None, ctx.record.gradient_of_output(ctx.index)


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, record: _Record, expert_out: Tensor, weights: Tensor, y: Tensor, *tickets: Tensor) -> Tensor:
        ctx.record, ctx.n = record, len(tickets)
        ctx.save_for_backward(expert_out, weights)
        record.moves.backwards.expect(ctx)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.record.moves.backwards.reached(ctx):
            # Read first: a checkpoint that runs forward again does so here, before this backward's own exchange begins.
            expert_out, weights = ctx.saved_tensors
            ctx.record.begin(grad, expert_out, weights)
        return None, None, None, None, *(_ticket(grad) for _ in range(ctx.n))
