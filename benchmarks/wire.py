"""all_reduce with every wire between two emulated hosts of two ranks: python benchmarks/wire.py

Hosts are network namespaces whose links tc shapes; needs root. fp32 and the wires take turns, call by call.
Writes results/wire.json, from which docs/wire.md has its table."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np
from common import environment, markdown_table, run_ranks, size_name, write_json

import pycomm
from pycomm.netns import emulated_hosts, why_unavailable

WIRES = (None, "bf16", "fp8", "int8", "int4")
RATES = ("200mbit", "1gbit")
SIZES = (1 << 20, 4 << 20, 16 << 20)
N_CALLS = 7  # of each; the first is not counted


def measure(store: Any, rank: int, n_ranks: int) -> list[dict[str, Any]]:
    """Median seconds of each size and wire, over calls that begin together; on rank 0 the slowest rank's."""
    rows = []
    with pycomm.init(store, rank, n_ranks, timeout_s=120) as group:
        for nbytes in SIZES:
            given = np.random.default_rng(rank).standard_normal(nbytes // 4).astype(np.float32)
            exact = given.copy()
            group.all_reduce(exact)
            times: dict[str | None, list[float]] = {wire: [] for wire in WIRES}
            error: dict[str | None, float] = {}
            for _ in range(N_CALLS):
                for wire in WIRES:
                    x = given.copy()
                    group.barrier()
                    started = time.perf_counter()
                    group.all_reduce(x, wire=wire)
                    took = np.array([time.perf_counter() - started])
                    group.all_reduce(took, "max")
                    times[wire].append(float(took[0]))
                    error[wire] = float(np.linalg.norm(x - exact) / np.linalg.norm(exact))
            rows += [
                {
                    "nbytes": nbytes,
                    "wire": wire or "fp32",
                    "median_s": round(statistics.median(times[wire][1:]), 6),
                    "relative_error": round(error[wire], 6),
                }
                for wire in WIRES
            ]
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    if why := why_unavailable():
        sys.exit(f"wire.py: {why}")
    record: dict[str, Any] = {"environment": environment(), "results": []}
    table = []
    with emulated_hosts() as network:
        for rate in RATES:
            network.shape(rate)
            rows = run_ranks(measure, 4, hosts=["a", "a", "b", "b"], network=network)[0]
            record["results"] += [{"rate": rate, **row} for row in rows]
            for nbytes in SIZES:
                of_size = {row["wire"]: row for row in rows if row["nbytes"] == nbytes}
                plain = of_size["fp32"]["median_s"]
                cells = [f"{row['median_s'] * 1e3:.1f} ms, {plain / row['median_s']:.2f}×" for row in of_size.values()]
                table.append([rate, size_name(nbytes), *cells])
    path = write_json("wire", record)
    print(markdown_table(["link", "tensor", "fp32", *filter(None, WIRES)], table))
    print("\nrelative error (2-norm): ", {row["wire"]: row["relative_error"] for row in record["results"][-5:]})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
