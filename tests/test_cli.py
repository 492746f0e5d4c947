"""The `pycomm` command: its subcommands, their exit codes, and what they need to be installed."""

import subprocess
import sys

import fake_nccl
import pytest

from pycomm.cli import COMMANDS
from pycomm.explain import explain
from pycomm.topology import Topology


def test_as_a_process_of_its_own():
    for arguments, code in ((["--help"], 0), (["explain", "all_reduce", "64QiB"], 2)):
        done = subprocess.run([sys.executable, "-m", "pycomm", *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == code and "Traceback" not in done.stderr
        assert "usage: pycomm" in done.stdout if code == 0 else "64QiB" in done.stderr


def test_help_lists_every_command_and_each_describes_itself(pycomm_command):
    code, stdout, stderr = pycomm_command("--help")
    assert (code, stderr) == (0, "")
    for name, command in COMMANDS.items():
        assert f"  {name} " in stdout and command.help in stdout
        code, stdout_of_it, _ = pycomm_command(name, "--help")
        assert code == 0 and f"usage: pycomm {name}" in stdout_of_it
    assert pycomm_command()[0] == 2


def test_version(pycomm_command):
    code, stdout, _ = pycomm_command("--version")
    assert code == 0 and stdout.startswith("pycomm ")


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["no-such-command"], "no-such-command"),
        (["explain", "all_reduce"], "nbytes"),
        (["explain", "all_reduce", "64QiB"], "64QiB"),
        (["explain", "all_reduc", "64MiB"], "no collective 'all_reduc'"),
        (["explain", "all_reduce", "1", "--hosts", "2"], "needs --ranks-per-host"),
        (["explain", "all_reduce", "1", "--hosts", "2,0"], "at least 1 rank"),
        (["explain", "all_reduce", "1", "--hosts", "2,-1"], "at least 1 rank"),
        (["explain", "all_reduce", "1", "--topology", "/no/such.toml"], "/no/such.toml"),
        (["explain", "all_reduce", "1", "--topology", "x.toml", "--ranks", "2"], "leave --ranks and --hosts out"),
    ],
)
def test_wrong_arguments_name_the_fact_and_end_with_2(pycomm_command, arguments, fact):
    code, stdout, stderr = pycomm_command(*arguments)
    assert (code, stdout) == (2, "")
    assert fact in stderr and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("layout", "ranks_per_host"),
    [
        ([], [2, 2]),
        (["--ranks", "3"], [3]),
        (["--hosts", "3,1"], [3, 1]),
        (["--hosts", "4", "--ranks-per-host", "2"], [2] * 4),
    ],
)
def test_explain_prints_what_the_library_says(pycomm_command, layout, ranks_per_host):
    code, stdout, stderr = pycomm_command("explain", "all_reduce", "64MiB", *layout)
    assert (code, stderr) == (0, "")
    assert stdout == f"{explain(Topology.emulated(ranks_per_host), 'all_reduce', 64 << 20)}\n"


def test_explain_takes_a_topology_from_a_file(pycomm_command, tmp_path):
    topology = Topology.emulated([2, 3])
    topology.save(tmp_path / "cluster.toml")
    code, stdout, _ = pycomm_command("explain", "broadcast", "4KiB", "--topology", str(tmp_path / "cluster.toml"))
    assert code == 0 and stdout == f"{explain(topology, 'broadcast', 4096)}\n"


def test_explain_and_launch_work_with_numpy_alone():
    """Neither torch nor the extension can be imported."""
    program = """
import sys
sys.modules["torch"] = sys.modules["pycomm._C"] = None  # importing either is refused, and finding it too
from pycomm.cli import main
assert main(["explain", "all_reduce", "1MiB"]) == 0
assert main(["launch", "--ranks", "2", "--", "true"]) == 0
assert main(["info"]) == 0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "all_reduce of 1 MiB" in done.stdout and "extension   not loaded" in done.stdout


def test_info_names_versions_and_the_extension(pycomm_command):
    code, stdout, stderr = pycomm_command("info")
    assert (code, stderr) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in stdout.splitlines())
    from pycomm import _C

    cuda = {"cuda", "nccl"} if hasattr(_C, "cuda_info") else {"cuda"}
    assert {"pycomm", "python", "machine", "numpy", "torch", "extension"} | cuda == set(rows)
    assert "_C" in rows["extension"] and rows["cuda"].startswith("runtime" if "nccl" in cuda else "not compiled in")


def test_info_lists_what_an_nccl_has_and_what_it_lacks(pycomm_command, monkeypatch):
    from pycomm import _C

    library = str(fake_nccl.build())
    monkeypatch.setenv("PYCOMM_NCCL_LIB", library)
    _, stdout, _ = pycomm_command("info")
    if not hasattr(_C, "cuda_info"):
        assert "not compiled in" in stdout
        return
    lines = [line.split() for line in stdout.splitlines()]
    assert ["nccl", "2.29.5", "at", library] in lines
    table = {line[0]: line for line in lines if len(line) > 2 and line[1].startswith("nccl")}
    assert table["shrink"][1:3] == ["ncclCommShrink", "yes"] and "ranks that are left" in " ".join(table["shrink"])
    assert " ".join(table["grow"]).startswith("grow ncclCommGrow no, needs NCCL 2.29.0")
