"""Batches for the exchange's tests, and what they must give: dense arithmetic on all ranks' tokens, in numpy.

Experts multiply elementwise by a vector of their own, so that an expert's output depends on its row alone. With whole
numbers all sums are exact, in any order; with fractions `replay` does the sums of
pycomm/moe/transport.py token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycomm.moe import ExpertParallel

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Case:
    n_tokens: tuple[int, ...]  # by rank
    num_experts: int
    top_k: int
    hidden: int
    routing: str = "uniform"  # or "hot": every token to the same experts
    whole: bool = True
    dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    x: Tensor
    idx: Tensor
    weights: Tensor
    grad: Tensor


def batch(case: Case, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(1000 * case.seed + rank)
    n, dtype = case.n_tokens[rank], getattr(torch, case.dtype)

    def values(*shape: int) -> Tensor:
        if case.whole:
            return torch.randint(-2, 3, shape, generator=generator).float()
        return torch.randn(shape, generator=generator)

    idx = torch.empty(n, case.top_k, dtype=torch.int64)
    for token in range(n):
        if case.routing == "hot":
            idx[token] = torch.arange(case.num_experts - case.top_k, case.num_experts).flip(0)
        else:
            idx[token] = torch.randperm(case.num_experts, generator=generator)[: case.top_k]
    x, weights, grad = values(n, case.hidden), values(n, case.top_k), values(n, case.hidden)
    return Batch(x.to(dtype), idx, weights, grad.to(dtype))


def factors(case: Case, expert: int) -> Tensor:
    """The vector [H] that an expert multiplies by."""
    generator = torch.Generator().manual_seed(expert)
    if case.whole:
        return torch.randint(-2, 3, (case.hidden,), generator=generator).to(getattr(torch, case.dtype))
    return torch.randn(case.hidden, generator=generator).to(getattr(torch, case.dtype))


def run_experts(case: Case, dispatched: Any, experts: tuple[int, ...], layout: str) -> Tensor:
    """expert_out for what dispatch gave."""
    rows = dispatched.rows
    if not experts:
        return rows * 1
    table = torch.stack([factors(case, e) for e in experts])
    if layout == "expert":
        parts = rows.split(dispatched.sizes)
        return torch.cat([part * vector for part, vector in zip(parts, table, strict=True)])
    if layout == "token":
        return rows * table[dispatched.experts]
    total = torch.zeros(rows.shape)
    for k in range(case.top_k):
        chosen = dispatched.experts[:, k]
        out = (rows * table[chosen.clamp(min=0)]).float() * dispatched.weights[:, k : k + 1]
        total = total + torch.where((chosen >= 0).unsqueeze(1), out, 0.0)
    return total.to(rows.dtype)


def through(group: Any, case: Case, layout: str = "expert", **settings: Any) -> list[Array]:
    """y, the gradients of x and the weights, and the rows that came, of one batch."""
    one = batch(case, group.rank)
    x, weights = one.x.clone().requires_grad_(), one.weights.clone().requires_grad_()
    ep = ExpertParallel(group, case.num_experts, case.hidden, case.top_k, layout=layout, **settings)  # type: ignore[arg-type]
    dispatched = ep.dispatch(x, one.idx, weights)
    y = ep.combine(run_experts(case, dispatched, ep.placement.experts[group.rank], layout), dispatched)
    y.backward(one.grad)
    assert x.grad is not None and weights.grad is not None
    return [each.float().numpy() for each in (y.detach(), x.grad, weights.grad, dispatched.rows.detach())]


def dense(case: Case, rank: int) -> list[Array]:
    """y and the gradients of x and of the weights, with every expert at hand; exact for whole numbers."""
    one = batch(case, rank)
    x, weights = one.x.double().requires_grad_(), one.weights.double().requires_grad_()
    y = torch.zeros_like(x)
    for e in range(case.num_experts):
        y = y + x * factors(case, e).double() * (weights * (one.idx == e)).sum(-1, keepdim=True)
    y.backward(one.grad.double())
    assert x.grad is not None and weights.grad is not None
    return [each.detach().numpy() for each in (y, x.grad, weights.grad)]


def replay(case: Case, rank: int, ranks_of_hosts: list[list[int]], experts_of: list[tuple[int, ...]]) -> list[Array]:
    """y and x.grad, bit for bit: fp32 sums of a rank in its order, of a host by rank, rounded, of all hosts."""
    one, dtype = batch(case, rank), getattr(torch, case.dtype)

    def summed(of_expert: dict[int, Tensor], weight: dict[int, Tensor]) -> Tensor:
        total = np.zeros(case.hidden, np.float32)
        for ranks in ranks_of_hosts:
            of_host = np.zeros(case.hidden, np.float32)
            for each in ranks:
                of_rank = np.zeros(case.hidden, np.float32)
                for e in experts_of[each]:
                    if e in of_expert:
                        of_rank = of_rank + of_expert[e].float().numpy() * weight[e].numpy()
                of_host = of_host + of_rank
            total = total + torch.from_numpy(of_host).to(dtype).float().numpy()
        return torch.from_numpy(total).to(dtype)

    y, x_grad = torch.empty_like(one.x), torch.empty_like(one.x)
    for t in range(len(one.x)):
        chosen = one.idx[t].tolist()
        weight = dict(zip(chosen, one.weights[t], strict=True))
        y[t] = summed({e: one.x[t] * factors(case, e) for e in chosen}, weight)
        back = {e: (one.grad[t].float() * weight[e]).to(dtype) * factors(case, e) for e in chosen}
        x_grad[t] = summed(back, {e: torch.ones(()) for e in chosen})
    return [y.float().numpy(), x_grad.float().numpy()]
