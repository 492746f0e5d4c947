"""One program under `pycomm launch`, on emulated hosts, and under torchrun: both give it what pycomm and torch need."""

import json
import subprocess
import sys

import torch_ranks  # noqa: F401  (its RES_OPTIONS reach these ranks too)
from commands import PYCOMM

PROGRAM = """
import json
import pycomm, torch, torch.distributed as dist

group = pycomm.init()
x = torch.full((1000,), float(group.rank))
group.all_reduce(x)
dist.init_process_group("pycomm")
dist.all_reduce(x)
found = {"rank": group.rank, "sum": x[0].item(), "hosts": list(group.host_ids), "backend": dist.get_backend()}
if group.rank == 0:
    print("found", json.dumps(found))
dist.destroy_process_group()
group.close()
"""


def run(tmp_path, *command):
    """What rank 0 found."""
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run([*command, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("found ")[2])


def test_emulated_hosts_of_unequal_size(tmp_path):
    found = run(tmp_path, *PYCOMM, "launch", "--hosts", "2,1")
    assert found == {"rank": 0, "sum": 9.0, "hosts": ["host0", "host0", "host1"], "backend": "pycomm"}


def test_torchrun(tmp_path):
    found = run(tmp_path, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert (found["rank"], found["sum"], found["backend"]) == (0, 2.0, "pycomm")
    assert len(set(found["hosts"])) == 1


def test_the_store_outlives_ranks_that_leave_later_than_its_own(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import time, pycomm\n"
        "group = pycomm.init()\n"
        "group.barrier()\n"
        "if group.rank == 1:\n"
        "    time.sleep(1)  # rank 0's program has ended\n"
        "    group._store.check(['word'])  # torch prints a stack and raises where nobody serves the store\n"
        "group = None if group.rank == 0 else group\n"
    )
    done = subprocess.run(
        [*PYCOMM, "launch", "--hosts", "2,1", "--", "python", program],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
