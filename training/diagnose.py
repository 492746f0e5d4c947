"""Where a step went wrong: which rank and layer first made a number that is none, or has the largest loss or gradient.

Called when a step has failed, so it may be slow: the step's forward and backward run again, watched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.metered import MeteredGroup

_ROW = 256  # bytes of a rank's finding

# Phase (0 forward, 1 backward), the turn of the rank's stage in it, how many outputs were seen before it, where.
Finding = tuple[int, int, int, str]


def first_not_finite(world: MeteredGroup, model: nn.Module, again: Callable[[], Any], stage: int = 0) -> str:
    """In words, the rank and layer whose output, or gradient of an output, was first not finite in again(), which runs
    the step's forward and backward. stage: of the pipeline, this rank's. All ranks together."""
    seen: list[Finding] = []
    count = 0

    def look(phase: int, name: str, value: Any) -> None:
        nonlocal count
        count += 1
        if not seen and isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            where = f"{'nan' if value.isnan().any() else 'inf'} in {'the gradient of ' if phase else ''}{name}"
            seen.append((phase, -stage if phase else stage, count, where))

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for each in output if isinstance(output, tuple) else (output,):
                look(0, name, each)
                if isinstance(each, Tensor) and each.requires_grad:
                    each.register_hook(lambda grad: look(1, name, grad))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        again()
    finally:
        for handle in handles:
            handle.remove()
    found = [(tuple(each[:3]), rank, each[3]) for rank, each in enumerate(_gather(world, seen[:1])) for each in each]
    if not found:
        return "every layer's output and gradient is finite, their sums are not"
    _, rank, where = min(found)
    return f"first {where} on rank {rank}"


def largest_loss_and_gradient(world: MeteredGroup, losses: list[float], gradients: dict[str, Tensor]) -> str:
    """In words, the rank with the largest loss, and the rank and parameter with the largest part of the gradient's
    square. losses: of every rank. All ranks together."""
    squares = {name: float(gradient.double().square().sum()) for name, gradient in gradients.items()}
    name = max(squares, key=lambda key: squares[key])
    largest = [finding for row in _gather(world, [(squares[name], name)]) for finding in row]
    of_gradient = max(range(len(largest)), key=lambda rank: largest[rank][0])
    of_loss = max(range(len(losses)), key=lambda rank: losses[rank])
    return (
        f"the largest loss is rank {of_loss}'s, {losses[of_loss]:.4f}; the largest gradient is that of "
        f"{largest[of_gradient][1]} on rank {of_gradient}, of norm {math.sqrt(largest[of_gradient][0]):.3g}"
    )


def _gather(world: MeteredGroup, value: Any) -> list[Any]:
    """The JSON-able value of every rank, by rank; each at most _ROW bytes."""
    row = torch.frombuffer(bytearray(json.dumps(value).encode().ljust(_ROW)[:_ROW]), dtype=torch.uint8)
    rows = torch.empty(world.size, _ROW, dtype=torch.uint8)
    world.all_gather(rows, row.unsqueeze(0))
    return [json.loads(bytes(each.numpy())) for each in rows]
