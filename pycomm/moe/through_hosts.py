"""Rows that cross once to each host, where its ranks read them in place (host_memory.py); the order of sums is
transport.py's."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from pycomm import devices
from pycomm.errors import InvalidArgument
from pycomm.group import Group
from pycomm.moe.form import Form
from pycomm.moe.host_memory import CopiedMemory, HostMemory, SharedMemory, memory_on_device
from pycomm.moe.placement import Geometry
from pycomm.moe.tables import ExchangePlan, OnHost, Route
from pycomm.moe.transport import Crossings, Expanding, Reducing, Transport, sums
from pycomm.moe.waits import Waits


class Reach(IntEnum):
    """What ranks of a host can do with rows on each other's device."""

    nothing = 0
    copies = 1
    in_place = 2


class ThroughHosts(Transport):
    """One expand and one reduce are under way at a time, since each has one piece of the host's memory. One that begins
    ends the one before it: a stream's backward that was cut off, say. All ranks do so at the same place."""

    def __init__(self, waits: Waits, group: Group, host: Group, geometry: Geometry) -> None:
        super().__init__(waits)
        self.host = host
        self._shared = SharedMemory(group, host, geometry.members[geometry.host])
        self._on_device: HostMemory | None = None
        self._expanding: _HostExpanding | None = None
        self._reducing: _HostReducing | None = None

    def ask_device(self, like: Tensor) -> tuple[Reach, str]:
        """What this host's ranks can do for each other on like's device, and why not more. All ranks call it before the
        first rows on a device."""
        with self.waits.stage("plan, memory inside the host"):
            self._on_device, why = memory_on_device(self.host, like)
        if self._on_device is None:
            return Reach.nothing, why
        copies = isinstance(self._on_device, CopiedMemory) and self.host.size > 1
        return Reach.copies if copies else Reach.in_place, why

    def memory_of(self, rows: Tensor) -> HostMemory:
        if not devices.on_device(rows):
            return self._shared
        assert self._on_device is not None, "plans on devices are made after ask_device()"
        return self._on_device

    def begin_expand(
        self, stage: str, plan: ExchangePlan, route: Route, rows: Tensor, form: Form, crossings: Sequence[int]
    ) -> Expanding:
        if self._expanding is not None:
            self._expanding.finish()
        self._expanding = _HostExpanding(self, stage, plan, route, rows, form, crossings)
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
        form: Form,
        order: Sequence[int],
    ) -> None:
        super().__init__(plan, route)
        self._stage, self._memory, self._waits = stage, transport.memory_of(rows), transport.waits
        self._crossings = Crossings(transport.waits, f"{stage}, rows between hosts", plan, route.leg, back=False)
        with transport.waits.stage(f"{stage}, rows inside the host"):
            own = self._memory.take("own", _on_host(route).staged, form.sent_width, form.sent)
            held = self._memory.take("held", _on_host(route).arrived, form.sent_width, form.sent)
        coded, leaving = form.leave(rows, route.leg, own)
        for crossing in order:
            self._crossings.start(crossing, held, leaving(crossing))
        if coded is not own:
            own.copy_(coded)
        with transport.waits.stage(f"{stage}, rows inside the host"):
            self.sources = self._memory.share("own", "held")
        self._finished = False

    def arrived(self, crossing: int) -> None:
        if self._finished:
            raise InvalidArgument(
                "another exchange of this ExpertParallel began before this stream had ended: end its loop (or its "
                "backward) first, or use an ExpertParallel of its own"
            )
        self._crossings.wait(crossing)
        with self._waits.stage(f"{self._stage}, rows inside the host"):
            self._memory.wrote("held")

    def finish(self) -> None:
        if not self._finished:
            self._finished = True
            self._crossings.wait_all()
            with self._waits.stage(f"{self._stage}, end inside the host"):
                self._memory.end()


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
        self._stage, self._travels_as = stage, travels_as
        self._memory, self._waits = transport.memory_of(rows), transport.waits
        self._crossings = Crossings(transport.waits, f"{stage}, sums between hosts", plan, route.leg, back=True)
        with self._waits.stage(f"{stage}, partial sums inside the host"):
            self._partial = self._memory.take("partial", _on_host(route).partials, rows.shape[1], torch.float32)
        self._begins = [route.own.n]
        for terms in route.leaving:
            self._begins.append(self._begins[-1] + terms.n)
        self._sources: list[Tensor] = []
        self._returned = rows.new_empty((route.leg.send_bounds[-1], rows.shape[1]), dtype=travels_as)
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
            self._memory.end()

    def _stand(self) -> None:
        """Returns once the partial sums of all ranks of the host stand in the sources."""
        with self._waits.stage(f"{self._stage}, partial sums inside the host"):
            if self._sources:
                self._memory.wrote("partial")
            else:
                self._sources = self._memory.share("partial")
