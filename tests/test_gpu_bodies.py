"""What `make test-gpu` runs on GPUs, run on the fake device: that these tests are right is known without a GPU."""

from __future__ import annotations

import os
from dataclasses import replace

import gpu_bodies
import pytest
import torch
import torch.distributed as dist
from accelerators import Accelerator, Fake
from fake_nccl import build
from gpu_cases import CASES, UNTOLD, Case, run_case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_fake_device(case: Case) -> None:
    run_case(case, Fake(str(build())), 4 if case.n_hosts > 1 else 3)


def test_a_device_with_two_ranks_is_refused_where_nccl_is_not_told_of_it() -> None:
    told_in_vain = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}  # the fake's NCCL is older than that
    for variables in (UNTOLD.environment, told_in_vain):
        case = replace(UNTOLD, environment={**variables, "FAKE_DEVICE_ID": "one"})
        run_case(case, Fake(str(build())), 2)


@pytest.mark.parametrize("way", ["told", "as hosts"])
def test_ranks_share_a_device_as_their_nccl_lets_them(way: str) -> None:
    told = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "FAKE_NCCL_VERSION": "23003"}
    case = Case(_shares, 3, environment={"FAKE_DEVICE_ID": "one", **(told if way == "told" else {})})
    run_case(case, Fake(str(build())), 3)


def _shares(rank: int, n: int, a: Accelerator) -> None:
    if "NCCL_MULTI_RANK_GPU_ENABLE" not in os.environ:
        os.environ["NCCL_HOSTID"] = f"rank {rank}"
    dist.all_reduce(x := gpu_bodies.values(rank, 100))
    assert torch.equal(x, sum(gpu_bodies.values(r, 100) for r in range(n)))
