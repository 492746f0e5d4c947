"""torch.distributed on real GPUs and the real NCCL; `make test-gpu` runs it, `make test` does not. One rank per GPU.

Without a GPU, or with a torch that cannot use it, every test fails: none may pass by not running."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch_ranks import run_torch_ranks

from pycomm.errors import InvalidArgument
from pycomm.moe import ExpertParallel, StaticExpertParallel


def n_gpus() -> int:
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert found > 0, "no GPU, or a CPU-only torch"
    return found


def run(fn: Any) -> None:
    run_torch_ranks(fn, n_gpus(), backend="cpu:pycomm,cuda:pycomm", timeout_s=120)


def _values(rank: int, numel: int) -> torch.Tensor:
    return torch.randint(-50, 50, (numel,), generator=torch.Generator().manual_seed(numel + rank))


def test_collectives_equal_the_cpu_engines() -> None:
    run(_collectives)


def _collectives(rank: int, n: int) -> None:
    torch.cuda.set_device(rank)
    for numel in (0, 1, 127, 100001):
        x = _values(rank, numel)
        y = x.cuda()
        dist.all_reduce(x)
        dist.all_reduce(y)
        assert torch.equal(x, y.cpu())
        whole, there = torch.empty(n * numel, dtype=torch.int64), torch.empty(n * numel, dtype=torch.int64).cuda()
        dist.all_gather_into_tensor(whole, _values(rank, numel))
        dist.all_gather_into_tensor(there, _values(rank, numel).cuda())
        assert torch.equal(whole, there.cpu())
        dist.all_to_all_single(piece := torch.empty_like(whole), whole)
        dist.all_to_all_single(other := torch.empty_like(there), there)
        assert torch.equal(piece, other.cpu())
    dist.barrier()


def test_asynchronous_work_is_in_the_order_of_streams() -> None:
    run(_streams)


def _streams(rank: int, n: int) -> None:
    torch.cuda.set_device(rank)  # an index of a GPU here
    side, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    for turn in range(50):
        with torch.cuda.stream(side):
            x = torch.zeros(1 << 22, device="cuda")
            torch.cuda._sleep(2_000_000)
            x += turn
            work = dist.all_reduce(x, async_op=True)
        assert work is not None
        with torch.cuda.stream(consumer):
            work.wait()
            y = x + 1
        del x  # its memory is given to the next turn's tensors
        torch.cuda.synchronize()
        assert y.min().item() == y.max().item() == n * turn + 1


def test_a_captured_graph_replays_bit_for_bit() -> None:
    run(_graph)


def _graph(rank: int, n: int) -> None:
    torch.cuda.set_device(rank)
    x = torch.randn(1 << 16, device="cuda")
    dist.all_reduce(x.clone())  # the ranks meet before the capture
    given = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = given * 2
        dist.all_reduce(y)
        work = dist.all_reduce(z := y + 1, async_op=True)
        assert work is not None
        work.wait()
        z = z + 1
    expected = x * 2
    dist.all_reduce(expected)
    plus = expected + 1
    dist.all_reduce(plus)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected) and torch.equal(z, plus + 1)


def test_ranks_on_emulated_hosts_go_through_the_host_on_one_gpu() -> None:
    n_gpus()
    run_torch_ranks(_through_host, 2, backend="cpu:pycomm,cuda:pycomm", hosts=["a", "b"], timeout_s=120)


def _through_host(rank: int, n: int) -> None:
    torch.cuda.set_device(0)
    for numel in (1, 127, 100001):
        x = _values(rank, numel)
        y = x.cuda()
        dist.all_reduce(x)
        dist.all_reduce(y)
        assert torch.equal(x, y.cpu())
    got = torch.zeros(5000, device="cuda")
    peer = 1 - rank
    messages = [dist.P2POp(dist.isend, torch.full_like(got, rank), peer), dist.P2POp(dist.irecv, got, peer)]
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    assert got.unique().tolist() == [peer]
    _streams(0, n)


class _Foreign:
    """A tensor that shows nothing but __cuda_array_interface__, on torch's current stream."""

    def __init__(self, x: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            **x.__cuda_array_interface__,
            "version": 3,
            "stream": torch.cuda.current_stream().cuda_stream or 1,
        }


def test_arrays_of_other_libraries_are_reduced_in_place() -> None:
    run_ranks(_foreign, n_gpus(), timeout_s=120)


def _foreign(group: Any) -> None:
    torch.cuda.set_device(group.rank)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x = torch.zeros(1 << 20, device="cuda")
        torch.cuda._sleep(2_000_000)
        x += group.rank + 1
        group.all_reduce(_Foreign(x))
        y = x + 1
        group.all_reduce(z := torch.ones(5, device="cuda"))
    torch.cuda.synchronize()
    assert (y == 1 + group.size * (group.size + 1) // 2).all() and (z == group.size).all()


def test_the_expert_exchange_has_the_cpus_bits() -> None:
    run_ranks(_experts, n_gpus(), timeout_s=120)


def _experts(group: Any) -> None:
    torch.cuda.set_device(group.rank)
    n_experts, top_k = 4 * group.size, 3
    random = torch.Generator().manual_seed(group.rank)
    for dtype, hidden, n_tokens in ((torch.float32, 70, 33), (torch.bfloat16, 256, 64), (torch.bfloat16, 5, 0)):
        idx = torch.rand(n_tokens, n_experts, generator=random).argsort(1)[:, :top_k]
        x, y_grad = (torch.randn(n_tokens, hidden, generator=random).to(dtype) for _ in range(2))
        weights = torch.rand(n_tokens, top_k, generator=random)
        for wire, dedup in ((None, "none"), (None, "rank"), ("fp8", "rank")):
            found = []
            for device in ("cpu", "cuda"):
                ep = ExpertParallel(group, n_experts, wire=wire, dedup=dedup)
                moved = [each.to(device) for each in (x, idx, weights, y_grad)]
                mine, of_weights = moved[0].requires_grad_(), moved[2].requires_grad_()
                dispatched = ep.dispatch(mine, moved[1], of_weights)
                y = ep.combine(dispatched.rows * 2, dispatched)
                y.backward(moved[3])
                assert y.device.type == device and dispatched.rows.device.type == device
                found.append([each.cpu() for each in (dispatched.rows.detach(), y.detach(), mine.grad)])
                found[-1].append(of_weights.grad.cpu())
            for ours, expected in zip(found[1], found[0], strict=True):
                assert torch.equal(ours, expected), (dtype, wire, dedup)
            if wire is None:
                static = StaticExpertParallel(group, n_experts, max(1, n_tokens * group.size))
                mine.grad = of_weights.grad = None
                dispatched = static.dispatch(mine, moved[1], of_weights)
                y = static.combine(dispatched.rows * 2, dispatched)
                y.backward(moved[3])
                for there, expected in zip((y.detach(), mine.grad, of_weights.grad), found[0][1:], strict=True):
                    assert torch.equal(there.cpu(), expected), (dtype, "static")
    with pytest.raises(InvalidArgument, match="dedup='host' moves rows in CPU memory"):
        ExpertParallel(group, n_experts, dedup="host").plan(idx.cuda())


def test_ddp_trains_as_on_nccl() -> None:
    run(_ddp)


def _ddp(rank: int, n: int) -> None:
    torch.cuda.set_device(rank)
    nccl = dist.new_group(backend="nccl")
    found = []
    for group in (None, nccl):
        torch.manual_seed(1)
        model = DistributedDataParallel(torch.nn.Linear(64, 64).cuda(), process_group=group)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(5):
            torch.manual_seed(10 * step + rank)
            optimizer.zero_grad()
            model(torch.randn(16, 64, device="cuda")).square().mean().backward()
            optimizer.step()
        found.append(model.module.weight.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
