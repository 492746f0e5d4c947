"""What our kernels do, by torch: its own kernels one after the other, and Triton's that torch.compile makes of them.

Rows are as gpu_kernels.cc's: bytes are those that must be read and written at least, inputs random, rotated past the
L2, outputs poisoned before where they are not read. quantise and pack give new tensors of torch's allocator, which
nothing poisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_clock import Clock

Row = dict[str, Any]
Tensors = Sequence[torch.Tensor]
SIZES = (1 << 24, 1 << 26, 1 << 28)  # bytes of bfloat16
BLOCK = 128
N_PACKED = 64


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = x.view(-1, BLOCK).float()
    scale = blocks.abs().amax(1, keepdim=True) / 448
    return (blocks / scale).to(torch.float8_e4m3fn), scale


def dequantise_reduce(out: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return out.view(-1, BLOCK).copy_(out.view(-1, BLOCK).float() + codes.float() * scale)


def pack(x: torch.Tensor) -> torch.Tensor:
    return torch.cat(x.chunk(N_PACKED)) * 0.5


def rows(clock: Clock, sizes: Sequence[int] = SIZES, compiles: bool = True) -> tuple[list[Row], dict[str, str]]:
    """(measurements, what could not be measured and why)."""
    found: list[Row] = []
    missing: dict[str, str] = {}
    for nbytes in sizes:
        _rows_of(clock, nbytes, ("torch", "triton") if compiles else ("torch",), found, missing)
    return found, missing


def _rows_of(clock: Clock, nbytes: int, ways: Sequence[str], found: list[Row], missing: dict[str, str]) -> None:
    numel = nbytes // 2
    n_sets = clock.sets_past_cache(nbytes)
    x = torch.randn(n_sets, numel, device=clock.device, dtype=torch.bfloat16)
    out = torch.empty_like(x)
    coded = [quantise(one) for one in x]
    coded_nbytes = numel + numel // BLOCK * 4
    tasks: tuple[tuple[str, int, Callable[[int], Tensors], Callable[..., Any]], ...] = (
        ("reduce", 3 * nbytes, lambda i: (x[i], x[i - 1], out[i]), _add),
        ("quantise e4m3", nbytes + coded_nbytes, lambda i: (x[i],), quantise),
        ("dequantise-reduce e4m3", 2 * nbytes + coded_nbytes, lambda i: (out[i], *coded[i]), dequantise_reduce),
        ("pack", 2 * nbytes, lambda i: (x[i],), pack),
    )
    for kernel, least, arguments, function in tasks:
        for by in ways:
            try:
                run = torch.compile(function, dynamic=False) if by == "triton" else function
                median_s = clock.median_s(
                    lambda turn, run=run, arguments=arguments: run(*arguments(turn % n_sets)),
                    # Of the others dequantise_reduce reads `out`, which this would put into the L2.
                    (lambda turn: out[turn % n_sets].fill_(0.25)) if function is _add else None,
                )
            except Exception as error:  # of any part of a compiler that may not be here
                missing[f"{kernel} by {by}"] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            found.append({"kernel": kernel, "by": by, "numel": numel, "nbytes": least, "median_s": median_s})


def _add(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.add(a, b, out=out)


def expands(
    clock: Clock, tokens: Sequence[int] = (4096, 128), width: int = 7168, choices: int = 8, experts: int = 256
) -> list[Row]:
    """gpu_moe's expand by torch: index_select of each token's row for each of its experts, in experts' order."""
    found = []
    for n_tokens in tokens:
        routed = torch.rand(n_tokens, experts, device=clock.device).topk(choices, dim=1).indices.flatten()
        index = routed.argsort(stable=True) // choices
        numel = n_tokens * choices * width
        n_sets = clock.sets_past_cache(2 * numel)
        x = torch.randn(n_sets, n_tokens, width, device=clock.device, dtype=torch.bfloat16)
        out = torch.empty(n_sets, n_tokens * choices, width, device=clock.device, dtype=torch.bfloat16)
        median_s = clock.median_s(
            lambda turn, x=x, out=out, index=index, n=n_sets: torch.index_select(
                x[turn % n], 0, index, out=out[turn % n]
            ),
            lambda turn, out=out, n=n_sets: out[turn % n].fill_(float("nan")),
        )
        found.append(
            {
                "kernel": f"moe expand T={n_tokens}",
                "by": "torch",
                "numel": numel,
                "nbytes": 2 * (numel + n_tokens * width),
                "median_s": median_s,
            }
        )
    return found
