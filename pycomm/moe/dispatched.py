"""What a dispatch gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pycomm.moe.tables import ExchangePlan


@dataclass(frozen=True)
class Dispatched:
    """What this rank's experts get.

    rows [n_out, H]. In layout "expert": those of the first expert, then of the second, .., each in (source rank, token)
    order and padded with zeros to a multiple of align. "token": one row for each of a token's experts here, in (source
    rank, token, expert) order. "rank": one row a token, in (source rank, token) order.

    weights, float32, with gradients: the router's. "expert" and "token": [n_out], one a row, 0 for padding; combine()
    applies them. "rank": [n_out, K], one for each of the row's `experts` [n_out, K] (local numbers, -1 beyond), to be
    applied by the caller, whose expert_out is then the sum over the row's experts here.
    experts: in layout "token" [n_out]; None in layout "expert", where expert_counts says it."""

    rows: Tensor
    weights: Tensor
    experts: Tensor | None
    plan: ExchangePlan
    anchor: Tensor
    home_weights: Tensor

    @property
    def expert_counts(self) -> Tensor:
        """int64 [local experts], on the rows' device: rows of each, without padding."""
        return self.plan.expert_counts

    @property
    def expert_offsets(self) -> Tensor:
        """int64 [local experts + 1]: where each expert's rows begin in layout "expert"."""
        return self.plan.expert_offsets

    @property
    def sizes(self) -> tuple[int, ...]:
        """The same as numbers of the host: rows.split(sizes) are the experts' parts in layout "expert"."""
        return self.plan.sizes
