"""The tests of the GPU engine, each once, for whatever accelerator runs them: tests/gpu on GPUs, test_gpu_bodies.py on
the fake device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import device_parts
import gpu_bodies
import gpu_group_bodies
from accelerators import Accelerator
from spawn import run_ranks
from torch_ranks import run_torch_ranks


@dataclass(frozen=True)
class Case:
    """n_ranks: None for as many as there are. n_hosts: emulated hosts, with as many ranks each. environment: set in
    every rank, over the accelerator's own. of_group: the body is of pycomm's Group."""

    body: Callable[..., None]
    n_ranks: int | None = None
    n_hosts: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    of_group: bool = False
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.body.__name__


def _part(part: Callable[..., Any]) -> Case:
    return Case(partial(gpu_group_bodies.same_bits, part=part), n_hosts=2, of_group=True, name=part.__name__)


CASES = (
    Case(gpu_bodies.collectives),
    Case(gpu_bodies.streams),
    Case(gpu_bodies.graph),
    Case(gpu_bodies.messages),
    Case(gpu_bodies.coalesced),
    Case(gpu_bodies.sub_groups),
    Case(gpu_bodies.small_by_peers, environment={"PYCOMM_CUDA_PEER_BYTES": "65536"}),
    Case(gpu_bodies.small_by_peers, 2, environment={"PYCOMM_CUDA_PEER_BYTES": "65536"}, name="small_by_2_peers"),
    Case(gpu_bodies.failures),
    Case(gpu_bodies.failures, 2, environment={"PYCOMM_CUDA_PEER_BYTES": "65536"}, name="failures_in_the_peer_kernel"),
    Case(gpu_bodies.refusals),
    Case(gpu_bodies.models, 2, environment={"PYCOMM_CUDA_PEER_BYTES": "4096"}),
    Case(gpu_bodies.pipeline),
    Case(gpu_bodies.through_host, 2, n_hosts=2, environment={"PYCOMM_CUDA_BETWEEN_HOSTS": "tcp"}),
    Case(gpu_group_bodies.hierarchical, n_hosts=2, of_group=True),
    Case(gpu_group_bodies.wire, n_hosts=2, of_group=True),
    Case(gpu_group_bodies.foreign_arrays, of_group=True),
    Case(gpu_group_bodies.experts, of_group=True),
    Case(gpu_group_bodies.experts, n_hosts=2, of_group=True, name="experts_of_2_hosts"),
    Case(gpu_group_bodies.static_experts, of_group=True),
    Case(gpu_group_bodies.static_experts, n_hosts=2, of_group=True, name="static_experts_of_2_hosts"),
    *map(_part, (device_parts.buckets, device_parts.products, device_parts.sharded, device_parts.stream)),
)
# On an accelerator of one device.
UNTOLD = Case(gpu_bodies.one_device_twice, 2, environment={"NCCL_MULTI_RANK_GPU_ENABLE": "0"})


def run_case(case: Case, accelerator: Accelerator, n_ranks: int) -> None:
    """Raises what run_torch_ranks() raises. n_ranks: where the case does not say."""
    n = case.n_ranks or n_ranks
    hosts = [f"host{rank * case.n_hosts // n}" for rank in range(n)] if case.n_hosts > 1 else None
    variables = {**accelerator.environment(n), **case.environment}
    if case.of_group:
        run_ranks(_group_rank, n, accelerator, case.body, hosts=hosts, environment=variables)
        return
    run_torch_ranks(
        _torch_rank,
        n,
        accelerator,
        case.body,
        backend=accelerator.backend,
        hosts=hosts,
        environment=variables,
    )


def _torch_rank(rank: int, n: int, accelerator: Accelerator, body: Callable[..., None]) -> None:
    accelerator.begin(rank, n)
    body(rank, n, accelerator)


def _group_rank(group: Any, accelerator: Accelerator, body: Callable[..., None]) -> None:
    accelerator.begin(group.rank, group.size)
    body(group, accelerator)
