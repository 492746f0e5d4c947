"""What the build promises: where it looks for CUDA, and a module that asks nothing of the machine it is loaded on."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch  # the module needs its libraries

from pycomm import _C

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cuda_home(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str, bool], str]:
    """What `setup.py cuda_home` says with PYCOMM_CUDA=wanted, on a machine with or without a toolkit in CUDA_HOME."""

    def ask(wanted: str, toolkit: bool) -> str:
        monkeypatch.setenv("PYCOMM_CUDA", wanted)
        monkeypatch.setenv("CUDA_HOME", "/opt/toolkit")
        monkeypatch.setattr(Path, "is_file", lambda path: toolkit and path.is_relative_to("/opt/toolkit"))
        monkeypatch.setattr(sys, "argv", ["setup.py", "cuda_home"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "setup.py"))
        return str(ended.value.code or capsys.readouterr().out.strip())

    return ask


def test_cuda_is_built_where_a_toolkit_is_found(cuda_home: Callable[[str, bool], str]) -> None:
    assert cuda_home("", True) == cuda_home("1", True) == "/opt/toolkit"
    assert cuda_home("", False) == cuda_home("0", True) == ""


def test_cuda_wanted_without_a_toolkit_is_an_error_that_says_where_it_looked(
    cuda_home: Callable[[str, bool], str],
) -> None:
    assert cuda_home("1", False).startswith("PYCOMM_CUDA=1, but no CUDA toolkit: none under CUDA_HOME")
    assert cuda_home("yes", True).startswith("PYCOMM_CUDA=yes: must be 0")


def test_module_needs_no_cuda_library_and_shows_no_symbol_of_one() -> None:
    module = _C.__file__
    needed = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in needed
    assert not re.search(r"NEEDED.*(cuda|nccl)", needed)
    # A visible cudaMalloc would be bound to the libcudart that a CUDA build of torch puts in the global scope.
    symbols = subprocess.run(["nm", "-D", module], capture_output=True, text=True, check=True).stdout
    assert "PyInit__C" in symbols
    assert not re.search(r"^.* [TUVW] (__)?(cuda|nccl)\w*$", symbols, re.MULTILINE)


def test_module_was_built_for_this_torch() -> None:
    from importlib.metadata import requires

    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"torch=={minor}.*" in (requires("pycomm") or [])
