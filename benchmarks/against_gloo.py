"""pycomm against torch's Gloo on this machine, interleaved: python benchmarks/against_gloo.py

Ranks are processes on one host. For each collective and size the contenders take turns, block by block, in an order
that rotates, so that whatever else the machine does meets all of them alike. A call's time is that of its slowest rank;
medians and 99th percentiles are over all blocks. In every block, before and after the timed calls, the contender's
result is compared with the right one.

Writes results/against_gloo.json and .png, and prints the tables and the figures that were to be reached.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import RESULTS, environment, markdown_table, microseconds, run_ranks, size_name, write_json

GLOO, TORCH, GROUP = "Gloo", "pycomm, torch.distributed", "pycomm, Group"
CONTENDERS = (GLOO, TORCH, GROUP)

KIB, MIB = 1 << 10, 1 << 20
ALL_REDUCE_SIZES = [8, 64, 512, 4 * KIB, 32 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB]
OTHER_SIZES = [8, 4 * KIB, MIB, 16 * MIB]
OTHERS = ("broadcast", "all_gather", "reduce_scatter", "all_to_all")
CASES = [
    *(("all_reduce", nbytes) for nbytes in ALL_REDUCE_SIZES),
    *((collective, nbytes) for collective in OTHERS for nbytes in OTHER_SIZES),
    ("barrier", 0),
]
N_BLOCKS = 6  # of each contender; a multiple of their number, so that each comes first equally often
BLOCK_S = 0.04  # what a block's timed calls may take, unless three take longer
MAX_CALLS = 500

# torch 2.13 renamed these; the old names warn on every call
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Buffers:
    """One rank's float32 arrays of one case: `whole` has a piece for each rank, `piece` is one of them.

    Filled with small integers that differ by place and rank, so that sums are exact and a piece from a wrong rank, or
    at a wrong place, is a wrong number."""

    def __init__(self, collective: str, nbytes: int, rank: int, n: int) -> None:
        rows = max(1, math.ceil(nbytes / 4 / n))
        ramp = (torch.arange(rows * n, dtype=torch.int32) % 61).float()
        self._filled = ramp + 100 * rank
        self._own_piece = self._filled.view(n, -1)[rank].clone()
        self.whole, self.source, self.piece = torch.empty(rows * n), self._filled.clone(), torch.empty(rows)
        total = ramp * n + 100 * sum(range(n))
        mine = ramp.view(n, -1)[rank]
        # what one call on the filled arrays must leave, and where
        self._expected = {
            "all_reduce": (self.whole, total),
            "broadcast": (self.whole, ramp),
            "all_gather": (self.whole, ramp + 100 * torch.arange(n).repeat_interleave(rows)),
            "reduce_scatter": (self.piece, total.view(n, -1)[rank].clone()),
            "all_to_all": (self.whole, torch.cat([mine + 100 * r for r in range(n)])),
            "barrier": (self.piece, self._own_piece),
        }[collective]

    def fill(self) -> None:
        self.whole.copy_(self._filled)
        self.piece.copy_(self._own_piece)

    def right(self) -> bool:
        return torch.equal(*self._expected)


def torch_call(collective: str, b: Buffers, group: Any) -> Callable[[], Any]:
    return {
        "all_reduce": partial(dist.all_reduce, b.whole, group=group),
        "broadcast": partial(dist.broadcast, b.whole, 0, group=group),
        "all_gather": partial(_all_gather, b.whole, b.piece, group=group),
        "reduce_scatter": partial(_reduce_scatter, b.piece, b.whole, group=group),
        "all_to_all": partial(dist.all_to_all_single, b.whole, b.source, group=group),
        "barrier": partial(dist.barrier, group=group),
    }[collective]


def group_call(collective: str, b: Buffers, group: Any) -> Callable[[], Any]:
    return {
        "all_reduce": partial(group.all_reduce, b.whole),
        "broadcast": partial(group.broadcast, b.whole, 0),
        "all_gather": partial(group.all_gather, b.whole, b.piece),
        "reduce_scatter": partial(group.reduce_scatter, b.piece, b.whole),
        "all_to_all": partial(group.all_to_all, b.whole, b.source),
        "barrier": group.barrier,
    }[collective]


def verify(name: str, call: Callable[[], Any], collective: str, b: Buffers) -> None:
    """One call on fresh values. Leaves zeros, which sums in place do not let grow. Raises where the result is wrong."""
    b.fill()
    call()
    if not b.right():
        raise AssertionError(f"rank {b.rank}: {name} gives a wrong {collective} of {size_name(4 * len(b.whole))}")
    b.whole.zero_()


def timed(call: Callable[[], Any], n_calls: int) -> list[int]:
    """Nanoseconds of each call."""
    clock = time.perf_counter_ns
    times = []
    for _ in range(n_calls):
        begin = clock()
        call()
        times.append(clock() - begin)
    return times


def measure(store: Any, rank: int, n: int, cases: Sequence[tuple[str, int]]) -> list[dict[str, list[list[int]]]]:
    """One rank: for each case and contender the times of each block's calls, in nanoseconds."""
    import pycomm

    patience = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=patience)
    gloo = dist.group.WORLD
    ours = dist.new_group(backend="pycomm", timeout=patience)
    group = pycomm.init(dist.PrefixStore("group", store), rank, n, timeout_s=60)
    gc.disable()  # a collection in the midst of a call would be counted as its time
    results = []
    for collective, nbytes in cases:
        b = Buffers(collective, nbytes, rank, n)
        calls = {
            GLOO: torch_call(collective, b, gloo),
            TORCH: torch_call(collective, b, ours),
            GROUP: group_call(collective, b, group),
        }

        n_calls = {}
        for name in CONTENDERS:
            verify(name, calls[name], collective, b)
            slowest = torch.tensor([float(np.median(timed(calls[name], 5)))])
            dist.all_reduce(slowest, dist.ReduceOp.MAX, group=gloo)  # every rank makes as many calls
            n_calls[name] = int(min(max(BLOCK_S * 1e9 / slowest.item(), 3), MAX_CALLS))
        times: dict[str, list[list[int]]] = {name: [] for name in CONTENDERS}
        for block in range(N_BLOCKS):
            first = block % len(CONTENDERS)
            for name in CONTENDERS[first:] + CONTENDERS[:first]:
                verify(name, calls[name], collective, b)
                timed(calls[name], 1 + n_calls[name] // 20)  # the ranks fall into step
                times[name].append(timed(calls[name], n_calls[name]))
                verify(name, calls[name], collective, b)
        results.append(times)
    group.close()
    dist.destroy_process_group()
    return results


def summary(ranks: Sequence[dict[str, list[list[int]]]]) -> dict[str, dict[str, float]]:
    """Per contender: median and p99 in microseconds, an iteration counting as long as its slowest rank took."""
    found = {}
    for name in CONTENDERS:
        blocks = zip(*(rank[name] for rank in ranks), strict=True)
        longest = np.concatenate([np.max(block, axis=0) for block in blocks]) / 1e3
        found[name] = {
            "median_us": round(float(np.median(longest)), 2),
            "p99_us": round(float(np.percentile(longest, 99)), 2),
            "calls": len(longest),
        }
    return found


def speed_up(entry: dict[str, Any], name: str) -> float:
    return float(entry["contenders"][GLOO]["median_us"] / entry["contenders"][name]["median_us"])


def table(entries: Sequence[dict[str, Any]]) -> str:
    head = ["float32", *(f"{name}, µs (p99)" for name in CONTENDERS), "torch: × Gloo", "Group: × Gloo"]
    rows = []
    for entry in entries:
        what = "barrier" if entry["collective"] == "barrier" else f"{entry['collective']} {size_name(entry['nbytes'])}"
        cells = [f"{microseconds(c['median_us'])} ({microseconds(c['p99_us'])})" for c in entry["contenders"].values()]
        rows.append([what, *cells, *(f"{speed_up(entry, name):.1f}" for name in (TORCH, GROUP))])
    return markdown_table(head, rows)


def figures(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, and what was: each of pycomm's two ways in by itself."""

    def least(n_ranks: int, low: int, high: int, name: str) -> float:
        return min(
            speed_up(e, name)
            for e in results
            if e["collective"] == "all_reduce" and e["n_ranks"] == n_ranks and low <= e["nbytes"] <= high
        )

    goals = [
        (2, 8, 4 * KIB, 10.0, "2 ranks, all_reduce 8 B to 4 KiB: at least 10 × Gloo"),
        (2, MIB, 64 * MIB, 2.0, "2 ranks, all_reduce 1 to 64 MiB: at least 2 × Gloo"),
        (4, 8, 64 * MIB, 1.0, "4 ranks, all_reduce 8 B to 64 MiB: not slower than Gloo"),
    ]
    found = []
    for n_ranks, low, high, goal, text in goals:
        if any(e["n_ranks"] == n_ranks for e in results):
            for name in (TORCH, GROUP):
                value = least(n_ranks, low, high, name)
                found.append({"figure": f"{text} ({name})", "measured": round(value, 2), "reached": value >= goal})
    for e in results:
        if (e["n_ranks"], e["collective"], e["nbytes"]) == (2, "all_reduce", 8):
            value = e["contenders"][GROUP]["median_us"]
            text = "2 ranks, all_reduce 8 B: under 3 µs (pycomm, Group)"
            found.append({"figure": text, "measured": value, "reached": value < 3})
    return found


def plot(results: Sequence[dict[str, Any]], environment_of_run: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted({e["n_ranks"] for e in results})
    figure, axes = pyplot.subplots(1, len(counts), figsize=(6 * len(counts), 4.2), sharey=True, squeeze=False)
    styles = {GLOO: ("#999999", "o"), TORCH: ("#1f77b4", "s"), GROUP: ("#d62728", "^")}
    for axis, n_ranks in zip(axes[0], counts, strict=True):
        entries = [e for e in results if e["n_ranks"] == n_ranks and e["collective"] == "all_reduce"]
        for name, (colour, marker) in styles.items():
            sizes = [e["nbytes"] for e in entries]
            medians = [e["contenders"][name]["median_us"] for e in entries]
            axis.plot(sizes, medians, color=colour, marker=marker, markersize=4, label=name)
        axis.set(xscale="log", yscale="log", title=f"all_reduce, {n_ranks} processes, float32")
        axis.set_xticks(sizes, [size_name(nbytes) for nbytes in sizes], rotation=45, ha="right", fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set_xlabel("tensor")
    axes[0][0].set_ylabel("median time, µs")
    axes[0][0].legend(frameon=False)
    caption = f"{environment_of_run['cpu']}, {environment_of_run['cores']} cores, torch {environment_of_run['torch']}"
    figure.suptitle(caption, fontsize=9, color="#555555")
    figure.tight_layout()
    figure.savefig(RESULTS / "against_gloo.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", default="2,4", help="numbers of processes, one after the other (default 2,4)")
    parser.add_argument("--collectives", help="only these, separated by commas")
    options = parser.parse_args()
    cases = [c for c in CASES if options.collectives is None or c[0] in options.collectives.split(",")]
    about = environment()
    results: list[dict[str, Any]] = []
    for n in map(int, options.ranks.split(",")):
        by_rank = run_ranks(measure, n, cases)
        entries = [
            {"n_ranks": n, "collective": collective, "nbytes": nbytes, "contenders": summary(ranks)}
            for (collective, nbytes), *ranks in zip(cases, *by_rank, strict=True)
        ]
        print(f"\n{n} processes on {about['cores']} cores\n\n{table(entries)}", flush=True)
        results += entries
    reached = figures(results)
    path = write_json("against_gloo", {"environment": about, "figures": reached, "results": results})
    if any(e["collective"] == "all_reduce" for e in results):
        plot(results, about)
    print()
    for row in reached:
        print(f"{'reached' if row['reached'] else 'MISSED '}  {row['figure']}: {row['measured']}")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
