"""An exchange's movements by a plan: rows, in their form on the wire, and the weights that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from pycomm import _C
from pycomm.group import Group
from pycomm.moe.backward import Backwards
from pycomm.moe.cost import Dedup
from pycomm.moe.rows import decode_fp8, empty_rows, encode_fp8
from pycomm.moe.tables import ExchangePlan, Route
from pycomm.moe.transport import Expanding, Reducing, Transport
from pycomm.moe.waits import Waits

Wire = Literal["bf16", "fp8"]


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
        """The plan's output rows [n_out, H] of rows [T, H], as they come out of the wire. then: see Transport."""
        found = self.transports[plan.mode].expand(stage, plan, route, self._coded(rows), then)
        return self._decoded(found, rows.shape[1], rows.dtype)

    def begin_expand(
        self, stage: str, plan: ExchangePlan, route: Route, rows: Tensor, crossings: Sequence[int]
    ) -> Arriving:
        """The same in steps."""
        under_way = self.transports[plan.mode].begin_expand(stage, plan, route, self._coded(rows), crossings)
        return Arriving(under_way, self.memory, lambda found: self._decoded(found, rows.shape[1], rows.dtype))

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

    def _coded(self, rows: Tensor) -> Tensor:
        return encode_fp8(rows) if self.wire == "fp8" else rows.to(self._travels_as(rows.dtype))

    def _decoded(self, found: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        return decode_fp8(found, width, dtype) if self.wire == "fp8" else found.to(dtype)

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

    def __init__(self, under_way: Expanding, memory: _C.RowMemory, decoded: Callable[[Tensor], Tensor]) -> None:
        self._under_way, self._memory, self._decoded = under_way, memory, decoded
        self.finish = under_way.finish
        self.meanwhile = under_way.meanwhile

    def stage(self, number: int) -> Tensor:
        """That stage's rows, in the order of their places in the output."""
        n = len(self._under_way.route.expansions[number].to)
        rows = empty_rows(self._memory, self._under_way.sources[0], n)
        return self._decoded(self._under_way.stage(number, rows, None))
