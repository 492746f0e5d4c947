"""Ring attention on torch's flash kernels beside plain products: python benchmarks/ring_attention.py

Two ranks of one thread each on this machine, forward and backward; the median of rounds in which both take turns, of
the slowest rank. Writes results/ring_attention.json."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from common import environment, run_ranks, write_json

import pycomm
from training import ring_attention
from training.context import attend
from training.layout import Layout
from training.mesh import Mesh


def rounds(store: Any, rank: int, n_ranks: int, shape: tuple[int, int, int], n_rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, by round. shape: tokens of the whole sequence, heads, their width."""
    torch.set_num_threads(1)
    has_flash = ring_attention._has_flash
    times: dict[str, list[float]] = {"flash": [], "plain": []}
    n_tokens, *of_head = shape
    with pycomm.init(store, rank, n_ranks, timeout_s=60) as world:
        mesh = Mesh(world, Layout(1, 1, 1, cp=n_ranks))
        inputs = [torch.randn(n_tokens // n_ranks, 1, *of_head, requires_grad=True) for _ in range(3)]
        for turn in range(n_rounds + 1):
            for way in times:
                ring_attention._has_flash = has_flash if way == "flash" else lambda query, value: False
                world.barrier()
                begin = time.perf_counter()
                attend(*inputs, mesh, "ring", None).sum().backward()
                if turn:
                    times[way].append(time.perf_counter() - begin)
        mesh.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    about = environment()
    found = run_ranks(rounds, 2, (args.tokens, 8, 64), args.rounds)
    median_s = {
        way: statistics.median(max(of_round) for of_round in zip(*(each[way] for each in found), strict=True))
        for way in found[0]
    }
    for way, seconds in median_s.items():
        print(f"{way}: {seconds * 1e3:.0f} ms, {args.tokens} tokens on 2 ranks, 8 heads of 64")
    write_json("ring_attention", {"environment": about, "tokens": args.tokens, "median_s": median_s})


if __name__ == "__main__":
    main()
