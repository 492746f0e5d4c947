"""An exchange's movements by a plan: rows, in their form on the wire, and the weights that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pycomm import _C
from pycomm.group import Group
from pycomm.moe.backward import Backwards
from pycomm.moe.cost import Dedup
from pycomm.moe.form import Form, Wire
from pycomm.moe.rows import fuses, row_dots, weigh_rows, weighted
from pycomm.moe.tables import ExchangePlan, Expansion, Route
from pycomm.moe.transport import Expanding, Reducing, Transport
from pycomm.moe.waits import Waits


class Movement:
    """memory: of output rows."""

    def __init__(
        self,
        waits: Waits,
        memory: _C.RowMemory,
        transports: dict[Dedup, Transport],
        wire: Wire | None,
        n_hosts: int,
    ) -> None:
        self.waits, self.memory, self.transports, self.wire = waits, memory, transports, wire
        self.backwards = Backwards(waits)
        self._beside = isinstance(waits.group, Group) and n_hosts > 1  # weights travel beside rows

    # Rows.

    def expand(
        self, stage: str, plan: ExchangePlan, route: Route, rows: Tensor, then: Callable[[], None] | None = None
    ) -> Tensor:
        """The plan's output rows [n_out, H] of rows [T, H], as they come out of the wire; zeros for padding. then: see
        Transport."""
        form = Form.of(rows, self.wire)
        out = form.empty(self.memory, rows, plan.n_out)
        self.transports[plan.mode].expand(
            stage,
            plan,
            route,
            rows,
            form,
            lambda sources, of: form.spread(out, sources, of.source, of.rows, of.to),
            then,
        )
        return form.arrived(out)

    def expand_weighted(
        self,
        stage: str,
        plan: ExchangePlan,
        route: Route,
        rows: Tensor,
        weights: Tensor,
        expert_out: Tensor,
        with_dots: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The output rows × weights [n_out], in expert_out's type; and with_dots their dot products with expert_out
        [n_out, H], float32."""
        form = Form.of(rows, self.wire)
        if not _weighs(form, expert_out):
            found = self.expand(stage, plan, route, rows)
            dots = row_dots(found, expert_out) if with_dots else None
            return weighted(found, weights, expert_out.dtype), dots
        out = torch.empty_like(expert_out)
        dots = torch.empty_like(weights) if with_dots else None

        def spread(sources: Sequence[Tensor], of: Expansion) -> Tensor:
            return weigh_rows(out, dots, sources, of.source, of.rows, of.to, of.to, weights, expert_out)

        self.transports[plan.mode].expand(stage, plan, route, rows, form, spread)
        return out, dots

    def begin_expand(
        self, stage: str, plan: ExchangePlan, route: Route, rows: Tensor, crossings: Sequence[int]
    ) -> Arriving:
        """expand() or expand_weighted() in steps."""
        form = Form.of(rows, self.wire)
        under_way = self.transports[plan.mode].begin_expand(stage, plan, route, rows, form, crossings)
        return Arriving(under_way, self.memory, form)

    def reduce(
        self,
        stage: str,
        plan: ExchangePlan,
        route: Route,
        rows: Tensor,
        weights: Tensor | None,
        home_weights: Tensor | None,
    ) -> Tensor:
        """The sums [T, H] over output rows [n_out, H], as Transport.reduce()."""
        travels_as = self._travels_as(rows.dtype)
        return self.transports[plan.mode].reduce(stage, plan, route, rows, weights, home_weights, travels_as)

    def begin_reduce(
        self,
        stage: str,
        plan: ExchangePlan,
        route: Route,
        rows: Tensor,
        weights: Tensor | None,
        home_weights: Tensor | None,
    ) -> Reducing:
        """The same in steps."""
        travels_as = self._travels_as(rows.dtype)
        return self.transports[plan.mode].begin_reduce(stage, plan, route, rows, weights, home_weights, travels_as)

    def _travels_as(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if self.wire and dtype.itemsize > 2 else dtype

    # Weights, one a slot.

    def start_weights(self, stage: str, plan: ExchangePlan, weights: Tensor) -> Callable[[], Tensor]:
        """Begins to move the weights [T, K] to the ranks of their experts; what it returns waits and gives [n_slots],
        those of this rank's experts."""
        leg = plan.scalars
        slots = weights.new_empty(plan.n_slots)
        return self._start(f"{stage}, weights", slots, weights.flatten()[leg.index], leg.receives[0], leg.sends[0])

    def start_back(self, stage: str, plan: ExchangePlan, slots: Tensor) -> Callable[[], Tensor]:
        """[T*K]: the other way, 0 for slots that went nowhere."""
        leg = plan.scalars
        returned = slots.new_empty(len(leg.index))
        arrived = self._start(f"{stage}, weights", returned, slots, leg.sends[0], leg.receives[0])
        return lambda: slots.new_zeros(plan.topk_idx.numel()).index_copy(0, leg.index, arrived())

    def _start(
        self, name: str, output: Tensor, sent: Tensor, receives: Sequence[int], sends: Sequence[int]
    ) -> Callable[[], Tensor]:
        group = self.waits.group
        if not isinstance(group, Group) or not self._beside:
            self.waits.all_to_all(name, output, sent, receives, sends)
            return lambda: output
        work = self.waits.start_all_to_all(group, name, output, sent, receives, sends)

        def arrived() -> Tensor:
            with self.waits.stage(name):
                work.wait()
            return output

        return arrived


class Arriving:
    """What begin_expand() began."""

    def __init__(self, under_way: Expanding, memory: _C.RowMemory, form: Form) -> None:
        self._under_way, self._memory, self._form = under_way, memory, form
        self.finish = under_way.finish
        self.meanwhile = under_way.meanwhile

    def stage(self, number: int) -> Tensor:
        """That stage's rows, in the order of their places in the output."""
        form, expansions = self._form, self._under_way.route.expansions
        out = form.empty(self._memory, self._under_way.sources[0], len(expansions[number].to))
        return form.arrived(
            self._under_way.stage(number, lambda sources, of: form.spread(out, sources, of.source, of.rows, None))
        )

    def stage_weighted(self, number: int, weights: Tensor, expert_out: Tensor, dots: Tensor) -> Tensor:
        """Those rows × their places' weights, in expert_out's type. At their places, dots gets their dot products with
        expert_out."""
        to = self._under_way.route.expansions[number].to
        if not _weighs(self._form, expert_out):
            found = self.stage(number)
            dots[to] = row_dots(found, expert_out, to)
            return weighted(found, weights[to], expert_out.dtype)
        out = expert_out.new_empty(len(to), expert_out.shape[1])
        return self._under_way.stage(
            number,
            lambda sources, of: weigh_rows(out, dots, sources, of.source, of.rows, None, to, weights, expert_out),
        )


def _weighs(form: Form, expert_out: Tensor) -> bool:
    """Whether rows are weighed in the pass that spreads them."""
    return form.sent == form.dtype == expert_out.dtype and fuses(expert_out)
