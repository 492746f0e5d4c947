"""check(schedule): the proof, by exact replay, that a schedule keeps its collective's promise; check_coded(): that it
does so with a wire.

Per rank and chunk it follows the set of contributions held, so it holds for every size, dtype and operation."""

from __future__ import annotations

from itertools import pairwise
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from pycomm.errors import ScheduleError
from pycomm.schedule import CODED, COLLECTIVES, Schedule, required_chunks


def check(schedule: Schedule) -> None:
    """Raises ScheduleError at the first transfer that is impossible, races with another of its round, reads a value
    that is not there or adds a contribution twice; and where a rank ends without what the collective promises it."""
    _check_frame(schedule)
    _check_rows(schedule)
    _check_races(schedule)
    _check_end(schedule, _replay(schedule))


def check_coded(schedule: Schedule, host: NDArray[np.int64]) -> None:
    """Raises ScheduleError where a wire would code a value more often than it must, or give ranks different bits.

    host: [n_ranks], equal for ranks of one host; what crosses hosts is coded (csrc/core/wire.h). Each contribution may
    be coded once, on its way to the rank that combines it; each result once, by the rank that made it, which then
    holds what all others decode. So where results are shared: no partial sum that holds coded values crosses hosts,
    nothing is combined once it has been shared across hosts, and all ranks end with one and the same value.
    REQUIRES: check(schedule) passed."""
    if schedule.collective not in CODED:
        raise ScheduleError(f"{schedule.collective} has no wire; {', '.join(CODED)} have one")
    rows, n = schedule.transfers, schedule.n_chunks
    shares = schedule.collective in ("all_reduce", "all_gather")
    crosses = host[rows["src"]] != host[rows["dst"]]
    source = rows["src"].astype(np.int64) * n + rows["chunk"]
    target = rows["dst"].astype(np.int64) * n + rows["chunk"]
    coded = np.zeros(schedule.n_ranks * n, np.bool_)  # whether the value holds anything that was coded
    maker = np.repeat(np.arange(schedule.n_ranks), n)  # the rank that made the value
    version = np.arange(schedule.n_ranks * n)  # tells values apart
    shared_from = np.full(n, np.iinfo(np.int32).max)  # the first round in which a value of the chunk is shared
    sharing = np.flatnonzero(crosses & ~rows["reduce"])
    np.minimum.at(shared_from, rows["chunk"][sharing], rows["round"][sharing])
    bounds = np.flatnonzero(np.diff(rows["round"], prepend=-1, append=np.iinfo(np.int32).max))
    for begin, end in pairwise(bounds.tolist()):
        part = slice(begin, end)
        src, dst, reduces, across = source[part], target[part], rows["reduce"][part], crosses[part]
        again = across & reduces & coded[src]
        late = shares & reduces & (rows["round"][part] >= shared_from[rows["chunk"][part]])
        passed_on = across & ~reduces & (maker[src] != rows["src"][part] if shares else coded[src])
        for wrong, reason in (
            (again, "the partial sum holds values that were coded, and would be coded again"),
            (late, "its chunk has been shared across hosts before it is complete"),
            (passed_on, "its sender did not make the value, so others hold it uncoded or it is coded again"),
        ):
            if wrong.any():
                _refuse(schedule, begin + int(wrong.argmax()), reason)
        coded[dst] = np.where(reduces, coded[src] | coded[dst], coded[src]) | across
        maker[dst] = np.where(reduces, rows["dst"][part], maker[src])
        version[dst] = np.where(reduces, schedule.n_ranks * n + np.arange(begin, end), version[src])
    at_end = version.reshape(schedule.n_ranks, n)
    if shares and len(np.unique(host)) > 1 and np.any(at_end != at_end[0]):
        rank, chunk = (int(i) for i in np.argwhere(at_end != at_end[0])[0])
        raise ScheduleError(
            f"{schedule.collective}/{schedule.algorithm}: ranks 0 and {rank} each make their own result of chunk "
            f"{chunk}; with a wire they would differ, so one rank must make it and send it to all"
        )


def _check_frame(schedule: Schedule) -> None:
    name = f"{schedule.collective}/{schedule.algorithm}"
    if schedule.collective not in COLLECTIVES:
        raise ScheduleError(f"{name}: no such collective; choose from {', '.join(COLLECTIVES)}")
    if schedule.n_ranks < 1:
        raise ScheduleError(f"{name}: n_ranks is {schedule.n_ranks}; a schedule needs at least 1 rank")
    if not 0 <= schedule.root < schedule.n_ranks:
        raise ScheduleError(f"{name}: root {schedule.root} is not among ranks 0 .. {schedule.n_ranks - 1}")
    required = required_chunks(schedule.collective, schedule.n_ranks)
    if schedule.n_chunks < 1 or required not in (None, schedule.n_chunks):
        rule = f"{required} on {schedule.n_ranks} ranks" if required else "at least 1"
        raise ScheduleError(f"{name}: n_chunks is {schedule.n_chunks}; {schedule.collective} needs {rule}")


def _check_rows(schedule: Schedule) -> None:
    rows = schedule.transfers
    for field, limit in (("src", schedule.n_ranks), ("dst", schedule.n_ranks), ("chunk", schedule.n_chunks)):
        outside = np.flatnonzero((rows[field] < 0) | (rows[field] >= limit))
        if len(outside):
            _refuse(schedule, outside[0], f"{field} must be one of 0 .. {limit - 1}")
    to_itself = np.flatnonzero(rows["src"] == rows["dst"])
    if len(to_itself):
        _refuse(schedule, to_itself[0], "a rank cannot send to itself; leave the transfer out")
    steps = np.diff(rows["round"].astype(np.int64), prepend=0)
    if np.any(steps < 0):
        first = int(np.flatnonzero(steps < 0)[0])
        before = f"it follows round {rows['round'][first - 1]}" if first else "rounds count from 0"
        _refuse(schedule, first, f"{before}; sort transfers by round")


def _check_races(schedule: Schedule) -> None:
    rows = schedule.transfers
    order = np.lexsort((rows["chunk"], rows["dst"], rows["round"]))
    ordered = rows[["round", "dst", "chunk"]][order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(again):
        first, second = order[again[0]], order[again[0] + 1]
        _refuse(schedule, second, f"transfer {first} writes the same chunk there in this round; move one of them")


def _replay(schedule: Schedule) -> NDArray[np.unsignedinteger]:
    """[n_ranks, n_chunks, words]: the contributions each rank holds to each chunk in the end, one bit each."""
    held = _at_start(schedule)
    flat = held.reshape(-1, held.shape[2])
    rows = schedule.transfers
    source = rows["src"].astype(np.int64) * schedule.n_chunks + rows["chunk"]
    target = rows["dst"].astype(np.int64) * schedule.n_chunks + rows["chunk"]
    reduce = rows["reduce"]
    bounds = np.flatnonzero(np.diff(rows["round"], prepend=-1, append=np.iinfo(np.int32).max))
    for begin, end in pairwise(bounds.tolist()):
        incoming = flat[source[begin:end]]
        current = flat[target[begin:end]]
        reducing = reduce[begin:end]
        empty = ~incoming.any(axis=1)
        if empty.any():
            index = begin + int(empty.argmax())
            source_rank = rows["src"][index]
            _refuse(schedule, index, f"rank {source_rank} holds no value of it yet; bring it there in an earlier round")
        absent = reducing & ~current.any(axis=1)
        if absent.any():
            index = begin + int(absent.argmax())
            _refuse(schedule, index, f"rank {rows['dst'][index]} holds no value to combine it with; make it a copy")
        twice = (incoming & current).any(axis=1) & reducing
        if twice.any():
            index = begin + int(twice.argmax())
            both = incoming[index - begin] & current[index - begin]
            whose = _ranks(schedule, both)
            _refuse(schedule, index, f"the contribution of {whose} is in both values and would count twice")
        flat[target[begin:end]] = np.where(reducing[:, None], incoming | current, incoming)
    return held


def _check_end(schedule: Schedule, held: NDArray[np.unsignedinteger]) -> None:
    end = COLLECTIVES[schedule.collective].end(schedule.n_ranks, schedule.n_chunks, schedule.root)
    full = np.bitwise_or.reduce(_at_start(schedule), axis=0)
    lacking = end & (held != full).any(axis=2)
    if not lacking.any():
        return
    rank, chunk = (int(i) for i in np.argwhere(lacking)[0])
    rows = schedule.transfers
    writers = np.flatnonzero((rows["dst"] == rank) & (rows["chunk"] == chunk))
    fact = f"rank {rank} ends without "
    if held[rank, chunk].any():
        fact += f"the contribution of {_ranks(schedule, full[chunk] & ~held[rank, chunk])} to chunk {chunk}"
    else:
        fact += f"a value of chunk {chunk}"
    if len(writers):
        _refuse(schedule, int(writers[-1]), f"after this last write {fact}")
    raise ScheduleError(
        f"{schedule.collective}/{schedule.algorithm}: {fact}: no transfer of any of the {schedule.n_rounds} rounds "
        f"brings it there; add one"
    )


def _at_start(schedule: Schedule) -> NDArray[np.unsignedinteger]:
    """[n_ranks, n_chunks, words]: bit r is the contribution of rank r; one bit, the value, where nothing is reduced."""
    collective = COLLECTIVES[schedule.collective]
    start = collective.start(schedule.n_ranks, schedule.n_chunks, schedule.root)
    if not collective.reduces:
        return start[:, :, None].astype(np.uint8)
    words = np.zeros((schedule.n_ranks, (schedule.n_ranks + 63) // 64), np.uint64)
    rank = np.arange(schedule.n_ranks)
    words[rank, rank // 64] = np.uint64(1) << (rank % 64).astype(np.uint64)
    return words[:, None, :] * start[:, :, None]


def _ranks(schedule: Schedule, words: NDArray[np.unsignedinteger]) -> str:
    if not COLLECTIVES[schedule.collective].reduces:
        return "its one owner"
    ranks = [rank for rank in range(schedule.n_ranks) if int(words[rank // 64]) >> (rank % 64) & 1]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _refuse(schedule: Schedule, index: int, reason: str) -> NoReturn:
    row = schedule.transfers[index]
    kind = "reduce" if row["reduce"] else "copy"
    raise ScheduleError(
        f"{schedule.collective}/{schedule.algorithm}: transfer {index} (round {row['round']}, {kind} of chunk "
        f"{row['chunk']}, rank {row['src']} -> {row['dst']}): {reason}"
    )
