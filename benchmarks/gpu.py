"""The CUDA kernels and the engine on this machine's GPUs: make bench-gpu

Runs gpu_kernels, gpu_moe and gpu_peers (built by cmake), torch's and Triton's kernels on the same data (gpu_torch.py),
and collectives of ranks as processes (gpu_ranks.py). Writes results/<gpu>.json and prints it (gpu_report.py). What
fails stands in the record as not measured, with its reason; the exit code is 1 then. Without a GPU nothing is
measured."""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_ranks
import gpu_torch
import torch
from common import environment, write_json
from gpu_clock import Clock
from gpu_report import tables

Record = dict[str, Any]
PROGRAMS = ("gpu_kernels", "gpu_moe", "gpu_peers")
SIZES = tuple(1 << power for power in range(10, 27, 4))
SMALL = (1 << 10, 1 << 14, 1 << 16, 1 << 20)
PEER_BYTES = 1 << 20
HIERARCHICAL = (1 << 12, 1 << 20, 1 << 26)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help=f"where {', '.join('bench_' + name for name in PROGRAMS)} are")
    folder = parser.parse_args(arguments).folder
    if not torch.cuda.is_available():
        sys.exit("bench-gpu: torch finds no GPU (a CPU-only torch?); nothing was measured")
    from pycomm import _C
    from pycomm.gpus import nccl_wheel

    info = _C.cuda_info(nccl_wheel())
    setting = gpu_ranks.Setting(Clock(), torch.cuda.device_count(), info["nccl_path"], info["nccl_version"])
    name = torch.cuda.get_device_name(0)
    record: Record = {
        "environment": environment(),
        "gpu": name,
        "n_gpus": setting.n_gpus,
        "nccl_version": info["nccl_version"],
        "not_measured": {},
    }
    measure_kernels(record, folder, setting.clock)
    if info["nccl_version"]:
        measure_ranks(record, setting)
    else:
        record["not_measured"]["collectives"] = info["nccl_problem"]
    path = write_json(re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"), record)
    print(tables(record))
    print(f"\nwritten: {path}")
    sys.exit(1 if record["not_measured"] else 0)


def measure_kernels(record: Record, folder: Path, clock: Clock) -> None:
    """Adds `kernels` and `threads`."""
    missing = record["not_measured"]
    kernels: list[Record] = []
    for program in PROGRAMS[:2]:
        _try(missing, program, lambda program=program: kernels.extend(run_program(folder / f"bench_{program}")))

    def by_torch() -> None:
        found, without = gpu_torch.rows(clock)
        kernels.extend(found)
        missing.update(without)

    _try(missing, "kernels by torch", by_torch)
    _try(missing, "expand by torch", lambda: kernels.extend(gpu_torch.expands(clock)))
    record["kernels"] = kernels
    _try(missing, "gpu_peers", lambda: record.update(threads=run_peers(folder / "bench_gpu_peers", missing)))


def measure_ranks(record: Record, setting: gpu_ranks.Setting, small: tuple[int, ...] = SMALL) -> None:
    """Adds `processes`, `hierarchical` and `graph`."""
    missing = record["not_measured"]
    record["processes"] = []
    for n_ranks in (2, 4):
        _try(
            missing,
            f"peers of {n_ranks} processes",
            lambda n=n_ranks: record["processes"].extend(gpu_ranks.all_reduces(setting, n, small, PEER_BYTES)),
        )
    _try(
        missing,
        "NCCL of processes",
        lambda: record["processes"].extend(gpu_ranks.all_reduces(setting, max(2, setting.n_gpus), SIZES, 0)),
    )
    _try(
        missing,
        "hierarchical",
        lambda: record.update(hierarchical=gpu_ranks.hierarchical(setting, HIERARCHICAL)),
    )
    _try(missing, "graph", lambda: record.update(graph=gpu_ranks.graph(setting, max(2, setting.n_gpus))))


def _try(missing: dict[str, str], what: str, run: Callable[[], object]) -> None:
    try:
        run()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        missing[what] = f"{type(error).__name__}: {lines[-1]}"
        print(f"bench-gpu: {what}: {error}", file=sys.stderr)


def _lines(program: Path) -> list[list[str]]:
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"{program.name}: exit code {done.returncode}")
    return [line.split("\t") for line in done.stdout.splitlines()]


def run_program(program: Path) -> list[Record]:
    """What gpu_timing.h's programs print: kernel, elements, bytes, seconds of each round."""
    return [
        {
            "kernel": kernel,
            "by": "pycomm" if kernel != "copy" else "cudaMemcpy",
            "numel": int(numel),
            "nbytes": int(nbytes),
            "median_s": statistics.median(map(float, seconds)),
        }
        for kernel, numel, nbytes, *seconds in _lines(program)
    ]


def run_peers(program: Path, missing: dict[str, str]) -> list[Record]:
    """What gpu_peers.cc prints: what, ranks, bytes, seconds of each round; or what it is without, and why."""
    found = []
    for what, *rest in _lines(program):
        if what == "without":
            missing[f"{rest[0]} of threads"] = rest[1]
            continue
        median_s = statistics.median(map(float, rest[2:]))
        found.append({"what": what, "ranks": int(rest[0]), "nbytes": int(rest[1]), "median_s": median_s})
    return found


if __name__ == "__main__":
    main()
