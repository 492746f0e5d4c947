"""All ranks of a launch, from start to end: one thread around one selector."""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from pycomm.errors import PycommError
from pycomm.launch.layout import Place
from pycomm.launch.streams import Rank, Stream

_HOLD_S = 2.0  # a traceback waits this long for its rank to end, so that the one that came first can be shown first
_SETTLE_S = 1.0  # after a consequence, how long the rank that caused it may take to end by itself
_PR_SET_PDEATHSIG = 1


def bind_to_launcher(launcher_pid: int) -> Callable[[], None]:
    """What a rank runs between fork and exec: it asks to be killed when the launcher dies."""
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork, where it is safe

    def bind() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher_pid:  # it died before prctl took effect
            os._exit(1)

    return bind


class Job:
    """All ranks of one launch, from start to end."""

    def __init__(self, grace_s: float, echo_failure: bool) -> None:
        self._grace_s = grace_s
        self._echo_failure = echo_failure  # the tracebacks go to files: show the one that matters on the terminal too
        self._selector = selectors.DefaultSelector()
        self._ranks: list[Rank] = []
        self._alive: list[Rank] = []
        self._first: Rank | None = None  # the rank whose failure ended the job
        self._signal: signal.Signals | None = None  # the signal that a person or a scheduler ended the job with
        self._settle_until: float | None = None
        self._kill_at: float | None = None

    def start(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        place: Place,
        outputs: Sequence[tuple[IO[bytes] | None, bytes, bool]],
        before_exec: Callable[[], None],
    ) -> None:
        """Start one rank. outputs: for stdout and stderr (sink, prefix, raw); a sink of None leaves the launcher's own;
        one entry alone stands for both, in their order.

        Raises PycommError where the program cannot be started."""
        pipes = [subprocess.PIPE if sink is not None else None for sink, _, _ in outputs]
        # a terminal cannot serve several ranks, nor a session that it does not control
        inherits_stdin = place.rank == 0 and sys.stdin is not None and not sys.stdin.isatty()
        try:
            process = subprocess.Popen(
                argv,
                env=dict(environment),
                stdin=None if inherits_stdin else subprocess.DEVNULL,
                stdout=pipes[0],
                stderr=pipes[1] if len(pipes) > 1 else subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=before_exec,
            )
        except OSError as error:
            raise PycommError(f"cannot start {argv[0]!r} for {place}: {error.strerror}") from error
        rank = Rank(place, process, os.pidfd_open(process.pid))
        self._ranks.append(rank)
        self._alive.append(rank)
        self._selector.register(rank.pidfd, selectors.EVENT_READ, rank)
        for pipe, (sink, prefix, raw) in zip((process.stdout, process.stderr), outputs, strict=False):
            if pipe is not None and sink is not None:
                stream = Stream(rank, pipe, sink, prefix, raw)
                rank.streams.append(stream)
                self._selector.register(stream.fd, selectors.EVENT_READ, stream)

    def run(self, signals_fd: int) -> int:
        """Until every rank has ended. signals_fd yields the numbers of the signals the launcher got, one byte each."""
        self._selector.register(signals_fd, selectors.EVENT_READ)
        while self._alive:
            for key, _ in self._selector.select(self._wait_s()):
                if isinstance(key.data, Stream):
                    if key.data.fd in self._selector.get_map() and not key.data.read():
                        self._selector.unregister(key.data.fd)
                elif isinstance(key.data, Rank):
                    self._reap(key.data)
                else:
                    for number in os.read(signals_fd, 64):
                        self._forward(signal.Signals(number))
            self._on_time(time.monotonic())
        return self._verdict()

    def end(self) -> None:
        """Kill what is left, which after run() is nothing; what it still has to say is lost."""
        for rank in self._alive:
            self._kill(rank)
        for rank in self._alive:
            rank.process.wait()
            os.close(rank.pidfd)
        self._selector.close()

    def _wait_s(self) -> float | None:
        """Seconds to the next thing that time alone brings."""
        times = [t for t in (self._settle_until, self._kill_at) if t is not None]
        times += [rank.traceback_at + _HOLD_S for rank in self._alive if rank.held and rank.traceback_at is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _on_time(self, now: float) -> None:
        for rank in self._alive:
            if rank.held and rank.traceback_at is not None and now >= rank.traceback_at + _HOLD_S:
                rank.release()
        if self._settle_until is not None and now >= self._settle_until:
            self._fail()
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            for rank in self._alive:
                self._kill(rank)

    def _reap(self, rank: Rank) -> None:
        self._kill(rank)  # its session first: until wait() the rank's id cannot be anyone else's
        rank.process.wait()
        rank.ended_at = time.monotonic()
        self._close(rank)
        if rank.exit_code == 0:
            rank.release()
        elif self._signal is not None:
            if rank.error_line().startswith(b"KeyboardInterrupt"):
                rank.held.clear()  # every rank has this one: it says only that Ctrl-C was pressed
            rank.release()
        elif self._first is not None:
            rank.release()
        elif rank.is_consequence() and self._alive:
            self._settle_until = self._settle_until or rank.ended_at + _SETTLE_S
        else:
            self._fail()
        if not self._alive and self._settle_until is not None:
            self._fail()

    def _fail(self) -> None:
        """Find the rank that failed first, show its traceback before any other, and end the rest."""
        self._settle_until = None
        failed = [rank for rank in self._ranks if rank.ended_at is not None and rank.exit_code != 0]
        failed.sort(key=lambda rank: (rank.is_consequence(), rank.failed_at()))
        self._first = failed[0]
        if self._echo_failure:
            for line in self._first.traceback:
                sys.stderr.buffer.write(b"[%d] " % self._first.place.rank + line.rstrip(b"\n") + b"\n")
            sys.stderr.flush()
        for rank in failed:
            rank.release()
        self._stop(signal.SIGTERM)

    def _forward(self, number: signal.Signals) -> None:
        """Hand a signal on. The first starts the grace period; a second one ends it."""
        if self._signal is not None:
            self._kill_at = time.monotonic()
            return
        self._signal = number
        self._stop(number)

    def _stop(self, number: signal.Signals) -> None:
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._grace_s
        for rank in self._alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank.process.pid, number)

    def _kill(self, rank: Rank) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.process.pid, signal.SIGKILL)

    def _close(self, rank: Rank) -> None:
        self._alive.remove(rank)
        self._selector.unregister(rank.pidfd)
        os.close(rank.pidfd)
        for stream in rank.streams:
            with contextlib.suppress(KeyError, ValueError):  # closed already where the rank closed its end early
                self._selector.unregister(stream.fd)
            stream.close()

    def _verdict(self) -> int:
        first = self._first
        if first is not None:
            others = len(self._ranks) - 1
            ended = f"; the other {others} ranks ended with it" if others > 1 else "; the other rank ended with it"
            say(f"{first.place} {first.fate()}{ended if others else ''}")
            return first.exit_code
        if self._signal is not None and any(rank.exit_code for rank in self._ranks):
            say(f"ended by {self._signal.name}")
            return 128 + self._signal
        return 0


def say(message: str) -> None:
    print(f"pycomm launch: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def signals() -> Iterator[int]:
    """A file descriptor that yields the number of each signal meant to end the job, instead of ending the launcher."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    # nohup and background jobs of a shell start with some of them ignored: let that stand
    caught = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    previous = {number: signal.signal(number, lambda *_: None) for number in caught}
    previous_fd = signal.set_wakeup_fd(writer)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
