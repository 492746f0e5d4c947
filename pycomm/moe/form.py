"""How rows look while they travel, and what an exchange does with them in the pass that codes or decodes them: with
fp8 on a device a row is coded into all its places at once, and decoded where its experts read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pycomm import _C
from pycomm.moe.rows import (
    coded_width,
    copy_rows,
    decode_fp8,
    empty_rows,
    encode_fp8,
    expand_coded_rows,
    fuses,
    pack_coded_rows,
)
from pycomm.moe.tables import Leg

Wire = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Form:
    """Of rows of `width` values of dtype, which travel as `sent_width` values of sent; uint8: in fp8."""

    width: int
    dtype: torch.dtype
    sent_width: int
    sent: torch.dtype
    fused: bool  # coding and decoding are one pass with packing and spreading

    @staticmethod
    def of(rows: Tensor, wire: Wire | None) -> Form:
        width, dtype = rows.shape[1], rows.dtype
        if wire == "fp8":
            return Form(width, dtype, coded_width(width), torch.uint8, fuses(rows))
        return Form(width, dtype, width, torch.bfloat16 if wire and dtype.itemsize > 2 else dtype, False)

    def leave(self, rows: Tensor, leg: Leg, own: Tensor | None) -> tuple[Tensor, Callable[[int], Tensor]]:
        """The rows as they travel, and of each crossing those that leave, in the leg's order. own: where the former may
        be written."""
        if not self.fused:
            coded = encode_fp8(rows) if self.sent == torch.uint8 else rows.to(self.sent)
            return coded, lambda crossing: packed(leg, crossing, coded)
        own = rows.new_empty(len(rows), self.sent_width, dtype=self.sent) if own is None else own
        leaving = rows.new_empty(len(leg.index), self.sent_width, dtype=self.sent)
        pack_coded_rows([own, leaving], *leg.places(len(rows)), rows)
        return own, lambda crossing: leaving[leg.send_bounds[crossing] : leg.send_bounds[crossing + 1]]

    def empty(self, memory: _C.RowMemory, like: Tensor, n: int) -> Tensor:
        """What spread() fills: n rows on like's device."""
        if self.fused:
            return like.new_empty(n, self.width, dtype=self.dtype)
        return empty_rows(memory, like, n, self.sent_width, self.sent)

    def spread(self, out: Tensor, sources: Sequence[Tensor], source: Tensor, rows: Tensor, to: Tensor | None) -> Tensor:
        """copy_rows() of sources as they travel; out: of empty()."""
        if self.fused:
            return expand_coded_rows(out, sources, source, rows, to)
        return copy_rows(out, sources, source, rows, to)

    def arrived(self, out: Tensor) -> Tensor:
        """What spread() has filled, in the rows' own type."""
        if self.sent != torch.uint8 or self.fused:
            return out.to(self.dtype)
        return decode_fp8(out, self.width, self.dtype)


def packed(leg: Leg, crossing: int, rows: Tensor) -> Tensor:
    index = leg.index[leg.send_bounds[crossing] : leg.send_bounds[crossing + 1]]
    return copy_rows(rows.new_empty((len(index), rows.shape[1])), [rows], torch.zeros_like(index), index)
