"""Start the ranks of a program on this machine, as one host or as several emulated ones, and end them together.

Each rank gets torchrun's variables, so a program that runs under torchrun runs here unchanged. Emulated hosts differ in
PYCOMM_HOST_ID alone: the engine shares memory between equal labels and uses TCP between different ones.

No rank outlives the launcher: each leads its own session, which is killed when its rank ends, and the kernel kills the
rank when the launcher itself is killed (PR_SET_PDEATHSIG). The launcher is one thread around one selector.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pycomm.errors import InvalidArgument, PycommError

OUTPUTS = ("prefix", "rank0")

_TRACEBACK = b"Traceback (most recent call last)"
# A rank that reports one of these suffered from another rank's end; it is not where the trouble began.
_CONSEQUENCE = re.compile(rb"PeerLost|Connection (closed|reset) by peer")
_TORCH_PREFIX = re.compile(rb"^\[rank\d+\]: ?")  # torch.distributed puts it before tracebacks; ours says the same
_HOLD_S = 2.0  # a traceback waits this long for its rank to end, so that the one that came first can be shown first
_SETTLE_S = 1.0  # after a consequence, how long the rank that caused it may take to end by itself
_MAX_LINE = 1 << 16  # a longer line is written in pieces
_MAX_LEFT = 1 << 20  # what a pipe may hold; a process that has left the rank's session may write to it for ever
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """Where one rank stands. host is the emulated host's label, None when all ranks share this real one."""

    rank: int
    local_rank: int
    local_world_size: int
    host_index: int
    host: str | None

    def __str__(self) -> str:
        return f"rank {self.rank}" + (f" ({self.host})" if self.host else "")


def places(ranks_per_host: Sequence[int]) -> list[Place]:
    """Every rank's place, hosts one after the other. Raises InvalidArgument where a host has no rank."""
    if not ranks_per_host or min(ranks_per_host) < 1:
        raise InvalidArgument(f"each host needs at least 1 rank, got {list(ranks_per_host)} ranks per host")
    result: list[Place] = []
    for host_index, n_local in enumerate(ranks_per_host):
        host = f"host{host_index}" if len(ranks_per_host) > 1 else None
        result += [Place(len(result) + local, local, n_local, host_index, host) for local in range(n_local)]
    return result


def rank_environment(
    place: Place, all_places: Sequence[Place], master_port: int, run_id: str, base: Mapping[str, str]
) -> dict[str, str]:
    """The environment of one rank: base, torchrun's variables, and PYCOMM_HOST_ID on an emulated host.

    OMP_NUM_THREADS is the cores divided by the ranks, unless base has it: more threads than cores wait for each other.
    """
    environment = dict(base)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // len(all_places))))
    environment.setdefault("PYTHONUNBUFFERED", "1")  # a rank that is killed loses no line it printed
    environment.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.local_rank),
        WORLD_SIZE=str(len(all_places)),
        LOCAL_WORLD_SIZE=str(place.local_world_size),
        GROUP_RANK=str(place.host_index),
        GROUP_WORLD_SIZE=str(all_places[-1].host_index + 1),
        ROLE_NAME="default",
        ROLE_RANK=str(place.rank),
        ROLE_WORLD_SIZE=str(len(all_places)),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(master_port),
        TORCHELASTIC_RUN_ID=run_id,
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_MAX_RESTARTS="0",
        TORCHELASTIC_USE_AGENT_STORE="False",  # rank 0 serves the store
    )
    if place.host is not None:
        environment["PYCOMM_HOST_ID"] = place.host
    return environment


def resolve_command(command: Sequence[str]) -> list[str]:
    """The program to start: `python`, `-m module` and `script.py` run in this interpreter, anything else as it is."""
    if not command:
        raise InvalidArgument("no command given; write it last, as in: pycomm launch --ranks 2 -- python train.py")
    first, *rest = command
    if first in ("python", "python3"):
        return [sys.executable, *rest]
    if first == "-m" or first.endswith(".py"):
        return [sys.executable, *command]
    return list(command)


@contextlib.contextmanager
def reserved_port(port: int = 0) -> Iterator[int]:
    """A port that no one else is given while the context lasts, yet that rank 0's store can listen on.

    The socket is bound but does not listen: the kernel hands the port to nobody who asks for a free one, and a listener
    that sets SO_REUSEADDR, as torch's TCPStore does, may still take it. port 0 means any.
    Raises PycommError where another process listens on the port.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("", port))  # every address, as the store binds
        except (OSError, OverflowError) as error:
            raise PycommError(
                f"cannot use port {port} of this machine for the ranks' store: {error}; "
                "leave --master-port out to have a free port chosen"
            ) from error
        yield holder.getsockname()[1]


def _bind_to_launcher(launcher_pid: int) -> Callable[[], None]:
    """What a rank runs between fork and exec: it asks to be killed when the launcher dies."""
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork, where it is safe

    def bind() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher_pid:  # it died before prctl took effect
            os._exit(1)

    return bind


@dataclass
class _Rank:
    """One running rank and what it said last."""

    place: Place
    process: subprocess.Popen[bytes]
    pidfd: int
    streams: list[_Stream] = field(default_factory=list)
    held: list[tuple[_Stream, bytes]] = field(default_factory=list)  # lines since a traceback began, not yet shown
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


class _Stream:
    """One pipe from a rank, cut into lines for a file or the terminal.

    raw: bytes are passed on as they come, for a rank that owns the terminal; only tracebacks are looked for.
    """

    def __init__(self, rank: _Rank, pipe: IO[bytes], sink: IO[bytes], prefix: bytes, raw: bool) -> None:
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


class _Job:
    """All ranks of one launch, from start to end."""

    def __init__(self, grace_s: float, echo_failure: bool) -> None:
        self._grace_s = grace_s
        self._echo_failure = echo_failure  # the tracebacks go to files: show the one that matters on the terminal too
        self._selector = selectors.DefaultSelector()
        self._ranks: list[_Rank] = []
        self._alive: list[_Rank] = []
        self._first: _Rank | None = None  # the rank whose failure ended the job
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
        rank = _Rank(place, process, os.pidfd_open(process.pid))
        self._ranks.append(rank)
        self._alive.append(rank)
        self._selector.register(rank.pidfd, selectors.EVENT_READ, rank)
        for pipe, (sink, prefix, raw) in zip((process.stdout, process.stderr), outputs, strict=False):
            if pipe is not None and sink is not None:
                stream = _Stream(rank, pipe, sink, prefix, raw)
                rank.streams.append(stream)
                self._selector.register(stream.fd, selectors.EVENT_READ, stream)

    def run(self, signals_fd: int) -> int:
        """Until every rank has ended. signals_fd yields the numbers of the signals the launcher got, one byte each."""
        self._selector.register(signals_fd, selectors.EVENT_READ)
        while self._alive:
            for key, _ in self._selector.select(self._wait_s()):
                if isinstance(key.data, _Stream):
                    if key.data.fd in self._selector.get_map() and not key.data.read():
                        self._selector.unregister(key.data.fd)
                elif isinstance(key.data, _Rank):
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

    def _reap(self, rank: _Rank) -> None:
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

    def _kill(self, rank: _Rank) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.process.pid, signal.SIGKILL)

    def _close(self, rank: _Rank) -> None:
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
            _say(f"{first.place} {first.fate()}{ended if others else ''}")
            return first.exit_code
        if self._signal is not None and any(rank.exit_code for rank in self._ranks):
            _say(f"ended by {self._signal.name}")
            return 128 + self._signal
        return 0


def _say(message: str) -> None:
    print(f"pycomm launch: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _signals() -> Iterator[int]:
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


def launch(
    command: Sequence[str],
    ranks_per_host: Sequence[int],
    *,
    output: str = "prefix",
    log_dir: Path | None = None,
    master_port: int = 0,
    grace_s: float = 10.0,
) -> int:
    """Run command once per rank and wait for all of them; call it from the main thread.

    ranks_per_host: ranks of each host, [n_hosts]; with more than one entry the hosts are emulated.
    output: "prefix" puts `[rank]` before each line; "rank0" leaves the launcher's own stdout to rank 0, for live
    progress lines, and prefixes the others. log_dir: what would be prefixed goes to log_dir/rank<r>.log instead.
    grace_s: from the signal that ends the job, or the first failure, until what is left gets SIGKILL.

    Returns 0 when every rank did; the exit code of the rank that failed first, 128 + signal where a signal ended it; or
    128 + the signal that ended the launch. Raises InvalidArgument, and PycommError where a rank cannot be started.
    """
    if output not in OUTPUTS:
        raise InvalidArgument(f"output is one of {', '.join(OUTPUTS)}, got {output!r}")
    all_places = places(ranks_per_host)
    argv = resolve_command(command)
    run_id = uuid.uuid4().hex[:12]
    width = len(f"[{len(all_places) - 1}] ")
    with contextlib.ExitStack() as stack:
        if log_dir is not None:
            log_dir.mkdir(parents=True, exist_ok=True)
        port = stack.enter_context(reserved_port(master_port))
        signals_fd = stack.enter_context(_signals())
        job = _Job(grace_s, echo_failure=log_dir is not None)
        stack.callback(job.end)
        before_exec = _bind_to_launcher(os.getpid())
        stdout, stderr = sys.stdout.buffer, sys.stderr.buffer
        for place in all_places:
            outputs: list[tuple[IO[bytes] | None, bytes, bool]]
            prefix = f"[{place.rank}]".ljust(width).encode()
            if place.rank == 0 and (output == "rank0" or (len(all_places) == 1 and log_dir is None)):
                outputs = [(None, b"", True), (stderr, b"", True)]
            elif log_dir is not None:
                outputs = [(stack.enter_context(open(log_dir / f"rank{place.rank}.log", "wb")), b"", False)]
            else:
                outputs = [(stdout, prefix, False), (stderr, prefix, False)]
            environment = rank_environment(place, all_places, port, run_id, os.environ)
            job.start(argv, environment, place, outputs, before_exec)
        return job.run(signals_fd)


def parse_layout(ranks: int | None, hosts: str | None, ranks_per_host: int | None) -> list[int]:
    """Ranks of each host from the options: ranks alone; hosts as a count with ranks_per_host, or as a list, "3,1"."""
    if (ranks is None) == (hosts is None):
        raise InvalidArgument("give either --ranks N, for one host, or --hosts, for emulated ones")
    if ranks is not None:
        if ranks_per_host is not None:
            raise InvalidArgument("--ranks-per-host goes with --hosts, not with --ranks")
        return [ranks]
    assert hosts is not None
    try:
        counts = [int(word) for word in hosts.split(",")]
    except ValueError:
        raise InvalidArgument(f"--hosts takes a count or a list of ranks per host such as 3,1, got {hosts!r}") from None
    if len(counts) > 1:
        if ranks_per_host is not None:
            raise InvalidArgument(f"--hosts {hosts} lists the ranks of each host already; leave --ranks-per-host out")
        return counts
    if ranks_per_host is None:
        raise InvalidArgument(f"--hosts {hosts} needs --ranks-per-host R, or a list of ranks per host such as 2,2")
    return [ranks_per_host] * counts[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pycomm launch",
        usage="pycomm launch (--ranks N | --hosts H --ranks-per-host R | --hosts N,N,...) [options] [--] command ...",
        description="Run a command once per rank on this machine, with torchrun's environment variables, and end all "
        "ranks together. `python`, `-m module` and `script.py` run in the interpreter that runs pycomm.",
        epilog="exit code: 0 when every rank ended with 0; else that of the rank that failed first (128 + signal where "
        "a signal ended it), whose traceback is shown before the others'; 128 + signal when the launch itself was "
        "ended; 2 when nothing could be started. Ctrl-C and SIGTERM go to every rank; a second one kills them at once.",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks, all on one host")
    parser.add_argument(
        "--hosts",
        metavar="H",
        help="emulated hosts (TCP between them, no shared memory across): a count, or the ranks of each, such as 3,1",
    )
    parser.add_argument("--ranks-per-host", type=int, metavar="R", help="ranks on each emulated host")
    parser.add_argument(
        "--output",
        choices=OUTPUTS,
        default="prefix",
        help="prefix: `[rank]` before every line (default; a single rank writes as it is). "
        "rank0: rank 0 writes to this terminal itself, so that live progress lines work; the others are prefixed",
    )
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="write what would be prefixed to DIR/rank<r>.log instead"
    )
    parser.add_argument(
        "--master-port", type=int, default=0, metavar="PORT", help="port of rank 0's store (default: a free one)"
    )
    parser.add_argument(
        "--grace", type=float, default=10.0, metavar="S", help="seconds between asking ranks to end and killing them"
    )
    return parser


def _split(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Our own options, and the command: what follows `--`, or begins with -m or a word. Each of ours takes a value."""
    i = 0
    while i < len(argv):
        word = argv[i]
        if word == "--":
            return argv[:i], argv[i + 1 :]
        if word == "-m" or not word.startswith("-"):
            break
        i += 1 if "=" in word or word in ("-h", "--help") else 2
    return argv[:i], argv[i:]


def main(argv: Sequence[str]) -> int:
    """`pycomm launch`: returns the exit code."""
    own, command = _split(argv)
    options = _parser().parse_args(own)
    try:
        return launch(
            command,
            parse_layout(options.ranks, options.hosts, options.ranks_per_host),
            output=options.output,
            log_dir=options.log_dir,
            master_port=options.master_port,
            grace_s=options.grace,
        )
    except BrokenPipeError:  # whoever read our output, such as `head`, has had enough; the ranks have been ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush would complain
        return 128 + signal.SIGPIPE
    except (PycommError, OSError) as error:
        _say(f"error: {error}")
        return 2
