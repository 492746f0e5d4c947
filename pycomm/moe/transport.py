"""How rows move: from rank to rank (Direct), or once to each host and there over shared memory (ThroughHosts).

Both give the same bits. With o_e the output of expert e for a token, w_e its weight, and everything summed in order:

    of a rank:  p_r = Σ_e w_e × o_e     over the token's experts on the rank, in the rank's order, in fp32
    of a host:  q_h = Σ_r p_r           over the host's ranks, in fp32, then rounded once to the type that it travels in
    in all:     y = Σ_h q_h             over hosts, in fp32, rounded once to the output's type

What travels differs: without deduplication every o_e, with it the p_r, through hosts the q_h."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pycomm import _C
from pycomm.group import Group
from pycomm.moe.placement import Geometry
from pycomm.moe.plan import ExchangePlan, Leg
from pycomm.moe.rows import Terms, combine_rows, copy_rows
from pycomm.moe.waits import Waits


class Transport(ABC):
    @abstractmethod
    def expand(self, stage: str, plan: ExchangePlan, rows: Tensor) -> Tensor:
        """The plan's output rows [n_out, width] from each token's row [T, width]; zeros for padding."""

    @abstractmethod
    def reduce(
        self,
        stage: str,
        plan: ExchangePlan,
        rows: Tensor,
        weights: Tensor | None,
        home_weights: Tensor | None,
        travels_as: torch.dtype,
    ) -> Tensor:
        """The sums [T, H] in rows' dtype over output rows [n_out, H]. weights: float32 [n_out]; home_weights: the same
        numbers for this rank's own slots, by (token, place)."""


def _sums(terms: Terms, sources: Sequence[Tensor], dtype: torch.dtype, weights: Tensor | None = None) -> Tensor:
    out = sources[0].new_empty((terms.n, sources[0].shape[1]), dtype=dtype)
    return combine_rows(out, sources, terms, weights)


def _weights_of(terms: Terms, weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights[terms.rows]


def _packed(leg: Leg, chunk: int, rows: Tensor) -> Tensor:
    index = leg.index[leg.send_bounds[chunk] : leg.send_bounds[chunk + 1]]
    return copy_rows(rows.new_empty((len(index), rows.shape[1])), [rows], torch.zeros_like(index), index)


class Direct(Transport):
    def __init__(self, waits: Waits) -> None:
        self._waits = waits

    def expand(self, stage: str, plan: ExchangePlan, rows: Tensor) -> Tensor:
        leg = plan.leg
        arrived = rows.new_empty((leg.receive_bounds[-1], rows.shape[1]))
        out = rows.new_empty((plan.n_out, rows.shape[1]))
        works = []
        for chunk in range(plan.n_chunks):
            part = arrived[leg.receive_bounds[chunk] : leg.receive_bounds[chunk + 1]]
            works.append(self._move(stage, plan, chunk, part, _packed(leg, chunk, rows), back=False))
        for chunk, expansion in enumerate(plan.expansions):
            self._finish(stage, plan, chunk, works[chunk])
            copy_rows(out, [arrived], expansion.source, expansion.rows, expansion.to)
        return out

    def reduce(
        self,
        stage: str,
        plan: ExchangePlan,
        rows: Tensor,
        weights: Tensor | None,
        home_weights: Tensor | None,
        travels_as: torch.dtype,
    ) -> Tensor:
        leg = plan.leg
        if plan.mode == "none":
            leaving = rows.new_empty((plan.n_slots, rows.shape[1]))
            copy_rows(leaving, [rows], torch.zeros_like(plan.slots_leave), plan.slots_leave)
        else:
            (terms,) = plan.partials
            leaving = _sums(terms, [rows], torch.float32, _weights_of(terms, weights))
        returned = leaving.new_empty((leg.send_bounds[-1], rows.shape[1]))
        works = []
        for chunk in range(plan.n_chunks):
            part = returned[leg.send_bounds[chunk] : leg.send_bounds[chunk + 1]]
            sent = leaving[leg.receive_bounds[chunk] : leg.receive_bounds[chunk + 1]]
            works.append(self._move(stage, plan, chunk, part, sent, back=True))
        for chunk, work in enumerate(works):
            self._finish(stage, plan, chunk, work)
        levels = list(plan.home)
        if plan.mode == "none":
            returned = _sums(levels.pop(0), [returned], torch.float32, home_weights)
        hosts, tokens = levels
        host_sums = _sums(hosts, [returned], travels_as)
        return host_sums.to(rows.dtype) if plan.one_host else _sums(tokens, [host_sums], rows.dtype)

    def _move(self, stage: str, plan: ExchangePlan, chunk: int, output: Tensor, rows: Tensor, back: bool) -> Any:
        sends, receives = plan.leg.sends[chunk], plan.leg.receives[chunk]
        if back:
            sends, receives = receives, sends
        name = _of_chunk(stage, plan, chunk)
        if plan.n_chunks == 1:
            self._waits.all_to_all(name, output, rows, receives, sends)
            return None
        assert isinstance(self._waits.group, Group)
        return self._waits.start_all_to_all(self._waits.group, name, output, rows, receives, sends)

    def _finish(self, stage: str, plan: ExchangePlan, chunk: int, work: Any) -> None:
        if work is not None:
            with self._waits.stage(_of_chunk(stage, plan, chunk)):
                work.wait()


def _of_chunk(stage: str, plan: ExchangePlan, chunk: int) -> str:
    return stage if plan.n_chunks == 1 else f"{stage}, chunk {chunk + 1} of {plan.n_chunks}"


class SharedMemory:
    """Memory of this rank that the ranks of its host read in place. An operation ends with a barrier: nobody reads any
    more, so the memory may be written again, or given back with the exchange."""

    def __init__(self, group: Group, host: Group, members: Sequence[int]) -> None:
        self._group, self._host = group, host
        self._endpoint_ranks = [group._ranks[rank] for rank in members]
        self._tensors: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        nbytes = shape[0] * shape[1] * dtype.itemsize
        if name not in self._tensors or self._tensors[name].numel() < nbytes:
            self._tensors.pop(name, None)  # given back before more is taken
            self._tensors[name] = self._group.empty(max(nbytes + nbytes // 8, 4096), dtype=torch.uint8)
        return self._tensors[name][:nbytes].view(dtype).view(shape)

    def addresses(self, *mine: Tensor) -> Tensor:
        """Every rank's addresses, int64 [ranks of the host, tensors]; returns once all have entered."""
        own = torch.tensor([each.data_ptr() for each in mine], dtype=torch.int64)
        gathered = torch.empty(self._host.size, len(mine), dtype=torch.int64)
        if self._host.size == 1:
            return gathered.copy_(own.unsqueeze(0))
        self._host.all_gather(gathered, own)
        return gathered

    def view(self, member: int, address: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        nbytes = shape[0] * shape[1] * dtype.itemsize
        if nbytes == 0:  # nor has an empty tensor an address
            return torch.empty(shape, dtype=dtype)
        found = _C.peer_bytes(self._group._endpoint, self._endpoint_ranks[member], address, nbytes)
        return found.view(dtype).view(shape)

    def barrier(self) -> None:
        if self._host.size > 1:
            self._host.barrier()


class ThroughHosts(Transport):
    def __init__(self, waits: Waits, group: Group, host: Group, geometry: Geometry) -> None:
        self._waits, self._group, self._host, self._geometry = waits, group, host, geometry
        self._shared = SharedMemory(group, host, geometry.members[geometry.host])
        self._me = geometry.local_index[geometry.rank]

    def expand(self, stage: str, plan: ExchangePlan, rows: Tensor) -> Tensor:
        assert plan.on_host is not None
        host, leg, width, dtype, shared = plan.on_host, plan.leg, rows.shape[1], rows.dtype, self._shared
        own = shared.take("own", (len(rows), width), dtype)
        held = shared.take("held", (host.arrived[self._me], width), dtype)
        works = []
        for chunk in range(self._n_crossings(plan)):
            part = held[leg.receive_bounds[chunk] : leg.receive_bounds[chunk + 1]]
            name = _of_chunk(f"{stage}, rows between hosts", plan, chunk)
            sent = _packed(leg, chunk, rows)
            works.append(
                self._waits.start_all_to_all(self._group, name, part, sent, leg.receives[chunk], leg.sends[chunk])
            )
        own.copy_(rows)
        with self._waits.stage(f"{stage}, rows inside the host"):
            addresses = shared.addresses(own, held).tolist()
        sources = [
            shared.view(member, addresses[member][kind], (numbers[member], width), dtype)
            for kind, numbers in enumerate((host.staged, host.arrived))
            for member in range(self._host.size)
        ]
        out = rows.new_empty((plan.n_out, width))
        for number, expansion in enumerate(plan.expansions):
            if number > 0 and works:
                with self._waits.stage(_of_chunk(f"{stage}, rows between hosts", plan, number - 1)):
                    works[number - 1].wait()
                with self._waits.stage(_of_chunk(f"{stage}, rows inside the host", plan, number - 1)):
                    shared.barrier()
            copy_rows(out, sources, expansion.source, expansion.rows, expansion.to)
        with self._waits.stage(f"{stage}, end inside the host"):
            shared.barrier()
        return out

    def reduce(
        self,
        stage: str,
        plan: ExchangePlan,
        rows: Tensor,
        weights: Tensor | None,
        home_weights: Tensor | None,
        travels_as: torch.dtype,
    ) -> Tensor:
        assert plan.on_host is not None
        host, leg, width, shared = plan.on_host, plan.leg, rows.shape[1], self._shared
        partial = shared.take("partial", (host.partials[self._me], width), torch.float32)
        sources: list[Tensor] = []
        local = plan.partials[0].n
        begins = [0, local]
        for terms in plan.partials[1:]:
            begins.append(begins[-1] + terms.n)

        def add_up(number: int) -> None:
            """Returns once the sums of this chunk stand on all ranks of the host, in sources."""
            terms = plan.partials[number]
            sums = partial[begins[number] : begins[number + 1]]
            combine_rows(sums, [rows], terms, _weights_of(terms, weights))
            with self._waits.stage(f"{stage}, partial sums inside the host"):
                if sources:
                    shared.barrier()
                    return
                addresses = shared.addresses(partial).tolist()
            for member, numbers in enumerate(host.partials):
                sources.append(shared.view(member, addresses[member][0], (numbers, width), torch.float32))

        returned = rows.new_empty((leg.send_bounds[-1], width), dtype=travels_as)
        works = []
        for chunk in range(self._n_crossings(plan)):
            add_up(chunk + 1)
            part = returned[leg.send_bounds[chunk] : leg.send_bounds[chunk + 1]]
            name = _of_chunk(f"{stage}, sums between hosts", plan, chunk)
            sent = _sums(host.gateway[chunk], sources, travels_as)
            works.append(
                self._waits.start_all_to_all(self._group, name, part, sent, leg.sends[chunk], leg.receives[chunk])
            )
        add_up(0)
        own = _sums(host.own, sources, travels_as)
        with self._waits.stage(f"{stage}, end inside the host"):
            shared.barrier()
        for chunk, work in enumerate(works):
            with self._waits.stage(_of_chunk(f"{stage}, sums between hosts", plan, chunk)):
                work.wait()
        if plan.one_host:
            return own.to(rows.dtype)
        return _sums(plan.home[0], [own, returned], rows.dtype)

    def _n_crossings(self, plan: ExchangePlan) -> int:
        return plan.n_chunks if self._geometry.n_hosts > 1 else 0
