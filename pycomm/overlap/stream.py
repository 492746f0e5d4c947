"""dispatch -> experts -> combine as a stream of chunks: while one is computed, others are on their way.

    stream = ExpertStream(ep, x, topk_idx, topk_weights)
    for chunk in stream:                                     # tokens that stay on their rank first
        chunk.output = my_experts(chunk.rows, chunk.expert_counts)
    y = stream.output                                        # as ep.combine(my_experts(...), ep.dispatch(...)), [T, H]

Of the exchange it needs dispatch() and combine() on some of the tokens, nothing else. They run on a thread of their own
in an order that is the same on every rank: all dispatches and then each chunk's combine, so that the link waits for no
product before it has sent all it can; in backward all combines, and then all dispatches. A token is whole in one chunk,
so its sum is that of an unsplit run.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from pycomm.errors import InvalidArgument
from pycomm.overlap import cost
from pycomm.overlap.stream_backward import Begin, End, Hold, Part, Record, Rows, without_graph

MAX_CHUNKS: Final = 4  # more gain less than products of fewer rows lose (benchmarks/overlap.py, stream)
CHUNK_LOSS: Final = 0.05  # of the link, to latency
CALLS: Final = 2  # collectives of a chunk's dispatch: sizes, then rows


class Exchange(Protocol):
    """What the stream needs: pycomm.moe.ExpertParallel. dispatch() gives a dataclass with rows and
    expert_counts, whose other tensors combine() may use."""

    @property
    def group(self) -> Any: ...
    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Any: ...
    def combine(self, expert_out: Tensor, dispatched: Any) -> Tensor: ...


@dataclass(eq=False)
class Chunk:
    """rows [n_received, H]: those of this rank's first expert, then of its second, ..; expert_counts of each.
    output: set by the loop's body, one row for each of rows."""

    index: int
    rows: Tensor
    expert_counts: Any
    dispatched: Any  # what dispatch() gave, rows without their gradient
    output: Tensor | None = None


class ExpertStream:
    """One batch of tokens. Iterated once, to the end; then output is there. All ranks together, with one n_chunks."""

    def __init__(
        self, ep: Exchange, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, *, n_chunks: int | str = "auto"
    ) -> None:
        """x [T, H], topk_idx [T, K] int64, topk_weights [T, K]; T may differ between ranks. n_chunks "auto": what the
        links' latency allows, by the rank with most tokens (one small all_reduce); 1 where overlapping would lose.
        Raises InvalidArgument before anything is sent where shapes do not fit."""
        if x.dim() != 2 or topk_idx.dim() != 2 or topk_idx.shape != topk_weights.shape or len(x) != len(topk_idx):
            raise InvalidArgument(
                f"x is {list(x.shape)}, topk_idx {list(topk_idx.shape)}, topk_weights {list(topk_weights.shape)}; "
                "they must be [T, H], [T, K] and [T, K]"
            )
        if n_chunks == "auto":
            n_chunks, self.why = _wanted(ep.group, x, topk_idx.shape[1])
        else:
            self.why = "as given"
        if not isinstance(n_chunks, int) or n_chunks < 1:
            raise InvalidArgument(f"n_chunks is {n_chunks!r}; give 1 or more, or 'auto'")
        self.n_chunks = n_chunks
        self._ep = ep
        self._x, self._weights = x, topk_weights
        order = _local_first(topk_idx, ep) if n_chunks > 1 else torch.arange(len(x))
        self._record = Record(order, [])
        self._topk_idx = topk_idx[order]
        self._output: Tensor | None = None
        self._begun = False

    @property
    def output(self) -> Tensor:
        """[T, H], after the loop."""
        if self._output is None:
            raise RuntimeError("the stream has no output before its loop has ended")
        return self._output

    def __iter__(self) -> Iterator[Chunk]:
        if self._begun:
            raise RuntimeError("a stream runs once; make another one")
        self._begun = True
        record, n = self._record, self.n_chunks
        grads = torch.is_grad_enabled() and (self._x.requires_grad or self._weights.requires_grad)
        tickets: tuple[Any, ...] = Begin.apply(record, n, self._x, self._weights) if grads else ()  # type: ignore[no-untyped-call]
        self._cut(grads)
        builds = torch.is_grad_enabled()
        held: list[Tensor] = []
        thread = ThreadPoolExecutor(1, thread_name_prefix="pycomm-stream")
        try:
            dispatches = [thread.submit(self._dispatch, part, builds) for part in record.parts]
            combines: list[Future[None]] = []
            for index, part in enumerate(record.parts):
                dispatches[index].result()
                rows = part.rows
                if grads and rows.requires_grad:
                    rows = Rows.apply(record, index, tickets[index])  # type: ignore[no-untyped-call]
                chunk = Chunk(index, rows, part.dispatched.expert_counts, part.dispatched)
                yield chunk
                out = self._checked(chunk)
                if builds and out.requires_grad:
                    part.out = out.detach().requires_grad_()
                    held.append(Hold.apply(record, index, out))  # type: ignore[no-untyped-call]
                else:
                    part.out = out.detach()
                combines.append(thread.submit(self._combine, part, builds))
            for work in combines:
                work.result()
        finally:
            thread.shutdown(wait=True, cancel_futures=True)
        y = torch.cat([part.y.detach() for part in record.parts])
        self._output = torch.empty_like(y).index_copy_(0, record.order, y)
        if held or grads:
            self._output = End.apply(record, self._output, *tickets[n:], *held)  # type: ignore[no-untyped-call]

    def _cut(self, grads: bool) -> None:
        """Tokens in chunks as even as they go, as leaves of their own graphs."""
        record, n = self._record, self.n_chunks
        x, weights = self._x.detach()[record.order], self._weights.detach()[record.order]
        pieces = zip(x.tensor_split(n), self._topk_idx.tensor_split(n), weights.tensor_split(n), strict=True)
        for rows, experts, weight in pieces:
            if grads:
                rows = rows.detach().requires_grad_(self._x.requires_grad)
                weight = weight.detach().requires_grad_(self._weights.requires_grad)
            record.parts.append(Part(rows, experts, weight))

    def _dispatch(self, part: Part, builds: bool) -> None:
        with torch.set_grad_enabled(builds):
            dispatched = self._ep.dispatch(part.x, part.topk_idx, part.weights)
            part.rows = dispatched.rows
            part.dispatched, part.kept, part.leaves = without_graph(dispatched)

    def _combine(self, part: Part, builds: bool) -> None:
        with torch.set_grad_enabled(builds):
            part.y = self._ep.combine(part.out, part.dispatched)

    @staticmethod
    def _checked(chunk: Chunk) -> Tensor:
        if chunk.output is None or chunk.output.dim() != 2 or len(chunk.output) != len(chunk.rows):
            got = "nothing" if chunk.output is None else str(list(chunk.output.shape))
            raise InvalidArgument(
                f"chunk {chunk.index} has {len(chunk.rows)} rows and {got} as output; set chunk.output in the loop, "
                "one row for each"
            )
        return chunk.output


def _local_first(topk_idx: Tensor, ep: Exchange) -> Tensor:
    """The order of tokens: those with the fewest experts on other ranks first, so that the first chunk, which nothing
    hides, is the lightest on the wire."""
    each = getattr(ep, "num_experts", 0) // ep.group.size
    if each == 0 or not len(topk_idx):
        return torch.arange(len(topk_idx))
    order: Tensor = (topk_idx // each != ep.group.rank).sum(1).argsort(stable=True)
    return order


def _wanted(group: Any, x: Tensor, top_k: int) -> tuple[int, str]:
    if group.size == 1:
        return 1, "one chunk: one rank has nobody to exchange with"
    spare = cost.spare_cores(group)
    if spare is not None and spare < 1:
        return 1, "one chunk: all ranks share one host whose cores compute, and copying needs one too"
    most = torch.tensor([x.numel() * top_k * x.itemsize])
    group.all_reduce(most, "max")
    nbytes = int(most)
    link = cost.predicted(group, "all_to_all", nbytes)
    wanted = int(nbytes / (CALLS * link.efficient_nbytes(CHUNK_LOSS)))
    if wanted < 2:
        return 1, f"one chunk: cut further it would lose more to latency than it hides; n bytes take {link}"
    return min(wanted, MAX_CHUNKS), f"chunks that lose {CHUNK_LOSS:.0%} of the link to latency; n bytes take {link}"
