"""Rows that cross once to each host, where its ranks read them in place over shared memory; the order of sums is
transport.py's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pycomm import _C
from pycomm.errors import InvalidArgument
from pycomm.group import Group
from pycomm.moe.placement import Geometry
from pycomm.moe.tables import ExchangePlan, OnHost, Route
from pycomm.moe.transport import Crossings, Expanding, Reducing, Transport, packed, sums
from pycomm.moe.waits import Waits


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
    """One expand and one reduce are under way at a time, since each has one piece of shared memory. One that begins
    ends the one before it: a stream's backward that was cut off, say. All ranks do so at the same place."""

    def __init__(self, waits: Waits, memory: _C.RowMemory, group: Group, host: Group, geometry: Geometry) -> None:
        super().__init__(waits, memory)
        self.group, self.host = group, host
        self.shared = SharedMemory(group, host, geometry.members[geometry.host])
        self.me = geometry.local_index[geometry.rank]
        self._expanding: _HostExpanding | None = None
        self._reducing: _HostReducing | None = None

    def begin_expand(
        self, stage: str, plan: ExchangePlan, route: Route, rows: Tensor, crossings: Sequence[int]
    ) -> Expanding:
        if self._expanding is not None:
            self._expanding.finish()
        self._expanding = _HostExpanding(self, stage, plan, route, rows, crossings)
        return self._expanding

    def begin_reduce(
        self,
        stage: str,
        plan: ExchangePlan,
        route: Route,
        rows: Tensor,
        weights: Tensor | None,
        home_weights: Tensor | None,
        travels_as: torch.dtype,
    ) -> Reducing:
        if self._reducing is not None:
            self._reducing.give_up()
        self._reducing = _HostReducing(self, stage, plan, route, rows, weights, home_weights, travels_as)
        return self._reducing


def _on_host(route: Route) -> OnHost:
    assert route.on_host is not None
    return route.on_host


class _HostExpanding(Expanding):
    def __init__(
        self,
        transport: ThroughHosts,
        stage: str,
        plan: ExchangePlan,
        route: Route,
        rows: Tensor,
        order: Sequence[int],
    ) -> None:
        super().__init__(plan, route)
        self._stage, self._shared, self._waits = stage, transport.shared, transport.waits
        self._crossings = Crossings(transport.waits, f"{stage}, rows between hosts", plan, route.leg, back=False)
        host, width, dtype, shared = _on_host(route), rows.shape[1], rows.dtype, transport.shared
        own = shared.take("own", (len(rows), width), dtype)
        held = shared.take("held", (host.arrived[transport.me], width), dtype)
        for crossing in order:
            self._crossings.start(crossing, held, packed(route.leg, crossing, rows))
        own.copy_(rows)
        with transport.waits.stage(f"{stage}, rows inside the host"):
            addresses = shared.addresses(own, held).tolist()
        self.sources = [
            shared.view(member, addresses[member][kind], (numbers[member], width), dtype)
            for kind, numbers in enumerate((host.staged, host.arrived))
            for member in range(transport.host.size)
        ]
        self._finished = False

    def arrived(self, crossing: int) -> None:
        if self._finished:
            raise InvalidArgument(
                "another exchange of this ExpertParallel began before this stream had ended: end its loop (or its "
                "backward) first, or use an ExpertParallel of its own"
            )
        self._crossings.wait(crossing)
        with self._waits.stage(f"{self._stage}, rows inside the host"):
            self._shared.barrier()

    def finish(self) -> None:
        if not self._finished:
            self._finished = True
            self._crossings.wait_all()
            with self._waits.stage(f"{self._stage}, end inside the host"):
                self._shared.barrier()


class _HostReducing(Reducing):
    def __init__(
        self,
        transport: ThroughHosts,
        stage: str,
        plan: ExchangePlan,
        route: Route,
        rows: Tensor,
        weights: Tensor | None,
        home_weights: Tensor | None,
        travels_as: torch.dtype,
    ) -> None:
        super().__init__(plan, route, rows, weights, home_weights)
        self._stage, self._transport, self._travels_as = stage, transport, travels_as
        self._shared, self._waits = transport.shared, transport.waits
        self._crossings = Crossings(transport.waits, f"{stage}, sums between hosts", plan, route.leg, back=True)
        host, width = _on_host(route), rows.shape[1]
        self._partial = self._shared.take("partial", (host.partials[transport.me], width), torch.float32)
        self._begins = [route.own.n]
        for terms in route.leaving:
            self._begins.append(self._begins[-1] + terms.n)
        self._sources: list[Tensor] = []
        self._returned = rows.new_empty((route.leg.send_bounds[-1], width), dtype=travels_as)
        self._finished = False

    def leave(self, crossing: int) -> None:
        terms = self.route.leaving[crossing]
        self.partial_sums(terms, self._partial[self._begins[crossing] : self._begins[crossing + 1]])
        self._stand()
        leaving = sums(_on_host(self.route).gateway[crossing], self._sources, self._travels_as)
        self._crossings.start(crossing, self._returned, leaving)

    def finish(self) -> Tensor:
        self.partial_sums(self.route.own, self._partial[: self.route.own.n])
        self._stand()
        own = sums(_on_host(self.route).own, self._sources, self._travels_as)
        self._end()
        self._crossings.wait_all()
        if self.plan.one_host:
            return own.to(self.rows.dtype)
        return sums(self.route.home[0], [own, self._returned], self.rows.dtype)

    def give_up(self) -> None:
        if not self._finished:
            self._crossings.wait_all()
            self._end()

    def _end(self) -> None:
        self._finished = True
        with self._waits.stage(f"{self._stage}, end inside the host"):
            self._shared.barrier()

    def _stand(self) -> None:
        """Returns once the partial sums of all ranks of the host stand in the sources."""
        with self._waits.stage(f"{self._stage}, partial sums inside the host"):
            if self._sources:
                self._shared.barrier()
                return
            addresses = self._shared.addresses(self._partial).tolist()
        width = self.rows.shape[1]
        for member, numbers in enumerate(_on_host(self.route).partials):
            self._sources.append(self._shared.view(member, addresses[member][0], (numbers, width), torch.float32))
