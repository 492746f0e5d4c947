"""What a collective on a device costs the host in pycomm alone: over a device and an NCCL that do nothing
(null_device.cc), so without CUDA's own calls (some events and queries an operation) and NCCL's.

    python benchmarks/gpu_host.py

Four ranks on two emulated hosts; rank 0 calls, the others are idle. Writes results/gpu_host.json. On a GPU, bench-gpu
measures the same with both."""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import environment, markdown_table, microseconds, run_ranks, write_json

ROOT = Path(__file__).resolve().parents[1]
CALLS, ROUNDS = 500, 15


def library() -> Path:
    """null_device.cc, compiled where it is older than its source."""
    source, made = ROOT / "benchmarks/null_device.cc", ROOT / "build/null_device.so"
    newest = max(path.stat().st_mtime for path in (source, ROOT / "csrc/cuda/device.h"))
    if not made.exists() or made.stat().st_mtime < newest:
        made.parent.mkdir(exist_ok=True)
        partial = made.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-Wl,-Bsymbolic", f"-I{ROOT / 'csrc'}"]
        subprocess.run(["c++", *flags, str(source), "-o", str(partial)], check=True)
        partial.rename(made)
    return made


class Array:
    """x's memory as an array on the device, on a stream that is not the default one."""

    def __init__(self, x: torch.Tensor) -> None:
        self.memory = x.numpy()
        self.__cuda_array_interface__ = {
            "shape": self.memory.shape,
            "typestr": self.memory.dtype.str,
            "data": (self.memory.ctypes.data, False),
            "version": 3,
            "stream": 16,
        }


def times(calls: int = CALLS, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """By what was called: `seconds` a call, the median of rounds, and how many `device_calls` it makes: events recorded
    and waited for, streams asked whether they are captured."""
    return dict(run_ranks(_rank, 4, str(library()), calls, rounds, hosts=["a", "a", "b", "b"])[0])


def _rank(store: dist.Store, rank: int, n_ranks: int, path: str, calls: int, rounds: int) -> dict[str, Any]:
    import pycomm

    os.environ |= {"PYCOMM_NCCL_LIB": path, "PYCOMM_TEST_DEVICE": path}
    with pycomm.init(store, rank, n_ranks, host_id=os.environ["PYCOMM_HOST_ID"], timeout_s=60) as group:
        array = Array(torch.zeros(1024))
        device = ctypes.CDLL(path)
        device.null_device_calls.restype = ctypes.c_uint64
        tasks: dict[str, Callable[[], Any]] = {
            "Group.all_reduce, native": lambda: group.all_reduce(array, algorithm="native"),
            "Group.all_reduce, hierarchical": lambda: group.all_reduce(array, algorithm="hierarchical"),
        }
        found = {}
        for name, call in tasks.items():
            call()  # all ranks meet
            if rank == 0:
                seconds = statistics.median(_seconds(call, calls) for _ in range(rounds))
                before = device.null_device_calls()
                call()
                found[name] = {"seconds": seconds, "device_calls": device.null_device_calls() - before}
        store.set(f"done/{rank}", "")
        store.wait([f"done/{one}" for one in range(n_ranks)], timedelta(seconds=300))
    return found


def _seconds(call: Callable[[], Any], n: int) -> float:
    begin_s = time.perf_counter()
    for _ in range(n):
        call()
    return (time.perf_counter() - begin_s) / n


def main() -> None:
    found = times()
    path = write_json("gpu_host", {"environment": environment(), "calls": found})
    rows = [[name, microseconds(one["seconds"] * 1e6), f"{one['device_calls']:g}"] for name, one in found.items()]
    print(markdown_table(["one call, without CUDA and NCCL", "us", "calls of CUDA it would make"], rows))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
