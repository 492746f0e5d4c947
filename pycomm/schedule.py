"""What a collective promises, and the schedule that keeps the promise: rounds of transfers over all ranks.

Planners write schedules with the combinators below; check, simulate and project read them. A schedule knows chunk ids,
never sizes, so one schedule serves every size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pycomm.errors import ScheduleError

TRANSFER: Final = np.dtype([("round", "<i4"), ("src", "<i4"), ("dst", "<i4"), ("chunk", "<i4"), ("reduce", "?")])
Transfers = NDArray[np.void]
Holders = NDArray[np.bool_]  # [n_ranks, n_chunks]: which rank holds a value of which chunk


@dataclass(frozen=True, eq=False)
class Schedule:
    """One collective over ranks 0 .. n_ranks-1. `transfers` ([n], TRANSFER) is sorted by round and read-only.

    All transfers of a round read the values from the start of that round; a copy replaces the chunk's value at dst, a
    reduce combines it with what dst holds. Nothing is proved here: `pycomm.check.check` does that."""

    collective: str
    algorithm: str
    n_ranks: int
    n_chunks: int
    root: int
    transfers: Transfers = field(repr=False)

    def __post_init__(self) -> None:
        if self.transfers.dtype != TRANSFER or self.transfers.ndim != 1:
            raise ScheduleError(
                f"{self.collective}/{self.algorithm}: transfers are {self.transfers.ndim}-d {self.transfers.dtype}; "
                f"make them 1-d of dtype TRANSFER, with schedule.transfers()"
            )
        rows = self.transfers.view()
        rows.flags.writeable = False
        object.__setattr__(self, "transfers", rows)

    @property
    def n_rounds(self) -> int:
        return n_rounds(self.transfers)

    def digest(self) -> str:
        """8 hexadecimal digits: equal for schedules that move the same in the same order, on every machine."""
        head = f"{self.collective} {self.n_ranks} {self.n_chunks} {self.root} "
        return hashlib.sha256(head.encode() + self.transfers.tobytes()).hexdigest()[:8]


# ---- what each collective promises ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collective:
    """The promise of one collective. `start` and `end` map (n_ranks, n_chunks, root) to Holders: who starts with its
    contribution to a chunk, and who must hold all contributions to it at the end. `n_chunks` is fixed by the ranks
    ("ranks": n, "pairs": n*n) or "any"."""

    reduces: bool
    rooted: bool
    n_chunks: Literal["any", "ranks", "pairs"]
    start: Callable[[int, int, int], Holders]
    end: Callable[[int, int, int], Holders]


def _everyone(n_ranks: int, n_chunks: int, root: int) -> Holders:
    return np.ones((n_ranks, n_chunks), np.bool_)


def _root_only(n_ranks: int, n_chunks: int, root: int) -> Holders:
    holders = np.zeros((n_ranks, n_chunks), np.bool_)
    holders[root] = True
    return holders


def _own(n_ranks: int, n_chunks: int, root: int) -> Holders:
    return np.eye(n_ranks, dtype=np.bool_)


def _own_row(n_ranks: int, n_chunks: int, root: int) -> Holders:
    return np.repeat(np.eye(n_ranks, dtype=np.bool_), n_ranks, axis=1)


def _own_column(n_ranks: int, n_chunks: int, root: int) -> Holders:
    return np.tile(np.eye(n_ranks, dtype=np.bool_), n_ranks)


COLLECTIVES: Final[Mapping[str, Collective]] = MappingProxyType(
    {
        "all_reduce": Collective(True, False, "any", _everyone, _everyone),
        "reduce": Collective(True, True, "any", _everyone, _root_only),
        "broadcast": Collective(False, True, "any", _root_only, _everyone),
        "reduce_scatter": Collective(True, False, "ranks", _everyone, _own),
        "all_gather": Collective(False, False, "ranks", _own, _everyone),
        "gather": Collective(False, True, "ranks", _own, _root_only),
        "scatter": Collective(False, True, "ranks", _root_only, _own),
        "all_to_all": Collective(False, False, "pairs", _own_row, _own_column),
    }
)


def required_chunks(collective: str, n_ranks: int) -> int | None:
    """How many chunks the collective has on n_ranks; None where the planner is free."""
    return {"any": None, "ranks": n_ranks, "pairs": n_ranks * n_ranks}[COLLECTIVES[collective].n_chunks]


def chunk_nbytes(schedule: Schedule, nbytes: ArrayLike) -> NDArray[np.int64]:
    """Bytes of each chunk when the pieces are near-equal: [n_chunks, *shape of nbytes].

    `nbytes` is the longest buffer a rank passes in or gets: the tensor of all_reduce, reduce and broadcast, all n
    pieces of the gathering and scattering collectives, one rank's n pieces of all_to_all."""
    n_pieces = schedule.n_ranks if schedule.collective == "all_to_all" else schedule.n_chunks
    total = np.asarray(nbytes, np.int64)
    piece = np.arange(schedule.n_chunks).reshape((-1,) + (1,) * total.ndim) % n_pieces
    return np.asarray(total // n_pieces + (piece < total % n_pieces), np.int64)


# ---- combinators: small schedules into larger ones ------------------------------------------------------------------


def transfers(
    round: ArrayLike, src: ArrayLike, dst: ArrayLike, chunk: ArrayLike, reduce: ArrayLike = False
) -> Transfers:
    """One transfer for each element of the arguments, broadcast together; sorted by round."""
    columns = np.broadcast_arrays(round, src, dst, chunk, reduce)
    rows = np.empty(columns[0].size, TRANSFER)
    for name, column in zip(TRANSFER.names or (), columns, strict=True):
        rows[name] = column.ravel()
    return _by_round(rows)


def n_rounds(rows: Transfers) -> int:
    return int(rows["round"].max()) + 1 if len(rows) else 0


def in_parallel(parts: Iterable[Transfers]) -> Transfers:
    """All parts at once, round by round."""
    return _by_round(np.concatenate([np.empty(0, TRANSFER), *parts]))


def in_sequence(*parts: Transfers) -> Transfers:
    """Each part in the rounds after the one before it. The engine overlaps them: it waits per chunk, not per round."""
    placed, begin = [], 0
    for part in parts:
        placed.append(_later(part, begin))
        begin += n_rounds(part)
    return in_parallel(placed)


def in_pipeline(parts: Iterable[Transfers], stage: int) -> Transfers:
    """Each part `stage` rounds behind the one before it."""
    return in_parallel(_later(part, index * stage) for index, part in enumerate(parts))


def without_empty_rounds(rows: Transfers) -> Transfers:
    out = rows.copy()
    out["round"] = np.unique(rows["round"], return_inverse=True)[1]
    return out


def place(rows: Transfers, ranks: ArrayLike, chunks: Sequence[ArrayLike] | NDArray[Any]) -> Transfers:
    """`rows` played by `ranks`: rank r becomes ranks[r], and chunk c becomes every chunk of chunks[c] (also none)."""
    rank_of = np.asarray(ranks)
    groups = [np.asarray(group, np.int64).ravel() for group in chunks]
    lengths = np.array([len(group) for group in groups], np.int64)
    begins = np.cumsum(lengths) - lengths
    repeats = lengths[rows["chunk"]]
    out = np.repeat(rows, repeats)
    within = np.arange(len(out)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    out["chunk"] = np.concatenate([np.empty(0, np.int64), *groups])[begins[out["chunk"]] + within]
    out["src"], out["dst"] = rank_of[out["src"]], rank_of[out["dst"]]
    return out


def reverse(rows: Transfers, reduce: bool) -> Transfers:
    """Every transfer backwards, the last first. Where `rows` carries each chunk from its owner to every other rank
    once, the reversal with `reduce` brings every contribution back to the owner once: all_gather becomes
    reduce_scatter, broadcast becomes reduce; without `reduce` scatter becomes gather."""
    out = rows[::-1].copy()
    out["round"] = n_rounds(rows) - 1 - out["round"]
    out["src"], out["dst"], out["reduce"] = rows["dst"][::-1], rows["src"][::-1], reduce
    return out


def first_copies(rows: Transfers, start: Holders) -> Transfers:
    """`rows` (copies only) without those that bring a rank a chunk it already holds."""
    key = rows["dst"].astype(np.int64) * start.shape[1] + rows["chunk"]
    first = np.zeros(len(rows), np.bool_)
    first[np.unique(key, return_index=True)[1]] = True
    kept: Transfers = rows[first & ~start[rows["dst"], rows["chunk"]]]
    return kept


def _later(rows: Transfers, rounds: int) -> Transfers:
    out = rows.copy()
    out["round"] += rounds
    return out


def _by_round(rows: Transfers) -> Transfers:
    return rows[np.argsort(rows["round"], kind="stable")]
