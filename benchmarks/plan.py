"""What `pycomm-train plan` prints for Llama 3.1 8B on 8 hosts of 8 GPUs, with figures as vendors state them: H100s of
990 TFLOP/s (dense bf16) that reach half of it, NVLink of 450 GB/s, a 400 Gbit/s NIC a GPU, all eight taken as one.

    python benchmarks/plan.py        writes benchmarks/results/plan.txt; some 10 s, no GPU

A prediction: nothing here was held against measured steps."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from pathlib import Path

import pycomm
from pycomm.topology import Link
from training.__main__ import main

OPTIONS = "--gpus 64 --monitor.peak-tflops 990 --plan.tflops 495 --train.memory-gib 75 --train.recompute selective"
RESULT = Path(__file__).parent / "results" / "plan.txt"


def cluster() -> pycomm.Topology:
    between, inside = Link(10e-6, 400e9, 2e-6), Link(3e-6, 450e9, 1e-6)
    return dataclasses.replace(pycomm.Topology.emulated([8] * 8, between, inside), reduce_bytes_per_s=1e12)


if __name__ == "__main__":
    os.environ["COLUMNS"] = "150"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cluster.toml"
        cluster().save(file)
        with RESULT.open("w") as out, contextlib.redirect_stdout(out):
            print(f"$ pycomm-train plan llama_8b --topology cluster.toml {OPTIONS}", flush=True)
            status = main(["plan", "llama_8b", "--topology", str(file), *OPTIONS.split()])
    raise SystemExit(status)
