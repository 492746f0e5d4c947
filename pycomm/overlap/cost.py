"""What a collective of some bytes costs in a group: latency_s + nbytes / bytes_per_s, predicted or measured.

Sizes of buckets and chunks follow from it: a message pays latency_s whatever its size, so the smallest ones that lose
no more than a stated share of the link are latency_s * bytes_per_s / share."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pycomm import devices
from pycomm.errors import InvalidArgument
from pycomm.explain import Explanation, format_s

_SMALL_NBYTES = 1 << 10
_LARGE_NBYTES = 1 << 20  # of a measurement: 40 ms at 200 Mbit/s
_LARGE_DEVICE_NBYTES = 32 << 20
_REPETITIONS = 3


class Explains(Protocol):
    """A group that can say what a collective would cost: pycomm.Group, or anything that wraps one."""

    def explanation(self, op: str, nbytes: int) -> Explanation: ...


class Measures(Protocol):
    """A group on which a collective can be timed, with one figure for all ranks."""

    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> Any: ...


@dataclass(frozen=True)
class LinkCost:
    """Seconds of a collective of n bytes: latency_s + n / bytes_per_s. source: where the two figures are from."""

    latency_s: float
    bytes_per_s: float
    source: str

    def seconds(self, nbytes: float) -> float:
        return self.latency_s + nbytes / self.bytes_per_s

    def efficient_nbytes(self, loss: float) -> int:
        """The least size whose latency is at most `loss` times the time of its bytes."""
        return max(1, int(self.latency_s * self.bytes_per_s / loss))

    def __str__(self) -> str:
        return f"{format_s(self.latency_s)} + n / {self.bytes_per_s / 1e6:.4g} MB/s ({self.source})"


def predicted(group: Explains, collective: str, nbytes: int, like: torch.Tensor) -> LinkCost:
    """From the group's topology and, where it has one, its tuning table, between 1 KiB and nbytes; for tensors on
    devices from what is known of their links (docs/cuda.md). Every rank gets the same, from run to run, and nothing is
    sent. like: one of the tensors. Raises InvalidArgument for a collective that no planner serves."""
    if devices.on_device(like):
        latency_s, bytes_per_s, source = devices.collective_cost(group, collective, nbytes)
        return LinkCost(latency_s, bytes_per_s, f"{collective}, {source}")
    sizes = (_SMALL_NBYTES, max(nbytes, 2 * _SMALL_NBYTES))
    seconds, measured = [], True
    for size in sizes:
        found = group.explanation(collective, size)
        chosen = next(one for one in found.candidates if one.algorithm == found.choice)
        seconds.append(chosen.expected_s if chosen.measured_s is None else chosen.measured_s)
        measured &= chosen.measured_s is not None
    return _line(sizes, seconds, f"{collective}, {'tuning table' if measured else 'predicted from the topology'}")


def measured(
    group: Measures, collective: str, nbytes: int, run: Callable[[torch.Tensor], Any], like: torch.Tensor
) -> LinkCost:
    """From timing run(x) on float32 scratch where `like` is, of 1 KiB and of nbytes (at most 1 MiB, on a device 32
    MiB): medians of the slowest rank. run waits for its collective. All ranks together; their results agree, but not
    from run to run."""
    most = _LARGE_DEVICE_NBYTES if devices.on_device(like) else _LARGE_NBYTES
    sizes = (_SMALL_NBYTES, min(max(nbytes, 2 * _SMALL_NBYTES), most))
    seconds = torch.zeros(len(sizes), dtype=torch.float64)
    for at, size in enumerate(sizes):
        x = torch.zeros(size // 4, device=like.device)
        times = []
        for _ in range(1 + _REPETITIONS):  # the first one connects, plans and warms up
            devices.settle(x)
            group.all_reduce(torch.zeros(1))  # in step
            begin = time.perf_counter()
            run(x)
            devices.settle(x)
            times.append(time.perf_counter() - begin)
        seconds[at] = statistics.median(times[1:])
    group.all_reduce(seconds, "max")
    return _line(sizes, seconds.tolist(), f"{collective}, measured")


def _line(sizes: tuple[int, int], seconds: list[float], source: str) -> LinkCost:
    small, large = seconds
    # Not less what 1 KiB takes on the link: shapers and buffers let the first bytes through faster than the rest.
    return LinkCost(small, (sizes[1] - sizes[0]) / max(large - small, 1e-9), source)


def spare_cores(group: Any, like: torch.Tensor) -> int | None:
    """Of this host beside those that compute; None across hosts, where waiting for a wire needs no core, and for
    tensors on devices, which copy by themselves."""
    if devices.on_device(like):
        return None
    inner: Any = getattr(group, "group", group)
    hosts = getattr(inner, "host_ids", None)
    if hosts is None or len(set(hosts)) > 1:
        return None
    cores = torch.tensor([float(len(os.sched_getaffinity(0)) - group.size * torch.get_num_threads())])
    group.all_reduce(cores, "min")
    return int(cores)


def found(
    group: Any,
    link: str | LinkCost,
    collective: str,
    nbytes: int,
    run: Callable[[torch.Tensor], Any],
    like: torch.Tensor,
) -> LinkCost:
    """The cost by `link`: "predicted", "measured" (see there for run), or itself where it is one. like: one of the
    tensors that are communicated."""
    require_source(link)
    if isinstance(link, LinkCost):
        return link
    if link == "predicted":
        return predicted(group, collective, nbytes, like)
    return measured(group, collective, nbytes, run, like)


def require_source(link: str | LinkCost) -> None:
    if not isinstance(link, LinkCost) and link not in ("predicted", "measured"):
        raise InvalidArgument(f"link is {link!r}; give 'predicted', 'measured' or a LinkCost")
