"""What planning counts with beside links: how fast a rank computes and updates, and what it costs ranks to meet.

    layer     what a block takes for a micro-batch however small it is: autograd's and Python's time
    meeting   what an exchange takes longer when its ranks come from computing than when they do nothing else: those
              that come first sleep until the last one wakes them, and none is ever exactly on time. The more layers
              exchange, the more it is; beside it small messages take no time.

Given for a cluster that is not here, measured in a job by its ranks together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from training.device import HOST, Device, Span

if TYPE_CHECKING:
    from pycomm.group import Group

_UPDATED_NUMEL = 1 << 20
_MOST_RANKS = 8  # that meet where it is measured; larger groups take no less
_N_TURNS, _N_TRIES = 20, 3
_PRODUCT_WIDTH = 384  # of what ranks compute between meetings: some milliseconds


@dataclass(frozen=True)
class Rates:
    """flops_per_s: that a rank reaches in the model's layers, beside layer_s of each, forward and backward together.
    update_s: of one fp32 number, its norm and AdamW. meeting_s: by the number of ranks that meet."""

    flops_per_s: float
    layer_s: float = 0.0
    update_s: float = 0.0
    meeting_s: dict[int, float] = field(default_factory=dict)

    def meeting(self, n_ranks: int) -> float:
        """Seconds; of as many ranks as were measured, at most."""
        sizes = [n for n in self.meeting_s if n <= n_ranks]
        return self.meeting_s[max(sizes)] if sizes else 0.0


def together(world: Group, alone: Rates, device: Device = HOST, compute: Callable[[], Any] | None = None) -> Rates:
    """The rates of a world's ranks, equal on all of them, which call it together. alone: this rank's. compute: what
    they do between meetings; None: a product. Meetings are of ranks whose host waits: GPUs have none."""
    slowest = torch.tensor([-alone.flops_per_s, alone.layer_s, alone.update_s], dtype=torch.float64)
    world.all_reduce(slowest, "max")  # a step is as fast as its slowest rank
    meetings = {} if device.late else meeting_s(world, compute or _product)
    return Rates(-float(slowest[0]), float(slowest[1]), float(slowest[2]), meetings)


def update_s(device: Device = HOST) -> float:
    """Seconds of one number in the norm of gradients and AdamW, the median of some tries."""
    x = torch.zeros(_UPDATED_NUMEL, device=device.where, requires_grad=True)
    x.grad = torch.zeros_like(x)
    update = torch.optim.AdamW([x], fused=True)
    times = []
    for _ in range(_N_TRIES + 2):  # two that do not count
        span = Span(device)
        for piece in x.grad.split(device.norm_numel):
            torch.linalg.vector_norm(piece, dtype=torch.float64)
        update.step()
        span.stop()
        times.append(span.seconds())
    return statistics.median(times[2:]) / _UPDATED_NUMEL


def meeting_s(world: Group, compute: Callable[[], Any]) -> dict[int, float]:
    """By the ranks of a group, of 2, 4, 8 neighbours as far as they divide the world's. All ranks together."""
    found = {}
    n_ranks = 2
    while n_ranks <= min(world.size, _MOST_RANKS) and world.size % n_ranks == 0:
        group = world.split(world.rank // n_ranks)
        assert group is not None
        with group:
            idle = _turn_s(group, lambda: None)
            all_tries = torch.tensor([_turn_s(group, compute) - idle for _ in range(_N_TRIES)], dtype=torch.float64)
        world.all_reduce(all_tries, "avg")
        found[n_ranks] = max(0.0, float(all_tries.median()))
        n_ranks *= 2
    return found


def _turn_s(group: Group, compute: Callable[[], Any]) -> float:
    """What a turn of computing and meeting takes longer than computing, of the rank that computes longest."""
    x, computing_s = torch.zeros(16), 0.0
    group.barrier()
    begin = time.perf_counter()
    for _ in range(_N_TURNS):
        computing_s -= time.perf_counter()
        compute()
        computing_s += time.perf_counter()
        group.all_reduce(x)
    took = torch.tensor([time.perf_counter() - begin, computing_s], dtype=torch.float64)
    group.all_reduce(took, "max")
    return float(took[0] - took[1]) / _N_TURNS


def _product() -> None:
    x = torch.ones(_PRODUCT_WIDTH, _PRODUCT_WIDTH)
    torch.mm(x, x)
