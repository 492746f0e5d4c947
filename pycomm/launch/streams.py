"""What a running rank says: its lines, with a prefix or as they are, and its last traceback, held back for a while."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass, field
from typing import IO

from pycomm.launch.layout import Place

_TRACEBACK = b"Traceback (most recent call last)"
# A rank that reports one of these suffered from another rank's end; it is not where the trouble began.
_CONSEQUENCE = re.compile(rb"PeerLost|Connection (closed|reset) by peer")
_TORCH_PREFIX = re.compile(rb"^\[rank\d+\]: ?")  # torch.distributed puts it before tracebacks; ours says the same
_MAX_LINE = 1 << 16  # a longer line is written in pieces
_MAX_LEFT = 1 << 20  # what a pipe may hold; a process that has left the rank's session may write to it for ever


@dataclass
class Rank:
    """One running rank and what it said last."""

    place: Place
    process: subprocess.Popen[bytes]
    pidfd: int
    streams: list[Stream] = field(default_factory=list)
    held: list[tuple[Stream, bytes]] = field(default_factory=list)  # lines since a traceback began, not yet shown
    traceback: list[bytes] = field(default_factory=list)  # the last traceback's lines, shown or not
    traceback_at: float | None = None
    ended_at: float | None = None

    @property
    def exit_code(self) -> int:
        """As a shell has it: 128 + signal for a rank that a signal ended."""
        code = self.process.returncode
        return 128 - code if code < 0 else code

    def release(self) -> None:
        """Show the lines held back."""
        held, self.held = self.held, []
        for stream, line in held:
            stream.show(line)

    def error_line(self) -> bytes:
        """The line that names the exception, the first after the last traceback's head without indent; or empty."""
        heads = [i for i, line in enumerate(self.traceback) if _TRACEBACK in line]
        after = self.traceback[heads[-1] + 1 :] if heads else []
        return next((line.strip() for line in after if line.strip() and not line[:1].isspace()), b"")

    def is_consequence(self) -> bool:
        return _CONSEQUENCE.search(self.error_line()) is not None

    def failed_at(self) -> float:
        """When the trouble showed: at the traceback, after which a rank may take long to end; else at its end."""
        assert self.ended_at is not None
        return self.ended_at if self.traceback_at is None else self.traceback_at

    def fate(self) -> str:
        code = self.process.returncode
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"was ended by {signal.Signals(-code).name}"
            return f"was ended by signal {-code}"
        error = self.error_line().decode(errors="replace")
        return f"failed with exit code {code}" + (f": {error}" if error else "")


class Stream:
    """One pipe from a rank, cut into lines for a file or the terminal.

    raw: bytes are passed on as they come, for a rank that owns the terminal; only tracebacks are looked for.
    """

    def __init__(self, rank: Rank, pipe: IO[bytes], sink: IO[bytes], prefix: bytes, raw: bool) -> None:
        self.rank = rank
        self.fd = pipe.fileno()
        self._pipe = pipe
        self._sink = sink
        self._prefix = prefix
        self._raw = raw
        self._partial = b""
        os.set_blocking(self.fd, False)

    def read(self) -> bool:
        """Take a pipe's worth, so that no rank keeps the others waiting; False when there is nothing, or no more."""
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return False
        self._take(data)
        return bool(data)

    def close(self) -> None:
        """Take what is left and show the last, unfinished line."""
        for _ in range(_MAX_LEFT >> 16):
            if not self.read():
                break
        if self._partial:
            self._line(self._partial)
            self._partial = b""
        self._pipe.close()

    def show(self, line: bytes) -> None:
        if not self._raw:
            # A progress bar redraws its line after each \r; a reader of prefixed lines wants its last state.
            line = self._prefix + line.rstrip(b"\r\n").rpartition(b"\r")[2] + b"\n"
        self._sink.write(line)
        self._sink.flush()

    def _take(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._line(line + b"\n")
        if self._partial and (len(self._partial) > _MAX_LINE or (self._raw and not self.rank.held)):
            self._line(self._partial)
            self._partial = b""

    def _line(self, line: bytes) -> None:
        rank = self.rank
        line = _TORCH_PREFIX.sub(b"", line)
        if _TRACEBACK in line and not rank.held:
            rank.traceback, rank.traceback_at = [], time.monotonic()
        elif not rank.held or rank.held[0][0] is not self:
            self.show(line)
            return
        rank.held.append((self, line))
        rank.traceback.append(line)
