"""One case on one library, ready to be called again and again on this rank. Numpy alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pycomm.bench.buffers import Buffers
from pycomm.bench.cases import Case

Call = Callable[[], Any]
Nanoseconds = NDArray[np.int64]
T = TypeVar("T")


class Unavailable(Exception):
    """A library cannot run this case, or at all, here; the message says why."""


class Trial(Protocol):
    """One case on one library and placement, on one rank."""

    def check(self) -> int | None:
        """Wrong elements on this rank after a call on fresh values; None where there is nothing to compare."""

    def block(self, n_calls: int, n_warmup: int) -> Nanoseconds:
        """[n_calls]: how long each call took on this rank, after some that do not count."""


class Memory:
    """What the trials of one case share on this rank, whatever library runs it: two arrays of the longest buffer."""

    def __init__(self, case: Case, rank: int) -> None:
        self._case, self.rank = case, rank
        self.a, self.b = (np.zeros(case.numel, case.element.raw) for _ in range(2))
        self._made: dict[tuple[str, str], Any] = {}

    def buffers(self, placement: str) -> Buffers:
        return Buffers(self._case, placement, self.rank, self.a, self.b)

    def once(self, library: str, what: str, make: Callable[[], T]) -> T:
        """make(), at the first call; what it gave, at later ones: for trials of one library that share it."""
        if (library, what) not in self._made:
            self._made[library, what] = make()
        made: T = self._made[library, what]
        return made


def timed(call: Call, n_calls: int) -> Nanoseconds:
    """[n_calls]: nanoseconds of each call."""
    clock = time.perf_counter_ns
    times = np.empty(n_calls, np.int64)
    for i in range(n_calls):
        begin = clock()
        call()
        times[i] = clock() - begin
    return times


class LocalTrial:
    """A call of this process on buffers."""

    def __init__(self, buffers: Buffers, call: Call) -> None:
        self.buffers, self._call = buffers, call

    def check(self) -> int | None:
        self.buffers.fill()
        self._call()
        wrong = self.buffers.wrong() if self.buffers.exact else None
        self.buffers.zero()
        return wrong

    def block(self, n_calls: int, n_warmup: int) -> Nanoseconds:
        for _ in range(n_warmup):
            self._call()
        return timed(self._call, n_calls)


class TimedAlone:
    """A call without a result to compare."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def check(self) -> int | None:
        return None

    def block(self, n_calls: int, n_warmup: int) -> Nanoseconds:
        for _ in range(n_warmup):
            self._call()
        return timed(self._call, n_calls)
