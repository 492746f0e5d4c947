"""The GPU engine on this machine's GPUs and its real NCCL (gpu_cases.py): `make test-gpu`, not `make test`.
Four ranks, or one on each GPU where there are more; where there are fewer GPUs, several ranks share one.

Without a GPU, or with a torch that cannot use it, every test fails: none may pass by not running."""

from __future__ import annotations

import pytest
import torch
from accelerators import Cuda
from gpu_cases import CASES, UNTOLD, Case, run_case

from pycomm import _C
from pycomm.gpus import nccl_wheel


def accelerator() -> Cuda:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert found > 0, "no GPU, or a CPU-only torch"
    found_nccl = _C.cuda_info(nccl_wheel())
    assert found_nccl["nccl_version"], found_nccl["nccl_problem"]
    return Cuda(found, found_nccl["nccl_version"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_gpus(case: Case) -> None:
    gpus = accelerator()
    run_case(case, gpus, max(gpus.n_gpus, 4))


def test_a_gpu_with_two_ranks_is_refused_where_nccl_is_not_told_of_it() -> None:
    run_case(UNTOLD, Cuda(1, accelerator().nccl_version), 2)
