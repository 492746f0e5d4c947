"""What overlapping communication with computation leaves exposed: python benchmarks/overlap.py [SECTION ..]

Two emulated hosts of one rank each (network namespaces), 200 Mbit/s between them. Needs root. Sections:

    sleeping   gradients of 32 layers, 8 MiB, whose backward sleeps 12 ms each, beside DDP over Gloo
    computing  the same with matrix products of about 12 ms on one core in the place of the sleep
    stream     MoE: dispatch -> experts -> combine in chunks, forward alone, with backward, and of some micro-batches
    matmul     all_gather_matmul and matmul_reduce_scatter, forward, as planned and in 1 to 8 pieces

T is the slowest rank's, the median over rounds in which all contenders take turns. T/max is T over the longer one of
computing alone (nothing split, nothing sent) and communicating alone (in one piece). Results are verified before they
are timed. A run replaces its own sections in results/overlap.json, and the tables in docs/overlap.md."""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import (
    as_measured,
    environment,
    markdown_table,
    read_json,
    run_ranks,
    sections_and_dry,
    write_figures,
    write_json,
)
from overlap_plot import plot
from torch import Tensor, nn

import pycomm
from pycomm.moe import ExpertParallel
from pycomm.netns import emulated_hosts, why_unavailable
from pycomm.overlap import (
    GradientBuckets,
    MatmulPlan,
    Scorecard,
    WeightGradients,
    all_gather_matmul,
    matmul_reduce_scatter,
    measure,
)
from pycomm.overlap.matmul import plan_all_gather_matmul, plan_matmul_reduce_scatter

RATE = "200mbit"
N_LAYERS, LAYER_S, WIDTH = 32, 0.012, 256  # a layer has WIDTH^2 weights in fp32: 8 MiB in all
GLOO_BUCKETS_MB = (0.25, 0.5, 1, 2, 4, 25)  # 25: DDP's default
N_ROUNDS = 7
PAGE = Path(__file__).parents[1] / "docs" / "overlap.md"
SERIAL_BUCKETS = "buckets after backward"


# Gradients.


class _Sleeps(torch.autograd.Function):
    """x + 0 * weight, in effect; its backward sleeps and then gives the weight a gradient of x's mean everywhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, trace: list[tuple[float, float]]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.value, ctx.trace = float(x.mean()), trace
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        begin = time.perf_counter()
        time.sleep(LAYER_S)
        ctx.trace.append((begin, time.perf_counter()))
        return grad, torch.full_like(ctx.saved_tensors[0], ctx.value), None


class _Marks(torch.autograd.Function):
    """Notes when backward passes here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, marks: list[float]) -> Tensor:
        ctx.marks = marks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.marks.append(time.perf_counter())
        return grad, None


class Layers(nn.Module):
    """N_LAYERS weights; the spans of each layer's backward are in `trace`."""

    def __init__(self, sleeps: bool) -> None:
        super().__init__()
        self.sleeps = sleeps
        self.trace: list[tuple[float, float]] = []
        self.marks: list[float] = []
        self.weights = nn.ParameterList(nn.Parameter(torch.eye(WIDTH)) for _ in range(N_LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        self.trace.clear()
        self.marks.clear()
        x = x.detach().requires_grad_()
        for weight in self.weights:
            x = _Sleeps.apply(x, weight, self.trace) if self.sleeps else _Marks.apply(x, self.marks) @ weight
        return x if self.sleeps else _Marks.apply(x, self.marks)

    def spans(self) -> list[tuple[float, float]]:
        return list(self.trace) if self.sleeps else list(itertools.pairwise(self.marks))


class TracedGroup:
    """A group that notes when the collectives of the buckets began and how long they took."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size
        self.begun: list[tuple[float, int, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def all_reduce(self, x: Tensor, op: str = "sum", **options: Any) -> Any:
        work = self._group.all_reduce(x, op, **options)
        if options.get("async_op"):
            self.begun.append((time.perf_counter(), x.nbytes, work))
        return work

    def spans(self) -> list[tuple[float, float, int]]:
        return [(begin, begin + work.duration_s, nbytes) for begin, nbytes, work in self.begun]


def backward_s(module: nn.Module, x: Tensor, after: Callable[[], object]) -> float:
    """Of backward and of what is waited for after it."""
    y = module(x).sum()
    begin = time.perf_counter()
    y.backward()
    after()
    return time.perf_counter() - begin


def batch_of(group: Any, sleeps: bool) -> Tensor:
    """Rows for which a layer's backward takes about LAYER_S on the slowest rank."""
    if sleeps:
        return torch.full((1, WIDTH), 1.0 + group.rank)
    rows, model = 1024, Layers(False)
    for _ in range(3):  # products of other sizes run at other rates
        x = torch.full((rows, WIDTH), 1.0 + group.rank)
        group.all_reduce(torch.zeros(1))
        took = torch.tensor([statistics.median([backward_s(model, x, lambda: None) for _ in range(7)][2:])])
        group.all_reduce(took, "max")
        rows = round(rows * LAYER_S * N_LAYERS / float(took) / 64) * 64
    return torch.full((rows, WIDTH), 1.0 + group.rank)


def gradients(store: Any, rank: int, n_ranks: int, sleeps: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "nic0"
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=n_ranks, timeout=timedelta(seconds=60)
    )
    with pycomm.init(dist.PrefixStore("pycomm", store), rank, n_ranks, timeout_s=60) as group:
        x = batch_of(group, sleeps)
        traced = TracedGroup(group)
        alone, ours = Layers(sleeps), Layers(sleeps)
        buckets = GradientBuckets(ours.parameters(), traced, link="measured", op="avg", set_grad=True)
        whole = torch.zeros(sum(p.numel() for p in ours.parameters()))
        peers = {}
        for megabytes in GLOO_BUCKETS_MB:
            model = Layers(sleeps)
            peers[f"DDP over Gloo, {megabytes:g} MB"] = nn.parallel.DistributedDataParallel(
                model, bucket_cap_mb=megabytes, gradient_as_bucket_view=True
            )

        def timed(call: Callable[[], object]) -> float:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin

        def pycomm_step() -> float:
            traced.begun.clear()
            return backward_s(ours, x, buckets.wait)

        def serial_step() -> float:
            with buckets.no_sync():
                took = backward_s(ours, x, lambda: None)
            return took + timed(buckets.wait)

        runs: dict[str, Callable[[], float]] = {
            "compute": lambda: backward_s(alone, x, lambda: None),
            "pycomm all_reduce": lambda: timed(lambda: group.all_reduce(whole)),
            "Gloo all_reduce": lambda: timed(lambda: dist.all_reduce(whole)),
            SERIAL_BUCKETS: serial_step,
            "pycomm buckets": pycomm_step,
            **{name: lambda ddp=ddp: backward_s(ddp, x, lambda: None) for name, ddp in peers.items()},
        }
        modules = {"pycomm buckets": ours} | {name: ddp.module for name, ddp in peers.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        trace: dict[str, Any] = {}
        for turn in range(N_ROUNDS + 2):  # two that do not count: buckets are laid out, DDP builds its own anew
            for name, run in runs.items():
                if (module := modules.get(name)) is not None:
                    for parameter in module.parameters():
                        parameter.grad = None
                group.all_reduce(torch.zeros(1))
                took = torch.tensor([run()], dtype=torch.float64)
                if module is not None and turn == 1:
                    verify(module, x, group)
                group.all_reduce(took, "max")
                if turn > 1:
                    times[name].append(float(took))
                if name == "pycomm buckets":
                    trace = {"compute": ours.spans(), "buckets": traced.spans()}
        explained = buckets.explain()
    dist.destroy_process_group()
    zero = min(begin for begin, *_ in trace["compute"])
    spans = {what: [[*(round(t - zero, 6) for t in span[:2]), *span[2:]] for span in trace[what]] for what in trace}
    return {"times_s": times, "trace": spans, "rows": len(x), "explained": explained}


def verify(module: nn.Module, x: Tensor, group: Any) -> None:
    """Weights are identities and ranks' inputs constants, so every gradient is the mean over ranks of one number."""
    mine = torch.tensor([x.shape[0] * float(x[0, 0]) if x.shape[0] > 1 else float(x[0, 0])])
    group.all_reduce(mine, "avg")
    for parameter in module.parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, mine.expand_as(parameter), rtol=1e-4, atol=0)


def gradient_entry(results: list[dict[str, Any]]) -> dict[str, Any]:
    found = results[0]
    medians = {name: statistics.median(times) for name, times in found["times_s"].items()}
    comm = min(medians["pycomm all_reduce"], medians["Gloo all_reduce"])
    longer = max(medians["compute"], comm)
    return {
        "medians_s": {name: round(t, 5) for name, t in medians.items()},
        "spread_s": {name: [round(min(t), 5), round(max(t), 5)] for name, t in found["times_s"].items()},
        "over_limit": {
            name: round(t / longer, 4)
            for name, t in medians.items()
            if name.startswith(("pycomm buckets", "DDP", SERIAL_BUCKETS))
        },
        "rows": found["rows"],
        "explained": found["explained"],
        "trace": found["trace"],
    }


# The MoE stream.

TOKENS, HIDDEN, FFN, EXPERTS, TOP_K = 1024, 512, 2048, 4, 2
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    **{f"{n} chunks": {"n_chunks": n} for n in (2, 4, 8, 16)},
    "experts cut": {"n_chunks": 2, "cut": "experts"},
}
MICRO_BATCHES = {"auto": (2, 4), "experts cut": (4,)}  # whose gradients add up, weights' put off from one to the next


def stream_inputs(rank: int, n_ranks: int) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, ...]]]:
    """A rank's rows [TOKENS, HIDDEN], their experts and weights [TOKENS, TOP_K], and its experts' two matrices; the
    same in every run."""
    random = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, generator=random, requires_grad=True)
    topk = torch.rand(TOKENS, EXPERTS, generator=random).argsort(1)[:, :TOP_K]
    weights = torch.full((TOKENS, TOP_K), 1 / TOP_K, requires_grad=True)
    matrices = [
        tuple(
            torch.randn(*shape, generator=random).mul_(0.02).requires_grad_()
            for shape in ((FFN, HIDDEN), (HIDDEN, FFN))
        )
        for _ in range(EXPERTS // n_ranks)
    ]
    return x, topk, weights, matrices


def stream(store: Any, rank: int, n_ranks: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with pycomm.init(store, rank, n_ranks, timeout_s=60) as first, first.replan(as_measured(first)) as group:
        ep = ExpertParallel(group, EXPERTS, HIDDEN, TOP_K)
        x, topk, weights, matrices = stream_inputs(rank, n_ranks)
        later = WeightGradients(together=True)

        def experts(rows: Tensor, sizes: Any, chosen: range, linear: Any = F.linear) -> Tensor:
            parts = zip(rows.split(sizes), matrices[chosen.start : chosen.stop], strict=True)
            return torch.cat([linear(torch.relu(linear(each, up)), down) for each, (up, down) in parts])

        everyone = range(len(matrices))

        def unsplit() -> Tensor:
            dispatched = ep.dispatch(x, topk, weights)
            return ep.combine(experts(dispatched.rows, dispatched.sizes, everyone), dispatched)

        found: dict[str, Any] = {}

        def streamed(way: str, flush: bool = True) -> Tensor:
            run = ep.stream(x, topk, weights, later=later, flush=flush, **WAYS[way])
            for chunk in run:
                chunk.output = experts(chunk.rows, chunk.sizes, chunk.experts, later.linear)
            if way == "auto":
                found["auto"] = f"{run.n_chunks} chunks: {run.why}"
            return run.output

        kept = ep.dispatch(x, topk, weights)
        rows = kept.rows.detach().requires_grad_()

        def communicate() -> Tensor:
            dispatched = ep.dispatch(x, topk, weights)
            return ep.combine(dispatched.rows, dispatched)

        def stream_of(way: str, n_batches: int) -> Makes:
            return [lambda i=i: streamed(way, flush=i == n_batches - 1) for i in range(n_batches)]

        leaves = [x, weights, *(each for pair in matrices for each in pair)]

        def verified(way: str, n_batches: int) -> None:
            results = []
            for makes in (stream_of(way, n_batches), [unsplit] * n_batches):
                for leaf in leaves:
                    leaf.grad = None
                for make in makes:
                    y = make()
                    y.square().sum().backward()
                results.append([y, *(leaf.grad for leaf in leaves)])
            for ours, plain in zip(*results, strict=True):
                torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)

        def card(way: str, n_batches: int, backward: bool) -> dict[str, Any]:
            verified(way, n_batches)
            kinds: dict[str, Makes] = {
                "compute": [lambda: experts(rows, kept.sizes, everyone)] * n_batches,
                "communicate": [communicate] * n_batches,
                "serial": [unsplit] * n_batches,
                "together": stream_of(way, n_batches),
            }
            with torch.set_grad_enabled(backward):
                return card_entry(measure(group, **{name: finished(makes, backward) for name, makes in kinds.items()}))

        for backward in (False, True):
            found["with backward" if backward else "forward"] = {way: card(way, 1, backward) for way in WAYS}
        found["of micro-batches"] = {
            f"{n} micro-batches, {way}": card(way, n, True) for way, numbers in MICRO_BATCHES.items() for n in numbers
        }
        return found


Makes = list[Callable[[], Tensor]]


def finished(makes: Makes, backward: bool) -> Callable[[], object]:
    def run() -> None:
        for make in makes:
            y = make()
            if backward:
                y.sum().backward()

    return run


def card_entry(card: Scorecard) -> dict[str, Any]:
    return vars(card) | {"overlap": card.overlap, "over_limit": card.over_limit}


# Sequence parallel products.

ROWS, D_IN, D_OUT = 1024, 512, 1024


def matmul(store: Any, rank: int, n_ranks: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with pycomm.init(store, rank, n_ranks, timeout_s=60) as first, first.replan(as_measured(first)) as group:
        return {name: product(group, name) for name in ("all_gather_matmul", "matmul_reduce_scatter")}


def product(group: Any, name: str) -> dict[str, Any]:
    """One of the products as planned, and in some numbers of pieces."""
    gathers = name == "all_gather_matmul"
    whole = torch.randn(ROWS, D_IN)
    x = whole[: ROWS // group.size].clone() if gathers else whole
    weight = torch.randn(D_OUT if gathers else D_IN // 2, D_IN)
    run, make = (
        (all_gather_matmul, plan_all_gather_matmul) if gathers else (matmul_reduce_scatter, plan_matmul_reduce_scatter)
    )
    planned = make(x, weight, group)
    gathered, partial = torch.empty(ROWS, D_IN), torch.empty(ROWS, len(weight))
    scattered = torch.empty(ROWS // group.size, len(weight))
    exact = run(x, weight, group, MatmulPlan(0, "unsplit"))
    cards = {}
    plans = {"planned": planned} | {str(n): MatmulPlan(n, "given") for n in (1, 2, 4, 8)}
    for label, plan in plans.items():
        torch.testing.assert_close(run(x, weight, group, plan), exact, rtol=1e-4, atol=1e-3)
        card = measure(
            group,
            compute=lambda: whole @ weight.T,
            communicate=lambda: group.all_gather(gathered, x) if gathers else group.reduce_scatter(scattered, partial),
            serial=lambda: run(x, weight, group, MatmulPlan(0, "unsplit")),
            together=lambda plan=plan: run(x, weight, group, plan),
        )
        cards[label] = card_entry(card)
    return {"plan": {"n_pieces": planned.n_pieces, "why": planned.why}, "cards": cards}


# Record and page.

SECTIONS = ("sleeping", "computing", "stream", "matmul")


def section(name: str) -> dict[str, Any]:
    bodies: dict[str, tuple[Any, ...]] = {
        "sleeping": (gradients, 2, True),
        "computing": (gradients, 2, False),
        "stream": (stream, 2),
        "matmul": (matmul, 2),
    }
    with emulated_hosts() as network:
        network.shape(RATE)
        results = run_ranks(*bodies[name], hosts=["a", "b"], network=network, timeout_s=280)
    return gradient_entry(results) if name in ("sleeping", "computing") else results[0]


def tables(record: dict[str, Any]) -> list[str]:
    parts = []
    for name in ("sleeping", "computing"):
        if name in record:
            entry = record[name]["result"]
            about = {"sleeping": "compute emulated by sleeping", "computing": "matrix products, two cores"}[name]
            rows = [
                [who, f"{1e3 * t:.0f}", f"{entry['over_limit'][who]:.3f}" if who in entry["over_limit"] else ""]
                for who, t in entry["medians_s"].items()
            ]
            parts.append(f"Gradients, {about}; {entry['explained']}.\n")
            parts.append(markdown_table(["median", "ms", "T/max"], rows) + "\n")
    if "stream" in record:
        found = record["stream"]["result"]
        rows = [
            card_cells(f"{what}, {n}", card) for what in ("forward", "with backward") for n, card in found[what].items()
        ]
        rows += [card_cells(f"with backward, {what}", card) for what, card in found["of micro-batches"].items()]
        parts.append(f"MoE stream; auto: {found['auto']}.\n")
        parts.append(markdown_table(CARD_HEAD, rows) + "\n")
        bounds = ", ".join(f"{way} {over_phases(found, way):.3f}" for way in found["forward"])
        parts.append(f"T with backward over max(forward) + max(backward), each phase by itself: {bounds}.\n")
    if "matmul" in record:
        found = record["matmul"]["result"]
        rows = [card_cells(f"{what}, {n}", card) for what in found for n, card in found[what]["cards"].items()]
        parts.append(
            "Sequence parallel products, pieces of a part. "
            + " ".join(f"{what} {found[what]['plan']['why']}." for what in found)
            + "\n"
        )
        parts.append(markdown_table(CARD_HEAD, rows) + "\n")
    return parts


def over_phases(stream: dict[str, Any], way: str) -> float:
    """T of forward and backward over what it can be at least, as backward begins when forward has ended."""
    forward, both = stream["forward"][way], stream["with backward"][way]
    least = sum(
        max(first["compute_s"] - taken["compute_s"], first["comm_s"] - taken["comm_s"])
        for first, taken in ((forward, {"compute_s": 0.0, "comm_s": 0.0}), (both, forward))
    )
    return float(both["together_s"]) / least


CARD_HEAD = ("ms", "compute", "communication", "serial", "overlapped", "E_overlap", "T/max")


def card_cells(name: str, card: dict[str, Any]) -> list[str]:
    times = [f"{1e3 * card[key]:.0f}" for key in ("compute_s", "comm_s", "serial_s", "together_s")]
    share = "" if card["overlap"] is None else f"{card['overlap']:.2f}"
    return [name, *times, share, f"{card['over_limit']:.3f}"]


def main() -> int:
    wanted, dry = sections_and_dry(__doc__ or "", SECTIONS)
    if (why := why_unavailable()) is not None:
        print(f"overlap.py cannot emulate hosts here: {why}", file=sys.stderr)
        return 2
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the store's complaints that addresses have no names
    record = read_json("overlap")
    for name in wanted:
        record[name] = {"environment": environment(), "result": section(name)}
        print("\n".join(tables({name: record[name]})), flush=True)
        if not dry:
            write_json("overlap", {key: record[key] for key in SECTIONS if key in record})
            write_figures(PAGE, tables(record))
            plot(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
