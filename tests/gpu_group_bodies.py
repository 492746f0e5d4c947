"""What each rank does in tests of pycomm's own Group on a device (gpu_bodies.py): body(group, accelerator)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from accelerators import Accelerator
from gpu_bodies import normal, values

from pycomm.errors import InvalidArgument
from pycomm.moe import ExpertParallel, StaticExpertParallel


def hierarchical(group: Any, a: Accelerator) -> None:
    """Inside hosts and across in turn: the CPU engine's bits for whole numbers, all ranks' own for any."""
    n = group.size
    for numel in (0, 1, 5, 4097, 100003):
        for dtype in (torch.int64, torch.int32, torch.float32, torch.float16):
            for op in ("sum", "max"):
                x = values(group.rank, numel, dtype)
                y = x.clone().to(a.device)
                group.all_reduce(x, op)
                group.all_reduce(a.array(y), op, algorithm="hierarchical")
                a.synchronize()
                assert torch.equal(x, y.cpu()), (numel, dtype, op)
        y = normal(group.rank, numel).to(a.device)
        group.all_reduce(a.array(y), algorithm="hierarchical")
        a.synchronize()
        everyone = torch.empty(n * numel)
        group.all_gather(everyone, y.cpu())
        assert all(torch.equal(mine, y.cpu()) for mine in everyone.chunk(n) if numel)
        exact = sum(normal(rank, numel).double() for rank in range(n))
        torch.testing.assert_close(y.cpu().double(), exact, rtol=1e-5, atol=1e-5)
        mine, whole = values(group.rank, numel), torch.zeros(n * numel, dtype=torch.int64, device=a.device)
        group.all_gather(a.array(whole), a.array(mine.to(a.device)), algorithm="hierarchical")
        a.synchronize()
        assert torch.equal(whole.cpu(), torch.cat([values(rank, numel) for rank in range(n)]))
        part = torch.zeros(numel, dtype=torch.int64, device=a.device)
        group.reduce_scatter(a.array(part), a.array(whole), algorithm="hierarchical")
        got = torch.zeros_like(whole)
        group.all_to_all(a.array(got), a.array(whole), algorithm="hierarchical")
        a.synchronize()
        assert torch.equal(part.cpu(), n * mine) and torch.equal(got.cpu(), mine.repeat(n))


def wire(group: Any, a: Accelerator) -> None:
    """Codes across hosts: all ranks get the same bits, within the bound; what is lost is in the residual."""
    n, hosts = group.size, len(set(group.host_ids))
    for name, relative in (("int8", 0.5 / 127), ("fp8", 1 / 16)):
        for numel in (1, 300, 40001):
            given = [normal(rank, numel) for rank in range(n)]
            exact = sum(one.double() for one in given)
            largest = max(one.abs().max().item() for one in given)
            x, lost = given[group.rank].clone().to(a.device), torch.full((numel,), 9.0, device=a.device)
            group.all_reduce(a.array(x), wire=name, wire_residual=a.array(lost))
            a.synchronize()
            error = (x.cpu().double() - exact).abs().max().item()
            assert error <= (n + n * (1 + hosts * relative)) * largest * relative * 1.001
            assert numel == 1 or error > 0
            everyone = torch.empty(n * numel)
            group.all_gather(everyone, x.cpu())
            assert all(torch.equal(other, x.cpu()) for other in everyone.chunk(n))
            group.all_reduce(everything := lost.cpu().double())
            torch.testing.assert_close(x.cpu().double() + everything, exact, rtol=1e-5, atol=1e-4)


def foreign_arrays(group: Any, a: Accelerator) -> None:
    """Arrays of other libraries, in place and in the order of their stream; host arrays by their own engine. DLPack on
    the CPU is host arrays too."""
    n, total = group.size, group.size * (group.size + 1) // 2
    with a.on_stream():
        x = torch.zeros(1 << 20, device=a.device)
        a.delay()
        x += group.rank + 1
        group.all_reduce(a.foreign(x))
        y = x + 1
        work = group.all_reduce(a.foreign(z := torch.ones(5, device=a.device)), async_op=True)
        work.wait()
        whole, mine = torch.zeros(3 * n, device=a.device), torch.full((3,), float(group.rank), device=a.device)
        group.all_gather(a.foreign(whole), a.foreign(mine))
        for giving in (lambda x: nullcontext(a.dlpack(x)), a.cupy):
            by = torch.zeros(1 << 20, device=a.device)
            a.delay()
            by += group.rank + 1
            if (given := giving(by)) is not None:
                with given as array:
                    group.all_reduce(array)
                assert bool((by == total).all())
    a.synchronize()
    assert (y == 1 + total).all() and (z == n).all()
    assert whole.tolist() == [float(rank) for rank in range(n) for _ in range(3)]
    on_host = np.full(7, group.rank + 1)
    group.all_reduce(on_host)
    assert (on_host == total).all()
    with pytest.raises(InvalidArgument, match=r"another on cpu|another on the CPU"):
        group.all_to_all(a.foreign(torch.ones(n, device=a.device)), np.ones(n, np.float32))
    group.all_reduce(a.foreign(z.fill_(1.0)))  # the group goes on
    a.synchronize()
    assert (z == n).all()


def same_bits(group: Any, a: Accelerator, part: Callable[[Any, str], list[torch.Tensor]]) -> None:
    """A part of device_parts.py on the device as on the CPU."""
    on_cpu = part(group, "cpu")
    with a.device_group(group) as of_device:
        found = part(of_device, a.device)
    for index, (ours, expected) in enumerate(zip(found, on_cpu, strict=True)):
        assert torch.equal(ours, expected), (index, ours, expected)


WAYS = ((None, "none"), (None, "rank"), ("fp8", "rank"), (None, "host"), ("fp8", "host"))  # (wire, dedup)
BATCHES = ((torch.float32, 70, 33), (torch.bfloat16, 256, 64), (torch.bfloat16, 5, 0))  # (type, width, tokens)


def experts(group: Any, a: Accelerator) -> None:
    """The expert exchange, forward and backward, has the CPU's bits."""
    for kind in BATCHES:
        for coding, dedup in WAYS:
            found = []
            for device, within in (("cpu", nullcontext(group)), (a.device, a.device_group(group))):
                with within as used:
                    exchange = ExpertParallel(used, 4 * used.size, wire=coding, dedup=dedup)
                    given = _batch(used.rank, 4 * used.size, device, *kind)
                    found.append([each.cpu() for each in _exchanged(exchange, given)])
            for ours, expected in zip(found[1], found[0], strict=True):
                assert torch.equal(ours, expected), (kind, coding, dedup)


def _batch(
    rank: int, n_experts: int, device: str, dtype: torch.dtype, hidden: int, n_tokens: int
) -> list[torch.Tensor]:
    """x, topk_idx, weights and y's gradient of a rank: random, of 3 experts a token."""
    random = torch.Generator().manual_seed(rank)
    idx = torch.rand(n_tokens, n_experts, generator=random).argsort(1)[:, :3]
    x, y_grad = (torch.randn(n_tokens, hidden, generator=random).to(dtype) for _ in range(2))
    weights = torch.rand(n_tokens, 3, generator=random)
    return [x.to(device).requires_grad_(), idx.to(device), weights.to(device).requires_grad_(), y_grad.to(device)]


def _exchanged(ep: Any, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """Dispatched rows, y, and the gradients of x and weights."""
    x, idx, weights, y_grad = given
    dispatched = ep.dispatch(x, idx, weights)
    y = ep.combine(dispatched.rows * 2, dispatched)
    assert y.device == x.device and dispatched.rows.device == x.device
    return [dispatched.rows.detach(), y.detach(), *torch.autograd.grad(y, (x, weights), y_grad)]


def static_experts(group: Any, a: Accelerator) -> None:
    """The expert exchange of static sizes, forward and backward, captured as a graph: with each replay's input the bits
    of the exact one on the CPU."""
    n_experts, turns = 4 * group.size, range(3)

    def batch(turn: int, device: str, *kind: Any) -> list[torch.Tensor]:
        return _batch(group.rank + 100 * turn, n_experts, device, *kind)

    for kind in BATCHES:
        expected = [_exchanged(ExpertParallel(group, n_experts), batch(turn, "cpu", *kind))[1:] for turn in turns]
        with a.device_group(group) as of_device:
            static = StaticExpertParallel(of_device, n_experts, max(1, kind[2] * group.size))
            given = batch(0, a.device, *kind)
            results = [torch.empty_like(given[at]) for at in (3, 0, 2)]  # y, and gradients of x and weights

            def step(static: Any = static, given: list[torch.Tensor] = given, into: Any = results) -> None:
                with torch.enable_grad():
                    found = _exchanged(static, given)[1:]
                for result, each in zip(into, found, strict=True):
                    result.copy_(each)

            with torch.no_grad():
                step()  # the ranks meet before the capture
                replay = a.graph(step)
                for turn in turns:
                    for mine, other in zip(given, batch(turn, "cpu", *kind), strict=True):
                        mine.copy_(other)
                    for result in results:
                        result.fill_(float("nan"))
                    replay()
                    a.synchronize()
                    for ours, due in zip(results, expected[turn], strict=True):
                        assert torch.equal(ours.cpu(), due), (kind, turn)
