"""Who this process is in a job that some launcher started: torchrun, `pycomm launch`, srun or an mpiexec."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pycomm.errors import PycommError

_TORCHRUN: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# rank and size in the job, and on the host, as Open MPI sets them, and as Hydra does for MPICH and Intel MPI
_MPIEXEC: Final = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_FIRST_PORT, _N_PORTS = 20000, 12000  # below those that Linux gives to whoever asks for any


def join_job() -> bool:
    """Sets torchrun's variables for this rank, from whatever started it; False where it is no rank of anything.

    Raises PycommError where a launcher does not say all that is needed."""
    found = job_environment(os.environ)
    os.environ.update(found or {})
    return found is not None


def job_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """torchrun's variables for this rank: as they stand, or from Slurm's or an mpiexec's. None where this process is no
    rank of anything.

    Raises PycommError where a launcher says who this rank is but not where rank 0 is."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {name: environment[name] for name in _TORCHRUN if name in environment}
    mpi = next((names for names in _MPIEXEC if names[0] in environment and names[1] in environment), None)
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:  # a batch script itself is in no step
        found = _from_slurm(environment)
        # The step may be that of an mpiexec's daemons, one on each host; ranks have theirs from the daemons.
        if mpi is None or (environment[mpi[0]], environment[mpi[1]]) == (found["RANK"], found["WORLD_SIZE"]):
            return found
    elif mpi is None and environment.get("SLURM_PROCID", "0") != "0":
        raise PycommError(
            f"SLURM_PROCID is {environment['SLURM_PROCID']} and SLURM_STEP_ID is not set; srun sets both. Start the "
            "ranks with srun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for all of them"
        )
    return _from_mpiexec(environment, *mpi) if mpi is not None else None


def _from_mpiexec(
    environment: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str
) -> dict[str, str]:
    """Where all ranks are on this host, rank 0 is too, and what started them all gives the port."""
    found = {"RANK": environment[rank], "WORLD_SIZE": environment[size]}
    if local_rank in environment:
        found["LOCAL_RANK"] = environment[local_rank]
    if environment.get(local_size) == environment[size] and (starter := _starter(rank)) is not None:
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_FIRST_PORT + starter % _N_PORTS)}
    found |= {name: environment[name] for name in _TORCHRUN[2:] if name in environment}
    missing = [name for name in _TORCHRUN if name not in found]
    if missing:
        raise PycommError(
            f"this is rank {environment[rank]} of an mpiexec, which does not say where rank 0 is: set "
            f"{' and '.join(missing)} for all ranks, or start them with `pycomm launch`, torchrun or srun"
        )
    return found


def _starter(variable: str) -> int | None:
    """The nearest ancestor without this variable, which ranks and programs around them have; None where it cannot be
    seen."""
    pid = os.getppid()
    try:
        while f"\0{variable}=".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
    return pid


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
    """The first name of Slurm's list: "gpu[03-07,9],login" is gpu03, and "rack[1-2]node[3-4]" is rack1node3."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes.strip())
    assert first is not None
    return re.sub(r"\[(\d*)[^\]]*\]", r"\1", first[0])
