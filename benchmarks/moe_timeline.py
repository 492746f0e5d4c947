"""What a stream of expert chunks does when: python benchmarks/moe_timeline.py

One step, forward and backward, of the stream of benchmarks/overlap.py (its sizes, its link of 200 Mbit/s between two
emulated hosts of one rank each), after some that do not count. Needs root. Writes the spans of rank 0 to
results/moe_timeline.json and draws them in docs/moe_stream.png; with --plot it only draws what is there."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import as_measured, environment, read_json, run_ranks, write_json
from overlap import EXPERTS, HIDDEN, RATE, TOP_K, stream_inputs
from torch import Tensor

import pycomm
from pycomm.moe import ExpertParallel
from pycomm.netns import emulated_hosts
from pycomm.overlap import WeightGradients

WARM_UP = 4
PICTURE = Path(__file__).parents[1] / "docs" / "moe_stream.png"


class _Marks(torch.autograd.Function):
    """Notes when backward passes here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Any) -> Tensor:
        ctx.note = note
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.note(time.perf_counter())
        return grad, None


class TimedGradients(WeightGradients):
    """Weight gradients that note when they were computed."""

    def __init__(self) -> None:
        super().__init__(together=True)
        self.spans: list[tuple[float, float]] = []

    def flush(self) -> None:
        begin = time.perf_counter()
        super().flush()
        self.spans.append((begin, time.perf_counter()))


def step(ep: ExpertParallel, x: Tensor, topk: Tensor, weights: Tensor, matrices: list[Any]) -> dict[str, Any]:
    """The spans of a step in seconds from its beginning, each with what it was."""
    crossings: list[tuple[str, float, int, Any]] = []
    start = type(ep.waits).start_all_to_all

    def traced(group: Any, name: str, output: Tensor, rows: Tensor, *counts: Any) -> Any:
        begin = time.perf_counter()
        work = start(ep.waits, group, name, output, rows, *counts)
        crossings.append((name, begin, rows.nbytes, work))
        return work

    ep.waits.start_all_to_all = traced  # type: ignore[method-assign]
    later = TimedGradients()
    computing: dict[str, list[float]] = {}
    zero = time.perf_counter()
    run = ep.stream(x, topk, weights, later=later)
    for chunk in run:
        begun = computing.setdefault(f"{chunk.index + 1}", [time.perf_counter()])
        back: list[float] = computing.setdefault(f"{chunk.index + 1}'", [])
        parts = zip(_Marks.apply(chunk.rows, back.append).split(chunk.sizes), matrices, strict=True)
        out = torch.cat([later.linear(torch.relu(later.linear(each, up)), down) for each, (up, down) in parts])
        begun.append(time.perf_counter())
        chunk.output = _Marks.apply(out, back.append)
    forward = time.perf_counter()
    run.output.sum().backward()
    end = time.perf_counter()
    computing["weight gradients"] = [*later.spans[-1]]
    return {
        "chunks": f"{run.n_chunks} chunks: {run.why}",
        "compute": [[name, *(round(t - zero, 6) for t in span)] for name, span in computing.items()],
        "crossings": [
            [name, round(begin - zero, 6), round(begin - zero + work.duration_s, 6), nbytes]
            for name, begin, nbytes, work in crossings
        ],
        "forward_s": round(forward - zero, 6),
        "step_s": round(end - zero, 6),
    }


def stream(store: Any, rank: int, n_ranks: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with pycomm.init(store, rank, n_ranks, timeout_s=60) as first, first.replan(as_measured(first)) as group:
        ep = ExpertParallel(group, EXPERTS, HIDDEN, TOP_K)
        x, topk, weights, matrices = stream_inputs(rank, n_ranks)
        for _ in range(WARM_UP):
            step(ep, x, topk, weights, matrices)
            group.barrier()
        return step(ep, x, topk, weights, matrices)


def plot(trace: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(11, 2.8))
    for name, begin, end in trace["compute"]:
        shade = "slategray" if name.startswith("weight") else "tab:blue"
        axis.broken_barh([(1e3 * begin, 1e3 * (end - begin))], (2.1, 0.8), facecolor=shade, edgecolor="white")
        axis.text(1e3 * (begin + end) / 2, 2.5, name, ha="center", va="center", size=7, color="white")
    done = 0.0
    for name, begin, end, _ in sorted(trace["crossings"], key=lambda each: each[1]):
        runs_from, done = max(begin, min(done, end)), max(done, end)
        if "weights" in name:  # of the router: some kilobytes
            continue
        lane, shade = (1.1, "tab:orange") if "dispatch" in name else (0.1, "tab:green")
        axis.broken_barh([(1e3 * begin, 1e3 * (runs_from - begin))], (lane, 0.12), facecolor="lightgray")
        axis.broken_barh([(1e3 * runs_from, 1e3 * (end - runs_from))], (lane, 0.8), facecolor=shade, edgecolor="white")
        chunk = name.partition("chunk ")[2].partition(" of")[0]
        axis.text(1e3 * (runs_from + end) / 2, lane + 0.4, chunk, ha="center", va="center", size=7)
    axis.axvline(1e3 * trace["forward_s"], color="black", linewidth=0.8, linestyle=":")
    axis.set_yticks([0.5, 1.5, 2.5], ["combine crosses", "dispatch crosses", "experts"])
    axis.set_title(f"MoE stream, forward and backward, {trace['chunks'].partition(':')[0]}, 200 Mbit/s", size=9)
    axis.set_xlabel("ms; dotted: forward's end; n': backward of chunk n; gray: started, not yet its turn")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--plot"]):
        sys.exit("usage: moe_timeline.py [--plot]")
    if not arguments:
        with emulated_hosts() as network:
            network.shape(RATE)
            found = run_ranks(stream, 2, hosts=["a", "b"], network=network, timeout_s=120)[0]
        write_json("moe_timeline", {"environment": environment(), "trace": found})
    plot(read_json("moe_timeline")["trace"])


if __name__ == "__main__":
    main(sys.argv[1:])
