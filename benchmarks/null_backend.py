"""torch.distributed's backend "null", which does nothing: the time of a call on it is torch's own overhead.

    import null_backend; null_backend.register(); group = dist.new_group(backend="null")

Or alone, on one rank: python benchmarks/null_backend.py prints that overhead for each collective.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent


def register() -> None:
    """Tells torch of the backend; compiles it where that was not done yet (a minute; build/null_backend keeps it)."""
    if "null" in dist.Backend.backend_list:
        return
    from torch.utils import cpp_extension

    folder = HERE.parent / "build" / "null_backend"
    folder.mkdir(parents=True, exist_ok=True)
    module = cpp_extension.load(
        "null_backend",
        [str(HERE / "null_backend.cc")],
        extra_cflags=["-O3", "-std=c++20"],
        build_directory=str(folder),
    )

    def create(options: Any, _: Any) -> Any:
        return module.NullBackend(options.group_rank, options.group_size)

    dist.Backend.register_backend("null", create, extended_api=True, devices=["cpu"])


def calls(group: Any) -> dict[str, Callable[[], Any]]:
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    x, y = torch.zeros(2), torch.zeros(2)
    return {
        "all_reduce": partial(dist.all_reduce, x, group=group),
        "all_reduce, async": lambda: dist.all_reduce(x, group=group, async_op=True).wait(),
        "broadcast": partial(dist.broadcast, x, 0, group=group),
        "all_gather": partial(all_gather, x, y, group=group),
        "reduce_scatter": partial(reduce_scatter, x, y, group=group),
        "all_to_all": partial(dist.all_to_all_single, x, y, group=group),
        "barrier": partial(dist.barrier, group=group),
    }


def median_us(call: Callable[[], Any], n_calls: int = 2000) -> float:
    clock = time.perf_counter_ns
    times = []
    for _ in range(n_calls):
        begin = clock()
        call()
        times.append(clock() - begin)
    return statistics.median(times) / 1e3


def main() -> None:
    register()
    dist.init_process_group("null", store=dist.HashStore(), rank=0, world_size=1)
    for name, call in calls(None).items():
        print(f"{name:20} {median_us(call):6.2f} us")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
