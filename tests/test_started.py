"""Ranks that another launcher started: what its variables say, and commands as ranks of srun's and of an mpiexec's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from pycomm.errors import PycommError
from pycomm.launch.started import first_node, job_environment


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-07,9],login", "gpu03"),
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("n[1,3]-ib", "n1-ib"),
        ("rack1-n[008]", "rack1-n008"),
        ("rack[1-2]node[3-4],rack3node1", "rack1node3"),
        ("rack[07,9]-n[3,5-6]-ib", "rack07-n3-ib"),
    ],
)
def test_first_node_of_slurms_lists(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_the_environment_of_each_launcher() -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert job_environment(torchrun | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "X": "y"}) == torchrun
    slurm = {"SLURM_STEP_ID": "2", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "1234"}
    slurm |= {"SLURM_STEP_NODELIST": "n[07-10]", "SLURM_LOCALID": "1"}
    found = job_environment(slurm)
    assert found is not None
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"], found["LOCAL_RANK"]) == ("3", "8", "n07", "1")
    others = [job_environment(slurm | {"SLURM_PROCID": str(rank)}) for rank in range(8)]
    assert {each["MASTER_PORT"] for each in others if each} == {found["MASTER_PORT"]}
    assert job_environment(slurm | {"MASTER_PORT": "555"}) == found | {"MASTER_PORT": "555"}
    batch_script = {name: value for name, value in slurm.items() if name != "SLURM_STEP_ID"}
    batch_script["SLURM_PROCID"] = "0"
    assert job_environment(batch_script) is None
    assert job_environment({"HOME": "/"}) is None
    with pytest.raises(PycommError, match="SLURM_PROCID is 3 and SLURM_STEP_ID is not set"):
        job_environment(batch_script | {"SLURM_PROCID": "3"})


HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize("mpiexec", [HYDRA, OPEN_MPI], ids=["Hydra", "Open MPI"])
def test_an_mpiexecs_ranks_are_told_where_rank_0_is_unless_all_are_here(mpiexec: dict[str, str]) -> None:
    local_rank, local_size = "MPI_LOCALRANKID", "MPI_LOCALNRANKS"
    if mpiexec is OPEN_MPI:
        local_rank, local_size = "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
    elsewhere = mpiexec | {local_rank: "0", local_size: "1"}
    for environment in (mpiexec, elsewhere):
        with pytest.raises(PycommError, match="set MASTER_ADDR and MASTER_PORT"):
            job_environment(environment)
    with pytest.raises(PycommError, match="set MASTER_PORT for"):
        job_environment(elsewhere | {"MASTER_ADDR": "h"})
    where = {"MASTER_ADDR": "h", "MASTER_PORT": "1"}
    ranks = {"RANK": "1", "WORLD_SIZE": "2"}
    assert job_environment(mpiexec | where) == ranks | where
    here = mpiexec | {local_rank: "1", local_size: "2"}
    assert job_environment(here | where) == ranks | where | {"LOCAL_RANK": "1"}
    found = job_environment(here)
    assert found is not None
    assert found["MASTER_ADDR"] == "127.0.0.1" and 20000 <= int(found["MASTER_PORT"]) < 32000


def test_an_mpiexec_inside_a_slurm_job_starts_its_daemons_by_srun() -> None:
    """Ranks inherit the daemons' SLURM_PROCID, the same for all on a host; where srun started the ranks, both agree."""
    daemon = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1"}
    here = HYDRA | {"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert (job_environment(daemon | here) or {})["RANK"] == "1"
    task = daemon | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert (job_environment(task | HYDRA) or {})["MASTER_ADDR"] == "n1"


@pytest.mark.parametrize("launcher", ["srun", "mpiexec"])
def test_commands_run_as_its_ranks(launcher: str) -> None:
    """Rank 1 has a shell around it, so that the two have no parent in common."""
    command = {"srun": ["topo"], "mpiexec": ["bench", "all_reduce", "-b", "8", "-e", "8", "-n", "3", "--timeout", "60"]}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(2):
        if launcher == "srun":
            own = {"SLURM_STEP_ID": "0", "SLURM_PROCID": f"{rank}", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7"}
            own |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": f"{rank}", "MASTER_PORT": port}
        else:
            own = {"PMI_RANK": f"{rank}", "PMI_SIZE": "2", "MPI_LOCALRANKID": f"{rank}", "MPI_LOCALNRANKS": "2"}
        around = ["sh", "-c", '"$@"; exit $?', "sh"] if rank == 1 else []
        started = [*around, sys.executable, "-m", "pycomm", *command[launcher]]
        ranks.append(
            subprocess.Popen(started, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert ("2 ranks, 1 host" if launcher == "srun" else "pycomm bench: 2 ranks on 1 host") in said[0][0]
    assert said[1][0] == ""  # rank 0 alone prints
