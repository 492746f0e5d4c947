"""How pycomm scales with ranks on one host, more than it has cores: time against the work, what idle ranks cost, memory
of a group, and how fast groups are made. Writes results/scale.json and the tables in docs/scale.md.

    python benchmarks/scale.py [--ranks 2 4 8 16 32]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from common import environment, markdown_table, microseconds, run_ranks, size_name, write_json

import pycomm

CALLS = (("barrier", 0), ("all_reduce", 8), ("all_reduce", 64 << 10), ("all_reduce", 1 << 20))
BUDGET_S = 1.2  # per figure
N_GROUPS = 100
IDLE_S = 4.0
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "scale.md"


def cpu_s() -> float:
    used = os.times()
    return used.user + used.system


def group_kib() -> tuple[int, int]:
    """KiB of this process's group segments: mapped, and its share of what is resident (Pss)."""
    mapped = pss = 0
    for block in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        if "memfd:pycomm-group" in block:
            fields = dict(re.findall(r"^(\w+): +(\d+) kB", block, re.MULTILINE))
            mapped += int(fields["Size"])
            pss += int(fields["Pss"])
    return mapped, pss


def measure(store: dist.Store, rank: int, n_ranks: int) -> dict[str, Any]:
    with pycomm.init(store, rank, n_ranks, timeout_s=120) as group:
        return {**measure_calls(group), **measure_idle(group), **measure_groups(group)}


def measure_calls(group: pycomm.Group) -> dict[str, Any]:
    """Median seconds of each call, every result verified."""
    calls = {}
    n, me = group.size, group.rank
    for op, nbytes in CALLS:
        x = np.ones(nbytes // 4, np.float32)
        times: list[float] = []
        end = np.zeros(1, np.int64)
        group.barrier()
        begin = time.perf_counter()
        while not end[0]:
            for _ in range(10):
                x[:] = me + 1
                start = time.perf_counter()
                if op == "barrier":
                    group.barrier()
                else:
                    group.all_reduce(x)
                times.append(time.perf_counter() - start)
                assert (x == n * (n + 1) / 2).all() or op == "barrier"
            end[0] = me == 0 and time.perf_counter() - begin > BUDGET_S
            group.broadcast(end)
        calls[f"{op} {size_name(nbytes)}" if nbytes else op] = statistics.median(times)
    return {"calls": calls}


def measure_idle(group: pycomm.Group) -> dict[str, float]:
    """Share of a core that a rank uses while nothing goes on: with open groups, and with a posted receive."""
    n, me = group.size, group.rank
    shares = {}
    for what in ("idle", "idle_with_receive"):
        work = group.recv(np.zeros(1), (me + 1) % n, tag=9, async_op=True) if what == "idle_with_receive" else None
        group.barrier()
        used, begin = cpu_s(), time.perf_counter()
        time.sleep(IDLE_S)
        shares[what] = (cpu_s() - used) / (time.perf_counter() - begin)
        group.barrier()
        if work:
            group.send(np.zeros(1), (me - 1) % n, tag=9)
            work.wait()
    return shares


def measure_groups(group: pycomm.Group) -> dict[str, Any]:
    """Seconds for N_GROUPS groups over all ranks, and KiB of one group, mapped and Pss of this rank, as it is used."""
    n, me = group.size, group.rank
    everyone = range(n)

    def made(count: int) -> list[pycomm.Group]:
        groups = [group.new_group(everyone) for _ in range(count)]
        return [inner for inner in groups if inner is not None]

    group.barrier()
    begin = time.perf_counter()
    groups = made(N_GROUPS)
    group.barrier()
    seconds = time.perf_counter() - begin
    for inner in groups:
        inner.close()
    groups.clear()
    del inner

    before = group_kib()
    groups = made(5)
    memory = {}

    def note(state: str) -> None:
        group.barrier()
        memory[state] = [(now - then) / len(groups) for now, then in zip(group_kib(), before, strict=True)]
        group.barrier()

    note("made")
    for inner in groups:
        for _ in range(16):  # all slots
            inner.all_reduce(np.zeros(1))
    note("8 B calls")
    for inner in groups:
        for _ in range(128):  # all slots
            inner.all_reduce(np.zeros(2048))
    note("16 KiB calls")
    for inner in groups:
        x = np.zeros(8 << 10, np.uint8)
        sent = [inner.send(np.zeros_like(x), peer, async_op=True) for peer in everyone if peer != me]
        for peer in everyone:
            if peer != me:
                inner.recv(x, peer)
        for work in sent:
            work.wait()
    note("8 KiB messages, all pairs")
    for inner in groups:
        inner.close()
    return {"groups_s": seconds, "memory": memory}


def collect(n: int) -> dict[str, Any]:
    per_rank = run_ranks(measure, n)
    largest = {key: max(figures[key] for figures in per_rank) for key in ("idle", "idle_with_receive", "groups_s")}
    calls = {name: max(figures["calls"][name] for figures in per_rank) for name in per_rank[0]["calls"]}
    memory = {
        state: {"mapped_kib": mapped, "host_kib": sum(figures["memory"][state][1] for figures in per_rank)}
        for state, (mapped, _) in per_rank[0]["memory"].items()
    }
    return {"calls_s": calls, **largest, "memory": memory}


def tables(record: dict[str, Any]) -> str:
    by_ranks = {int(n): figures for n, figures in record["ranks"].items()}
    fewest = min(by_ranks)
    base = by_ranks[fewest]["calls_s"]
    where = record["environment"]
    states = list(by_ranks[fewest]["memory"])

    def pair_kib(n: int) -> float:
        memory = by_ranks[n]["memory"]
        return (memory[states[-1]]["host_kib"] - memory[states[-2]]["host_kib"]) / (n * (n - 1))

    return "\n\n".join(
        (
            f"{where['cpu']}, {where['cores']} cores; `python benchmarks/scale.py`. Median time of a call in µs, "
            "the slowest rank's:",
            markdown_table(
                ["ranks", *base],
                [[str(n), *(microseconds(s * 1e6) for s in f["calls_s"].values())] for n, f in by_ranks.items()],
            ),
            f"That time per rank, over the same with {fewest} ranks. The work of an all_reduce is each rank's bytes: "
            "1.00 is a time that grows as the work does.",
            markdown_table(
                ["ranks", *base],
                [
                    [str(n), *(f"{f['calls_s'][name] * fewest / (base[name] * n):.2f}" for name in base)]
                    for n, f in by_ranks.items()
                ],
            ),
            "What an idle rank uses, at most, and how long groups take:",
            markdown_table(
                ["ranks", "idle, % of a core", "with a receive posted, %", f"{N_GROUPS} groups of all ranks, s"],
                [
                    [str(n), *(f"{f[key] * 100:.2f}" for key in ("idle", "idle_with_receive")), f"{f['groups_s']:.2f}"]
                    for n, f in by_ranks.items()
                ],
            ),
            "Memory of one group on its host (the sum of its ranks' Pss), in KiB, as more of it comes into use:",
            markdown_table(
                ["ranks", "mapped", *states, "per ordered pair"],
                [
                    [
                        str(n),
                        f"{f['memory'][states[0]]['mapped_kib']:,.0f}",
                        *(f"{f['memory'][state]['host_kib']:,.0f}" for state in states),
                        f"{pair_kib(n):.1f}",
                    ]
                    for n, f in by_ranks.items()
                ],
            ),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--add", action="store_true", help="keep the recorded figures of other rank counts")
    arguments = parser.parse_args()
    path = ROOT / "benchmarks" / "results" / "scale.json"
    record: dict[str, Any] = {"environment": environment(), "ranks": {}}
    if arguments.add and path.exists():
        record["ranks"] = json.loads(path.read_text())["ranks"]
    for n in arguments.ranks:
        record["ranks"][str(n)] = collect(n)
        print(n, json.dumps(record["ranks"][str(n)]), flush=True)
    record["ranks"] = dict(sorted(record["ranks"].items(), key=lambda item: int(item[0])))
    write_json("scale", record)
    before, rest = DOC.read_text().split(BEGIN)
    DOC.write_text(f"{before}{BEGIN}\n\n{tables(record)}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
