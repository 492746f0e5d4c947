"""Ring attention on torch's flash kernels beside plain products: python benchmarks/ring_attention.py

Two ranks of one thread each on this machine, forward and backward, the best of some rounds in which both take turns."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import run_ranks

import pycomm
from training import ring_attention
from training.context import attend
from training.layout import Layout
from training.mesh import Mesh


def rounds(store: Any, rank: int, n_ranks: int, shape: tuple[int, int, int], n_rounds: int) -> dict[str, float]:
    """Seconds of each way. shape: tokens of the whole sequence, heads, their width."""
    torch.set_num_threads(1)
    has_flash, best = ring_attention._has_flash, {"flash": float("inf"), "plain": float("inf")}
    n_tokens, *of_head = shape
    with pycomm.init(store, rank, n_ranks, timeout_s=60) as world:
        mesh = Mesh(world, Layout(1, 1, 1, cp=n_ranks))
        inputs = [torch.randn(n_tokens // n_ranks, 1, *of_head, requires_grad=True) for _ in range(3)]
        for _ in range(n_rounds + 1):
            for way in best:
                ring_attention._has_flash = has_flash if way == "flash" else lambda query, value: False
                world.barrier()
                begin = time.perf_counter()
                attend(*inputs, mesh, "ring", None).sum().backward()
                best[way] = min(best[way], time.perf_counter() - begin)
        mesh.close()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    found = run_ranks(rounds, 2, (args.tokens, 8, 64), args.rounds)
    for way in found[0]:
        print(f"{way}: {max(each[way] for each in found) * 1e3:.0f} ms, {args.tokens} tokens on 2 ranks, 8 heads of 64")


if __name__ == "__main__":
    main()
