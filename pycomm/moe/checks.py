"""What an exchange refuses, in words: settings at once, a batch on all ranks before its rows move."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import torch
from torch import Tensor

from pycomm.errors import InvalidArgument

MAX_TOP_K: Final = 32


def require(holds: bool, text: str) -> None:
    if not holds:
        raise InvalidArgument(text)


def require_sizes(num_experts: int, hidden: int | None, top_k: int | None, max_tokens: int | None) -> None:
    most = min(MAX_TOP_K, num_experts)
    require(num_experts >= 1, f"num_experts is {num_experts}; there must be one at least")
    require(hidden is None or hidden >= 1, f"hidden is {hidden}; a row has one value at least")
    require(top_k is None or 1 <= top_k <= most, f"top_k is {top_k}; it is 1 to {most} of {num_experts} experts")
    require(max_tokens is None or max_tokens >= 1, f"max_tokens is {max_tokens}; give 1 or more, or None for no limit")


def code_of(value: object) -> int:
    """Equal where reprs are equal, in 62 bits: what ranks tell each other of settings."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "little") >> 2


def problem_of_routing(topk_idx: Tensor, num_experts: int, top_k: int | None, *, strangers: bool = False) -> str | None:
    """Reads topk_idx. strangers: ids that do not exist are allowed."""
    problem = problem_of_routing_form(topk_idx, num_experts, top_k)
    if problem or topk_idx.numel() == 0:
        return problem
    low, high = (int(bound) for bound in topk_idx.aminmax())
    if (low < 0 or high >= num_experts) and not strangers:
        return f"topk_idx names experts {low} to {high}; there are 0 to {num_experts - 1}"
    ascending = topk_idx.sort(-1).values
    known = (ascending >= 0) & (ascending < num_experts)
    twice = ((ascending[:, 1:] == ascending[:, :-1]) & known[:, 1:]).any(-1).nonzero()
    if len(twice):
        token = int(twice[0])
        return f"topk_idx names one expert twice for token {token}: {topk_idx[token].tolist()}"
    return None


def problem_of_routing_form(topk_idx: Tensor, num_experts: int, top_k: int | None) -> str | None:
    """Of what is known without reading topk_idx."""
    most = min(MAX_TOP_K, num_experts)
    if topk_idx.dim() != 2 or topk_idx.dtype != torch.int64 or not 1 <= topk_idx.shape[1] <= most:
        return f"topk_idx is {topk_idx.dtype} {list(topk_idx.shape)}; it must be int64 [T, K], K 1 to {most}"
    if top_k is not None and topk_idx.shape[1] != top_k:
        return f"topk_idx is {list(topk_idx.shape)}, top_k is {top_k}"
    return None


def problem_of_rows(x: Tensor, topk_idx: Tensor, topk_weights: Tensor, hidden: int | None) -> str | None:
    if x.dim() != 2 or topk_idx.shape != topk_weights.shape or len(x) != len(topk_idx):
        return (
            f"x is {list(x.shape)}, topk_idx {list(topk_idx.shape)}, topk_weights {list(topk_weights.shape)}; "
            "they must be [T, H], [T, K] and [T, K]"
        )
    if not x.device == topk_idx.device == topk_weights.device:
        devices = f"x is on {x.device}, topk_idx on {topk_idx.device}, topk_weights on {topk_weights.device}"
        return f"{devices}; put all on one device"
    if hidden is not None and x.shape[1] != hidden:
        return f"x is {list(x.shape)}, hidden is {hidden}"
    if not x.dtype.is_floating_point or not topk_weights.dtype.is_floating_point:
        return f"x is {x.dtype} and topk_weights {topk_weights.dtype}; they must be floating point"
    return None


def problem_of_output(expert_out: Tensor, n_out: int, hidden: int | None, device: torch.device) -> str | None:
    """device: of dispatched.rows."""
    if expert_out.device != device:
        return f"expert_out is on {expert_out.device}, dispatched.rows on {device}; put both on one device"
    if expert_out.dim() != 2 or len(expert_out) != n_out:
        return f"expert_out is {list(expert_out.shape)}, dispatched.rows had {n_out} rows; they must match"
    if hidden is not None and expert_out.shape[1] != hidden:
        return f"expert_out is {list(expert_out.shape)}, hidden is {hidden}"
    return None


def problem_of_plan(plan: Any, owner: tuple[Any, ...], topk_idx: Tensor) -> str | None:
    if plan.owner != owner:
        return "the plan is of another ExpertParallel, or of this one before mask(); make a plan of this batch"
    if plan.home_weights.device != topk_idx.device:
        return f"the plan is of {plan.home_weights.device}, topk_idx on {topk_idx.device}; make a plan of this batch"
    if plan.topk_idx.shape != topk_idx.shape:
        return (
            f"the plan is of topk_idx {list(plan.topk_idx.shape)}, this batch has {list(topk_idx.shape)}; "
            "make a plan of this batch"
        )
    if not plan.is_of(topk_idx):
        token = int((plan.topk_idx != topk_idx.cpu()).any(-1).nonzero()[0])
        return f"the plan is of another batch: token {token} has other experts; make a plan of this batch"
    return None


def require_equal(values: Tensor, names: list[str]) -> None:
    """values [ranks, len(names)]: what ranks must not differ in. All ranks see the same, so all raise."""
    for name, column in zip(names, values.T, strict=True):
        different = (column != column[0]).nonzero().flatten().tolist()
        if different:
            raise InvalidArgument(
                f"{name}: rank 0 has {int(column[0])}, rank {different[0]} has {int(column[different[0]])}; "
                "give all ranks the same"
            )
