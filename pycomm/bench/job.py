"""The ranks' environment, from whatever started them, and Ctrl-C that keeps what was measured."""

from __future__ import annotations

import contextlib
import fcntl
import re
import signal
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Final

from pycomm.errors import PycommError

_TORCHRUN: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MPIEXEC: Final = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))
_SIOCGIFADDR: Final = 0x8915  # linux/sockios.h
_ECHO_S: Final = 1.0  # a signal that comes again sooner is the same one, from the terminal and from a launcher


def job_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """torchrun's variables for this rank: as they stand, or from Slurm's or an mpiexec's. None where this process is no
    rank of anything.

    Raises PycommError where a launcher says who this rank is but not where rank 0 is."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {name: environment[name] for name in _TORCHRUN if name in environment}
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:  # a batch script itself is in no step
        return _from_slurm(environment)
    for rank, size in _MPIEXEC:
        if rank in environment and size in environment:
            missing = [name for name in _TORCHRUN[2:] if name not in environment]
            if missing:
                raise PycommError(
                    f"this is rank {environment[rank]} of an mpiexec, which does not say where rank 0 is: set "
                    f"{' and '.join(missing)} for all ranks, or start them with `pycomm launch`, torchrun or srun"
                )
            return {"RANK": environment[rank], "WORLD_SIZE": environment[size]} | {
                name: environment[name] for name in _TORCHRUN[2:]
            }
    return None


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """srun's variables (man srun, OUTPUT ENVIRONMENT VARIABLES): task 0 runs on the step's first node."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    size = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    if size is None or not nodes:
        raise PycommError("srun set SLURM_PROCID, but neither the number of tasks nor the list of nodes; is it srun?")
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = 20000 + (job * 16 + step) % 20000  # of this step, the same on all its ranks
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_node(nodes),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
    }


def first_node(nodes: str) -> str:
    """The first name of Slurm's list: "gpu[03-07,9],login" is gpu03."""
    match = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\])?([^\[,]*)", nodes.strip())
    assert match is not None
    return match[1] + (match[2] or "") + match[3]


def interfaces(addresses: Sequence[str]) -> list[str]:
    """The names of this host's network interfaces that have these IPv4 addresses, in their order."""
    named: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                named[socket.inet_ntoa(answer[20:24])] = name
    return [named[address] for address in addresses if address in named]


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
