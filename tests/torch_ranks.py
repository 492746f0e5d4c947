"""Ranks of torch.distributed as processes, for tests: run_torch_ranks(fn, n_ranks) runs fn(rank, world_size) in each.

A fork server imports torch once; each rank is forked from it, so a test starts 4 fresh ranks in a fraction of a second.
The store is served by the test's own process on a free port, so that no rank's end takes it away from the others.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

# PYCOMM_TEST_BACKEND=gloo runs the same tests on an independent implementation: one that fails there is itself wrong.
BACKEND = os.environ.get("PYCOMM_TEST_BACKEND", "pycomm")

# TCPStore looks up the names of its peers for its log; where a name server loses the question that would take 5 s.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

# On GPUs each rank starts afresh: what the fork server imports may start CUDA, which no fork survives.
_context = multiprocessing.get_context(os.environ.get("PYCOMM_TEST_START", "forkserver"))
_context.set_forkserver_preload(
    [
        "pytest",
        "pycomm",
        "torch",
        "torch.distributed",
        "torch._dynamo",
        "torch._inductor.utils",
        "torch.distributed._functional_collectives",
        "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
        "torch.distributed.checkpoint",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch.nn.parallel",
    ]
)
HANGS_S = 300.0  # no test's ranks take so long, not on a slow machine that does other things either
_SETTLE_S = 3.0  # after a rank failed, how long the others may take to say what they saw of it


class RanksFailed(AssertionError):
    """Some ranks raised, died or did not end; the message has every traceback."""


def run_torch_ranks(
    fn: Callable[..., Any],
    n_ranks: int,
    *args: Any,
    backend: str = BACKEND,
    hosts: Sequence[str] | None = None,
    op_timeout_s: float = 30,
    may_die: Collection[int] = (),
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """What fn(rank, n_ranks, *args) returned, by rank, each called with the default process group of `backend` at hand.

    hosts: a label per rank, for emulated hosts. environment: set in each rank before it begins. op_timeout_s: the
    group's timeout. may_die: ranks whose end without a result is expected; they give None. Raises RanksFailed, with
    nothing left running.
    """
    if backend == "gloo":
        hosts = None
    return run_processes(
        _torch_rank,
        n_ranks,
        fn,
        args,
        backend,
        op_timeout_s,
        hosts=hosts,
        may_die=may_die,
        environment=environment,
    )


def run_processes(
    body: Callable[..., Any],
    n_ranks: int,
    *args: Any,
    hosts: Sequence[str] | None,
    timeout_s: float = HANGS_S,
    may_die: Collection[int] = (),
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """What body(store_port, rank, n_ranks, *args) returned in a process of its own, by rank."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: dict[Connection, tuple[int, BaseProcess]] = {}
    for rank in range(n_ranks):
        ours, theirs = _context.Pipe(duplex=False)
        variables = dict(environment or {}) | ({} if hosts is None else {"PYCOMM_HOST_ID": hosts[rank]})
        process = _context.Process(
            target=_rank_main,
            args=(theirs, body, store.port, rank, n_ranks, variables, args),
            daemon=True,
        )
        process.start()
        theirs.close()
        ranks[ours] = (rank, process)
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout_s
    waiting = dict(ranks)
    try:
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for connection in ready:
                assert isinstance(connection, Connection)
                rank, process = waiting.pop(connection)
                try:
                    ok, value = connection.recv()
                except EOFError:
                    process.join(10)
                    ok, value = rank in may_die, None
                    if not ok:
                        value = f"ended with exit code {process.exitcode} and no result"
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + _SETTLE_S)
            if not ready:
                for rank, process in waiting.values():
                    failures[rank] = f"still running after {timeout_s:g} s; its stacks are on stderr"
                    if process.pid is not None:
                        os.kill(process.pid, signal.SIGUSR1)
                        process.join(0.5)
                break
    finally:
        for connection, (_, process) in ranks.items():
            if connection in waiting:
                process.kill()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
    if failures:
        raise RanksFailed("".join(f"\n--- rank {rank} of {n_ranks}: {text}" for rank, text in failures.items()))
    return [results[rank] for rank in range(n_ranks)]


def _rank_main(
    connection: Connection,
    body: Callable[..., Any],
    port: int,
    rank: int,
    n_ranks: int,
    variables: Mapping[str, str],
    args: tuple[Any, ...],
) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    os.environ.update(variables)
    try:
        connection.send((True, body(port, rank, n_ranks, *args)))
    except BaseException:  # a failed rank says why, whatever it was
        connection.send((False, traceback.format_exc()))


def _torch_rank(
    port: int,
    rank: int,
    n_ranks: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    backend: str,
    op_timeout_s: float,
) -> Any:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    timeout = timedelta(seconds=op_timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=n_ranks, timeout=timeout)
    value = fn(rank, n_ranks, *args)
    if dist.is_initialized():
        dist.destroy_process_group()
    return value
