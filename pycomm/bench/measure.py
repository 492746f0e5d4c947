"""Libraries in turns: each case on each library and placement, block by block, in an order that rotates.

Between its blocks a library is quiet, and each rank that waits for another's sleeps. A call's time is that of its
slowest rank; figures are over the calls of all blocks. Before they are timed, results on fresh values are verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pycomm.bench.cases import ALONE, COMPUTE, SERIAL, TOGETHER, Case
from pycomm.bench.libraries import Copies, Library
from pycomm.bench.roofline import MEMORY_FROM, link_limit_s, memory_limit_s
from pycomm.bench.trials import Memory, Trial, Unavailable, timed
from pycomm.group import Group
from pycomm.overlap.scorecard import Scorecard

N_ROUNDS: Final = 5
BLOCK_S: Final = 0.03  # what a block's timed calls may take, unless three take longer
MIN_CALLS: Final = 3
MAX_CALLS: Final = 400
LARGE_COPY: Final = 64 << 20  # bytes, which no cache holds and for which memcpy goes past the caches
_CALIBRATION: Final = 3  # calls


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call on its slowest rank (of one message, in latency and bandwidth), over `calls` calls;
    wrong: elements on all ranks that were not what they must be, None where that was not checked."""

    calls: int
    mean_us: float
    p50_us: float
    p95_us: float
    p99_us: float
    wrong: int | None

    @staticmethod
    def of(nanoseconds: NDArray[np.int64], calls_per_run: int, wrong: int | None) -> Timing:
        us = nanoseconds / 1e3 / calls_per_run
        p50, p95, p99 = (round(float(np.percentile(us, q)), 4) for q in (50, 95, 99))
        return Timing(len(us), round(float(us.mean()), 4), p50, p95, p99, wrong)


@dataclass
class Row:
    """What was measured of a case. timings[library][placement]; refused[library]: why it has none. limit_us: the
    roofline. bytes_*: what all ranks send in one call of pycomm's, headers included."""

    case: Case
    timings: dict[str, dict[str, Timing]]
    refused: dict[str, str] = field(default_factory=dict)
    algorithm: str = ""
    reason: str = ""
    bytes_inside: int = 0
    bytes_between: int = 0
    limit_us: float | None = None

    def native(self, library: str = "pycomm") -> Timing | None:
        """The timing that ratios and percentiles are taken from."""
        return self.timings.get(library, {}).get(self.case.kind.native)

    def ratio(self, library: str) -> float | None:
        """The library's median over pycomm's."""
        theirs, ours = self.native(library), self.native()
        return theirs.p50_us / ours.p50_us if theirs is not None and ours is not None else None

    def scorecard(self, library: str) -> Scorecard | None:
        """What the library gains by overlapping, from medians; None for what is no overlap case."""
        found = self.timings.get(library, {})
        if not {COMPUTE, ALONE, SERIAL, TOGETHER} <= found.keys():
            return None
        return Scorecard(*(found[name].p50_us / 1e6 for name in (COMPUTE, ALONE, SERIAL, TOGETHER)))

    @property
    def wrong(self) -> int:
        return sum(t.wrong or 0 for placements in self.timings.values() for t in placements.values())


@dataclass(frozen=True)
class Effort:
    """n_iters: timed calls of each library, placement and case; None: as many as take 0.15 s, at least 15 and at most
    2,000. n_warmup: calls before them. n_checks: calls on fresh values whose results are verified."""

    n_iters: int | None = None
    n_warmup: int = 5
    n_checks: int = 1


@dataclass
class _Contender:
    library: str
    placement: str
    trial: Trial
    n_calls: int = 0
    wrong: int | None = None
    blocks: list[NDArray[np.int64]] = field(default_factory=list)


class Session:
    """All ranks of a job, in step. libraries: pycomm first. control: a group of the same ranks that is not measured.
    interrupted: asked between rounds, on every rank; where one rank says so, all stop there."""

    def __init__(
        self,
        group: Group,
        control: Group,
        libraries: Sequence[Library],
        effort: Effort,
        link_bytes_per_s: NDArray[np.float64] | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.group, self.control, self.libraries, self.effort = group, control, libraries, effort
        self.link_bytes_per_s = link_bytes_per_s
        self._interrupted = interrupted
        self.stopped = False
        self._large_rate: float | None = None

    def measure(self, case: Case) -> Row | None:
        """The case's row; None where the session was stopped before a round was complete. All ranks together."""
        row = Row(case, {})
        memory = Memory(case, self.group.rank)
        contenders = [each for library in self.libraries for each in self._trials(library, case, memory, row)]
        if case.nbytes >= MEMORY_FROM:
            contenders += self._trials(Copies(), case, memory, row)
        for each in contenders:
            self._calibrate(each, row)
        n_rounds = min(N_ROUNDS, self.effort.n_iters or N_ROUNDS)
        for i in range(n_rounds):
            if self._stop():
                break
            first = i * len(contenders) // n_rounds
            for each in contenders[first:] + contenders[:first]:
                each.blocks.append(self._block(each))
        if not contenders[0].blocks:
            return None
        self._summarise(row, contenders)
        return row

    def agree(self, *values: float) -> list[float]:
        """The largest of each value over all ranks."""
        return [float(value) for value in self.control.all_reduce(np.array(values, np.float64), "max")]

    def _stop(self) -> bool:
        self.stopped = bool(self.agree(self.stopped or self._interrupted())[0])
        return self.stopped

    def _trials(self, library: Library, case: Case, memory: Memory, row: Row) -> list[_Contender]:
        """One for each placement, verified; none where the library refuses the case, which row.refused then says."""
        own = library is self.libraries[0]
        found = []
        placements = (case.kind.native,) if isinstance(library, Copies) else case.kind.placements
        for placement in placements:
            problem, wrong = "", None
            try:
                trial = library.trial(case, placement, memory)
                wrong = self._check(trial) if not isinstance(library, Copies) else None
            except Unavailable as error:
                problem = str(error)
            except Exception as error:  # another library's refusal, whatever its type; ours is a failure
                if own:
                    raise
                problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            failed, checked, total = self._agree_check(bool(problem), wrong)
            if failed:
                row.refused[library.name] = problem or "refused on another rank"
                return []
            found.append(_Contender(library.name, placement, trial, wrong=total if checked else None))
        return found

    def _check(self, trial: Trial) -> int | None:
        total: int | None = None
        for _ in range(self.effort.n_checks):
            wrong = trial.check()
            if wrong is not None:
                total = (total or 0) + wrong
        return total

    def _agree_check(self, failed: bool, wrong: int | None) -> tuple[bool, bool, int]:
        """(some rank failed, some rank checked, wrong elements of all ranks)."""
        sums = self.control.all_reduce(np.array([failed, wrong is not None, wrong or 0], np.int64))
        return bool(sums[0]), bool(sums[1]), int(sums[2])

    def _calibrate(self, each: _Contender, row: Row) -> None:
        ours = each.library == self.libraries[0].name and each.placement == row.case.kind.native
        before = self.group.stats()
        self.control.barrier()
        times = each.trial.block(_CALIBRATION, self.effort.n_warmup)
        if ours:
            after = self.group.stats()
            n = _CALIBRATION + self.effort.n_warmup
            sent = np.array(
                [
                    after.bytes_inside_hosts - before.bytes_inside_hosts,
                    after.bytes_between_hosts - before.bytes_between_hosts,
                ],
                np.int64,
            )
            row.bytes_inside, row.bytes_between = (
                int(x) // n // row.case.calls_per_run for x in self.control.all_reduce(sent)
            )
        if self.effort.n_iters is not None:
            each.n_calls = -(-self.effort.n_iters // min(N_ROUNDS, self.effort.n_iters))
        else:
            slowest = self.agree(float(np.median(times)))[0]
            each.n_calls = int(min(max(BLOCK_S * 1e9 / max(slowest, 1), MIN_CALLS), MAX_CALLS))

    def _block(self, each: _Contender) -> NDArray[np.int64]:
        """[n_calls]: the slowest rank's time of each call."""
        self.control.barrier()
        times = each.trial.block(each.n_calls, 1 + each.n_calls // 20)  # the ranks fall into step
        return np.asarray(self.control.all_reduce(np.ascontiguousarray(times), "max"))

    def _large_copies(self) -> float:
        """Bytes a second that all ranks together read and write in copies past the caches; measured once."""
        if self._large_rate is None:
            source, to = (np.ones(LARGE_COPY, np.uint8) for _ in range(2))
            self.control.barrier()
            slowest = self.agree(float(np.median(timed(lambda: np.copyto(to, source), 7)[2:])))[0]
            self._large_rate = self.group.size * 2 * LARGE_COPY / (slowest / 1e9)
        return self._large_rate

    def _summarise(self, row: Row, contenders: Sequence[_Contender]) -> None:
        case = row.case
        for each in contenders:
            timing = Timing.of(np.concatenate(each.blocks), case.calls_per_run, each.wrong)
            row.timings.setdefault(each.library, {})[each.placement] = timing
        limits = []
        copies = row.timings.pop(Copies.name, None)
        if copies is not None:
            half = case.numel // 2 * case.element.nbytes
            rate = case.n_ranks * 2 * half / (copies[case.kind.native].p50_us * case.calls_per_run / 1e6)
            if case.nbytes >= LARGE_COPY // 2:
                rate = max(rate, self._large_copies())
            limits.append(memory_limit_s(case, rate))
        if self.link_bytes_per_s is not None:
            limits.append(link_limit_s(case, self.group.topology, self.link_bytes_per_s))
        known = [limit for limit in limits if limit is not None]
        row.limit_us = max(known) * 1e6 if known else None
        row.algorithm, row.reason = choice(self.group, case)


def choice(group: Group, case: Case) -> tuple[str, str]:
    """The algorithm that pycomm takes for a case, and why: what Group.explain() says, in short."""
    name = case.collective.removeprefix("overlap_")
    if case.moe is not None:
        name = "all_to_all"
    if group.size == 1:
        return "none", "one rank has nobody to exchange with"
    if case.pair is not None or name == "sendrecv":
        return "messages", "point-to-point: no choice is made"
    if case.nbytes <= group.native_nbytes(name):
        return "native", "inside one host the engine's own path serves this size; no schedule runs"
    if name == "barrier":
        return "all_reduce", "across hosts a barrier is an all_reduce of one byte"
    if case.moe is not None:
        return "pairwise", "an uneven all_to_all goes pairwise between hosts"
    explanation = group.explanation(name, case.nbytes, case.root)
    return explanation.choice, explanation.reason
