"""What the ranks of a benchmark agree on, and Ctrl-C that keeps what was measured."""

from __future__ import annotations

import json
import signal
import time
from types import FrameType
from typing import TYPE_CHECKING, Final

from pycomm.discover import gather_bytes

if TYPE_CHECKING:
    from pycomm.group import Group

_ECHO_S: Final = 1.0  # a signal that comes again sooner is the same one, from the terminal and from a launcher


def first_word(group: Group, word: str) -> str:
    """What the lowest rank that has something to say says, on every rank; "" where none has. All ranks together."""
    said = gather_bytes(group, json.dumps(word).encode())
    return next(filter(None, map(json.loads, said)), "")


class Interrupt:
    """While it lasts, the first SIGINT or SIGTERM is only noted, and a second one ends the process as ever."""

    def __init__(self) -> None:
        self._noted_at: float | None = None
        self._number = signal.SIGINT
        # nohup and background jobs of a shell start with some of them ignored: let that stand
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._previous = {number: handler for number, handler in found.items() if handler != signal.SIG_IGN}

    def __enter__(self) -> Interrupt:
        for number in self._previous:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether there was one."""
        return self._noted_at is not None

    @property
    def exit_code(self) -> int:
        return 128 + self._number

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._noted_at is None:
            self._noted_at, self._number = now, signal.Signals(number)
        elif now - self._noted_at > _ECHO_S:
            raise KeyboardInterrupt
