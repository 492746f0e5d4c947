"""The expert-parallel exchange against a dense reference, gradients included, in the cases that break exchanges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from spawn import run_ranks
from torch import Tensor

from pycomm.errors import InvalidArgument
from pycomm.moe import ExpertParallel

Array = np.ndarray[Any, np.dtype[Any]]
HIDDEN = 5


class OneRank:
    """A group of one, which must never be asked to communicate."""

    rank = 0
    size = 1

    def all_to_all(self, *arguments: Any) -> None:
        raise AssertionError("one rank has nobody to exchange with")


def batch(rank: int, n_tokens: int, routing: str, n_experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, topk_idx, topk_weights and the gradient of y, for one rank. Small integers: every sum is exact."""
    generator = torch.Generator().manual_seed(7 + rank)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=generator).float()

    if routing == "uniform":
        idx = torch.stack([torch.randperm(n_experts, generator=generator)[:top_k] for _ in range(n_tokens)])
    elif routing == "hot":  # every token to the same experts, which are all on the last ranks
        idx = torch.arange(n_experts - top_k, n_experts).expand(n_tokens, -1).flip(-1).contiguous()
    else:  # "some ranks have no token"
        idx = torch.empty(0, top_k, dtype=torch.int64) if rank % 2 else torch.arange(top_k).expand(n_tokens, -1)
    n = len(idx)
    return integers(n, HIDDEN), idx.reshape(n, top_k).contiguous(), integers(n, top_k), integers(n, HIDDEN)


def weight_of(expert: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + expert)
    return torch.randint(-3, 4, (HIDDEN, HIDDEN), generator=generator).float()


def dense(rank: int, *case: Any) -> list[Tensor]:
    """y, and the gradients of x and of the router's weights, with every expert at hand."""
    x, idx, weights, grad = batch(rank, *case)
    x.requires_grad_()
    weights.requires_grad_()
    y = sum(
        ((x @ weight_of(e)) * (weights * (idx == e)).sum(-1, keepdim=True) for e in range(case[2])), torch.zeros(())
    )
    y.backward(grad)
    assert x.grad is not None and weights.grad is not None
    return [y.detach(), x.grad, weights.grad]


def exchanged(group: Any, *case: Any) -> tuple[list[Array], Array, list[int]]:
    """dense()'s results through the exchange, the gradients of this rank's experts, and their loads."""
    n_experts = case[2]
    x, idx, weights, grad = batch(group.rank, *case)
    x.requires_grad_()
    weights.requires_grad_()
    exchange = ExpertParallel(group, n_experts)
    n_local = n_experts // group.size
    experts = torch.stack([weight_of(group.rank * n_local + e) for e in range(n_local)]).requires_grad_()
    dispatched = exchange.dispatch(x, idx, weights)
    parts = dispatched.rows.split(dispatched.expert_counts)
    y = exchange.combine(torch.cat([part @ w for part, w in zip(parts, experts, strict=True)]), dispatched)
    y.backward(grad)
    assert x.grad is not None and weights.grad is not None and experts.grad is not None
    results = [each.numpy() for each in (y.detach(), x.grad, weights.grad)]
    return results, experts.grad.numpy(), list(dispatched.expert_counts)


CASES = [
    (6, "uniform", 4, 2),
    (9, "uniform", 8, 3),
    (1, "uniform", 4, 1),
    (7, "hot", 8, 2),
    (5, "some ranks have no token", 4, 4),
    (0, "hot", 4, 2),
]


def every_case(group: Any) -> list[tuple[list[Array], Array, list[int]]]:
    return [exchanged(group, *case) for case in CASES]


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_exchange_equals_the_dense_reference_bit_for_bit(n_ranks: int) -> None:
    results = run_ranks(every_case, n_ranks)
    for number, case in enumerate(CASES):
        loads = [0] * case[2]
        for rank in range(n_ranks):
            for ours, expected in zip(results[rank][number][0], dense(rank, *case), strict=True):
                assert np.array_equal(ours, expected), (case, rank)
            for expert in batch(rank, *case)[1].flatten().tolist():
                loads[expert] += 1
        assert [load for rank in range(n_ranks) for load in results[rank][number][2]] == loads, case


def test_expert_gradients_do_not_depend_on_the_number_of_ranks() -> None:
    """Two ranks of 3 tokens and one rank that has all 6 give every expert the same gradient."""
    case = (3, "uniform", 4, 2)
    two = np.concatenate([gradient for _, gradient, _ in run_ranks(exchanged, 2, *case)])
    x, idx, weights, grad = (torch.cat(parts) for parts in zip(*(batch(rank, *case) for rank in range(2)), strict=True))
    experts = torch.stack([weight_of(e) for e in range(4)]).requires_grad_()
    exchange = ExpertParallel(OneRank(), 4)
    dispatched = exchange.dispatch(x, idx, weights)
    parts = dispatched.rows.split(dispatched.expert_counts)
    exchange.combine(torch.cat([p @ w for p, w in zip(parts, experts, strict=True)]), dispatched).backward(grad)
    assert experts.grad is not None
    assert np.array_equal(two, experts.grad)


class CountingGroup:
    """Passes on to a group and counts."""

    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.size, self.n_calls = group, group.rank, group.size, 0

    def all_to_all(self, *arguments: Any) -> Any:
        self.n_calls += 1
        return self.group.all_to_all(*arguments)


def count_exchanges(group: Any) -> list[int]:
    counting = CountingGroup(group)
    exchange = ExpertParallel(counting, 4)
    x, idx, weights, grad = batch(group.rank, 6, "uniform", 4, 2)
    x.requires_grad_()
    seen = []
    plan = exchange.plan(idx)
    seen.append(counting.n_calls)
    for _ in range(2):
        dispatched = exchange.dispatch(x, idx, weights, plan)
        y = exchange.combine(dispatched.rows * 2, dispatched)
        seen.append(counting.n_calls)
        y.backward(grad)
        seen.append(counting.n_calls)
    return seen


def test_sizes_are_exchanged_once_and_backward_reuses_them() -> None:
    assert run_ranks(count_exchanges, 2) == [[1, 3, 5, 7, 9]] * 2


def test_rows_reach_an_expert_by_source_rank_and_token() -> None:
    for rank, (rows, counts) in enumerate(run_ranks(rows_received, 2)):
        mine = (2 * rank, 2 * rank + 1)
        expected = [s * 10 + t for e in mine for s in range(2) for t in range(4) if e in (t, (t + 1) % 4)]
        assert rows == expected and counts == [4, 4]


def rows_received(group: Any) -> tuple[list[int], list[int]]:
    """Token t of each rank goes to experts (t + 1) % 4 and t; a row says where it came from."""
    tokens = torch.arange(4)
    x = (group.rank * 10 + tokens).float().unsqueeze(-1)
    idx = torch.stack([(tokens + 1) % 4, tokens], -1)
    dispatched = ExpertParallel(group, 4).dispatch(x, idx, torch.ones(4, 2))
    return dispatched.rows.flatten().int().tolist(), list(dispatched.expert_counts)


def test_bad_input_is_refused_before_anything_is_sent() -> None:
    exchange = ExpertParallel(OneRank(), 4)
    x, weights = torch.ones(2, HIDDEN), torch.ones(2, 2)
    with pytest.raises(InvalidArgument, match="experts -1 to 3; there are 0 to 3"):
        exchange.dispatch(x, torch.tensor([[0, -1], [2, 3]]), weights)
    with pytest.raises(InvalidArgument, match="experts 0 to 4; there are 0 to 3"):
        exchange.dispatch(x, torch.tensor([[0, 1], [2, 4]]), weights)
    with pytest.raises(InvalidArgument, match=r"twice for token 1: \[3, 3\]"):
        exchange.dispatch(x, torch.tensor([[0, 1], [3, 3]]), weights)
    with pytest.raises(InvalidArgument, match=r"topk_weights \[2, 1\]"):
        exchange.dispatch(x, torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 1))
    with pytest.raises(InvalidArgument, match="int64"):
        exchange.plan(torch.zeros(2, 2))
    other = exchange.plan(torch.tensor([[0, 1]]))
    with pytest.raises(InvalidArgument, match=r"plan is of topk_idx \[1, 2\]"):
        exchange.dispatch(x, torch.tensor([[0, 1], [2, 3]]), weights, other)
    dispatched = exchange.dispatch(x, torch.tensor([[0, 1], [2, 3]]), weights)
    with pytest.raises(InvalidArgument, match="had 4 rows"):
        exchange.combine(torch.ones(3, HIDDEN), dispatched)
    group = OneRank()
    group.size = 3
    with pytest.raises(InvalidArgument, match="4 experts do not spread evenly over 3 ranks"):
        ExpertParallel(group, 4)
