"""How rows move, here straight from rank to rank; through_hosts.py sends them once to each host.

Both give the same bits. With o_e the output of expert e for a token, w_e its weight, and everything summed in order:

    of a rank:  p_r = Σ_e w_e × o_e     over the token's experts on the rank, in the rank's order, in fp32
    of a host:  q_h = Σ_r p_r           over the host's ranks, in fp32, then rounded once to the type that it travels in
    in all:     y = Σ_h q_h             over hosts, in fp32, rounded once to the output's type

What travels differs: without deduplication every o_e, with it the p_r, through hosts the q_h.

expand() and reduce() are whole; begin_expand() and begin_reduce() give the same in steps, a crossing at a time, so that
a stream (stream.py) works on one stage while others cross. All ranks take the same steps in the same order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pycomm import devices
from pycomm.group import Group
from pycomm.moe.form import Form
from pycomm.moe.rows import Terms, combine_rows, copy_rows
from pycomm.moe.tables import ExchangePlan, Expansion, Leg, Route
from pycomm.moe.waits import Waits

Meanwhile = Callable[[Any], None]  # what it is given is a Work: it returns once that is completed, or before
# What becomes of a stage's rows, which lie in these sources as they travel.
Spread = Callable[[Sequence[Tensor], Expansion], Tensor]


class Expanding(ABC):
    """Rows on their way to their experts."""

    _crossings: Crossings

    def __init__(self, plan: ExchangePlan, route: Route) -> None:
        self.plan, self.route = plan, route
        self.sources: list[Tensor] = []

    def meanwhile(self, do: Meanwhile) -> None:
        """Waits for crossings do something else first."""
        self._crossings.meanwhile = do

    @abstractmethod
    def arrived(self, crossing: int) -> None:
        """Returns once the sources have that crossing's rows."""

    @abstractmethod
    def finish(self) -> None:
        """After the last stage, or instead of it."""

    def stage(self, number: int, spread: Spread) -> Tensor:
        crossing = self.plan.crossing_of_stage[number]
        if crossing is not None:
            self.arrived(crossing)
        return spread(self.sources, self.route.expansions[number])


class Reducing(ABC):
    """Sums on their way home. rows [n_out, H]: output rows, of which a step needs those that its sums are made of."""

    _crossings: Crossings

    def __init__(
        self, plan: ExchangePlan, route: Route, rows: Tensor, weights: Tensor | None, home_weights: Tensor | None
    ) -> None:
        self.plan, self.route, self.rows, self.weights, self.home_weights = plan, route, rows, weights, home_weights

    def meanwhile(self, do: Meanwhile) -> None:
        """As Expanding's."""
        self._crossings.meanwhile = do

    @abstractmethod
    def leave(self, crossing: int) -> None:
        """Sends that crossing's sums."""

    @abstractmethod
    def finish(self) -> Tensor:
        """[T, H], after all have left."""

    def partial_sums(self, terms: Terms, out: Tensor) -> Tensor:
        weights = None if self.weights is None else self.weights[terms.rows]
        return combine_rows(out, [self.rows], terms, weights)


class Transport(ABC):
    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    @abstractmethod
    def begin_expand(
        self, stage: str, plan: ExchangePlan, route: Route, rows: Tensor, form: Form, crossings: Sequence[int]
    ) -> Expanding:
        """From each token's row [T, H]; form: of these. crossings: all, in the order in which they are sent."""

    @abstractmethod
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
        """Over output rows [n_out, H], to sums in rows' dtype. weights: float32 [n_out]; home_weights: the same numbers
        for this rank's own slots, by (token, place)."""

    def expand(
        self,
        stage: str,
        plan: ExchangePlan,
        route: Route,
        rows: Tensor,
        form: Form,
        spread: Spread,
        then: Callable[[], None] | None = None,
    ) -> None:
        """All stages. then: called once all rows are on their way."""
        under_way = self.begin_expand(stage, plan, route, rows, form, range(plan.n_chunks))
        if then is not None:
            then()
        stages = range(len(route.expansions))
        for number in sorted(stages, key=lambda each: plan.crossing_of_stage[each] is not None):  # what is here first
            under_way.stage(number, spread)
        under_way.finish()

    def reduce(
        self,
        stage: str,
        plan: ExchangePlan,
        route: Route,
        rows: Tensor,
        weights: Tensor | None,
        home_weights: Tensor | None,
        travels_as: torch.dtype,
    ) -> Tensor:
        """The sums [T, H], as of begin_reduce()."""
        under_way = self.begin_reduce(stage, plan, route, rows, weights, home_weights, travels_as)
        for crossing in range(plan.n_chunks):
            under_way.leave(crossing)
        return under_way.finish()


def sums(terms: Terms, sources: Sequence[Tensor], dtype: torch.dtype, weights: Tensor | None = None) -> Tensor:
    out = sources[0].new_empty((terms.n, sources[0].shape[1]), dtype=dtype)
    return combine_rows(out, sources, terms, weights)


class Crossings:
    """The all_to_alls of one leg. at_once: each is waited for where it starts, for want of a wire to wait for. On a
    device no wait is the host's: it is the order of the stream that the kernels are on."""

    def __init__(
        self, waits: Waits, stage: str, plan: ExchangePlan, leg: Leg, *, back: bool, at_once: bool = False
    ) -> None:
        self._waits, self._stage, self._plan, self._at_once = waits, stage, plan, at_once
        self._sends, self._receives = (leg.receives, leg.sends) if back else (leg.sends, leg.receives)
        self._bounds = leg.send_bounds if back else leg.receive_bounds
        self._works: dict[int, Any] = {}
        self.meanwhile: Meanwhile | None = None

    def start(self, crossing: int, output: Tensor, rows: Tensor) -> None:
        """output: of all crossings."""
        part = output[self._bounds[crossing] : self._bounds[crossing + 1]]
        arguments = (self._name(crossing), part, rows, self._receives[crossing], self._sends[crossing])
        group = self._waits.group
        if isinstance(group, Group) and not self._at_once:
            self._works[crossing] = self._waits.start_all_to_all(group, *arguments)
        else:
            self._waits.all_to_all(*arguments)

    def wait(self, crossing: int) -> None:
        work = self._works.pop(crossing, None)
        if work is not None:
            if self.meanwhile is not None:
                self.meanwhile(work)
            with self._waits.stage(self._name(crossing)):
                work.wait()

    def wait_all(self) -> None:
        for crossing in list(self._works):
            self.wait(crossing)

    def _name(self, crossing: int) -> str:
        n = self._plan.n_chunks
        return self._stage if n == 1 else f"{self._stage}, chunk {crossing + 1} of {n}"


class Direct(Transport):
    def __init__(self, waits: Waits, one_host: bool) -> None:
        super().__init__(waits)
        self._one_host = one_host

    def begin_expand(
        self, stage: str, plan: ExchangePlan, route: Route, rows: Tensor, form: Form, crossings: Sequence[int]
    ) -> Expanding:
        under_way = self._crossings(stage, plan, route, rows, back=False)
        return _DirectExpanding(under_way, plan, route, rows, form, crossings)

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
        crossings = self._crossings(stage, plan, route, rows, back=True)
        return _DirectReducing(crossings, plan, route, rows, weights, home_weights, travels_as)

    def _crossings(self, stage: str, plan: ExchangePlan, route: Route, rows: Tensor, back: bool) -> Crossings:
        # On a device a stream of their own costs events, and gains where there is something to compute meanwhile.
        at_once = plan.n_chunks == 1 if devices.on_device(rows) else self._one_host
        return Crossings(self.waits, stage, plan, route.leg, back=back, at_once=at_once)


class _DirectExpanding(Expanding):
    def __init__(
        self, crossings: Crossings, plan: ExchangePlan, route: Route, rows: Tensor, form: Form, order: Sequence[int]
    ) -> None:
        super().__init__(plan, route)
        self._crossings = crossings
        own, leaving = form.leave(rows, route.leg, None)
        arrived = own.new_empty((route.leg.receive_bounds[-1], own.shape[1]))
        for crossing in order:
            crossings.start(crossing, arrived, leaving(crossing))
        self.sources = [own, arrived]

    def arrived(self, crossing: int) -> None:
        self._crossings.wait(crossing)

    def finish(self) -> None:
        self._crossings.wait_all()


class _DirectReducing(Reducing):
    def __init__(
        self,
        crossings: Crossings,
        plan: ExchangePlan,
        route: Route,
        rows: Tensor,
        weights: Tensor | None,
        home_weights: Tensor | None,
        travels_as: torch.dtype,
    ) -> None:
        super().__init__(plan, route, rows, weights, home_weights)
        self._crossings, self._travels_as = crossings, travels_as
        dtype = rows.dtype if plan.mode == "none" else torch.float32
        self._returned = rows.new_empty((route.leg.send_bounds[-1], rows.shape[1]), dtype=dtype)

    def leave(self, crossing: int) -> None:
        width = self.rows.shape[1]
        if self.plan.mode == "none":
            index = self.route.leaving_rows[crossing]
            leaving = self.rows.new_empty((len(index), width))
            copy_rows(leaving, [self.rows], torch.zeros_like(index), index)
        else:
            terms = self.route.leaving[crossing]
            leaving = self.partial_sums(terms, self.rows.new_empty((terms.n, width), dtype=torch.float32))
        self._crossings.start(crossing, self._returned, leaving)

    def finish(self) -> Tensor:
        dtype, levels = self.rows.dtype, list(self.route.home)
        if self.plan.mode == "none":
            self._crossings.wait_all()
            own, returned = sums(levels.pop(0), [self.rows, self._returned], torch.float32, self.home_weights), None
        else:
            terms = self.route.own
            own = self.partial_sums(terms, self.rows.new_empty((terms.n, self.rows.shape[1]), dtype=torch.float32))
            returned = self._returned
            self._crossings.wait_all()
        hosts, tokens = levels
        host_sums = sums(hosts, [own] if returned is None else [own, returned], self._travels_as)
        return host_sums.to(dtype) if self.plan.one_host else sums(tokens, [host_sums], dtype)
