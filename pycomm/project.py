"""project(schedule, rank): the program of one rank, as the engine runs it (layout: csrc/core/program.h).

Sends and receives come from one transfer, so they cannot mismatch. REQUIRES: the schedule passed check()."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pycomm.calls import CallSchedule, Partition
from pycomm.errors import ScheduleError
from pycomm.schedule import COLLECTIVES, Schedule, Transfers

STEP: Final = np.dtype(
    [
        ("kind", "u1"),
        ("src_buffer", "u1"),
        ("dst_buffer", "u1"),
        ("flags", "u1"),
        ("peer", "<i4"),
        ("chunk", "<i4"),
        ("scratch_slot", "<i4"),
        ("round", "<i4"),
        ("dep_begin", "<i4"),
        ("dep_count", "<i4"),
        ("call", "<i4"),
    ]
)
SEND, RECV, RECV_REDUCE, COPY, CALL = range(5)
INPUT, OUTPUT, SCRATCH = range(3)
CODED, SEALED = 1, 2  # flags, in programs for a wire


@dataclass(frozen=True, eq=False)
class Program:
    """What one rank does. Steps stand by round, within a round sends before receives (they read what the round began
    with), each by transfer index; so between two ranks the order of sends is the order of receives.

    deps[dep_begin : dep_begin + dep_count] are earlier steps on the same chunk that a step must not overtake. A copy
    has none, and stands behind the sends of the first round, so that the first bytes leave at once."""

    collective: str
    algorithm: str
    n_ranks: int
    rank: int
    root: int
    n_chunks: int
    n_scratch: int
    steps: NDArray[np.void] = field(repr=False)
    deps: NDArray[np.int32] = field(repr=False)
    peers: tuple[int, ...]


def project(schedule: Schedule, rank: int, host: NDArray[np.int64] | None = None) -> Program:
    """The steps of `rank`. A chunk's value lives in INPUT until something is written, then in OUTPUT if it is part of
    the rank's result, else in SCRATCH. Raises ScheduleError where there is no such rank.

    host: [n_ranks], for a program with a wire: steps between hosts are CODED; where this rank makes a value that it
    shares with other hosts, the write that completes it and those sends are SEALED. REQUIRES: check_coded() passed."""
    if not 0 <= rank < schedule.n_ranks:
        raise ScheduleError(
            f"{schedule.collective}/{schedule.algorithm}: no rank {rank} among {schedule.n_ranks}; project one of them"
        )
    collective = COLLECTIVES[schedule.collective]
    ends_here = collective.end(schedule.n_ranks, schedule.n_chunks, schedule.root)[rank]
    steps = _steps(schedule, rank, ends_here)
    copies = _copies(_copied(schedule, rank, ends_here, steps), steps)
    if host is not None:
        _mark_coded(schedule, rank, host, steps, copies)
    first_sends = int(np.argmin(np.append((steps["kind"] == SEND) & (steps["round"] == steps["round"][:1]), False)))
    sealed = copies["flags"] == SEALED  # what others are sent is what these leave
    steps = np.concatenate([copies[sealed], steps[:first_sends], copies[~sealed], steps[first_sends:]])
    n_scratch = _assign_slots(steps, schedule.n_chunks)
    deps = _resolve(steps)
    peers = tuple(int(peer) for peer in np.unique(steps["peer"]) if peer >= 0)
    return Program(
        schedule.collective,
        schedule.algorithm,
        schedule.n_ranks,
        rank,
        schedule.root,
        schedule.n_chunks,
        n_scratch,
        steps,
        deps,
        peers,
    )


@dataclass(frozen=True, eq=False)
class CallProgram(Program):
    """A program whose steps are whole collectives. calls: (collective, partition, this rank's part of it, chunks)."""

    calls: tuple[tuple[str, int, tuple[int, ...], tuple[int, ...]], ...]
    partitions: tuple[Partition, ...]


def project_calls(schedule: CallSchedule, rank: int) -> CallProgram:
    """The calls of `rank`, in the schedule's order, which is the same on all ranks. A call waits for the last calls
    before it that touched its chunks. REQUIRES: check(schedule.expand()) passed."""
    steps, deps = [], list[int]()
    calls = list[tuple[str, int, tuple[int, ...], tuple[int, ...]]]()
    last: dict[int, int] = {}
    for call in schedule.calls:
        for part, chunks in zip(schedule.partitions[call.partition], call.chunks, strict=True):
            if rank not in part:
                continue
            before = sorted({last[chunk] for chunk in chunks if chunk in last})
            steps.append((CALL, INPUT, OUTPUT, 0, -1, chunks[0], -1, call.round, len(deps), len(before), len(calls)))
            deps += before
            last |= dict.fromkeys(chunks, len(calls))
            calls.append((call.collective, call.partition, part, chunks))
    return CallProgram(
        schedule.collective,
        schedule.algorithm,
        schedule.n_ranks,
        rank,
        0,
        schedule.n_chunks,
        0,
        np.array(steps, STEP),
        np.array(deps, np.int32),
        tuple(peer for peer in range(schedule.n_ranks) if peer != rank),
        tuple(calls),
        schedule.partitions,
    )


def _own_rows(schedule: Schedule, rank: int) -> Transfers:
    """The transfers that `rank` takes part in, as its steps stand."""
    rows = schedule.transfers
    rows = rows[(rows["src"] == rank) | (rows["dst"] == rank)]
    ordered: Transfers = rows[np.lexsort((rows["src"] != rank, rows["round"]))]
    return ordered


def _steps(schedule: Schedule, rank: int, ends_here: NDArray[np.bool_]) -> NDArray[np.void]:
    """The sends and receives in order. A send's src_buffer is set as if all of its chunk's writes came before it."""
    rows = _own_rows(schedule, rank)
    sends = rows["src"] == rank
    steps = np.zeros(len(rows), STEP)
    steps["kind"] = np.where(sends, SEND, np.where(rows["reduce"], RECV_REDUCE, RECV))
    steps["peer"] = np.where(sends, rows["dst"], rows["src"])
    steps["chunk"], steps["round"] = rows["chunk"], rows["round"]
    steps["scratch_slot"] = steps["call"] = -1
    home = np.where(ends_here[rows["chunk"]], OUTPUT, SCRATCH)
    written = _written_before(steps)
    reads = steps["kind"] != RECV
    steps["src_buffer"] = np.where(reads & written, home, INPUT)
    steps["dst_buffer"] = np.where(sends, INPUT, home)
    return steps


def _mark_coded(
    schedule: Schedule, rank: int, host: NDArray[np.int64], steps: NDArray[np.void], copies: NDArray[np.void]
) -> None:
    """Sets flags. steps: as _steps() gives them, without copies."""
    sends = steps["kind"] == SEND
    crosses = host[steps["peer"]] != host[rank]
    steps["flags"][crosses] = CODED
    if schedule.collective not in ("all_reduce", "all_gather"):
        return  # nobody else holds what is sent
    shares = sends & crosses & ~_own_rows(schedule, rank)["reduce"]
    steps["flags"][shares] |= SEALED
    for chunk in np.unique(steps["chunk"][shares]):
        of_chunk = steps["chunk"] == chunk
        writes = np.flatnonzero(of_chunk & ~sends)
        if len(writes):
            steps["flags"][writes[-1]] |= SEALED
        else:  # its own contribution: it shares what the copy to its own output leaves there
            copies["flags"][copies["chunk"] == chunk] = SEALED
            steps["src_buffer"][of_chunk] = OUTPUT


def _written_before(steps: NDArray[np.void]) -> NDArray[np.bool_]:
    """Whether an earlier step wrote the chunk of each step."""
    writes = np.flatnonzero(steps["kind"] != SEND)
    chunks, first = np.unique(steps["chunk"][writes], return_index=True)
    first_write = np.full(int(steps["chunk"].max(initial=0)) + 1, len(steps))
    first_write[chunks] = writes[first]
    return np.asarray(first_write[steps["chunk"]] < np.arange(len(steps)))


def _copied(schedule: Schedule, rank: int, ends_here: NDArray[np.bool_], steps: NDArray[np.void]) -> NDArray[np.int64]:
    """The chunks of the result that nothing writes: the rank's own input. A broadcast's root has but one buffer."""
    if schedule.collective == "broadcast" and rank == schedule.root:
        return np.empty(0, np.int64)
    unwritten = ends_here.copy()
    unwritten[steps["chunk"][steps["kind"] != SEND]] = False
    return np.flatnonzero(unwritten)


def _copies(chunks: NDArray[np.int64], steps: NDArray[np.void]) -> NDArray[np.void]:
    copies = np.zeros(len(chunks), STEP)
    copies["kind"], copies["src_buffer"], copies["dst_buffer"] = COPY, INPUT, OUTPUT
    copies["chunk"], copies["round"] = chunks, steps["round"][0] if len(steps) else 0
    copies["peer"] = copies["scratch_slot"] = copies["call"] = -1
    return copies


def _assign_slots(steps: NDArray[np.void], n_chunks: int) -> int:
    """Numbers the chunks that pass through SCRATCH, in chunk order."""
    touches = (steps["src_buffer"] == SCRATCH) | (steps["dst_buffer"] == SCRATCH)
    chunks = np.unique(steps["chunk"][touches])
    steps["scratch_slot"][touches] = np.searchsorted(chunks, steps["chunk"][touches])
    return len(chunks)


def _resolve(steps: NDArray[np.void]) -> NDArray[np.int32]:
    """Sets dep_begin and dep_count: a read waits for the last write of its chunk, a write for the reads since then, or
    for that write where there are none. A copy is a write where sends read what it seals. INPUT and OUTPUT count as one
    place; reads of INPUT never stop a write to SCRATCH."""
    last_write: dict[int, int] = {}
    reads_since: dict[int, list[int]] = {}
    deps: list[int] = []
    begins, counts = [], []
    columns = (steps["kind"], steps["chunk"], steps["dst_buffer"], steps["flags"] & SEALED)
    for index, (kind, chunk, destination, sealed) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        begins.append(len(deps))
        before = [last_write[chunk]] if chunk in last_write else []
        if kind == SEND:
            reads_since.setdefault(chunk, []).append(index)
        elif kind != COPY or sealed:
            in_the_way = reads_since.pop(chunk, [])
            if destination == SCRATCH and not before:
                in_the_way = []
            before = in_the_way or before
            last_write[chunk] = index
        deps += before
        counts.append(len(deps) - begins[-1])
    steps["dep_begin"], steps["dep_count"] = begins, counts
    return np.array(deps, np.int32)
