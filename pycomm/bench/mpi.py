"""MPI as a baseline: a companion job that this job's rank 0 starts on the same host, or the ranks themselves where an
mpiexec or srun with PMI started them.

A job under torchrun has no MPI, and MPI cannot be joined from outside without losing its shared memory; so the same
number of ranks is started by mpiexec, sleeps, and wakes for its turns. That is honest on one host alone: of several
emulated hosts MPI would know nothing, and on several real ones mpiexec needs a host list of its own."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from pycomm.bench.cases import Case
from pycomm.bench.mpi_meeting import Meeting
from pycomm.bench.mpi_rank import KEY, mpi_module, mpi_trial, refusal
from pycomm.bench.trials import Memory, Nanoseconds, Trial, Unavailable
from pycomm.errors import PycommError
from pycomm.group import Group

_IMPORT_S = 60.0  # for mpi4py, also from a slow network's file system
_STARTED_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")


class MpiRanks:
    """MPI in the ranks' own processes."""

    name = "mpi"

    def __init__(self, group: Group) -> None:
        """Raises Unavailable where MPI's ranks are not the group's."""
        MPI = mpi_module()
        if MPI.COMM_WORLD.size != group.size:
            raise Unavailable(f"MPI.COMM_WORLD has {MPI.COMM_WORLD.size} ranks, the job {group.size}")
        self._comm = MPI.COMM_WORLD.Split(0, group.rank)
        self.version = MPI.Get_library_version().split("\n")[0].strip("\0 ")

    def trial(self, case: Case, placement: str, memory: Memory) -> Trial:
        if why := refusal(case):
            raise Unavailable(why)
        return mpi_trial(self._comm, case, placement, memory)

    def close(self) -> None: ...


class MpiCompanion:
    """MPI's ranks as processes of their own, commanded by this job's rank 0; on other ranks it does nothing."""

    name = "mpi"

    def __init__(self, n_ranks: int, leads: bool, mpiexec: str, python: str, timeout_s: float) -> None:
        """Raises PycommError where the ranks do not come, with what they said."""
        self._n, self._timeout_s = n_ranks, timeout_s
        self._ranks: dict[int, Connection] = {}
        self.version = ""
        self._process: subprocess.Popen[bytes] | None = None
        if not leads:
            return
        key = secrets.token_hex(16)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (until close())
        with Meeting(bytes.fromhex(key), backlog=n_ranks) as meeting:
            self._process = subprocess.Popen(
                [*shlex.split(mpiexec), "-n", str(n_ranks), python, "-m", "pycomm.bench.mpi_rank", meeting.address],
                env=companion_environment(os.environ, key),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                self._meet(meeting)
            except BaseException:
                self.close()
                raise

    def trial(self, case: Case, placement: str, memory: Memory) -> Trial:
        if why := refusal(case):
            raise Unavailable(why)
        self._ask("trial", case, placement)
        return _RemoteTrial(self, placement)

    def close(self) -> None:
        for connection in self._ranks.values():
            connection.close()
        if self._process is not None:
            try:
                self._process.wait(min(3, self._timeout_s / 4))  # they end with their connections
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    def _meet(self, meeting: Meeting) -> None:
        until = time.monotonic() + self._timeout_s / 2  # the job's other ranks wait timeout_s for this one's word
        while len(self._ranks) < self._n:
            assert self._process is not None
            ended = self._process.poll() is not None
            came = meeting.next()
            if came is None:
                if ended or time.monotonic() > until:
                    raise PycommError(f"{len(self._ranks)} of {self._n} MPI ranks came; {self._said()}")
                continue
            connection, (rank, size, self.version) = came
            if size != self._n:
                raise PycommError(f"MPI started jobs of {size} ranks instead of {self._n}; is mpiexec this MPI's own?")
            self._ranks[rank] = connection

    def _ask(self, *command: Any) -> list[Any]:
        """Every MPI rank's answer, by rank; none on ranks that do not lead."""
        for rank in sorted(self._ranks):
            try:
                self._ranks[rank].send(command)
            except ConnectionError:
                raise PycommError(f"MPI rank {rank} has ended; {self._said()}") from None
        answers = []
        for rank in sorted(self._ranks):
            try:
                if not self._ranks[rank].poll(self._timeout_s):
                    raise PycommError(f"MPI rank {rank} does not answer {command[0]!r} in {self._timeout_s:g} s")
                answers.append(self._ranks[rank].recv())
            except (EOFError, ConnectionError):
                raise PycommError(f"MPI rank {rank} ended; {self._said()}") from None
        return answers

    def _said(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return "it said: " + " | ".join(lines[-5:]) if lines else "it said nothing"


class _RemoteTrial:
    def __init__(self, companion: MpiCompanion, placement: str) -> None:
        self._companion, self._placement = companion, placement

    def check(self) -> int | None:
        answers = [wrong for wrong in self._companion._ask("check", self._placement) if wrong is not None]
        return sum(answers) if answers else None

    def block(self, n_calls: int, n_warmup: int) -> Nanoseconds:
        """The slowest MPI rank's times, on the rank that leads; others took none."""
        answers = self._companion._ask("block", self._placement, n_calls, n_warmup)
        return np.max(answers, axis=0) if answers else np.zeros(n_calls, np.int64)


def companion_environment(base: Mapping[str, str], key: str) -> dict[str, str]:
    """The environment of the companion's mpiexec: without what the own launcher set, which an MPI might read."""
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    foreign = ("SLURM_", "PMI", "OMPI_", "TORCHELASTIC_", "GROUP_", "ROLE_")
    kept = {name: value for name, value in base.items() if name not in own and not name.startswith(foreign)}
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [base.get("PYTHONPATH")])]
    return kept | {KEY: key, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def default_mpiexec(python: str) -> str:
    """The mpiexec beside the interpreter, as MPI's wheels install it, else the one on the path; "" without one."""
    beside = Path(python).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec") or ""


def started_by_mpi(environment: Mapping[str, str]) -> bool:
    return any(name in environment for name in _STARTED_BY_MPI)


def mpi_refusal(group: Group, mpiexec: str, python: str, timeout_s: float) -> str:
    """Why no companion can be started for this job; empty where one can. timeout_s: for which other ranks wait."""
    if len(set(group.host_ids)) > 1:
        return (
            "the job has several hosts: a companion would be one job on this host alone; start the ranks "
            "themselves by srun --mpi or mpiexec to measure MPI across hosts"
        )
    if not mpiexec:
        return f"no mpiexec beside {python} or on the path; install an MPI, or name one with --mpiexec"
    return _import_problem(python, min(_IMPORT_S, timeout_s / 2)) if group.rank == 0 else ""


def _import_problem(python: str, patience_s: float) -> str:
    """Why this interpreter cannot import mpi4py; empty where it can."""
    other = "name another with --mpi-python"
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [python, "-c", "import mpi4py, numpy"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            return f"{python} cannot be started: {error.strerror}; {other}"
        try:
            code = process.wait(patience_s)
        except subprocess.TimeoutExpired:
            return f"{python} has not imported mpi4py in {patience_s:g} s; {other}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        errors.seek(0)
        lines = errors.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()] or [f"it ends with {code} and says nothing"]
        return f"{python} has no mpi4py: {said[-1]}; {other}" if code else ""


def open_mpi(group: Group, timeout_s: float, mpiexec: str, python: str) -> MpiRanks | MpiCompanion:
    if started_by_mpi(os.environ):
        return MpiRanks(group)
    return MpiCompanion(group.size, group.rank == 0, mpiexec, python, timeout_s)
