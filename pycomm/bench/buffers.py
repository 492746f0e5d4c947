"""A rank's memory for one case: what goes in, and the exact oracle of what must come out. Numpy alone.

Values are whole numbers that every type represents, also in every partial sum, so that each library must give the very
bits, in whatever order it adds. They depend on place and rank: a piece of a wrong rank or at a wrong place is a wrong
number. For a reduction one rank in turn, place by place, gives something else than the others (a missing or doubled
contribution shows), and the result has a closed form for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pycomm.bench.cases import IN_PLACE, Case

Array = NDArray[Any]
PERIOD: Final = 61  # of the values along the places; a prime, so that pieces of other sizes do not repeat it
_TILE: Final = 1 << 16  # elements filled or compared at once


@dataclass(frozen=True)
class _Piece:
    """`array` holds the periodic values of `table` from place `begin` on."""

    array: Array
    table: Array
    begin: int = 0

    def parts(self) -> Iterator[tuple[slice, Array]]:
        period = len(self.table)
        step = max(_TILE // period, 1) * period
        offset = self.begin % period
        tile = np.resize(self.table, step + period)[offset : offset + step]
        for at in range(0, len(self.array), step):
            length = min(step, len(self.array) - at)
            yield slice(at, at + length), tile[:length]


class Buffers:
    """input and output of one rank, one-dimensional arrays of the type's raw bits; empty where the rank has none.

    In place they overlap as the collective has it: the same array, or one the piece of the other. `a`, `b`: memory that
    several Buffers of a case share, each numel elements."""

    def __init__(self, case: Case, placement: str, rank: int, a: Array, b: Array) -> None:
        self.case, self.rank = case, rank
        in_place = placement == IN_PLACE
        each = case.count
        mine = slice(rank * each, (rank + 1) * each)
        at_root = rank == case.root
        nothing = a[:0]
        name = case.collective.removeprefix("overlap_")
        if name in ("all_reduce", "reduce", "broadcast", "latency", "bandwidth"):
            self.input, self.output = (b, b) if in_place or case.pair is not None else (a, b)
        elif name in ("reduce_scatter", "scatter"):
            holds = name == "reduce_scatter" or at_root
            self.input = a if holds else nothing
            self.output = a[mine] if in_place and holds else b[:each]
        elif name in ("all_gather", "gather"):
            holds = name == "all_gather" or at_root
            self.output = b if holds else nothing
            self.input = b[mine] if in_place and holds else a[:each]
        else:
            self.input, self.output = a, b
        self._inputs = list(self._given(name, each))
        self._outputs = list(self._expected(name, each))

    @property
    def exact(self) -> bool:
        """Whether the type can hold the exact result of this many ranks."""
        summed = self.case.kind.reduces and self.case.op in ("sum", "avg")
        return not summed or self.case.n_ranks <= self.case.element.exact

    def fill(self) -> None:
        """What goes in; where a result is to stand, bits that no result has."""
        self.output.view(np.uint8)[:] = 0xFF
        for piece in self._inputs:
            for where, values in piece.parts():
                piece.array[where] = values

    def wrong(self) -> int:
        """Elements of this rank's output that are not what they must be."""
        bits = f"u{self.case.element.nbytes}"
        return sum(
            int(np.count_nonzero(piece.array[where].view(bits) != values.view(bits)))
            for piece in self._outputs
            for where, values in piece.parts()
        )

    def zero(self) -> None:
        """Repeated sums in place do not grow from here."""
        self.input[:] = 0
        self.output[:] = 0

    def _given(self, name: str, each: int) -> Iterator[_Piece]:
        if name in ("all_gather", "gather"):
            yield _Piece(self.input, self._contribution(self.rank), self.rank * each)
        elif self.case.pair is not None:
            if self.rank == self.case.pair[0]:
                yield _Piece(self.input, self._contribution(self.rank))
        elif name != "broadcast" or self.rank == self.case.root:
            yield _Piece(self.input, self._contribution(self.rank))

    def _expected(self, name: str, each: int) -> Iterator[_Piece]:
        case, rank, out = self.case, self.rank, self.output
        mine = rank * each
        match name:
            case "all_reduce":
                yield _Piece(out, self._result())
            case "reduce" if rank == case.root:
                yield _Piece(out, self._result())
            case "reduce_scatter":
                yield _Piece(out, self._result(), mine)
            case "broadcast":
                yield _Piece(out, self._contribution(case.root))
            case "scatter":
                yield _Piece(out, self._contribution(case.root), mine)
            case "all_gather" | "gather" if len(out):
                for r in range(case.n_ranks):
                    yield _Piece(out[r * each : (r + 1) * each], self._contribution(r), r * each)
            case "all_to_all":
                for r in range(case.n_ranks):
                    yield _Piece(out[r * each : (r + 1) * each], self._contribution(r), mine)
            case "sendrecv":
                yield _Piece(out, self._contribution((rank - 1) % case.n_ranks))
            case "latency" | "bandwidth" if case.pair is not None and rank in case.pair:
                yield _Piece(out, self._contribution(case.pair[0]))

    def _contribution(self, rank: int) -> Array:
        """One period of what a rank gives."""
        element, n = self.case.element, self.case.n_ranks
        places = np.arange(PERIOD * n)
        if not self.case.kind.reduces:
            return element.encode((places % PERIOD + 3 * rank) % (min(element.exact, 1 << 20) + 1))
        base, special = self._base(), places % n == rank
        given, others = {
            "sum": (base + n, base),
            "avg": (base + n, base),
            "product": (base + 1, np.ones_like(base)),
            "min": (base, base + 1),
            "max": (base + 1, base),
            "band": (base, np.full_like(base, (1 << 7) - 1)),
            "bor": (base, np.zeros_like(base)),
            "bxor": (base, np.zeros_like(base)),
        }[self.case.op]
        return element.encode(np.where(special, given, others))

    def _result(self) -> Array:
        """One period of the reduction's result, for all ranks' contributions."""
        base, n = self._base(), self.case.n_ranks
        result = {"sum": n * (base + 1), "avg": base + 1, "product": base + 1, "max": base + 1}.get(self.case.op, base)
        return self.case.element.encode(result)

    def _base(self) -> NDArray[np.int64]:
        """0 .. limit-1 along the places, with limit × n ranks (a sum's largest value) still exact."""
        exact, n = self.case.element.exact, self.case.n_ranks
        limit = exact // n if self.case.op in ("sum", "avg") else exact
        return np.arange(PERIOD * n) % PERIOD % max(limit, 1)
