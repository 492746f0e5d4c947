"""The expert exchange beside what others do, and beside the wire: python benchmarks/moe.py [hosts] [one_host]

hosts: 2 emulated hosts of 4 ranks, 200 Mbit/s each way (network namespaces shaped by tc; needs root). one_host: 2 and 4
ranks. E=256 experts, top 8, hidden 2048, bfloat16, 256 tokens a rank, routed uniformly, one set of processes a section.

    all_to_all   what Megatron-Core and torchtitan do: counts, rows permuted by expert and one row for each (token,
                 expert) in all_to_all_single, permuted again; over Gloo, and over pycomm's all_to_all
    rank, auto   pycomm.moe with dedup="rank" and with what dedup="auto" takes

All take turns; a time is that of the slowest rank, after a barrier, and of the turns the median; a dispatch begins with
topk_idx, so that it includes its layout exchange, and ends with rows in expert order. The rows of all are compared
first, bit for bit. "wire" is the payload's time at the link's rate: with Ethernet, IP and TCP headers (1448 of 1514
bytes are payload) and without. Writes results/moe.json and the tables of docs/moe.md."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import environment, markdown_table, read_json, run_ranks, write_figures, write_json
from torch import Tensor

from pycomm.netns import emulated_hosts, why_unavailable

EXPERTS, TOP_K, HIDDEN, TOKENS = 256, 8, 2048, 256
RATE, RATE_BYTES_PER_S = "200mbit", 200e6 / 8
PAYLOAD_SHARE = 1448 / 1514
HOSTS = ("a",) * 4 + ("b",) * 4
N_TURNS = {"hosts": 9, "one_host": 25}
LAYOUT_TOLERANCE = 0.02
PLAN = "of a dispatch, the plan and its collective, ms"
PAGE = Path(__file__).parents[1] / "docs/moe.md"

Move = Callable[[Tensor, Tensor, list[int], list[int]], Any]


def batch(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(rank)
    idx = torch.rand(TOKENS, EXPERTS, generator=random).topk(TOP_K).indices
    x = torch.randn(TOKENS, HIDDEN, generator=random).bfloat16()
    return x, idx, torch.rand(TOKENS, TOP_K, generator=random).softmax(-1)


class PermuteAndAllToAll:
    """One row for each (token, expert); torch does everything but move(output, input, output_counts, input_counts)."""

    def __init__(self, move: Move, n_ranks: int) -> None:
        self.move, self.n_ranks = move, n_ranks

    def dispatch(self, x: Tensor, idx: Tensor, weights: Tensor) -> Tensor:
        experts = idx.flatten()
        self.order = experts.argsort(stable=True)
        sent = torch.bincount(experts, minlength=EXPERTS)
        received = torch.empty_like(sent)
        even = [EXPERTS // self.n_ranks] * self.n_ranks
        self.move(received, sent, even, even)
        self.sends = sent.view(self.n_ranks, -1).sum(1).tolist()
        self.receives = received.view(self.n_ranks, -1).sum(1).tolist()
        self.weights = weights
        rows = x.index_select(0, self.order // TOP_K)
        arrived = rows.new_empty(sum(self.receives), HIDDEN)
        self.move(arrived.view(torch.float32), rows.view(torch.float32), self.receives, self.sends)
        n_local = EXPERTS // self.n_ranks
        block = (torch.arange(EXPERTS) % n_local).repeat_interleave(received)
        self.by_expert = block.argsort(stable=True)
        return arrived.index_select(0, self.by_expert)

    def combine(self, out: Tensor) -> Tensor:
        arrived = torch.empty_like(out).index_copy_(0, self.by_expert, out)
        rows = arrived.new_empty(len(self.order), HIDDEN)
        self.move(rows.view(torch.float32), arrived.view(torch.float32), self.sends, self.receives)
        slots = torch.empty_like(rows).index_copy_(0, self.order, rows).view(TOKENS, TOP_K, HIDDEN)
        return torch.bmm(self.weights.bfloat16().unsqueeze(1), slots).squeeze(1)


class Ours:
    def __init__(self, group: Any, dedup: Any) -> None:
        from pycomm.moe import ExpertParallel

        self.ep = ExpertParallel(group, EXPERTS, HIDDEN, TOP_K, dedup=dedup)

    def dispatch(self, x: Tensor, idx: Tensor, weights: Tensor) -> Tensor:
        self.dispatched = self.ep.dispatch(x, idx, weights)
        return self.dispatched.rows

    def combine(self, out: Tensor) -> Tensor:
        return self.ep.combine(out, self.dispatched)


def rank_body(store: Any, rank: int, n: int, on_hosts: bool, n_turns: int) -> dict[str, Any]:
    import pycomm
    from pycomm.hosts import Host, Link, Nic

    if on_hosts:
        os.environ["GLOO_SOCKET_IFNAME"] = "nic0"
    dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=n)
    topology = None
    if on_hosts:  # what `pycomm tune` would find
        nic = Nic("nic0", Link(100e-6, RATE_BYTES_PER_S))
        topology = pycomm.Topology((Host("a", (0, 1, 2, 3), (nic,)), Host("b", (4, 5, 6, 7), (nic,))))
    group = pycomm.init(dist.PrefixStore("pycomm", store), rank, n, timeout_s=60, topology=topology)
    contenders: dict[str, Any] = {
        "all_to_all, Gloo": PermuteAndAllToAll(dist.all_to_all_single, n),
        "all_to_all, pycomm": PermuteAndAllToAll(group.all_to_all, n),
        "pycomm.moe, rank": Ours(group, "rank"),
        "pycomm.moe, auto": Ours(group, "auto"),
    }
    x, idx, weights = batch(rank)
    first: Tensor | None = None
    results: dict[str, Any] = {"dispatch": {}, "combine": {}, "both": {}, "bytes": {}, "plan": []}
    for name, each in contenders.items():
        before = group.stats().bytes_between_hosts
        rows = each.dispatch(x, idx, weights)
        between = group.stats().bytes_between_hosts
        y = each.combine(rows)
        after = group.stats().bytes_between_hosts
        results["bytes"][name] = (between - before, after - between)
        first = rows if first is None else first
        if not torch.equal(rows, first):
            raise AssertionError(f"rank {rank}: the rows of {name} differ")
        error = (y.float() - x.float() * weights.sum(-1, keepdim=True)).abs().max()
        if not error < 0.1:
            raise AssertionError(f"rank {rank}: {name} does not bring the rows back ({error})")
    # The crossing of rows alone: what the layout costs beside it.
    moe = contenders["pycomm.moe, auto"].ep
    plan = moe.plan(idx)
    before = group.stats().bytes_between_hosts
    moe.dispatch(x, idx, weights, plan)
    results["rows_bytes"] = group.stats().bytes_between_hosts - before
    results["explain"] = moe.explain(TOKENS)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(n_turns):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            group.barrier()
            begin = time.perf_counter()
            rows = contenders[name].dispatch(x, idx, weights)
            middle = time.perf_counter()
            group.barrier()
            again = time.perf_counter()
            contenders[name].combine(rows)
            end = time.perf_counter()
            slowest = torch.tensor([middle - begin, end - again], dtype=torch.float64)
            group.all_reduce(slowest, "max")
            times[name].append((float(slowest[0]), float(slowest[1])))
        group.barrier()
        begin = time.perf_counter()
        moe.plan(idx)
        slowest = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
        group.all_reduce(slowest, "max")
        results["plan"].append(float(slowest))
    for name, found in times.items():
        results["dispatch"][name] = [dispatch for dispatch, _ in found]
        results["combine"][name] = [combine for _, combine in found]
        results["both"][name] = [dispatch + combine for dispatch, combine in found]
    dist.destroy_process_group()
    group.close()
    return results


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    return {
        name: {"median_ms": round(statistics.median(s) * 1e3, 3), "turns_ms": sorted(round(t * 1e3, 2) for t in s)}
        for name, s in times.items()
    }


def on_hosts() -> dict[str, Any]:
    from pycomm.moe.cost import rows_between_hosts

    with emulated_hosts() as network:
        network.shape(RATE)
        ranks = run_ranks(rank_body, 8, True, N_TURNS["hosts"], hosts=HOSTS, network=network)
    found = {part: summary(ranks[0][part]) for part in ("dispatch", "combine", "both")}
    tokens = TOKENS * 4  # of a host
    expected = rows_between_hosts("host", EXPERTS, TOP_K, 8, 2) * tokens * HIDDEN * 2
    sent = {host: sum(r["rows_bytes"] for r, h in zip(ranks, HOSTS, strict=True) if h == host) for host in "ab"}
    bytes_of = {
        name: [max(sum(r["bytes"][name][k] for r in part) for part in (ranks[:4], ranks[4:])) for k in (0, 1)]
        for name in ranks[0]["bytes"]
    }
    of = {name: each["median_ms"] for name, each in found["dispatch"].items()}
    ours = of["pycomm.moe, auto"]
    wire_ms = expected / RATE_BYTES_PER_S * 1e3
    figures = {
        "all_to_all over Gloo / ours": round(of["all_to_all, Gloo"] / ours, 3),
        "rank / ours": round(of["pycomm.moe, rank"] / ours, 3),
        "ours / wire": round(ours / wire_ms, 3),
        "ours / wire with headers": round(ours / (wire_ms / PAYLOAD_SHARE), 3),
        "rows and weights between hosts / formula": {h: round(b / expected, 4) for h, b in sent.items()},
        PLAN: round(statistics.median(ranks[0]["plan"]) * 1e3, 2),
    }
    reached = {
        "all_to_all over Gloo / ours, 3.5 asked": figures["all_to_all over Gloo / ours"] >= 3.5,
        "rank / ours, 2.2 asked": figures["rank / ours"] >= 2.2,
        "bytes within 2 % of the formula": all(abs(b / expected - 1) <= LAYOUT_TOLERANCE for b in sent.values()),
        "ours / wire, 1.15 asked": figures["ours / wire"] <= 1.15,
    }
    return {
        **found,
        "bytes_between_hosts": bytes_of,
        "expected_bytes": round(expected),
        "wire_ms": round(wire_ms, 2),
        "figures": figures,
        "reached": reached,
        "explain": ranks[0]["explain"],
    }


def on_one_host(n: int) -> dict[str, Any]:
    ranks = run_ranks(rank_body, n, False, N_TURNS["one_host"])
    found = {part: summary(ranks[0][part]) for part in ("dispatch", "combine", "both")}
    of = {name: each["median_ms"] for name, each in found["both"].items()}
    ours = of["pycomm.moe, auto"]
    figures = {
        "all_to_all over Gloo / ours": round(of["all_to_all, Gloo"] / ours, 3),
        "all_to_all over pycomm / ours": round(of["all_to_all, pycomm"] / ours, 3),
        PLAN: round(statistics.median(ranks[0]["plan"]) * 1e3, 2),
    }
    reached = {
        "all_to_all over Gloo / ours, 5 asked": figures["all_to_all over Gloo / ours"] >= 5,
        "all_to_all over pycomm / ours, 2 asked": figures["all_to_all over pycomm / ours"] >= 2,
    }
    return {**found, "figures": figures, "reached": reached, "explain": ranks[0]["explain"]}


def table(name: str, section: dict[str, Any]) -> str:
    rows = [
        [contender, *(f"{section[part][contender]['median_ms']:.2f}" for part in ("dispatch", "combine", "both"))]
        for contender in section["dispatch"]
    ]
    lines = [markdown_table([f"{name}, median ms", "dispatch", "combine", "both"], rows), ""]
    lines += [f"* {figure}: {value}" for figure, value in section["figures"].items()]
    lines += [
        f"* {'reached' if reached else '**not reached**'}: {what}" for what, reached in section["reached"].items()
    ]
    return "\n".join(lines) + "\n"


def about(record: dict[str, Any]) -> str:
    first = next(iter(record.values()))["environment"]
    return (
        f"E={EXPERTS}, K={TOP_K}, H={HIDDEN}, bf16, {TOKENS} tokens a rank; all ranks share {first['cores']} cores; "
        "`python benchmarks/moe.py`, whose head says what is compared.\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="hosts, one_host (default: both)")
    parser.add_argument("--dry", action="store_true", help="print, and leave the record as it is")
    options = parser.parse_args()
    sections = options.sections or ["hosts", "one_host"]
    if unknown := set(sections) - {"hosts", "one_host"}:
        parser.error(f"no section {', '.join(sorted(unknown))}")
    if "hosts" in sections and (why := why_unavailable()) is not None:
        print(f"moe.py cannot emulate hosts here: {why}", file=sys.stderr)
        return 2
    record = read_json("moe")
    where = environment()
    if "hosts" in sections:
        record["2 hosts x 4 ranks, 200 Mbit/s"] = {"environment": where, **on_hosts()}
    if "one_host" in sections:
        for n in (2, 4):
            record[f"1 host x {n} ranks"] = {"environment": where, **on_one_host(n)}
    parts = [about(record), *(table(name, section) for name, section in record.items())]
    print("\n".join(parts))
    if not options.dry:
        write_figures(PAGE, parts)
        print(f"written: {write_json('moe', record)}, {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
