"""Ranks of pycomm's own Group as processes, for tests: run_ranks(fn, n_ranks) runs fn(group) in each."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as c10d
from torch_ranks import HANGS_S, run_processes

import pycomm


def run_ranks(
    fn: Callable[..., Any],
    n_ranks: int,
    *args: Any,
    hosts: Sequence[str] | None = None,
    timeout_s: float = HANGS_S,
    op_timeout_s: float = 30,
    may_die: Collection[int] = (),
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """What fn(group, *args) returned, by rank. fn is a module-level function. hosts: an emulated host's label per rank.
    environment: set in each rank before it begins.

    may_die: ranks whose end without a result is expected; they give None. Raises RanksFailed with every traceback."""
    return run_processes(
        _rank,
        n_ranks,
        fn,
        op_timeout_s,
        args,
        hosts=hosts,
        timeout_s=timeout_s,
        may_die=may_die,
        environment=environment,
    )


def _rank(
    port: int, rank: int, n_ranks: int, fn: Callable[..., Any], op_timeout_s: float, args: tuple[Any, ...]
) -> Any:
    store = c10d.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=op_timeout_s))
    with pycomm.init(store, rank, n_ranks, host_id=os.environ.get("PYCOMM_HOST_ID"), timeout_s=op_timeout_s) as group:
        return fn(group, *args)
