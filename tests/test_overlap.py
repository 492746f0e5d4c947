"""Gradient buckets: which sums they make, in which order, and what they refuse."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from spawn import run_ranks
from torch import Tensor, nn

from pycomm.errors import InvalidArgument
from pycomm.overlap import GradientBuckets

WIDTHS = (3, 5, 7, 2)  # odd, so that no bucket edge falls on a round number


class RecordingGroup:
    """A group of two equal ranks in one process: a sum doubles. Keeps the order of starts and waits."""

    size = 2

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []

    def all_reduce(self, x: Tensor, op: str = "sum", *, async_op: bool = False) -> Any:
        assert op == "sum" and async_op
        self.log.append(("start", x.numel()))
        group = self

        class Work:
            def wait(self) -> None:
                group.log.append(("wait", x.numel()))
                x.mul_(2)

        return Work()


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(WIDTHS))).to(dtype)


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, WIDTHS[0], generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain_gradients(seeds: list[int]) -> list[Tensor]:
    model = network()
    for seed in seeds:
        model(inputs(seed)).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("bucket_nbytes", [1, 60, 1 << 20])
def test_buckets_hold_the_summed_gradients(bucket_nbytes: int) -> None:
    model, group = network(), RecordingGroup()
    buckets = GradientBuckets(model.parameters(), group, bucket_nbytes=bucket_nbytes)
    model(inputs(1)).square().sum().backward()
    buckets.wait()
    for parameter, expected in zip(model.parameters(), plain_gradients([1]), strict=True):
        assert parameter.grad is None
        assert torch.equal(buckets.gradient(parameter), expected * 2)


def test_buckets_start_during_backward_in_reverse_order_and_are_waited_for_after() -> None:
    model, group = network(), RecordingGroup()
    buckets = GradientBuckets(model.parameters(), group, bucket_nbytes=1)  # one parameter each
    sizes = [p.numel() for p in reversed(list(model.parameters()))]
    model(inputs(1)).square().sum().backward()
    assert group.log == [("start", n) for n in sizes]
    buckets.wait()
    assert group.log[len(sizes) :] == [("wait", n) for n in sizes]


def test_no_sync_adds_up_and_only_the_last_micro_batch_reduces() -> None:
    model, group = network(), RecordingGroup()
    buckets = GradientBuckets(model.parameters(), group, bucket_nbytes=60)
    for _ in range(2):  # the second step must not see the first one's gradients
        group.log.clear()
        with buckets.no_sync():
            model(inputs(1)).square().sum().backward()
            model(inputs(2)).square().sum().backward()
        assert not group.log
        model(inputs(3)).square().sum().backward()
        buckets.wait()
        for parameter, expected in zip(model.parameters(), plain_gradients([1, 2, 3]), strict=True):
            torch.testing.assert_close(buckets.gradient(parameter), expected * 2)


def test_bf16_gradients_add_up_in_fp32() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    buckets = GradientBuckets([weight], RecordingGroup())
    for micro_batch_gradient in (256.0, 1.0):  # bf16 has 8 bits of mantissa: there 256 + 1 is 256
        with buckets.no_sync():
            (weight * micro_batch_gradient).sum().backward()
    assert buckets.gradient(weight).dtype == torch.float32
    assert buckets.gradient(weight).item() == 257.0


def test_a_parameter_that_backward_does_not_reach_has_gradient_zero() -> None:
    model, unused = network(), nn.Parameter(torch.ones(4))
    group = RecordingGroup()
    parameters = [*model.parameters(), unused]  # last, so its bucket would be the first to start
    buckets = GradientBuckets(parameters, group, bucket_nbytes=1)
    buckets.gradient(unused).fill_(7.0)  # left over from an earlier step
    model(inputs(1)).square().sum().backward()
    assert not group.log  # every rank starts in the same order, so nothing overtakes the missing one
    buckets.wait()
    assert torch.equal(buckets.gradient(unused), torch.zeros(4))
    for parameter, expected in zip(model.parameters(), plain_gradients([1]), strict=True):
        assert torch.equal(buckets.gradient(parameter), expected * 2)


def test_a_second_synchronising_backward_before_wait_is_refused() -> None:
    model = network()
    buckets = GradientBuckets(model.parameters(), RecordingGroup())
    model(inputs(1)).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"call wait\(\) after each synchronising backward"):
        model(inputs(2)).square().sum().backward()
    buckets.close()


def test_parameters_that_cannot_have_gradients_are_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(InvalidArgument, match=r"parameter 1 .* given twice"):
        GradientBuckets([weight, weight], RecordingGroup())
    with pytest.raises(InvalidArgument, match=r"parameter 0 .* requires a gradient"):
        GradientBuckets([torch.ones(2)], RecordingGroup())


def test_close_takes_the_hooks_off() -> None:
    model = network()
    GradientBuckets(model.parameters(), RecordingGroup()).close()
    model(inputs(1)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def reduce_over_ranks(group: Any, bucket_nbytes: int) -> list[Any]:
    model = network()
    buckets = GradientBuckets(model.parameters(), group, bucket_nbytes=bucket_nbytes)
    for step in range(3):
        with buckets.no_sync():
            model(inputs(100 * step + group.rank)).square().sum().backward()
        model(inputs(100 * step + 50 + group.rank)).square().sum().backward()
        buckets.wait()
    return [buckets.gradient(parameter).numpy() for parameter in model.parameters()]


def test_ranks_get_the_sum_over_ranks_and_micro_batches() -> None:
    n_ranks = 3
    expected = plain_gradients([200 + rank for rank in range(n_ranks)] + [250 + rank for rank in range(n_ranks)])
    results = run_ranks(reduce_over_ranks, n_ranks, 60)
    for rank_result in results:
        for ours, rank_0s, exact in zip(rank_result, results[0], expected, strict=True):
            assert np.array_equal(ours, rank_0s)
            np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)
