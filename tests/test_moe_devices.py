"""The expert exchange through hosts on tensors of a device (a fake one): the bits of CPU tensors and of every other
way, by memory that the ranks of a host map, and where they cannot."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
from typing import Any

import pytest
from fake_groups import DeviceGroup, on_device, run_device_groups
from moe_cases import Array, Case, batch, run_experts, through
from spawn import run_ranks

from pycomm import devices
from pycomm.errors import GroupClosed, InvalidArgument
from pycomm.moe import ExpertParallel, Placement, form, movement, rows
from pycomm.moe.through_hosts import Reach

HOSTS = ["a", "a", "b", "b"]
UNEVEN = Placement(((5,), (0, 1, 2), (), (3, 4, 6)))
FEW = Case((7, 0, 5, 9), 7, 3, 70, whole=False, seed=1)
LARGE = Case((60, 41, 0, 90), 7, 3, 2051, whole=False, dtype="bfloat16", seed=2)  # more than the first memory holds


def same(ours: list[Array], expected: list[Array], what: Any) -> None:
    for name, mine, other in zip(("y", "x.grad", "weights.grad", "rows"), ours, expected, strict=True):
        assert mine.shape == other.shape and (mine == other).all(), (what, name)


def streamed(group: Any, case: Case, cut: Any, n_chunks: int, **settings: Any) -> list[Array]:
    one = batch(case, group.rank)
    x, weights = one.x.clone().requires_grad_(), one.weights.clone().requires_grad_()
    ep = ExpertParallel(group, case.num_experts, **settings)
    stream = ep.stream(x, one.idx, weights, cut=cut, n_chunks=n_chunks)
    mine = ep.placement.experts[group.rank]
    for chunk in stream:
        of_chunk = mine[chunk.experts.start : chunk.experts.stop]
        chunk.output = run_experts(case, chunk, of_chunk, "expert")
    stream.output.backward(one.grad)
    assert x.grad is not None and weights.grad is not None
    return [each.float().numpy() for each in (stream.output.detach(), x.grad, weights.grad, stream.output.detach())]


def test_rows_cross_once_to_each_host_with_the_bits_of_cpu_tensors() -> None:
    run_device_groups(_same_bits, 4, hosts=HOSTS)


def _same_bits(group: Any, of_devices: DeviceGroup) -> None:
    for case, settings in (
        (FEW, {}),
        (LARGE, {"placement": UNEVEN}),
        (FEW, {"layout": "token", "placement": UNEVEN, "wire": "bf16"}),
        (FEW, {"layout": "rank", "wire": "fp8"}),
        (LARGE, {"align": 4, "wire": "fp8"}),
        (Case((0, 6, 6, 6), 6, 2, 5, routing="hot", whole=False, seed=3), {"max_tokens": 7, "drop": True}),
        (Case((0, 0, 0, 0), 4, 2, 8), {}),
        (FEW, {}),
    ):
        layout = settings.pop("layout", "expert")
        expected = through(group, case, layout, dedup="host", **settings)
        same(through(group, case, layout, dedup="rank", **settings), expected, "straight")
        of_devices.calls.clear()
        with on_device(of_devices):
            same(through(of_devices, case, layout, dedup="host", **settings), expected, (case, settings))
        assert "symmetric_memory" in of_devices.calls and not of_devices.in_use
    for cut, n_chunks in (("tokens", 3), ("experts", 2)):
        expected = streamed(group, FEW, cut, n_chunks, placement=UNEVEN, dedup="host")
        with on_device(of_devices):
            same(streamed(of_devices, FEW, cut, n_chunks, placement=UNEVEN, dedup="host"), expected, cut)


def slow_between(of: Any, collective: str, nbytes: int) -> tuple[float, float, str]:
    """devices.collective_cost()."""
    return (1e-5, 1e7 if len(set(of.host_ids)) > 1 else 1e11, "of the test")


def test_rows_coded_decoded_and_weighed_where_they_move_have_the_same_bits() -> None:
    """What kernels do in one pass on a device, here in several, by the same tables."""
    run_ranks(_fused, 4, hosts=HOSTS)


def _fused(group: Any) -> None:
    ways: list[tuple[str, dict[str, Any]]] = [
        (layout, {"dedup": dedup, "wire": wire, "placement": UNEVEN, "align": align})
        for dedup, layout, align in (
            ("none", "token", 1),
            ("rank", "rank", 1),
            ("rank", "expert", 4),
            ("host", "expert", 1),
        )
        for wire in (None, "bf16", "fp8")
    ]
    calls = []

    def counted(name: str) -> Any:
        real = getattr(rows, name)
        return lambda *given: calls.append(name) or real(*given)

    for case in (FEW, dataclasses.replace(LARGE, hidden=200)):
        expected = [through(group, case, layout, **settings) for layout, settings in ways]
        in_stream = [streamed(group, case, "experts", 2, wire=wire, dedup="rank") for wire in (None, "fp8")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows, "_FUSED", ("cpu",))
            for name, where in (("pack_coded_rows", form), ("expand_coded_rows", form), ("weigh_rows", movement)):
                patch.setattr(where, name, counted(name))
            for (layout, settings), other in zip(ways, expected, strict=True):
                calls.clear()
                same(through(group, case, layout, **settings), other, (layout, settings))
                fp8, weighs = settings["wire"] == "fp8", layout != "rank" and settings["wire"] is None
                bf16 = case.dtype == "bfloat16" and layout != "rank" and settings["wire"] == "bf16"
                assert ("pack_coded_rows" in calls and "expand_coded_rows" in calls) == fp8
                assert ("weigh_rows" in calls) == (weighs or bf16)
            for wire, other in zip((None, "fp8"), in_stream, strict=True):
                same(streamed(group, case, "experts", 2, wire=wire, dedup="rank"), other, wire)


def test_auto_goes_through_hosts_where_devices_have_slow_links_between() -> None:
    run_device_groups(_auto, 4, hosts=HOSTS)


def _auto(group: Any, of_devices: DeviceGroup) -> None:
    with pytest.MonkeyPatch.context() as patch, on_device(of_devices):
        patch.setattr(devices, "collective_cost", slow_between)
        ep = ExpertParallel(of_devices, 8, 64)
        choice = ep.choice(1000, 4, device="cuda")
        none, rank, host = choice.estimates
        assert choice.mode == "host" and host.seconds < min(none.seconds, rank.seconds)
        share = 1 - 1 / 70  # of tokens with one of 4 experts among 4 of 8
        crossing = 2e-5 + 1000 * 2 * share * 64 * (2 + 2) / 1e7
        reached = 4 * (1 - 15 / 70)  # ranks of 2 experts
        inside = 6e-5 + 1000 * reached * 64 * (2 + 4) / 1e11
        assert host.seconds == pytest.approx(crossing + inside)
        case = Case((30, 20, 30, 10), 8, 4, 64)
        one = batch(case, group.rank)
        assert ep.plan(one.idx).mode == "host"
        stream = ep.stream(one.x, one.idx, one.weights)
        assert "an all_to_all, of the test" in stream.why
        for chunk in stream:
            chunk.output = chunk.rows
        assert ep.plan(one.idx).mode == "host" and of_devices.calls.count("symmetric_memory") == 3
        # Ranks that know other figures, as those of uneven hosts do, take rank 0's way.
        quick = (1e-5, 1e12, "of the test")
        patch.setattr(devices, "collective_cost", slow_between if group.rank == 0 else lambda *_: quick)
        ep = ExpertParallel(of_devices, 8, 64)
        assert (ep.choice(22, 4, device="cuda").mode == "host") == (group.rank == 0)
        assert ep.plan(one.idx).mode == "host"
    of_rank = on_device(of_devices) if group.rank == 1 else contextlib.nullcontext()
    with of_rank, pytest.raises(InvalidArgument, match="on a device: rank 0 has 0, rank 1 has 1"):
        ExpertParallel(group, 8).plan(one.idx)


def test_where_devices_cannot_be_mapped_a_host_gathers() -> None:
    run_device_groups(_unmapped, 4, hosts=HOSTS)


def _unmapped(group: Any, of_devices: DeviceGroup) -> None:
    fake = ctypes.CDLL(os.environ["PYCOMM_TEST_DEVICE"])
    if group.rank == 3:  # the second of its host: the other host maps
        fake.fake_device_unshared(f"{os.getpid()}/1".encode())
    for case, settings in ((FEW, {"wire": "fp8"}), (LARGE, {"placement": UNEVEN})):
        expected = through(group, case, dedup="host", **settings)
        with on_device(of_devices):
            same(through(of_devices, case, dedup="host", **settings), expected, case)
    expected = streamed(group, FEW, "tokens", 3, dedup="host")
    with on_device(of_devices), pytest.MonkeyPatch.context() as patch:
        same(streamed(of_devices, FEW, "tokens", 3, dedup="host"), expected, "stream")
        patch.setattr(devices, "collective_cost", slow_between)
        ep = ExpertParallel(of_devices, FEW.num_experts, FEW.hidden)
        assert ep.choice(100, FEW.top_k, device="cuda").mode == "host"  # nobody has asked yet
        assert ep.plan(batch(FEW, group.rank).idx).mode != "host"
        assert ep._planning._reach == Reach.copies
        assert "(not possible here)" in ep.explain(100, FEW.top_k, device="cuda")


def test_without_collectives_inside_a_host_rows_go_straight() -> None:
    run_device_groups(
        _no_way_inside, 4, hosts=HOSTS, environment={"FAKE_DEVICE_ID": "x", "PYCOMM_CUDA_BETWEEN_HOSTS": "tcp"}
    )


def _no_way_inside(group: Any, of_devices: DeviceGroup) -> None:
    one, expected = batch(FEW, group.rank), through(group, FEW, dedup="host")
    with on_device(of_devices), pytest.MonkeyPatch.context() as patch:
        ep = ExpertParallel(of_devices, FEW.num_experts, dedup="host")
        for _ in range(2):
            with pytest.raises(InvalidArgument, match=r"dedup='host' on devices needs collectives .* use one device"):
                ep.dispatch(one.x, one.idx, one.weights)
        patch.setattr(devices, "collective_cost", slow_between)
        same(through(of_devices, FEW), expected, "auto")


def test_a_rank_that_gives_up_between_ends_the_others_on_devices() -> None:
    run_device_groups(_gives_up, 4, hosts=HOSTS)


def _gives_up(group: Any, of_devices: DeviceGroup) -> None:
    one = batch(FEW, group.rank)
    with on_device(of_devices):
        ep = ExpertParallel(of_devices, FEW.num_experts, dedup="host")
        dispatched = ep.dispatch(one.x, one.idx, one.weights)
        if group.rank == 1:
            with pytest.raises(RuntimeError), ep.failing_together():
                raise RuntimeError("of the test")
            return
        with pytest.raises(GroupClosed, match=r"rank 1 of 4, after .*of the test"):
            ep.combine(dispatched.rows, dispatched)
