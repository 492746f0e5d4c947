"""The CUDA kernels and the c10d backend on this machine's GPUs: make bench-gpu

Runs gpu_kernels and gpu_moe (built by cmake), times torch's copy of rows beside the latter, then, on all GPUs of the
machine, torch.distributed's all_reduce on "nccl" and on "pycomm" in turns. Writes results/<gpu>.json and prints tables.
Without a GPU it fails: nothing is measured then."""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import environment, markdown_table, run_ranks, write_json

SIZES = tuple(1 << exponent for exponent in range(10, 27, 4))
ROUNDS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("programs", type=Path, nargs="+", help="gpu_kernels, then gpu_moe")
    programs = parser.parse_args().programs
    if not torch.cuda.is_available():
        sys.exit("bench-gpu: torch finds no GPU (a CPU-only torch?); nothing was measured")
    name = torch.cuda.get_device_name(0)
    kernels = [row for program in programs for row in _timed(program)] + _torch_expands()
    copies = [row for row in kernels if row["kernel"] == "copy"]
    n_ranks = torch.cuda.device_count()
    collectives = run_ranks(_all_reduces, n_ranks)[0]
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    results = {"environment": environment(), "gpu": name, "kernels": kernels}
    path = write_json(slug, results | {"n_ranks": n_ranks, "all_reduce": collectives})
    rows = [
        [row["kernel"], f"{row['numel'] * 2 >> 20} MiB", f"{row['median_s'] * 1e6:.1f}", f"{_rate(row) / 1e9:.0f}",
         f"{_rate(row) / _rate(min(copies, key=lambda copy: abs(copy['nbytes'] - row['nbytes']))):.0%}"]
        for row in kernels
    ]  # fmt: skip
    print(markdown_table(["kernel", "bfloat16", "median us", "GB/s", "of a copy of about as many bytes"], rows))
    rows = [[str(row["nbytes"]), f"{row['nccl_s'] * 1e6:.1f}", f"{row['pycomm_s'] * 1e6:.1f}"] for row in collectives]
    print(markdown_table([f"all_reduce, {n_ranks} rank(s), bytes", "nccl us", "pycomm us"], rows))
    print(f"\nwritten: {path}")


def _rate(row: dict[str, Any]) -> float:
    """Bytes per second."""
    return float(row["nbytes"] / row["median_s"])


def _timed(program: Path) -> list[dict[str, Any]]:
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"bench-gpu: {program}: {done.stderr.strip() or f'exit code {done.returncode}'}; nothing was written")
    rows = []
    for line in done.stdout.splitlines():
        kernel, numel, nbytes, *seconds = line.split("\t")
        median_s = statistics.median(map(float, seconds))
        rows.append({"kernel": kernel, "numel": int(numel), "nbytes": int(nbytes), "median_s": median_s})
    return rows


def _torch_expands() -> list[dict[str, Any]]:
    """gpu_moe's expand by torch: index_select of each token's row for each of its experts, in experts' order."""
    width, choices, experts = 7168, 8, 256
    rows = []
    for n_tokens in (4096, 128):
        routed = torch.rand(n_tokens, experts, device="cuda").topk(choices, dim=1).indices.flatten()
        index = routed.argsort(stable=True) // choices
        n_sets = 3 if n_tokens > 1000 else 16  # past the L2
        x = torch.randn(n_sets, n_tokens, width, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(n_sets, n_tokens * choices, width, device="cuda", dtype=torch.bfloat16)
        seconds = []
        for turn in range(-3, ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            torch.index_select(x[turn % n_sets], 0, index, out=out[turn % n_sets])
            end.record()
            end.synchronize()
            if turn >= 0:
                seconds.append(begin.elapsed_time(end) / 1e3)
        numel = n_tokens * choices * width
        rows.append(
            {
                "kernel": f"torch index_select, as moe expand T={n_tokens}",
                "numel": numel,
                "nbytes": 2 * (numel + n_tokens * width),
                "median_s": statistics.median(seconds),
            }
        )
    return rows


def _all_reduces(store: dist.Store, rank: int, n_ranks: int) -> list[dict[str, Any]]:
    import pycomm  # noqa: F401  (registers the backend)

    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:pycomm,cuda:pycomm", store=store, rank=rank, world_size=n_ranks)
    groups = {"pycomm": dist.group.WORLD, "nccl": dist.new_group(backend="nccl")}
    found = []
    for nbytes in SIZES:
        x = torch.randn(nbytes // 4, device="cuda")
        times: dict[str, list[float]] = {name: [] for name in groups}
        for turn in range(-5, ROUNDS):
            for name, group in groups.items():
                torch.cuda.synchronize()
                begin = time.perf_counter()
                dist.all_reduce(x, dist.ReduceOp.MAX, group)
                torch.cuda.synchronize()
                if turn >= 0:
                    times[name].append(time.perf_counter() - begin)
        found.append({"nbytes": nbytes} | {f"{name}_s": statistics.median(values) for name, values in times.items()})
    dist.destroy_process_group()
    return found


if __name__ == "__main__":
    main()
