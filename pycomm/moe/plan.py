"""The plan of one batch: from every rank's topk_idx, which all ranks hold, where each row goes and comes from.

Vocabulary: a *slot* is a (token, expert) pair, its expert in place order (placement.py); a *row* is a token that this
rank's experts need, whatever their number; an *item* is what travels: a slot without deduplication, else a row. Tokens
of all ranks are numbered by (source rank, token). All tables are int64 on the CPU, and moved to the batch's device at
the end: reading topk_idx is the one time that the host waits for a device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pycomm.errors import InvalidArgument
from pycomm.moe.cost import Dedup
from pycomm.moe.placement import Geometry, Places
from pycomm.moe.rows import Terms

Layout = Literal["expert", "rank", "token"]
Ints = NDArray[Any]  # of int64, or truth values; numpy, since an operation of some thousand takes half of torch's time
Counts = tuple[tuple[int, ...], ...]  # [chunk][peer]


@dataclass(frozen=True)
class Leg:
    """Rows that go from rank to rank, one all_to_all a chunk. index: the sender's, chunk by chunk, peer by peer."""

    index: Tensor
    sends: Counts
    receives: Counts

    @cached_property
    def send_bounds(self) -> tuple[int, ...]:
        return _bounds([sum(counts) for counts in self.sends])

    @cached_property
    def receive_bounds(self) -> tuple[int, ...]:
        return _bounds([sum(counts) for counts in self.receives])


@dataclass(frozen=True)
class Expansion:
    """Of one chunk: output row to[i] is row rows[i] of source source[i], zeros where that is -1."""

    to: Tensor
    source: Tensor
    rows: Tensor


@dataclass(frozen=True)
class OnHost:
    """What the ranks of a host do together where rows cross hosts once. By position among the host's ranks."""

    staged: tuple[int, ...]  # tokens of each
    arrived: tuple[int, ...]  # rows of other hosts that each holds as a gateway
    partials: tuple[int, ...]  # rows of each, its partial sums
    gateway: tuple[Terms, ...]  # chunk by chunk: this rank's sums over the host's partial sums, for other hosts
    own: Terms  # likewise for its own tokens


@dataclass(frozen=True)
class ExchangePlan:
    """Where the rows of one batch go. It belongs to the ExpertParallel that made it, and to this topk_idx."""

    owner: tuple[Any, ...]  # what an exchange must have in common with the one that made it
    mode: Dedup
    layout: Layout
    n_chunks: int
    topk_idx: Tensor  # [T, K] int64
    expert_counts: Tensor  # [local experts] int64: slots of each
    expert_offsets: Tensor  # [local experts + 1] int64: where each one's rows begin in layout "expert", with padding
    sizes: tuple[int, ...]  # rows of each local expert, padding included: rows.split(sizes)
    dropped: int  # slots of all ranks that found no room or no expert
    n_slots: int  # of this rank's experts
    n_out: int  # rows that dispatch gives
    slot_of_out: Tensor  # [n_out]: -1 for padding; in layout "rank" that of the row's first slot
    slot_expert: Tensor  # [n_slots]: the local expert
    slot_row: Tensor  # [n_slots]: the row
    slot_of_row: Tensor  # [rows, K]: the row's slots, then -1
    scalars: Leg  # one value a slot; index into the T*K weights
    home_weights: Tensor  # index into the T*K weights of this rank's own slots, by (token, place)
    leg: Leg
    expansions: tuple[Expansion, ...]  # by chunk; of mode "host" the first is of the host's own tokens
    partials: tuple[Terms, ...]  # sums over output rows: this rank's rows, in the order that they leave in
    slots_leave: Tensor  # mode "none": output row of each slot in that order
    home: tuple[Terms, ...]  # sums on the way back, the last gives the tokens
    one_host: bool  # there is one host, and every token of this rank has an expert: a host's sum is the token's
    on_host: OnHost | None

    def to(self, device: torch.device) -> ExchangePlan:
        return self if device.type == "cpu" else _moved(self, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _moved(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    return value


@dataclass(frozen=True)
class Request:
    """What a plan is made for: the exchange's settings."""

    owner: tuple[Any, ...]
    geometry: Geometry
    places: Places
    n_local: int  # experts of this rank
    mode: Dedup
    layout: Layout
    n_chunks: int
    align: int
    max_tokens: int | None
    drop: bool


def make_plan(request: Request, everyone: Tensor, n_tokens: tuple[int, ...]) -> ExchangePlan:
    """everyone: topk_idx of all ranks one after the other, [sum of n_tokens, K], on the CPU; n_tokens by rank.

    Raises InvalidArgument, on all ranks the same, where an expert gets more than max_tokens and drop is off."""
    return _Planner(request, everyone, n_tokens).plan()


class _Planner:
    def __init__(self, request: Request, everyone: Tensor, n_tokens: tuple[int, ...]) -> None:
        self.request, self.geometry, self.places = request, request.geometry, request.places
        self.me, self.world = self.geometry.rank, self.geometry.size
        self.n_tokens, self.top_k = n_tokens, everyone.shape[1]
        bounds = _bounds(list(n_tokens))
        self.begin, self.end = bounds[self.me], bounds[self.me + 1]
        counts = np.array(n_tokens)
        self.source = np.repeat(np.arange(self.world), counts)
        self.token = np.arange(len(everyone)) - np.array(bounds[:-1])[self.source]
        self.chunk = self.token * request.n_chunks // np.maximum(counts, 1)[self.source]
        self.idx = everyone[self.begin : self.end]
        place, column = self.places.route(everyone, torch.from_numpy(self.source + self.token))
        self.place, self.column = place.numpy(), column.numpy()
        self.rank_of, self.host_of, self.local_of = (
            table.numpy() for table in (self.places.rank, self.places.host, self.places.local)
        )
        self.lost = int((self.place == self.places.n).sum())
        if request.max_tokens is not None:
            self._keep_to_capacity(request.max_tokens)

    def _keep_to_capacity(self, max_tokens: int) -> None:
        flat = self.place.reshape(-1)
        order = flat.argsort(kind="stable")
        counts = np.bincount(flat, minlength=self.places.n + 1)
        position = np.empty_like(flat)
        position[order] = np.arange(len(flat)) - (counts.cumsum() - counts)[flat[order]]
        over = (position >= max_tokens) & (flat < self.places.n)
        if not over.any():
            return
        if not self.request.drop:
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

    def plan(self) -> ExchangePlan:
        request = self.request
        self._find_slots()
        self._lay_out()
        self._find_home()
        scalars = self._scalars()
        slots_leave, on_host = np.empty(0, np.int64), None
        partials: tuple[Terms, ...] = ()
        if request.mode == "host":
            leg, expansions, partials, home, on_host = self._through_hosts()
        elif request.mode == "rank":
            leg, arrival, sent = self._direct(self.rank_token, self.rank_rank, self.row_global)
            expansions = self._expand_arrivals(arrival, self.row_global, rows=True)
            partials = (self._partial_sums(arrival.argsort()),)
            home = self._home_levels(sent, None)
        else:
            leg, arrival, sent = self._direct(self.home_token, self.home_rank, self.slot_global)
            expansions = self._expand_arrivals(arrival, self.slot_global, rows=False)
            slots_leave = self.out_of_slot[arrival.argsort()]
            home = self._home_levels(None, sent)
        return ExchangePlan(
            owner=request.owner,
            mode=request.mode,
            layout=request.layout,
            n_chunks=request.n_chunks,
            topk_idx=self.idx,
            expert_counts=_tensor(self.expert_counts),
            expert_offsets=_tensor(self.expert_offsets),
            sizes=tuple(np.diff(self.expert_offsets).tolist()),
            dropped=self.lost,
            n_slots=len(self.slot_global),
            n_out=len(self.slot_of_out),
            slot_of_out=_tensor(self.slot_of_out),
            slot_expert=_tensor(self.slot_local),
            slot_row=_tensor(self.slot_row),
            slot_of_row=_tensor(self._slots_of_rows()),
            scalars=scalars,
            home_weights=_tensor(self.home_weight),
            leg=leg,
            expansions=expansions,
            partials=partials,
            slots_leave=_tensor(slots_leave),
            home=home,
            one_host=self.geometry.n_hosts == 1 and len(self.host_token) == self.end - self.begin,
            on_host=on_host,
        )

    # What this rank's experts take.

    def _find_slots(self) -> None:
        here = self.rank_of[self.place] == self.me
        self.slot_global, k = here.nonzero()
        self.slot_local = self.local_of[self.place[self.slot_global, k]]
        first = _starts_run(self.slot_global)
        self.slot_row = first.cumsum() - 1
        self.row_global = self.slot_global[first]
        self.row_bounds = np.append(first.nonzero()[0], len(first))

    def _lay_out(self) -> None:
        request, n = self.request, len(self.slot_global)
        self.expert_counts = np.bincount(self.slot_local, minlength=request.n_local)
        padded = -(-self.expert_counts // request.align) * request.align
        self.expert_offsets = np.append(0, padded.cumsum())
        if request.layout == "rank":
            self.slot_of_out, self.out_of_slot = self.row_bounds[:-1], self.slot_row
        elif request.layout == "token":
            self.slot_of_out = self.out_of_slot = np.arange(n)
        else:
            order = self.slot_local.argsort(kind="stable")
            within = np.arange(n) - (self.expert_counts.cumsum() - self.expert_counts)[self.slot_local[order]]
            self.out_of_slot = np.empty(n, np.int64)
            self.out_of_slot[order] = self.expert_offsets[self.slot_local[order]] + within
            self.slot_of_out = np.full(self.expert_offsets[-1], -1)
            self.slot_of_out[self.out_of_slot] = np.arange(n)

    def _slots_of_rows(self) -> Ints:
        table = np.full((len(self.row_global), self.top_k), -1)
        table[self.slot_row, np.arange(len(self.slot_row)) - self.row_bounds[self.slot_row]] = np.arange(
            len(self.slot_row)
        )
        return table

    def _partial_sums(self, rows: Ints) -> Terms:
        """Sums over output rows, one for each of these rows of this rank."""
        if self.request.layout == "rank":  # the caller made them
            return _terms(np.zeros_like(rows), rows, np.ones_like(rows), 1)
        lengths = np.diff(self.row_bounds)[rows]
        slots = _ranges(self.row_bounds[rows], lengths)
        return _terms(np.zeros_like(slots), self.out_of_slot[slots], lengths, self.top_k)

    # What this rank's tokens need.

    def _find_home(self) -> None:
        place = self.place[self.begin : self.end]
        self.home_token, k = (place < self.places.n).nonzero()
        at = place[self.home_token, k]
        self.home_rank, self.home_host = self.rank_of[at], self.host_of[at]
        self.home_weight = self.home_token * self.top_k + self.column[self.begin : self.end][self.home_token, k]
        first = _starts_run(self.home_token, self.home_rank)
        self.rank_token, self.rank_rank = self.home_token[first], self.home_rank[first]
        rank_host = self.home_host[first]
        self.slots_a_rank = _run_lengths(first)
        first = _starts_run(self.rank_token, rank_host)
        self.host_token, self.host_host = self.rank_token[first], rank_host[first]
        self.ranks_a_host = _run_lengths(first)
        self.hosts_a_token = np.bincount(self.host_token, minlength=self.end - self.begin)

    def _home_levels(self, sent_rows: Ints | None, sent_slots: Ints | None) -> tuple[Terms, ...]:
        """Sums over what came back, where this rank's rows or slots stand at these positions: slots to ranks' sums, to
        hosts' sums, to tokens."""
        levels = []
        if sent_slots is not None:
            levels.append(_terms(np.zeros_like(sent_slots), sent_slots, self.slots_a_rank, self.top_k))
        rows = np.arange(len(self.rank_token)) if sent_rows is None else sent_rows
        levels.append(_terms(np.zeros_like(rows), rows, self.ranks_a_host, self.top_k))
        hosts = np.arange(len(self.host_token))
        levels.append(_terms(np.zeros_like(hosts), hosts, self.hosts_a_token, self.top_k))
        return tuple(levels)

    def _scalars(self) -> Leg:
        order = self.home_rank.argsort(kind="stable")
        sends = np.bincount(self.home_rank, minlength=self.world)
        receives = np.bincount(self.source[self.slot_global], minlength=self.world)
        return Leg(_tensor(self.home_weight[order]), (tuple(sends.tolist()),), (tuple(receives.tolist()),))

    # Straight from rank to rank.

    def _direct(self, token: Ints, rank: Ints, arriving: Ints) -> tuple[Leg, Ints, Ints]:
        """The leg of items that this rank sends (their token here, their rank) and gets (their number among all
        tokens); the position of each that it gets, and of each that it sends."""
        n_chunks = self.request.n_chunks
        index, sends, sent = _by_chunk(self.chunk[self.begin :][token], rank, token, n_chunks, self.world)
        _, receives, arrival = _by_chunk(self.chunk[arriving], self.source[arriving], arriving, n_chunks, self.world)
        return Leg(_tensor(index), sends, receives), arrival, sent

    def _expand_arrivals(self, arrival: Ints, item_global: Ints, rows: bool) -> tuple[Expansion, ...]:
        item = self._item_of_out(rows)
        position = np.where(item < 0, -1, arrival[item.clip(0)] if len(arrival) else -1)
        chunk = np.where(item < 0, 0, self.chunk[item_global[item.clip(0)]] if len(arrival) else 0)
        return _by_chunk_of_output(chunk, np.zeros_like(item), position, self.request.n_chunks)

    def _item_of_out(self, rows: bool) -> Ints:
        if not rows or len(self.slot_row) == 0:
            return self.slot_of_out
        return np.where(self.slot_of_out < 0, -1, self.slot_row[self.slot_of_out.clip(0)])

    # Once to each host, and inside it over shared memory.

    def _through_hosts(self) -> tuple[Leg, tuple[Expansion, ...], tuple[Terms, ...], tuple[Terms, ...], OnHost]:
        geometry, n_chunks = self.geometry, self.request.n_chunks
        mine, host_index = geometry.host, np.array(geometry.host_index)
        members = geometry.members[mine]
        me = geometry.local_index[self.me]
        gateways = np.array([geometry.gateway(rank, mine) for rank in range(self.world)])
        local_index = np.array(geometry.local_index)

        # All tokens that this host's experts need, those of its own ranks first, then chunk by chunk.
        needs = (self.rank_of[self.place][:, :, None] == np.array(members)).any(1)  # [tokens, ranks of the host]
        seen = needs.any(1).nonzero()[0]
        foreign = host_index[self.source[seen]] != mine
        stage = np.where(foreign, 1 + self.chunk[seen], 0)
        order = stage.argsort(kind="stable")
        seen, stage, foreign = seen[order], stage[order], foreign[order]
        needs = needs[seen]
        position = needs.cumsum(0) - 1  # of each token among the partial sums of each rank
        via = local_index[np.where(foreign, gateways[self.source[seen]], self.source[seen])]
        held = (via[:, None] == np.arange(len(members))) & foreign[:, None]
        held_position = (held.cumsum(0) - 1)[np.arange(len(via)), via]

        # Dispatch: source q is what rank q of the host staged of its own, source L + q what it holds as a gateway.
        source = np.where(foreign, len(members) + via, via)
        row = np.where(foreign, held_position, self.token[seen])
        number = np.full(len(self.source), -1)
        number[seen] = np.arange(len(seen))
        item = self._item_of_out(rows=True)
        at = number[self.row_global[item.clip(0)]] if len(self.row_global) else np.full_like(item, -1)
        pad = item < 0
        safe = at.clip(0)
        expansions = _by_chunk_of_output(
            np.where(pad, 0, stage[safe]) if len(seen) else np.zeros_like(item),
            np.where(pad, 0, source[safe]) if len(seen) else np.zeros_like(item),
            np.where(pad, -1, row[safe]) if len(seen) else np.full_like(item, -1),
            n_chunks + 1,
        )

        # This rank's tokens to the gateways of other hosts.
        away = self.host_host != mine
        to = np.array([geometry.gateway(self.me, host) for host in range(geometry.n_hosts)])
        token = self.host_token[away]
        index, sends, sent = _by_chunk(
            self.chunk[self.begin :][token], to[self.host_host[away]], token, n_chunks, self.world
        )
        mine_to_hold = foreign & (via == me)
        _, receives, _ = _by_chunk(
            stage[mine_to_hold] - 1, self.source[seen[mine_to_hold]], seen[mine_to_hold], n_chunks, self.world
        )

        # Combine.
        row_of = np.full(len(self.source), -1)
        row_of[self.row_global] = np.arange(len(self.row_global))
        partials = tuple(
            self._partial_sums(row_of[seen[(stage == number) & needs[:, me]]]) for number in range(n_chunks + 1)
        )

        def over_ranks(chosen: Ints) -> Terms:
            token, rank = needs[chosen].nonzero()
            rows = position[chosen][token, rank]
            return _terms(rank, rows, needs[chosen].sum(1), self.top_k)

        gateway = tuple(over_ranks(mine_to_hold & (stage == 1 + number)) for number in range(n_chunks))
        own = over_ranks(self.source[seen] == self.me)
        hosts_row = np.empty(len(self.host_host), np.int64)
        hosts_row[~away] = np.arange(int((~away).sum()))
        hosts_row[away] = sent
        home = (_terms(away.astype(np.int64), hosts_row, self.hosts_a_token, self.top_k),)
        on_host = OnHost(
            staged=tuple(self.n_tokens[rank] for rank in members),
            arrived=tuple(held.sum(0).tolist()),
            partials=tuple(needs.sum(0).tolist()),
            gateway=gateway,
            own=own,
        )
        return Leg(_tensor(index), sends, receives), expansions, partials, home, on_host


def _bounds(lengths: list[int]) -> tuple[int, ...]:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return tuple(bounds)


def _starts_run(*keys: Ints) -> Ints:
    """Where any of the keys differs from the one before it."""
    starts = np.zeros(len(keys[0]), bool)
    starts[:1] = True
    for key in keys:
        starts[1:] |= key[1:] != key[:-1]
    return starts


def _run_lengths(starts: Ints) -> Ints:
    return np.diff(np.append(starts.nonzero()[0], len(starts)))


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """starts[0], starts[0] + 1, .. lengths[0] of them, then those of starts[1], .."""
    ends = lengths.cumsum()
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    indices: Ints = np.repeat(starts, lengths) + within
    return indices


def _terms(source: Ints, rows: Ints, lengths: Ints, most: int) -> Terms:
    return Terms(_tensor(source), _tensor(rows), _tensor(np.append(0, lengths.cumsum())), most)


def _by_chunk(chunk: Ints, peer: Ints, index: Ints, n_chunks: int, n_peers: int) -> tuple[Ints, Counts, Ints]:
    """index in order of (chunk, peer), the counts of each, and the position that each item then has."""
    key = chunk * n_peers + peer
    order = key.argsort(kind="stable")
    counts = np.bincount(key, minlength=n_chunks * n_peers).reshape(n_chunks, n_peers)
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    return index[order], tuple(tuple(row) for row in counts.tolist()), position


def _by_chunk_of_output(chunk: Ints, source: Ints, rows: Ints, n_chunks: int) -> tuple[Expansion, ...]:
    expansions = []
    for number in range(n_chunks):
        to = (chunk == number).nonzero()[0]
        expansions.append(Expansion(_tensor(to), _tensor(source[to]), _tensor(rows[to])))
    return tuple(expansions)


def _tensor(values: Ints) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int64))
