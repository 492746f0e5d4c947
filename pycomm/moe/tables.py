"""What a plan holds: where each row of one batch goes and comes from. plan.py makes it, transport.py follows it.

Vocabulary: a *slot* is a (token, expert) pair, its expert in place order (placement.py); a *row* is a token that this
rank's experts need, whatever their number; an *item* is what travels: a slot without deduplication, else a row, through
hosts a token. An item *crosses* where it leaves its rank (its host with "host"), in one of n_chunks crossings. A
*stage* is a part of this rank's output rows that experts can work on by itself. All tables are int64."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from pycomm.moe.cost import Dedup
from pycomm.moe.rows import Terms

Layout = Literal["expert", "rank", "token"]
Cut = Literal["tokens", "experts"]
Counts = tuple[tuple[int, ...], ...]  # [crossing][peer]


@dataclass(frozen=True)
class Leg:
    """Rows that go from rank to rank, an all_to_all a crossing. index: the sender's, by crossing, then by peer."""

    index: Tensor
    sends: Counts
    receives: Counts

    @cached_property
    def send_bounds(self) -> tuple[int, ...]:
        return tuple(accumulate((sum(counts) for counts in self.sends), initial=0))

    @cached_property
    def receive_bounds(self) -> tuple[int, ...]:
        return tuple(accumulate((sum(counts) for counts in self.receives), initial=0))

    @cached_property
    def _places(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        return {}

    def places(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the sender's n rows, where each goes: places starts[i] .. starts[i + 1] - 1, of which place j is row to[j]
        of the rows themselves (buffer[j] 0) or of those that leave, in the order of index (1). (starts, buffer, to)"""
        if n not in self._places:
            every = torch.arange(n, device=self.index.device)
            rows, order = torch.cat([every, self.index]).sort(stable=True)
            starts = torch.searchsorted(rows, torch.arange(n + 1, device=rows.device))
            leaves = order >= n
            self._places[n] = starts, leaves.long(), torch.where(leaves, order - n, order)
        return self._places[n]


@dataclass(frozen=True)
class Expansion:
    """Of one stage: output row to[i] is row rows[i] of source source[i], zeros where that is -1. Sources straight from
    rank to rank: this rank's own rows, then those that came; through hosts what each rank of the host has of its own,
    then what each holds as a gateway."""

    to: Tensor
    source: Tensor
    rows: Tensor


@dataclass(frozen=True)
class OnHost:
    """What the ranks of a host do together where rows cross hosts once. By position among the host's ranks."""

    staged: tuple[int, ...]  # tokens of each
    arrived: tuple[int, ...]  # rows of other hosts that each holds as a gateway
    partials: tuple[int, ...]  # rows of each, its partial sums: of the host's own tokens, then crossing by crossing
    gateway: tuple[Terms, ...]  # by crossing: this rank's sums over the host's partial sums, for other hosts
    own: Terms  # likewise for its own tokens


@dataclass(frozen=True)
class Route:
    """The way there and, against it, the way back: expand() follows it forwards, reduce() backwards (transport.py)."""

    leg: Leg
    expansions: tuple[Expansion, ...]  # by stage
    leaving: tuple[Terms, ...]  # by crossing: this rank's sums over output rows that leave; unused in mode "none"
    leaving_rows: tuple[Tensor, ...]  # mode "none", by crossing: the output rows that leave as they are
    own: Terms  # sums over output rows that do not cross; unused in mode "none"
    home: tuple[Terms, ...]  # sums over what was there and what came back, the last gives the tokens
    on_host: OnHost | None


@dataclass(frozen=True)
class Batch:
    """A tensor as it was."""

    tensor: weakref.ref[Tensor]
    version: int

    def is_unchanged(self, tensor: Tensor) -> bool:
        return self.tensor() is tensor and tensor._version == self.version


@dataclass(frozen=True)
class ExchangePlan:
    """Where the rows of one batch go. It belongs to the ExpertParallel that made it, and to this topk_idx."""

    owner: tuple[Any, ...]  # what an exchange must have in common with the one that made it
    mode: Dedup
    layout: Layout
    n_chunks: int
    crossing_of_stage: tuple[int | None, ...]  # what has to arrive before the stage, and may leave after it
    topk_idx: Tensor  # [T, K] int64, on the CPU
    batch: Batch | None  # on a device: the tensor that topk_idx was read from
    expert_counts: Tensor  # [local experts] int64: slots of each
    expert_offsets: Tensor  # [local experts + 1] int64: where each one's rows begin in layout "expert", with padding
    sizes: tuple[int, ...]  # rows of each local expert, padding included: rows.split(sizes)
    stage_counts: Tensor  # [stages, local experts] int64: slots of each stage
    stage_sizes: tuple[tuple[int, ...], ...]  # the same as numbers
    stage_experts: tuple[range, ...]  # the local experts that a stage may have rows of
    dropped: int  # slots of all ranks that found no room or no expert
    n_slots: int  # of this rank's experts
    n_out: int  # rows that dispatch gives
    slot_of_out: Tensor  # [n_out]: -1 for padding; in layout "rank" that of the row's first slot
    slot_expert: Tensor  # [n_slots]: the local expert
    slot_of_row: Tensor  # [rows, K]: the row's slots, then -1; of layout "rank" alone
    slot_weights: Tensor  # [n_slots]: index into all ranks' weights, one rank after the other
    scalars: Leg  # one value a slot; index into the T*K weights
    home_weights: Tensor  # index into the T*K weights of this rank's own slots, by (token, place)
    out: Route  # dispatch, and its backward
    back: Route  # combine, and its backward; another where stages are experts: a token leaves after its last one
    one_host: bool  # there is one host, and every token of this rank has an expert: a host's sum is the token's

    def to(self, device: torch.device, batch: Tensor) -> ExchangePlan:
        """With its tables on the device, all in one copy that nobody waits for; `batch`, there, is its topk_idx."""
        if device.type == "cpu":
            return self
        tables: list[Tensor] = []

        def note(table: Tensor) -> Tensor:
            tables.append(table)
            return table

        of_host = dataclasses.replace(self, topk_idx=self.topk_idx[:0])
        _each_tensor(of_host, note)
        together = torch.cat([table.flatten() for table in tables])
        if device.type == "cuda" and torch.cuda.is_available():
            together = together.pin_memory()
        there = together.to(device, non_blocking=True)
        parts = iter(torch.split(there, [table.numel() for table in tables]))
        moved: ExchangePlan = _each_tensor(of_host, lambda table: next(parts).view(table.shape))
        return dataclasses.replace(moved, topk_idx=self.topk_idx, batch=Batch(weakref.ref(batch), batch._version))

    def is_of(self, topk_idx: Tensor) -> bool:
        """Whether topk_idx, of this shape, names the plan's experts. On a device it is read, and waited for, only where
        it is not the tensor that the plan was made from, unchanged since."""
        if self.batch is not None and self.batch.is_unchanged(topk_idx):
            return True
        return torch.equal(self.topk_idx, topk_idx.cpu())


def _each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """value with each int64 tensor in it changed, in a fixed order."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _each_tensor(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, tuple):
        return tuple(_each_tensor(each, change) for each in value)
    return value
