"""Gradient buckets: which sums they make, in which order, and what they refuse. What put-off gradients wait for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pycomm import _C
from pycomm.errors import InvalidArgument
from pycomm.overlap import Bucket, GradientBuckets, Landed, LinkCost, WeightGradients
from pycomm.overlap.layout import pack
from pycomm.overlap.pool import Pool
from pycomm.overlap.ring_time import ring_s
from pycomm.overlap.trace import Trace

WIDTHS = (3, 5, 7, 2)  # odd, so that no bucket edge falls on a round number


LINK = LinkCost(1e-3, 1e6, "of the test")  # 20 kB lose 5 % to latency, 1 kB half


class RecordingGroup:
    """A group of two equal ranks in one process: a sum doubles. Keeps the order of starts and waits."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []

    def all_gather(self, output: Tensor, input: Tensor) -> None:
        output.copy_(input.expand_as(output))

    def broadcast(self, x: Tensor, root: int = 0) -> None:
        assert root == 0

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


@pytest.mark.parametrize("bucket_nbytes", [1, 60, 1 << 20, None])
def test_buckets_hold_the_summed_gradients(bucket_nbytes: int | None) -> None:
    model, group = network(), RecordingGroup()
    buckets = GradientBuckets(model.parameters(), group, bucket_nbytes=bucket_nbytes, link=LINK)
    held = [buckets.gradient(parameter) for parameter in model.parameters()]
    for seed in (1, 2):
        model(inputs(seed)).square().sum().backward()
        buckets.wait()
        for parameter, gradient, expected in zip(model.parameters(), held, plain_gradients([seed]), strict=True):
            assert parameter.grad is None
            assert buckets.gradient(parameter) is gradient  # also after it moved into its bucket
            assert torch.equal(gradient, expected * 2)
    memory = {flat.untyped_storage().data_ptr() for flat in buckets.flats}
    assert {gradient.untyped_storage().data_ptr() for gradient in held} == memory


def test_buckets_learn_the_order_in_step_one_and_start_in_it_during_backward() -> None:
    model, group = network(), RecordingGroup()
    parameters = list(model.parameters())
    ready: list[int] = []
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: ready.append(p.numel()))
    buckets = GradientBuckets(parameters[2:] + parameters[:2], group, bucket_nbytes=1)  # one parameter each
    model(inputs(1)).square().sum().backward()
    assert not group.log
    buckets.wait()
    assert group.log == [(what, n) for what in ("start", "wait") for n in ready]
    group.log.clear()
    model(inputs(1)).square().sum().backward()
    assert group.log == [("start", n) for n in ready[: len(parameters)]]
    buckets.wait()
    assert group.log[len(parameters) :] == [("wait", n) for n in ready[: len(parameters)]]


@pytest.mark.parametrize(
    ("product_s", "hop_s", "expected"),
    [
        (1.0, 0.1, 12.1),  # computing takes longer: 3 * 4 products, and the last piece's way
        (0.1, 1.0, 8.1),  # the link does: 2 * 4 pieces on their way, and a product
    ],
)
def test_ring_takes_the_longer_one_and_one_piece_of_the_other(product_s: float, hop_s: float, expected: float) -> None:
    assert ring_s(3, 4, product_s, hop_s) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("nbytes", "most", "last", "expected"),
    [
        ([], 10, 5, []),
        ([7], 10, 5, [1]),
        ([4, 4, 4, 4, 2, 2], 10, 5, [2, 2, 2]),
        ([20, 1, 1, 1], 10, 1, [1, 2, 1]),  # larger than a bucket: alone
        ([1] * 10, 3, 0, [3, 3, 3, 1]),
        ([1, 1, 1], 100, 100, [3]),
    ],
)
def test_pack(nbytes: list[int], most: int, last: int, expected: list[int]) -> None:
    assert pack(nbytes, most, last) == expected


def test_a_trace_foretells_each_use_of_a_step() -> None:
    """Two blocks, two micro-batches whose backwards recompute, an evaluation and a step that goes another way."""
    step = ["f0", "f1", "b1", "b1", "b0", "f0", "f1", "b1", "b0"]
    phases = {"f": "forward", "b": "backward"}
    trace: Trace[str] = Trace()
    assert [trace.use(each[1], phases[each[0]], 2) for each in step] == [[]] * len(step)  # type: ignore[arg-type]
    assert trace.upcoming(1) == []
    trace.restart()
    for _ in range(2):
        ahead = [trace.use(each[1], phases[each[0]], 1) for each in step]  # type: ignore[arg-type]
        # At f1 the next to run is 1 itself, at b0 0 itself; the last use has none behind it.
        assert ahead == [["1"], ["0"], ["0"], ["0"], ["1"], ["1"], ["0"], ["0"], []]
        trace.restart()
    trace.use("0", "forward", 1)
    trace.use("1", "forward", 1)
    assert trace.upcoming(1) == ["1"]  # it runs backward next: it stays
    assert trace.after_forward("0", 2) == ["1"] and trace.after_forward("1", 1) == []
    assert trace.upcoming(1) == ["1"]  # an evaluation moves nothing
    assert trace.use("0", "backward", 1) == ["1"]  # b1 did not come: the trace is found again
    assert trace.use("2", "forward", 1) == ["0"]  # never seen


def test_a_pool_hands_on_memory_that_views_follow() -> None:
    cpu, pool = torch.device("cpu"), Pool(64)
    x = pool.zeros([8], torch.float32, cpu)
    view, where = x[2:].view(3, 2), x.data_ptr()
    x.fill_(1)
    pool.empty(x)
    pool.empty(x)  # it has none by now
    assert x.untyped_storage().nbytes() == view.untyped_storage().nbytes() == 0 and pool.nbytes == 32
    y = pool.zeros([4], torch.float64, cpu)
    assert y.data_ptr() == where and not y.any() and pool.nbytes == 0
    pool.fill(x)  # there is none to hand on
    x.copy_(torch.arange(8.0))
    assert view.tolist() == [[2, 3], [4, 5], [6, 7]] and not y.any()
    for each in (y, x):
        pool.empty(each)
    large = pool.zeros([9], torch.float32, cpu)  # of another size
    assert pool.nbytes == 64
    pool.empty(large)  # beyond what it keeps
    assert pool.nbytes == 64 and large.untyped_storage().nbytes() == 0
    pool.fill(x)
    assert x.data_ptr() in (where, view.data_ptr() - 8) and view.untyped_storage().nbytes() == 32
    nothing = pool.zeros([0], torch.float32, cpu)
    pool.empty(nothing)
    pool.fill(nothing)
    assert nothing.numel() == 0
    with pytest.raises(InvalidArgument, match="both tensors must be on the CPU"):
        _C.swap_memory(x, torch.empty(1, device="meta"))


def test_sizes_follow_from_the_link() -> None:
    weights = [nn.Parameter(torch.zeros(1000)) for _ in range(20)]  # 4 kB each
    group = RecordingGroup()
    buckets = GradientBuckets(weights, group, link=LINK)
    sum((w * w).sum() for w in weights).backward()
    buckets.wait()
    assert [n for what, n in group.log if what == "start"] == [5000, 5000, 5000, 4000, 1000]
    assert "19.53 KiB lose 5% of the link to latency" in buckets.explain() and "of the test" in buckets.explain()
    slow = LinkCost(1e-3, 1e5, "slow")
    assert slow.efficient_nbytes(0.05) == 2000 and slow.seconds(1e5) == pytest.approx(1.001)


def test_torchs_optimizers_take_the_sums_with_set_grad() -> None:
    model, plain = network(), network()
    buckets = GradientBuckets(model.parameters(), RecordingGroup(), bucket_nbytes=60, set_grad=True)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, plain))
    for step in range(3):
        for set_to_none in (True, False):
            ours.zero_grad(set_to_none=set_to_none)
            theirs.zero_grad()
            model(inputs(step)).square().mean().backward()
            buckets.wait()
            (2 * plain(inputs(step)).square().mean()).backward()
            ours.step()
            theirs.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_hook_compresses_what_is_sent() -> None:
    def coarse(bucket: Bucket, group: Any) -> Landed:
        coded = bucket.flat.bfloat16()
        return Landed(group.all_reduce(coded, async_op=True), lambda: bucket.flat.copy_(coded))

    model, group = network(), RecordingGroup()
    buckets = GradientBuckets(model.parameters(), group, bucket_nbytes=60, hook=coarse)
    model(inputs(1)).square().sum().backward()
    buckets.wait()
    for parameter, expected in zip(model.parameters(), plain_gradients([1]), strict=True):
        assert torch.equal(buckets.gradient(parameter), (expected.bfloat16() * 2).float())


def test_no_sync_adds_up_and_only_the_last_micro_batch_reduces() -> None:
    model, group = network(), RecordingGroup()
    buckets = GradientBuckets(model.parameters(), group, bucket_nbytes=60)
    for _ in range(3):  # a step must not see the gradients of the one before
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
    buckets = GradientBuckets([weight], RecordingGroup(), link=LINK)
    for micro_batch_gradient in (256.0, 1.0):  # bf16 has 8 bits of mantissa: there 256 + 1 is 256
        with buckets.no_sync():
            (weight * micro_batch_gradient).sum().backward()
    assert buckets.gradient(weight).dtype == torch.float32
    assert buckets.gradient(weight).item() == 257.0


def test_a_parameter_that_backward_does_not_reach_has_gradient_zero() -> None:
    model, unused = network(), nn.Parameter(torch.ones(4))
    group = RecordingGroup()
    buckets = GradientBuckets([*model.parameters(), unused], group, bucket_nbytes=1)
    for _ in range(2):
        group.log.clear()
        buckets.gradient(unused).fill_(7.0)  # left over from an earlier step
        model(inputs(1)).square().sum().backward()
        started = len(group.log)
        buckets.wait()
        assert torch.equal(buckets.gradient(unused), torch.zeros(4))
        for parameter, expected in zip(model.parameters(), plain_gradients([1]), strict=True):
            assert torch.equal(buckets.gradient(parameter), expected * 2)
    assert started == len(WIDTHS) * 2 - 2  # it holds up nobody: what step one did not reach comes last
    # One that step one reached and this one does not holds up those behind it: every rank starts in one order.
    group.log.clear()
    model[0](inputs(1)).square().sum().backward()
    assert not group.log
    buckets.wait()
    assert torch.equal(buckets.gradient(model[2].weight), torch.zeros_like(model[2].weight))


def test_a_second_synchronising_backward_before_wait_is_refused() -> None:
    model = network()
    buckets = GradientBuckets(model.parameters(), RecordingGroup(), link=LINK)
    model(inputs(1)).square().sum().backward()  # also in step one, which reduces nothing by itself
    with pytest.raises(RuntimeError, match=r"call wait\(\) after each synchronising backward"):
        model(inputs(2)).square().sum().backward()
    buckets.close()


def test_parameters_that_cannot_have_gradients_are_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(InvalidArgument, match=r"parameter 1 .* given twice"):
        GradientBuckets([weight, weight], RecordingGroup())
    with pytest.raises(InvalidArgument, match=r"parameter 0 .* requires a gradient"):
        GradientBuckets([torch.ones(2)], RecordingGroup())
    table = nn.Embedding(4, 2, sparse=True)
    GradientBuckets(table.parameters(), RecordingGroup())
    with pytest.raises(InvalidArgument, match=r"parameter 0 \[4, 2\] has a sparse gradient"):
        table(torch.tensor([1])).sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_nbytes": 0}, "bucket_nbytes is 0; give at least 1"),
        ({"link": "guessed"}, "link is 'guessed'"),
        ({"collective": "all_gather"}, "collective is 'all_gather'"),
        ({"collective": "reduce_scatter", "wire": "int8"}, "error feedback needs all_reduce"),
        ({"hook": print, "wire": "int8", "error_feedback": False}, "give no wire"),
        ({"set_grad": True, "dtype": torch.bfloat16}, "set_grad needs all_reduce and buckets of the parameters' type"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        GradientBuckets([nn.Parameter(torch.ones(2))], RecordingGroup(), **options)


def test_close_takes_the_hooks_off() -> None:
    model = network()
    GradientBuckets(model.parameters(), RecordingGroup()).close()
    model(inputs(1)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Lasts:
    """A work that is completed after having been asked n times."""

    def __init__(self, n: int) -> None:
        self.left, self.waited = n, False

    def is_completed(self) -> bool:
        self.left -= 1
        return self.left < 0

    def wait(self) -> None:
        self.waited = True


def test_waits_compute_gradients_of_batches_that_have_ended() -> None:
    later = WeightGradients(together=True)
    weights = [torch.ones(1, 2, requires_grad=True) for _ in range(2)]

    def put_off(value: float) -> None:
        for weight in weights:
            later.linear(torch.full((3, 2), value), weight).sum().backward()

    put_off(1.0)
    later.fill(work := Lasts(9))  # more of this batch may come
    assert work.waited and [weight.grad for weight in weights] == [None, None]
    put_off(2.0)
    later.end_batch()
    later.run_beside(work := Lasts(1))
    assert not work.waited and len(later) == 1 and weights[1].grad is None
    assert torch.equal(weights[0].grad, torch.full((1, 2), 9.0))
    put_off(10.0)  # nobody waited for the first batch's second weight: it is not kept any longer
    assert len(later) == 2 and torch.equal(weights[1].grad, torch.full((1, 2), 9.0))
    later.end_batch()
    put_off(100.0)
    later.run_beside(Lasts(9))
    assert len(later) == 2 and all(torch.equal(weight.grad, torch.full((1, 2), 39.0)) for weight in weights)
    later.flush()
    assert len(later) == 0 and all(torch.equal(weight.grad, torch.full((1, 2), 339.0)) for weight in weights)
