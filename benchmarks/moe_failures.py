"""How soon the others notice a rank that fails in the middle of an MoE step: python benchmarks/moe_failures.py

4 ranks on 2 emulated hosts (labels; loopback between them), two exchanges one after the other, forward and backward;
rank 1 fails, in one of several ways, and the deadline is 60 s. A time is from the failing statement to the exception on
the slowest other rank, by the machine's one monotonic clock. Writes results/moe_failures.json."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from common import environment, markdown_table, serve_store, write_json
from torch import Tensor

HOSTS = ("a", "b", "a", "a")
FAILING, N_EXPERTS, TOKENS, HIDDEN, DEADLINE_S, N_TURNS = 1, 8, 64, 256, 60.0, 7


class Fails(Exception):
    """As an expert would raise."""


class InBackward(torch.autograd.Function):
    """rows; calls `fail` in its backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, fail: Callable[[], None]) -> Tensor:
        ctx.fail = fail
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.fail()
        return grad, None


def step(ep: Any, where: str, fail: Callable[[], None]) -> None:
    generator = torch.Generator().manual_seed(ep.group.rank)
    idx = torch.rand(TOKENS, N_EXPERTS, generator=generator).topk(2).indices
    x = torch.ones(TOKENS, HIDDEN).requires_grad_()
    for _ in range(2):
        dispatched = ep.dispatch(x, idx, torch.ones(TOKENS, 2))
        if where == "forward":
            fail()
        x = ep.combine(InBackward.apply(dispatched.rows, fail if where == "backward" else lambda: None), dispatched)  # type: ignore[no-untyped-call]
    x.sum().backward()


# name: where rank 1 fails, how, and whether the step is inside ep.failing_together()
WAYS: dict[str, tuple[str, str, bool]] = {
    "raises in an expert's backward, and lives": ("backward", "lives", False),
    "raises between dispatch and combine, and lives, in failing_together()": ("forward", "lives", True),
    "raises in an expert's backward, and its process ends": ("backward", "ends", False),
    "raises between dispatch and combine, and its process ends": ("forward", "ends", False),
    "is killed in an expert's backward": ("backward", "dies", False),
}


def rank_main(results: Connection, port: int, rank: int, where: str, how: str, together: bool) -> None:
    from contextlib import nullcontext

    import pycomm
    from pycomm.moe import ExpertParallel

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=DEADLINE_S))
    group = pycomm.init(store, rank, len(HOSTS), host_id=HOSTS[rank], timeout_s=DEADLINE_S)
    ep = ExpertParallel(group, N_EXPERTS)
    step(ep, "", lambda: None)  # connections open, memory is there

    def fail() -> None:
        if rank == FAILING:
            results.send((time.monotonic(), "failed"))
            if how == "dies":
                os._exit(1)
            raise Fails

    group.barrier()
    try:
        with ep.failing_together() if together else nullcontext():
            step(ep, where, fail)
    except pycomm.errors.PycommError as error:
        results.send((time.monotonic(), f"{type(error).__name__}: {error}"))
    except Fails:
        if how == "ends":
            raise
        results.recv()  # lives, and does nothing, until told
    with suppress(pycomm.errors.PycommError):
        group.close()


def one_turn(way: tuple[str, str, bool]) -> tuple[float, str]:
    """Seconds until the slowest of the others knew, and what it was told."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "pycomm.moe"])
    server = serve_store(None)
    ranks = []
    for rank in range(len(HOSTS)):
        ours, theirs = context.Pipe()
        process = context.Process(target=rank_main, args=(theirs, server.port, rank, *way), daemon=True)
        process.start()
        theirs.close()
        ranks.append((ours, process))
    try:
        found = []
        for connection, _ in ranks:
            if not connection.poll(2 * DEADLINE_S):
                raise RuntimeError("a rank said nothing")
            found.append(connection.recv())
        failed_at = found[FAILING][0]
        at, text = max(each for rank, each in enumerate(found) if rank != FAILING)
        with suppress(BrokenPipeError):
            ranks[FAILING][0].send("end")
        return at - failed_at, text
    finally:
        for _, process in ranks:
            process.join(10 if sys.exc_info()[0] is None else 0)
            process.kill()
            process.join()


def main() -> int:
    record: dict[str, Any] = {"environment": environment(), "deadline_s": DEADLINE_S}
    rows = []
    for name, way in WAYS.items():
        turns = [one_turn(way) for _ in range(N_TURNS)]
        times = sorted(round(seconds * 1e3, 2) for seconds, _ in turns)
        record[name] = {"median_ms": statistics.median(times), "turns_ms": times, "text": turns[-1][1]}
        rows.append([f"rank {FAILING} {name}", f"{statistics.median(times):.1f}", f"{times[-1]:.1f}"])
        print(name, record[name], flush=True)
    print(markdown_table(["ms until the last of the others raised", "median", "longest"], rows))
    print(f"written: {write_json('moe_failures', record)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
