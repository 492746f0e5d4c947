"""pycomm.overlap and the expert stream on tensors of a device (a fake one): the bits of CPU tensors, in the order of
streams alone, and with nothing that reads the device in a steady step."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_groups import DeviceGroup, OnFakeDevice, on_device, run_device_groups
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pycomm
from pycomm.errors import GroupClosed, InvalidArgument
from pycomm.moe import ExpertParallel, StaticExpertParallel
from pycomm.moe.plan import Request, make_plan
from pycomm.moe.planning import Planned
from pycomm.overlap import (
    Cut,
    GradientBuckets,
    InMemory,
    LinkCost,
    MatmulPlan,
    ShardedModules,
    WeightGradients,
    all_gather_matmuls,
    matmul_reduce_scatter,
    measure,
    plan_all_gather_matmul,
    plan_matmul_reduce_scatter,
)

HOSTS = ["a", "a", "b"]


def whole_numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small ones: sums are exact, in whichever order they are made."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def network() -> nn.Sequential:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in ((6, 5), (5, 7), (7, 3))))
    with torch.no_grad():
        for index, p in enumerate(model.parameters()):
            p.copy_(whole_numbers(index, *p.shape))
    return model


def buckets(group: Any) -> list[Tensor]:
    found = []
    for collective, nbytes, link in (
        ("all_reduce", None, "predicted"),
        ("all_reduce", 100, "predicted"),
        ("all_reduce", None, "measured"),
        ("reduce_scatter", 60, LinkCost(1e-3, 1e5, "of the test")),
    ):
        model = network()
        gradients = GradientBuckets(
            model.parameters(),
            group,
            collective=collective,
            bucket_nbytes=nbytes,
            link=link,
            set_grad=collective == "all_reduce" and nbytes is None,
        )
        for step in range(3):
            with gradients.no_sync():
                model(whole_numbers(10 * step + group.rank, 4, 6)).sum().backward()
            model(whole_numbers(20 * step + group.rank, 4, 6)).sum().backward()
            gradients.wait()
            found += [values.clone() for _, _, values in sorted(gradients.owned(), key=lambda each: each[2].numel())]
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            model.zero_grad()
        gradients.close()
    return found


def products(group: Any) -> list[Tensor]:
    n, rank = group.size, group.rank
    found = []
    for n_pieces, keep, n_rows, puts_off in (
        (0, False, 5, False),
        (1, True, 1, True),
        (3, False, 5, True),
        (2, True, 0, False),
    ):
        plan, later = MatmulPlan(n_pieces, "of the test"), WeightGradients() if puts_off else None
        x = whole_numbers(rank, n_rows, 2, 6).requires_grad_()
        weights = [whole_numbers(5, 4, 6).requires_grad_(), whole_numbers(6, 2, 6).requires_grad_()]
        ys = all_gather_matmuls(x, weights, group, plan, keep=keep, later=later)
        last = whole_numbers(7, 3, 6).requires_grad_()
        z = matmul_reduce_scatter(torch.cat(ys, -1), last, group, plan, later=later)
        (z * whole_numbers(8 + rank, *z.shape)).sum().backward()
        if later is not None:
            later.flush()
        found += [*ys, z, *(each.grad for each in (x, *weights, last))]
    x, weight = torch.ones(3 * n, 6), torch.ones(4, 6)
    for make in (plan_all_gather_matmul, plan_matmul_reduce_scatter):
        assert make(x, weight, group, "measured").why
    return [each.detach() for each in found]


def sharded(group: Any) -> list[Tensor]:
    alone = group.split(group.rank)
    found = []
    for depth, copies, dtype in ((0, False, None), (2, False, None), (1, True, torch.bfloat16)):
        model = network()
        blocks: list[Any] = list(model)
        if copies:
            blocks = [Cut(list(block.parameters()), alone, block, group, "last") for block in model]
        modules = ShardedModules(blocks, group, depth=depth, dtype=dtype)
        for step in range(3):
            for micro in range(2):
                x = whole_numbers(10 * step + micro + group.rank, 4, 6)
                model(x.to(dtype or x.dtype)).sum().backward()
                modules.end_backward()
            modules.wait()
            with torch.no_grad():
                for shard in modules.shards():
                    assert shard.grad is not None
                    found.append(shard.grad.clone())
                    shard += shard.grad.sign()
                    shard.grad = None
            modules.publish()
        with modules.whole():
            found += [p.detach().clone() for p in model.parameters()]
        modules.close()
    alone.close()
    return found


def stream(group: Any) -> list[Tensor]:
    n_experts, hidden, top_k = 6, 4, 2
    found = []
    for dedup, cut, n_chunks, wire, dtype in (
        ("none", "tokens", 1, None, torch.float32),
        ("rank", "tokens", 3, None, torch.bfloat16),
        ("none", "experts", 2, None, torch.float32),
        ("rank", "experts", 2, "fp8", torch.float32),
        ("host", "tokens", 2, "fp8", torch.bfloat16),
    ):
        ep = ExpertParallel(group, n_experts, dedup=dedup, wire=wire)
        for n_tokens in (7, 0 if group.rank == 2 else 3):
            random = torch.Generator().manual_seed(group.rank)
            topk = torch.rand(n_tokens, n_experts, generator=random).argsort(1)[:, :top_k]
            x = whole_numbers(group.rank, n_tokens, hidden, dtype=dtype).requires_grad_()
            weights = whole_numbers(9 + group.rank, n_tokens, top_k).requires_grad_()
            experts = [
                whole_numbers(e + 100 * group.rank, hidden, hidden, dtype=dtype).requires_grad_() for e in range(2)
            ]
            later = WeightGradients(together=True)
            parts = ep.stream(x, topk, weights, n_chunks=n_chunks, cut=cut, later=later)
            for chunk in parts:
                of_chunk = experts[chunk.experts.start : chunk.experts.stop]
                rows = [
                    later.linear(each, expert)
                    for each, expert in zip(chunk.rows.split(chunk.sizes), of_chunk, strict=True)
                ]
                chunk.output = torch.cat([chunk.rows[:0], *rows])
            (parts.output * whole_numbers(77 + group.rank, n_tokens, hidden)).sum().backward()
            found += [parts.output, x.grad, weights.grad, *(e.grad for e in experts if e.grad is not None)]
            dispatched = ep.dispatch(x, topk, weights)
            again = ep.dispatch(x, topk, weights, plan=dispatched.plan)
            found += [dispatched.rows, again.rows, ep.combine(again.rows, again)]
        ep.close()
    return [each.detach() for each in found]


@pytest.mark.parametrize("part", [buckets, products, sharded, stream])
def test_on_devices_the_bits_are_those_of_cpu_tensors(part: Callable[[Any], list[Tensor]]) -> None:
    run_device_groups(_same_bits, 3, part, hosts=HOSTS)


def _same_bits(group: Any, of_devices: DeviceGroup, part: Callable[[Any], list[Tensor]]) -> None:
    expected = part(group)
    with on_device(of_devices):
        found = part(of_devices)
    assert not of_devices.in_use, "an operation that nobody waited for"
    assert len(found) == len(expected)
    for index, (mine, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(mine, other), (part.__name__, index, mine, other)


def test_groups_bound_what_their_collectives_take_of_a_gpu() -> None:
    run_device_groups(_bounded, 2, environment={"PYCOMM_CUDA_MAX_CTAS": "12"})


def _bounded(group: Any, of_devices: DeviceGroup) -> None:
    fake = ctypes.CDLL(os.environ["PYCOMM_TEST_DEVICE"])
    few = group.new_group([0, 1], max_ctas=4)
    for each, most in ((group, 12), (few, 4), (few.new_group([1, 0]), 4), (few.split(0), 4)):
        x = torch.ones(5)
        each.all_reduce(OnFakeDevice(x))
        assert x.tolist() == [2.0] * 5 and fake.fake_nccl_max_ctas() == most
    with pytest.raises(InvalidArgument, match="max_ctas is 0; give 1 or more"):
        group.new_group([0, 1], max_ctas=0)
    # Revoked, what stands on the device fails as well, on every rank.
    if group.rank == 0:
        few.revoke("it has had enough")
    with pytest.raises(GroupClosed, match="it has had enough"):
        while True:
            few.all_reduce(OnFakeDevice(torch.ones(5)), async_op=True).wait(timeout_s=20)


def test_what_only_the_host_has_is_refused_on_devices() -> None:
    run_device_groups(_refused, 2)


def _refused(group: Any, of_devices: DeviceGroup) -> None:
    with on_device(of_devices):
        with pytest.raises(InvalidArgument, match="memory= is of the host, and the parameters are on"):
            ShardedModules([nn.Linear(2, 2)], of_devices, memory=InMemory())
        x, topk = torch.ones(3, 4), torch.tensor([[0, 1]] * 3)
        ep = ExpertParallel(of_devices, 4, dedup="rank")
        for n_chunks in ("auto", 2):
            stream = ep.stream(x, topk, torch.ones(3, 2), n_chunks=n_chunks)
            for chunk in stream:
                chunk.output = chunk.rows
            assert torch.equal(stream.output, 2 * x)
            assert "default figures for GPUs" in stream.why or n_chunks == 2
        plan = ep.plan(topk)
        with pytest.raises(InvalidArgument, match="the plan is of another batch: token 0 has other experts"):
            ep.dispatch(x, topk + group.rank, torch.ones(3, 2), plan=plan)
        with pytest.raises(InvalidArgument, match=r"rank 1: topk_idx names experts 3 to 4"):
            ep.dispatch(x, topk + 3 * group.rank, torch.ones(3, 2))
        card = measure(
            of_devices, **dict.fromkeys(("compute", "communicate", "serial", "together"), lambda: None), n_rounds=1
        )
        assert card.over_limit > 0


# A steady step, with tensors that have no values, on a device of their own ("meta"): whatever reads them raises.


class Nothing(pycomm.Group):
    """Rank 0 of 2 on two hosts, whose collectives on a device do nothing; it has none of the host's."""

    rank, size, name, host_ids = 0, 2, "nothing", ("a", "b")
    under_way: int

    def _call(self, *tensors: Tensor, async_op: bool = False, timeout_s: None = None, **_: Any) -> Any:
        assert timeout_s is None and all(each.device.type == "meta" for each in tensors)
        if not async_op:
            return tensors[0]
        self.under_way += 1
        return UnderWay(self)

    def all_reduce(self, x: Tensor, op: str = "sum", **options: Any) -> Any:
        return self._call(x, **options)

    def all_gather(self, output: Tensor, input: Tensor, counts: Any = None, **options: Any) -> Any:
        return self._call(output, input, **options)

    def reduce_scatter(self, output: Tensor, input: Tensor, op: str = "sum", **options: Any) -> Any:
        return self._call(output, input, **options)

    def all_to_all(self, output: Tensor, input: Tensor, *counts: Any, **options: Any) -> Any:
        return self._call(output, input, **options)

    def revoke(self, why: str) -> None:
        raise AssertionError(why)

    def exchange(self, sends: Any, receives: Any, **options: Any) -> Any:
        return self._call(*(x for x, _ in [*sends, *receives]), **options)


class UnderWay:
    def __init__(self, group: Nothing) -> None:
        self._group = group

    def wait(self) -> None:
        self._group.under_way -= 1

    def is_completed(self) -> bool:
        return False


class NoCopies(TorchDispatchMode):
    """Between the host and a device none: one that reads waits, and so does one that writes from ordinary memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        places = {
            each.device.type
            for each in tree_leaves((args, kwargs, result))
            if isinstance(each, Tensor) and (each.dim() or each.device.type == "meta")
        }
        assert len(places) < 2, f"{func} copies between {places}"
        return result


def _buckets_without_values(group: Nothing) -> Callable[[], None]:
    model = nn.Sequential(nn.Linear(6, 5, device="meta"), nn.Linear(5, 3, device="meta"))
    buckets = GradientBuckets(model.parameters(), group, bucket_nbytes=40)
    x = torch.empty(4, 6, device="meta")

    def step() -> None:
        with buckets.no_sync():
            model(x).sum().backward()
        model(x).sum().backward()
        buckets.wait()

    return step


def _products_without_values(group: Nothing) -> Callable[[], None]:
    later = WeightGradients()
    x, weight = (torch.empty(4, 6, device="meta", requires_grad=True) for _ in range(2))
    last = torch.empty(3, 4, device="meta", requires_grad=True)
    plan = MatmulPlan(2, "of the test")

    def step() -> None:
        (y,) = all_gather_matmuls(x, [weight], group, plan, later=later)
        matmul_reduce_scatter(y, last, group, plan, later=later).sum().backward()
        later.fill(group.all_reduce(x.detach(), async_op=True))
        later.flush()

    return step


def _sharded_without_values(group: Nothing) -> Callable[[], None]:
    model = nn.Sequential(nn.Linear(6, 5, device="meta"), nn.Linear(5, 3, device="meta"))
    sharded = ShardedModules(list(model), group)
    x = torch.empty(4, 6, device="meta")

    def step() -> None:
        model(x).sum().backward()
        sharded.wait()
        sharded.publish()
        for shard in sharded.shards():
            shard.grad = None

    return step


def _stream_without_values(group: Nothing) -> Callable[[], None]:
    ep = ExpertParallel(group, 4, dedup="rank")
    on_host = torch.tensor([[0, 1], [0, 2], [3, 2]])
    request = Request(
        ep._owner(), ep._geometry, ep._places, "rank", "expert", 2, "tokens", align=1, max_tokens=None, drop=False
    )
    topk = on_host.to("meta")
    plan = make_plan(request, on_host, on_host.repeat(2, 1).to(torch.uint8), (3, 3)).to(topk.device, topk)
    planned = Planned(plan, "as given", None)
    ep._planning.plan = lambda *_: planned  # type: ignore[method-assign]
    x, weights = (torch.empty(3, width, device="meta", requires_grad=True) for width in (6, 2))
    experts = [torch.empty(6, 6, device="meta", requires_grad=True) for _ in range(2)]
    later = WeightGradients(together=True)

    def step() -> None:
        stream = ep.stream(x, topk, weights, later=later)
        for chunk in stream:
            pairs = zip(chunk.rows.split(chunk.sizes), experts, strict=True)
            chunk.output = torch.cat([later.linear(rows, expert) for rows, expert in pairs])
        assert stream.n_chunks == 2 and plan.is_of(topk)
        stream.output.sum().backward()

    return step


def _static_without_values(group: Nothing) -> Callable[[], None]:
    ep = StaticExpertParallel(group, 4, 5, hidden=6, top_k=2)
    x, weights = (torch.empty(3, width, device="meta", requires_grad=True) for width in (6, 2))
    topk = torch.empty(3, 2, dtype=torch.int64, device="meta")

    def step() -> None:
        dispatched = ep.dispatch(x, topk, weights)
        ep.combine(dispatched.rows * 2, dispatched).sum().backward()

    return step


STEPS = (
    _buckets_without_values,
    _products_without_values,
    _sharded_without_values,
    _stream_without_values,
    _static_without_values,
)


@pytest.mark.parametrize("make", STEPS)
def test_a_steady_step_reads_nothing_from_the_device(
    make: Callable[[Nothing], Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pycomm.overlap.buckets.require_alike", lambda *_: None)
    monkeypatch.setattr("pycomm.overlap.prefetch.require_alike", lambda *_: None)
    monkeypatch.setattr("pycomm.overlap.buckets.agreed_order", lambda group, ready, n: list(ready))
    tolist = Tensor.tolist

    def listed(x: Tensor) -> Any:
        assert x.device.type != "meta", "tolist() reads the device"  # torch itself would crash
        return tolist(x)

    monkeypatch.setattr(Tensor, "tolist", listed)
    group = Nothing.__new__(Nothing)
    group.under_way = 0
    step = make(group)
    step()  # which learns
    with NoCopies():
        step()
    assert group.under_way == 0
