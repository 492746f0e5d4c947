"""pycomm.overlap and the expert stream on tensors of a device (a fake one), with nothing that reads the device in a
steady step, and what only the host has; that they give the bits of CPU tensors is a case of test_gpu_bodies.py."""

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
    GradientBuckets,
    InMemory,
    MatmulPlan,
    ShardedModules,
    WeightGradients,
    all_gather_matmuls,
    matmul_reduce_scatter,
    measure,
)


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
        for flush in (False, True):
            stream = ep.stream(x, topk, weights, later=later, flush=flush)
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
