"""The CUDA kernels and the c10d backend on this machine's GPUs: make bench-gpu

Runs gpu_kernels (built by cmake), then, on all GPUs that there are, torch.distributed's all_reduce on "nccl" and on
"pycomm" in turns. Writes results/<gpu>.json and prints a table. Without a GPU it fails: nothing is measured then."""

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
    parser.add_argument("kernels", type=Path, help="the program gpu_kernels")
    program = parser.parse_args().kernels
    if not torch.cuda.is_available():
        sys.exit("bench-gpu: torch finds no GPU (a CPU-only torch?); nothing was measured")
    name = torch.cuda.get_device_name(0)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"bench-gpu: {done.stderr.strip()}; nothing was written")
    kernels = []
    for line in done.stdout.splitlines():
        kernel, numel, nbytes, *seconds = line.split("\t")
        median_s = statistics.median(map(float, seconds))
        kernels.append({"kernel": kernel, "numel": int(numel), "nbytes": int(nbytes), "median_s": median_s})
    copy = {row["numel"]: row["nbytes"] / row["median_s"] for row in kernels if row["kernel"] == "copy"}
    n_ranks = torch.cuda.device_count()
    collectives = run_ranks(_all_reduces, n_ranks)[0]
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    results = {"environment": environment(), "gpu": name, "kernels": kernels}
    path = write_json(slug, results | {"n_ranks": n_ranks, "all_reduce": collectives})
    rows = [
        [row["kernel"], f"{row['numel'] * 2 >> 20} MiB", f"{row['median_s'] * 1e6:.1f}",
         f"{row['nbytes'] / row['median_s'] / 1e9:.0f}", f"{row['nbytes'] / row['median_s'] / copy[row['numel']]:.0%}"]
        for row in kernels
    ]  # fmt: skip
    print(markdown_table(["kernel", "bfloat16", "median us", "GB/s", "of copy"], rows))
    rows = [[str(row["nbytes"]), f"{row['nccl_s'] * 1e6:.1f}", f"{row['pycomm_s'] * 1e6:.1f}"] for row in collectives]
    print(markdown_table([f"all_reduce, {n_ranks} rank(s), bytes", "nccl us", "pycomm us"], rows))
    print(f"\nwritten: {path}")


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
