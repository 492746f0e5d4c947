"""Bytes that an all_reduce sends between two emulated hosts: python benchmarks/host_link_bytes.py

2 hosts of 2 ranks, 16 MiB of float32, every algorithm; the engine's own count (group.stats()), summed over each host's
ranks, beside what the hierarchical algorithm needs: 2S(N-1)/N per host for S bytes and N hosts. Writes
results/host_link_bytes.json; exit code 1 where the hierarchical count is off by more than 2 %."""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import environment, markdown_table, run_ranks, size_name, write_json

NBYTES = 16 << 20
HOSTS = ("a", "a", "b", "b")
TOLERANCE = 0.02


def sent_between_hosts(store: Any, rank: int, n: int) -> dict[str, int]:
    """One rank: bytes it sent to other hosts, for each algorithm."""
    import pycomm
    from pycomm.planners import PLANNERS

    ramp = (torch.arange(NBYTES // 4) % 61).float()
    sent = {}
    with pycomm.init(store, rank, n, timeout_s=60) as group:
        for algorithm in PLANNERS["all_reduce"]:
            x = ramp + rank
            before = group.stats().bytes_between_hosts
            group.all_reduce(x, algorithm=algorithm)
            sent[algorithm] = group.stats().bytes_between_hosts - before
            if not torch.equal(x, ramp * n + sum(range(n))):
                raise AssertionError(f"rank {rank}: wrong result of {algorithm}")
    return sent


def main() -> int:
    about = environment()
    by_rank = run_ranks(sent_between_hosts, len(HOSTS), hosts=HOSTS)
    names = sorted(set(HOSTS))
    needed = 2 * NBYTES * (len(names) - 1) // len(names)
    rows, algorithms = [], {}
    for algorithm in by_rank[0]:
        per_host = {
            name: sum(sent[algorithm] for sent, host in zip(by_rank, HOSTS, strict=True) if host == name)
            for name in names
        }
        algorithms[algorithm] = per_host
        rows.append([algorithm, *(f"{per_host[name] / needed:.4f}" for name in names)])
    head = ["all_reduce 16 MiB", *(f"host {name}, × 2S(N-1)/N" for name in names)]
    print(f"2S(N-1)/N = {size_name(needed)}\n\n{markdown_table(head, rows)}")
    reached = all(abs(nbytes / needed - 1) <= TOLERANCE for nbytes in algorithms["hierarchical"].values())
    record = {
        "environment": about,
        "nbytes": NBYTES,
        "hosts": HOSTS,
        "needed_per_host": needed,
        "sent_per_host": algorithms,
        "reached": reached,
    }
    path = write_json("host_link_bytes", record)
    print(f"\n{'reached' if reached else 'MISSED'}: hierarchical within 2 %; written: {path}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
