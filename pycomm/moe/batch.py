"""One batch as a rank sees it: everybody's tokens and the places of their slots, and what this rank's experts take."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from pycomm.errors import InvalidArgument
from pycomm.moe.cost import Dedup
from pycomm.moe.indices import Ints, inverse, run_bounds, starts_run
from pycomm.moe.placement import Geometry, Places
from pycomm.moe.tables import Cut, Layout


@dataclass(frozen=True)
class Request:
    """What a plan is made for: the exchange's settings."""

    owner: tuple[Any, ...]
    geometry: Geometry
    places: Places
    mode: Dedup
    layout: Layout
    n_chunks: int
    cut: Cut  # stages are of tokens (this rank's own or host's, then crossing by crossing), or of experts
    align: int
    max_tokens: int | None
    drop: bool


class Batch:
    """Tokens of all ranks, numbered by (source rank, token), and the places that their slots go to.

    place [N, K]: ascending, places.n for a slot that goes nowhere. home_*: this rank's slots by (token, place):
    home_token, the place, its rank, and home_weight, the index into the T*K weights."""

    def __init__(self, request: Request, everyone: Ints, n_tokens: tuple[int, ...]) -> None:
        self.geometry, self.places = request.geometry, request.places
        self.me, self.world = self.geometry.rank, self.geometry.size
        self.idx, self.n_tokens, self.top_k = everyone, n_tokens, everyone.shape[1]
        bounds = tuple(accumulate(n_tokens, initial=0))
        self.begin, self.end = bounds[self.me], bounds[self.me + 1]
        counts = np.array(n_tokens)
        self.source = np.repeat(np.arange(self.world), counts)
        self.token = np.arange(len(everyone)) - np.array(bounds[:-1])[self.source]
        self.rank_of, self.local_of = self.places.rank.numpy(), self.places.local.numpy()
        # Sorted together with the column, of which no more than 32 exist.
        place = self.places.of_experts(everyone, self.source + self.token).astype(np.int32)
        key: Ints = place * np.int32(32) + np.arange(self.top_k, dtype=np.int32)
        key.sort(axis=1)
        self.place, self.column = key >> 5, key & 31
        self.lost = int((self.place == self.places.n).sum()) if self.places.lost else 0
        if request.max_tokens is not None:
            self._keep_to_capacity(request.max_tokens, request.drop)
        own = self.place[self.begin : self.end]
        self.home_token, k = (own < self.places.n).nonzero()
        self.home_place = own[self.home_token, k]
        self.home_rank = self.rank_of[self.home_place]
        self.home_weight = self.home_token * self.top_k + self.column[self.begin : self.end][self.home_token, k]

    def _keep_to_capacity(self, max_tokens: int, drop: bool) -> None:
        flat = self.place.reshape(-1)
        order = flat.argsort(kind="stable")
        counts = np.bincount(flat, minlength=self.places.n + 1)
        position = np.empty(len(flat), np.int64)
        position[order] = np.arange(len(flat)) - (counts.cumsum() - counts)[flat[order]]
        over = (position >= max_tokens) & (flat < self.places.n)
        if not over.any():
            return
        if not drop:
            first = int(flat[over].min())
            raise InvalidArgument(
                f"expert {int(self.places.expert[first])} on rank {int(self.places.rank[first])} gets "
                f"{int(counts[first])} tokens, {int(over.sum())} slots too many in all; max_tokens is {max_tokens}; "
                f"raise it to {int(counts[:-1].max())}, or pass drop=True to leave them out and count them"
            )
        self.lost += int(over.sum())
        self.place = np.where(over.reshape(self.place.shape), self.places.n, self.place)
        again = self.place.argsort(-1, kind="stable")
        self.place = np.take_along_axis(self.place, again, -1)
        self.column = np.take_along_axis(self.column, again, -1)

    def slots_between(self, first: int, end: int) -> tuple[Ints, Ints]:
        """(token, k): the slots whose place is first .. end - 1, by token, then place; they are place[token, k]."""
        token, k = ((self.place >= first) & (self.place < end)).nonzero()
        return token, k


class Served:
    """What this rank's experts take. slot_*: its slots by (token, place); row_token, row_bounds: its tokens, and where
    each one's slots begin; slot_of_out, out_of_slot: where output rows and slots lie in each other's order;
    slot_weight: the index of each slot's weight among all ranks'."""

    def __init__(self, request: Request, batch: Batch) -> None:
        self.top_k = batch.top_k
        self.slot_token, k = batch.slots_between(*batch.places.of_rank(batch.me))
        self.slot_local = batch.local_of[batch.place[self.slot_token, k]]
        self.slot_weight = self.slot_token * self.top_k + batch.column[self.slot_token, k]
        first = starts_run(self.slot_token)
        self.slot_row = first.cumsum() - 1
        self.row_token = self.slot_token[first]
        self.row_bounds = run_bounds(first)
        n = len(self.slot_token)
        self.expert_counts = np.bincount(self.slot_local, minlength=batch.places.n_held[batch.me])
        padded = -(-self.expert_counts // request.align) * request.align
        self.expert_offsets = np.append(0, padded.cumsum())
        if request.layout == "rank":
            self.slot_of_out, self.out_of_slot = self.row_bounds[:-1], self.slot_row
        elif request.layout == "token":
            self.slot_of_out = self.out_of_slot = np.arange(n)
        else:
            order = self.slot_local.argsort(kind="stable")
            if request.align == 1:
                self.slot_of_out, self.out_of_slot = order, inverse(order)
                return
            local = self.slot_local[order]
            at = (self.expert_offsets[:-1] - self.expert_counts.cumsum() + self.expert_counts)[local] + np.arange(n)
            self.out_of_slot = np.empty(n, np.int64)
            self.out_of_slot[order] = at
            self.slot_of_out = np.full(self.expert_offsets[-1], -1)
            self.slot_of_out[at] = order

    def slots_of_rows(self) -> Ints:
        """[rows, K]: each row's slots, then -1."""
        table = np.full((len(self.row_token), self.top_k), -1)
        slots = np.arange(len(self.slot_row))
        table[self.slot_row, slots - self.row_bounds[self.slot_row]] = slots
        return table
