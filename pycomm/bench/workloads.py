"""Beyond single collectives: the MoE exchange, a collective with computation beside it, messages of two ranks."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from pycomm.bench.buffers import Array
from pycomm.bench.cases import ALONE, COMPUTE, IN_PLACE, OUT_OF_PLACE, SERIAL, WINDOW, Case
from pycomm.bench.trials import Call, LocalTrial, Memory, Nanoseconds, TimedAlone, Trial, timed
from pycomm.moe import Dispatched, ExpertParallel, RowsGroup

_MATRIX = 64  # of the computation: its product takes some microseconds


class Calls(Protocol):
    """What the workloads need of a library whose ranks are this process."""

    name: str

    @property
    def rows_group(self) -> RowsGroup: ...

    def call(self, case: Case, x: torch.Tensor, y: torch.Tensor, placement: str, async_op: bool = False) -> Call: ...


def as_tensor(array: Array, case: Case) -> torch.Tensor:
    """The array's memory with the case's own type."""
    return torch.from_numpy(array).view(getattr(torch, case.dtype))


def local_trial(library: Calls, case: Case, placement: str, memory: Memory) -> Trial:
    """The trial of any case on CPU tensors."""
    if case.moe is not None:
        return MoeTrial(library.rows_group, case)
    if case.collective.startswith("overlap_"):
        return _overlap_trial(library, case, placement, memory)
    buffers = memory.buffers(placement)
    x, y = as_tensor(buffers.input, case), as_tensor(buffers.output, case)
    return LocalTrial(buffers, library.call(case, x, y, placement))


def _overlap_trial(library: Calls, case: Case, placement: str, memory: Memory) -> Trial:
    """The collective alone, as much computation alone, one after the other, or both at once: started, computed beside,
    waited for."""
    where = IN_PLACE if case.collective == "overlap_all_reduce" else OUT_OF_PLACE
    buffers = memory.buffers(where)
    x, y = as_tensor(buffers.input, case), as_tensor(buffers.output, case)
    alone = library.call(case, x, y, where)
    if placement == ALONE:
        return LocalTrial(buffers, alone)
    compute = memory.once(library.name, COMPUTE, lambda: _computation(float(np.median(timed(alone, 7)[2:]))))
    if placement == COMPUTE:
        return TimedAlone(compute)
    if placement == SERIAL:

        def one_after_the_other() -> None:
            compute()
            alone()

        return LocalTrial(buffers, one_after_the_other)
    start = library.call(case, x, y, where, async_op=True)

    def together() -> None:
        work = start()
        compute()
        work.wait()

    return LocalTrial(buffers, together)


def _computation(nanoseconds: float) -> Call:
    """Matrix products that take about so long on this rank, one at least."""
    left, right, product = (torch.ones(_MATRIX, _MATRIX) for _ in range(3))

    def one() -> None:
        torch.mm(left, right, out=product)

    n = max(1, round(nanoseconds / float(np.median(timed(one, 50)[10:]))))

    def compute() -> None:
        for _ in range(n):
            one()

    return compute


class MoeTrial:
    """Dispatch (with its exchange of sizes) or combine of one batch, each token to top_k experts drawn at random.

    The oracle draws every rank's tokens and experts again. Weights are powers of two that add up to 1 and expert e
    multiplies by e % 4 + 1, so that the sums are exact in every floating type."""

    def __init__(self, group: RowsGroup, case: Case) -> None:
        assert case.moe is not None
        self._case, self._moe, self._rank, self._size = case, case.moe, group.rank, group.size
        # Without deduplication every library moves the same rows.
        self._experts = ExpertParallel(group, self._moe.experts, dedup="none", chunks=1)
        self._x, self._topk = self._batch(self._rank)
        halves = torch.full((self._moe.top_k,), 0.5).cumprod(0)
        halves[-1:] = halves[-2:-1] if self._moe.top_k > 1 else 1.0
        self._weights = halves.repeat(len(self._x), 1)
        self._combines = case.collective == "moe_combine"
        self._dispatched = self._dispatch()
        self._outputs = self._run_experts(self._dispatched)

    def check(self) -> int | None:
        if self._combines:
            found = self._experts.combine(self._outputs, self._dispatched)
            factors = (self._weights * (self._topk % 4 + 1)).sum(1, keepdim=True)
            expected = (self._x.float() * factors).to(found.dtype)
        else:
            found = self._dispatch().rows
            expected = self._rows_expected()
        if found.shape != expected.shape:
            return max(found.numel(), expected.numel())
        return int((found != expected).sum())

    def block(self, n_calls: int, n_warmup: int) -> Nanoseconds:
        call: Call = self._dispatch
        if self._combines:
            call = lambda: self._experts.combine(self._outputs, self._dispatched)  # noqa: E731
        for _ in range(n_warmup):
            call()
        return timed(call, n_calls)

    def _dispatch(self) -> Dispatched:
        return self._experts.dispatch(self._x, self._topk, self._weights)

    def _batch(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A rank's tokens [T, H], whole numbers 1 to 7, and their experts [T, K]."""
        moe = self._moe
        n_tokens = self._case.numel // (moe.top_k * moe.hidden)
        random = torch.Generator().manual_seed(rank)
        first = torch.randint(moe.experts, (n_tokens, 1), generator=random)
        topk = (first + torch.arange(moe.top_k)) % moe.experts
        tokens = torch.randint(1, 8, (n_tokens, moe.hidden), generator=random)
        return tokens.to(getattr(torch, self._case.dtype)), topk

    def _local_experts(self) -> range:
        each = self._moe.experts // self._size
        return range(self._rank * each, (self._rank + 1) * each)

    def _run_experts(self, dispatched: Dispatched) -> torch.Tensor:
        factors = torch.tensor([expert % 4 + 1 for expert in self._local_experts()])
        counts = dispatched.expert_counts
        return dispatched.rows * factors.repeat_interleave(counts).unsqueeze(1).to(dispatched.rows.dtype)

    def _rows_expected(self) -> torch.Tensor:
        batches = [self._batch(rank) for rank in range(self._size)]
        return torch.cat([x[(topk == e).any(1)] for e in self._local_experts() for x, topk in batches])


class Messages(Protocol):
    """A library's point-to-point calls on tensors; isend and irecv return something to wait() for."""

    def send(self, x: torch.Tensor, peer: int) -> Any: ...
    def recv(self, x: torch.Tensor, peer: int) -> Any: ...
    def isend(self, x: torch.Tensor, peer: int) -> Any: ...
    def irecv(self, x: torch.Tensor, peer: int) -> Any: ...


def ring_call(rank: int, size: int, messages: Messages, x: torch.Tensor, y: torch.Tensor) -> Call:
    """nccl-tests' sendrecv: every rank sends to the next one and receives from the one before."""
    following, previous = (rank + 1) % size, (rank - 1) % size

    def call() -> None:
        sending = messages.isend(x, following)
        messages.recv(y, previous)
        sending.wait()

    return call


def pair_call(case: Case, rank: int, messages: Messages, x: torch.Tensor) -> Call:
    """latency: a message there and back. bandwidth: WINDOW messages in flight one way, then one element back."""
    assert case.pair is not None
    if rank not in case.pair:
        return lambda: None
    first, second = case.pair
    other = second if rank == first else first

    def ping() -> None:
        messages.send(x, other)
        messages.recv(x, other)

    def pong() -> None:
        messages.recv(x, other)
        messages.send(x, other)

    def give() -> None:
        for work in [messages.isend(x, other) for _ in range(WINDOW)]:
            work.wait()
        messages.recv(x[:1], other)

    def take() -> None:
        for work in [messages.irecv(x, other) for _ in range(WINDOW)]:
            work.wait()
        messages.send(x[:1], other)

    calls = {"latency": (ping, pong), "bandwidth": (give, take)}[case.collective]
    return calls[rank != first]
