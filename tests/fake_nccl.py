"""Ranks whose tensors "on a device" are CPU tensors, over a fake NCCL (tests/cc/fake_nccl); for tests of the CUDA
engine where there is no GPU."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_ranks import run_torch_ranks

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "build/fake_nccl/libfake_nccl.so"


def build() -> Path:
    """The library, compiled where it is older than its sources."""
    folder = ROOT / "tests/cc/fake_nccl"
    newest = max(path.stat().st_mtime for path in [*folder.iterdir(), ROOT / "csrc/cuda/device.h"])
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < newest:
        LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        made = LIBRARY.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-DFAKE_VERSION=22905"]
        includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cc'}"]
        subprocess.run(["c++", *flags, *includes, *map(str, folder.glob("*.cc")), "-o", str(made)], check=True)
        made.rename(LIBRARY)
    return LIBRARY


def run_device_ranks(fn: Callable[..., Any], n_ranks: int, *args: Any, **options: Any) -> list[Any]:
    """run_torch_ranks(), with fn(rank, n_ranks, switches, *args) on the fake device. switches: fake_nccl.h's."""
    return run_torch_ranks(_on_fake, n_ranks, str(build()), fn, args, backend="pycomm", **options)


def _on_fake(rank: int, n_ranks: int, library: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    # The extension looks when the first tensor is communicated.
    os.environ["PYCOMM_NCCL_LIB"] = os.environ["PYCOMM_TEST_DEVICE"] = library
    switches = ctypes.CDLL(library)
    switches.fake_device_delay(100)
    return fn(rank, n_ranks, switches, *args)
