"""How the rows of a batch reach their experts and come back: the tables of a Route (tables.py), for each way."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pycomm.moe.batch import Batch, Served
from pycomm.moe.cost import Dedup
from pycomm.moe.indices import Ints, by_crossing, by_stage, inverse, ranges, run_bounds, starts_run, tensor, terms
from pycomm.moe.rows import Terms
from pycomm.moe.tables import Counts, Cut, Expansion, Layout, Leg, OnHost, Route


class Stages:
    """In which parts this rank's output rows are made, and what crosses before and after each.

    Of tokens: half of those that do not cross, then a stage a crossing, then the other half: what needs no wire fills
    the waits at both ends. Of experts: as many stages as crossings, each of a part of every rank's experts, so that an
    expert has all its rows at once."""

    def __init__(self, cut: Cut, n_crossings: int, n_places: int) -> None:
        """n_places: the ranks or hosts between which items cross."""
        self.cut = cut
        self.n_crossings = n_crossings if n_places > 1 else 0
        self.crossing: tuple[int | None, ...]
        if cut == "experts":
            self.crossing = tuple(range(n_crossings)) if n_places > 1 else (None,) * n_crossings
        else:
            self.crossing = (None, *range(n_crossings), None) if n_places > 1 else (None,)

    @property
    def n(self) -> int:
        return len(self.crossing)

    def of_experts(self, local: Ints, n_local: Ints | int) -> Ints:
        """The stage of experts, where those are cut, from their numbers and how many their rank has."""
        stage: Ints = local * self.n // np.maximum(n_local, 1)
        return stage

    def experts(self, n_local: int) -> tuple[range, ...]:
        """By stage, the local experts that it may have rows of."""
        if self.cut == "tokens":
            return (range(n_local),) * self.n
        starts = np.searchsorted(self.of_experts(np.arange(n_local), n_local), np.arange(self.n + 1)).tolist()
        return tuple(range(a, b) for a, b in pairwise(starts))


class Routes:
    def __init__(self, mode: Dedup, layout: Layout, stages: Stages, batch: Batch, served: Served) -> None:
        self.mode, self.layout, self.stages, self.batch, self.served = mode, layout, stages, batch, served
        self.me, self.geometry, self.places = batch.me, batch.geometry, batch.places
        n_crossings = max(1, stages.n_crossings)
        counts = np.array(batch.n_tokens)
        self.part = batch.token * n_crossings // np.maximum(counts, 1)[batch.source]  # of each token, where it crosses
        held = np.array(self.places.n_held)[batch.rank_of[:-1]]
        self.group_of_place = stages.of_experts(batch.local_of[:-1], held)
        host_of_rank = np.array(self.geometry.host_index)
        # Ranks from which nothing crosses.
        self.is_near = host_of_rank == self.geometry.host if mode == "host" else np.arange(batch.world) == self.me
        self._find_home()
        self.stage_of_slot = self._stage_of_slots()

    def route(self, last: bool) -> Route:
        """last: where stages are experts, an item crosses with its last one instead of its first one."""
        return self._through_hosts(last) if self.mode == "host" else self._direct(last)

    # This rank's tokens: slots in runs of one rank, those in runs of one host.

    def _find_home(self) -> None:
        batch = self.batch
        self.slot_runs = run_bounds(starts_run(batch.home_token, batch.home_rank))
        first = self.slot_runs[:-1]
        self.rank_token, self.rank_rank = batch.home_token[first], batch.home_rank[first]
        rank_host = np.array((*self.geometry.host_index, -1))[self.rank_rank]
        self.rank_runs = run_bounds(starts_run(self.rank_token, rank_host))
        first = self.rank_runs[:-1]
        self.host_token, self.host_host = self.rank_token[first], rank_host[first]
        self.hosts_a_token = np.bincount(self.host_token, minlength=batch.end - batch.begin)

    def _stage_of_slots(self) -> Ints:
        batch, served, stages = self.batch, self.served, self.stages
        if stages.cut == "experts":
            return self._groups_of_slots()
        token = served.slot_token
        if stages.n_crossings == 0:
            return np.zeros_like(token)
        half = batch.token[token] * 2 >= np.array(batch.n_tokens)[batch.source[token]]
        own: Ints = np.where(half, stages.n - 1, 0)
        stage: Ints = np.where(self.is_near[batch.source[token]], own, 1 + self.part[token])
        return stage

    def _crossing(self, tokens: Ints, runs: Ints, groups: Ints, last: bool) -> Ints:
        """In which crossing each item goes. tokens: of each, among all. runs, groups: its slots' bounds, and theirs."""
        if self.stages.cut == "tokens" or len(tokens) == 0:
            part: Ints = self.part[tokens]
            return part
        pick = np.maximum if last else np.minimum
        crossing: Ints = pick.reduceat(groups, runs[:-1])
        return crossing

    # Straight from rank to rank.

    def _direct(self, last: bool) -> Route:
        batch, served, rows = self.batch, self.served, self.mode == "rank"
        token, rank = (self.rank_token, self.rank_rank) if rows else (batch.home_token, batch.home_rank)
        runs = self.slot_runs if rows else np.arange(len(token) + 1)
        crossing = self._crossing(batch.begin + token, runs, self.group_of_place[batch.home_place], last)
        away = rank != self.me
        order, sends = self._cross(crossing[away], rank[away])
        sent = np.empty(len(token), np.int64)  # the position of each item there, or among what stayed here
        sent[away], sent[~away] = inverse(order), np.arange(len(away) - len(order))

        come_token = served.row_token if rows else served.slot_token
        come_runs = served.row_bounds if rows else np.arange(len(come_token) + 1)
        from_rank = batch.source[come_token]
        foreign = from_rank != self.me
        come = self._crossing(come_token, come_runs, self._groups_of_slots(), last)
        arrival_order, receives = self._cross(come[foreign], from_rank[foreign])
        row = batch.token[come_token]
        row[foreign] = inverse(arrival_order)
        expansions = self._expand(foreign.astype(np.int64), row)

        leaving: tuple[Terms, ...] = ()
        leaving_rows: tuple[Ints, ...] = ()
        nothing = np.empty(0, np.int64)
        own, levels = terms(nothing, nothing, nothing, 1), []
        ends = np.cumsum([0, *(sum(counts) for counts in receives)])
        leave = foreign.nonzero()[0][arrival_order]
        parts = [leave[a:b] for a, b in pairwise(ends)]
        if rows:
            leaving = tuple(self._partial_sums(part) for part in parts)
            own = self._partial_sums((~foreign).nonzero()[0])
            rank_source, rank_row = away.astype(np.int64), sent
        else:
            leaving_rows = tuple(served.out_of_slot[part] for part in parts)
            sent[~away] = served.out_of_slot[~foreign]
            levels.append(terms(away.astype(np.int64), sent, np.diff(self.slot_runs), batch.top_k))
            rank_source, rank_row = np.zeros_like(self.rank_token), np.arange(len(self.rank_token))
        levels.append(terms(rank_source, rank_row, np.diff(self.rank_runs), batch.top_k))
        levels.append(
            terms(np.zeros_like(self.host_token), np.arange(len(self.host_token)), self.hosts_a_token, batch.top_k)
        )
        leg = Leg(tensor(token[away][order]), sends, receives)
        return Route(leg, expansions, leaving, tuple(tensor(each) for each in leaving_rows), own, tuple(levels), None)

    def _cross(self, crossing: Ints, peer: Ints) -> tuple[Ints, Counts]:
        return by_crossing(crossing, peer, self.stages.n_crossings, self.batch.world)

    def _groups_of_slots(self) -> Ints:
        first, end = self.places.of_rank(self.me)
        groups: Ints = self.group_of_place[first:end][self.served.slot_local]
        return groups

    def _expand(self, source: Ints, row: Ints) -> tuple[Expansion, ...]:
        """source, row: of each row of this rank, or of each slot in mode "none"."""
        served = self.served
        slot = served.slot_of_out
        pad = slot < 0
        if len(served.slot_token) == 0:
            zeros = np.zeros_like(slot)
            return by_stage(zeros, zeros, np.full_like(slot, -1), self.stages.n)
        item = slot if self.mode == "none" else served.slot_row[slot]
        stage = self.stage_of_slot[slot]
        return by_stage(
            np.where(pad, 0, stage), np.where(pad, 0, source[item]), np.where(pad, -1, row[item]), self.stages.n
        )

    def _partial_sums(self, rows: Ints) -> Terms:
        """Sums over output rows, one for each of these rows of this rank."""
        served = self.served
        if self.layout == "rank":  # the caller made them
            return terms(np.zeros_like(rows), rows, np.ones_like(rows), 1)
        lengths = np.diff(served.row_bounds)[rows]
        slots = ranges(served.row_bounds[rows], lengths)
        return terms(np.zeros_like(slots), served.out_of_slot[slots], lengths, self.batch.top_k)

    # Once to each host, and inside it over shared memory.

    def _through_hosts(self, last: bool) -> Route:
        batch, served, geometry = self.batch, self.served, self.geometry
        n_crossings, mine = self.stages.n_crossings, geometry.host
        members = geometry.members[mine]
        me = geometry.local_index[self.me]
        gateways = np.array([geometry.gateway(rank, mine) for rank in range(batch.world)])
        local_index = np.array(geometry.local_index)

        # All tokens that this host's experts need, those of its own ranks first, then crossing by crossing.
        token, k = batch.slots_between(self.places.of_rank(members[0])[0], self.places.of_rank(members[-1])[1])
        place = batch.place[token, k]
        runs = run_bounds(starts_run(token))
        seen = token[runs[:-1]]
        needs = np.zeros((len(seen), len(members)), bool)
        needs[np.repeat(np.arange(len(seen)), np.diff(runs)), local_index[batch.rank_of[place]]] = True
        foreign = ~self.is_near[batch.source[seen]]
        come = self._crossing(seen, runs, self.group_of_place[place], last)
        number = np.where(foreign, 1 + come, 0)
        order = number.argsort(kind="stable")
        seen, number, foreign, needs = seen[order], number[order], foreign[order], needs[order]
        position = needs.cumsum(0) - 1  # of each token among the partial sums of each rank
        via = local_index[np.where(foreign, gateways[batch.source[seen]], batch.source[seen])]
        held = (via[:, None] == np.arange(len(members))) & foreign[:, None]
        held_position = (held.cumsum(0) - 1)[np.arange(len(via)), via]

        # There: source q is what rank q of the host staged of its own, source L + q what it holds as a gateway.
        source = np.where(foreign, len(members) + via, via)
        row = np.where(foreign, held_position, batch.token[seen])
        at = np.empty(len(batch.source), np.int64)
        at[seen] = np.arange(len(seen))
        of_row = at[served.row_token]
        expansions = self._expand(source[of_row], row[of_row])

        # This rank's tokens to the gateways of other hosts.
        away = self.host_host != mine
        to = np.array([geometry.gateway(self.me, host) for host in range(geometry.n_hosts)])
        groups = self.group_of_place[batch.home_place]
        crossing = self._crossing(batch.begin + self.host_token, self.slot_runs[self.rank_runs], groups, last)
        sent_order, sends = self._cross(crossing[away], to[self.host_host[away]])
        mine_to_hold = foreign & (via == me)
        _, receives = self._cross(number[mine_to_hold] - 1, batch.source[seen[mine_to_hold]])

        # Back.
        row_of = np.empty(len(batch.source), np.int64)
        row_of[served.row_token] = np.arange(len(served.row_token))
        own_partials, *leaving = (
            self._partial_sums(row_of[seen[(number == each) & needs[:, me]]]) for each in range(n_crossings + 1)
        )

        def over_ranks(chosen: Ints) -> Terms:
            token, rank = needs[chosen].nonzero()
            return terms(rank, position[chosen][token, rank], needs[chosen].sum(1), batch.top_k)

        hosts_row = np.empty(len(self.host_host), np.int64)
        hosts_row[~away] = np.arange(int((~away).sum()))
        hosts_row[away] = inverse(sent_order)
        on_host = OnHost(
            staged=tuple(batch.n_tokens[rank] for rank in members),
            arrived=tuple(held.sum(0).tolist()),
            partials=tuple(needs.sum(0).tolist()),
            gateway=tuple(over_ranks(mine_to_hold & (number == 1 + each)) for each in range(n_crossings)),
            own=over_ranks(batch.source[seen] == self.me),
        )
        leg = Leg(tensor(self.host_token[away][sent_order]), sends, receives)
        home = (terms(away.astype(np.int64), hosts_row, self.hosts_a_token, batch.top_k),)
        return Route(leg, expansions, tuple(leaving), (), own_partials, home, on_host)
