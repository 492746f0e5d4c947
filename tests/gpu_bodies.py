"""What each rank does in the tests of the GPU engine: on GPUs in `make test-gpu`, on the fake device in `make test`
(gpu_cases.py). body(rank, n_ranks, accelerator) uses torch.distributed; bodies of pycomm's Group are in
gpu_group_bodies.py. Expected values come from the CPU engine or another backend, or from arithmetic here."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerators import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pycomm.errors import CollectiveMismatch, GroupClosed, InvalidArgument, PeerTimeout

NUMELS = (0, 1, 127, 100001)


def values(rank: int, numel: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Small whole numbers, so that sums are exact in any order, in bfloat16 too while they are below 256."""
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    return torch.randint(-30, 30, (numel,), generator=generator).to(dtype)


def normal(rank: int, numel: int) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(1000 * rank + numel))


def collectives(rank: int, n: int, a: Accelerator) -> None:
    """Every collective of torch.distributed, on the device as on the CPU, bit for bit."""
    reference = a.cpu_group()

    def both(run: Callable[[Any, str], list[torch.Tensor]]) -> None:
        on_cpu, on_device = run(reference, "cpu"), run(None, a.device)
        for expected, found in zip(on_cpu, on_device, strict=True):
            assert found.device.type == a.device and torch.equal(found.cpu(), expected)

    def give(numel: int, device: str, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return values(rank, numel, dtype).to(device)

    def reductions(group: Any, device: str) -> list[torch.Tensor]:
        found = []
        for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64, torch.bfloat16):
            for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN):
                found.append(give(37, device, dtype))
                dist.all_reduce(found[-1], op, group)
        for numel in NUMELS:
            found.append(give(numel, device))
            dist.all_reduce(found[-1], group=group)
            dist.reduce(to_root := give(numel, device), n - 1, group=group)
            whole, part = give(n * numel, device), give(numel, device)
            dist.reduce_scatter_tensor(part, whole, group=group)
            found += [part, *([to_root] if rank == n - 1 else [])]
        return found

    def moves(group: Any, device: str) -> list[torch.Tensor]:
        found = []
        for numel in NUMELS:
            from_one = give(numel, device)
            dist.broadcast(from_one, n - 1, group)
            whole = give(n * numel, device)
            dist.all_gather_into_tensor(whole, give(numel, device), group)
            lists = [give(numel, device) for _ in range(n)]
            dist.all_gather(lists, give(numel, device, torch.int64) + 1, group)
            at_root = [give(numel, device) for _ in range(n)] if rank == 1 else []
            dist.gather(give(numel, device), at_root or None, 1, group)
            piece = give(numel, device)
            dist.scatter(piece, [give(numel, device) + r for r in range(n)] if rank == 0 else None, 0, group)
            exchanged = give(n * numel, device)
            dist.all_to_all_single(exchanged, give(n * numel, device) + 2, group=group)
            found += [from_one, whole, *lists, *at_root, piece, exchanged]
        given, taken = [rank + 2 * r for r in range(n)], [r + 2 * rank for r in range(n)]
        uneven = torch.zeros(sum(taken), 2, dtype=torch.int32, device=device)
        rows = values(rank, 2 * sum(given), torch.int32).view(-1, 2).to(device)
        dist.all_to_all_single(uneven, rows, taken, given, group)
        return [*found, uneven]

    both(reductions)
    both(moves)
    dist.all_reduce(average := give(64, a.device, torch.float32), dist.ReduceOp.AVG)  # NCCL multiplies by 1/n
    mean = torch.stack([values(r, 64, torch.float32) for r in range(n)]).mean(0)
    torch.testing.assert_close(average.cpu(), mean, rtol=1e-6, atol=1e-6)
    strided = values(rank, 48).view(6, 8).to(a.device).t()
    dist.all_reduce(strided)
    assert torch.equal(strided.cpu().t(), sum(values(r, 48) for r in range(n)).view(6, 8))
    objects: list[Any] = [None] * n
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in range(n)]
    dist.barrier()


def streams(rank: int, n: int, a: Accelerator) -> None:
    """Produced late on one stream, reduced asynchronously, awaited on another; its memory is used again at once."""
    for turn in range(20):
        with a.on_stream():
            x = torch.zeros(1 << 20, device=a.device)
            a.delay()
            x += turn
            work = dist.all_reduce(x, async_op=True)
        assert work is not None
        with a.on_stream():
            work.wait()
            y = x + 1
        del x  # given to the next turn's tensors
        a.synchronize()
        assert y.min().item() == y.max().item() == n * turn + 1
    with a.on_stream():
        z = torch.zeros(1 << 20, device=a.device)
        a.delay()
        z += rank
        dist.all_reduce(z)  # not asynchronous: in the order of the current stream
        z += 1
        future = dist.all_reduce(w := z.clone(), async_op=True).get_future()  # type: ignore[union-attr]
        doubled = future.then(lambda done: done.value()[0] * 2).wait()
    a.synchronize()
    total = n * (n - 1) // 2 + 1
    assert z.unique().tolist() == [total] and w.unique().tolist() == [n * total]
    assert doubled.unique().tolist() == [2 * n * total]


def graph(rank: int, n: int, a: Accelerator) -> None:
    """A training step's collectives, sharded parameters and all, captured once and replayed with new inputs."""
    numel = 1 << 12
    given = torch.empty(n * numel, device=a.device)  # this rank's gradients
    shard, whole = torch.empty(numel, device=a.device), torch.empty(n * numel, device=a.device)
    norm, tied = torch.empty(1, device=a.device), torch.empty(numel, device=a.device)
    exchanged = torch.empty(n * numel, device=a.device)

    def step() -> None:
        dist.reduce_scatter_tensor(shard, given)
        norm.copy_(shard.square().sum())
        dist.all_reduce(norm)
        shard.mul_(1 / (1 + norm))
        gathered = dist.all_gather_into_tensor(whole, shard, async_op=True)
        tied.copy_(given[:numel])
        reduced = dist.all_reduce(tied, async_op=True)
        assert gathered is not None and reduced is not None
        gathered.wait()
        reduced.wait()
        dist.all_to_all_single(exchanged, whole + tied.mean())

    def results() -> list[torch.Tensor]:
        a.synchronize()
        return [x.cpu().clone() for x in (shard, norm, whole, tied, exchanged)]

    given.copy_(normal(rank, n * numel))
    step()  # the ranks meet before the capture
    replay = a.graph(step)
    for turn in range(3):
        given.copy_(normal(rank + 100 * turn, n * numel))
        step()
        expected = results()
        for x in (shard, norm, whole, tied, exchanged):
            x.fill_(float("nan"))
        replay()
        for found, due in zip(results(), expected, strict=True):
            assert torch.equal(found, due)
    # Captured and not: what comes after replays is in their order.
    dist.all_reduce(tied.fill_(1.0))
    assert tied.unique().tolist() == [n]


def through_host(rank: int, n: int, a: Accelerator) -> None:
    """Hosts that TCP joins: every way of it, in the order of streams; no graph can hold it."""
    for numel in (1, 127, 100001):
        x = values(rank, numel).to(a.device)
        dist.all_reduce(x)
        assert torch.equal(x.cpu(), sum(values(r, numel) for r in range(n)))
    whole = torch.zeros(n * 500, dtype=torch.int64, device=a.device)
    dist.all_gather_into_tensor(whole, values(rank, 500).to(a.device))
    assert torch.equal(whole.cpu(), torch.cat([values(r, 500) for r in range(n)]))
    _ring(rank, n, a, 5000)
    streams(rank, n, a)


def _ring(rank: int, n: int, a: Accelerator, numel: int) -> None:
    got = torch.zeros(numel, device=a.device)
    messages = [
        dist.P2POp(dist.isend, torch.full_like(got, rank), (rank + 1) % n),
        dist.P2POp(dist.irecv, got, (rank - 1) % n),
    ]
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    assert got.unique().tolist() == [(rank - 1) % n]


def messages(rank: int, n: int, a: Accelerator) -> None:
    """Alone, between two ranks that others need not wait for, in order; and all around at once."""
    for numel in (1, 1000, 300_001):
        _ring(rank, n, a, numel)
        if rank < 2:
            for turn in range(3):
                x = torch.full((numel,), turn + 10.0 * rank, device=a.device)
                if rank == turn % 2:
                    dist.send(x, 1 - rank)
                else:
                    dist.recv(x, 1 - rank)
                assert x.unique().tolist() == [turn + 10.0 * (turn % 2)]
    if rank in (0, n - 1):  # several under way, awaited in the other order
        peer = n - 1 - rank
        moved = [torch.full((1000,), float(i), device=a.device) for i in range(4)]
        works = [dist.isend(x, peer) if rank == 0 else dist.irecv(x.zero_(), peer) for x in moved]
        for work in reversed(works):
            assert work is not None
            work.wait()
        a.synchronize()
        assert [x.unique().tolist() for x in moved] == [[float(i)] for i in range(4)]
    dist.barrier()


def coalesced(rank: int, n: int, a: Accelerator) -> None:
    """Several as one operation."""
    device = torch.device(a.device)
    x, y = torch.full((300,), float(rank), device=device), torch.full((2, 2), 1.0, device=device)
    with dist._coalescing_manager(device=device, async_ops=True) as together:
        dist.all_reduce(x)
        dist.all_reduce(y)
    together.wait()
    a.synchronize()
    assert x.unique().tolist() == [n * (n - 1) / 2] and y.unique().tolist() == [n]
    parts = [values(rank, numel).to(a.device) for numel in (5, 70)]
    wholes = [torch.empty(n * part.numel(), dtype=torch.int64, device=device) for part in parts]
    with dist._coalescing_manager(device=device, async_ops=True) as together:
        for whole, part in zip(wholes, parts, strict=True):
            dist.all_gather_into_tensor(whole, part)
    together.wait()
    a.synchronize()
    for whole, part in zip(wholes, parts, strict=True):
        assert torch.equal(whole.cpu(), torch.cat([values(r, part.numel()) for r in range(n)]))


def sub_groups(rank: int, n: int, a: Accelerator) -> None:
    """Of new_group and by NCCL's split, at work beside each other and the whole."""
    dist.all_reduce(x := torch.ones(5, device=a.device))
    evens = list(range(0, n, 2))
    some = dist.new_group(evens)
    mine = [r for r in range(n) if r % 2 == rank % 2]
    world = dist.group.WORLD
    assert world is not None
    half = world.split_group(mine, timedelta(seconds=30), None, f"half{rank % 2}", "a half")
    assert half is not None
    for turn in range(5):
        works = [half.allreduce([y := torch.full((1000,), float(rank + turn), device=a.device)])]
        if rank in evens:
            works.append(dist.all_reduce(z := torch.ones(77, device=a.device), group=some, async_op=True))
        works.append(dist.all_reduce(x.fill_(1.0), async_op=True))
        for work in reversed(works):
            work.wait()
        a.synchronize()
        assert x.unique().tolist() == [n] and y.unique().tolist() == [sum(mine) + len(mine) * turn]
        assert rank not in evens or z.unique().tolist() == [len(evens)]


def small_by_peers(rank: int, n: int, a: Accelerator) -> None:
    """The peer kernel sums in rank order, which random values of fp32 tell from any other; above its size NCCL sums."""
    limit = 65536 // 4
    for turn, numel in enumerate((1, 3, 1000, 4097, limit, limit + 1, 17)):
        x = normal(rank + 10 * turn, numel).to(a.device)
        dist.all_reduce(x)
        expected = normal(10 * turn, numel)
        for r in range(1, n):
            expected = expected + normal(r + 10 * turn, numel)
        if numel <= limit:
            assert torch.equal(x.cpu(), expected), numel
        else:
            torch.testing.assert_close(x.cpu(), expected, rtol=1e-5, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
            y = values(rank, 999, dtype).to(a.device)
            dist.all_reduce(y, op)
            everyone = torch.stack([values(r, 999, torch.float32) for r in range(n)])
            due = everyone.sum(0) if op == dist.ReduceOp.SUM else everyone.amax(0)
            assert torch.equal(y.cpu().float(), due)
    launches = a.peer_launches()
    assert launches is None or launches == 10
    streams(rank, n, a)


def failures(rank: int, n: int, a: Accelerator) -> None:
    """A rank that does not come, and ranks that call different collectives: an error on each, and processes live."""
    first, second = (dist.new_group(timeout=timedelta(seconds=seconds)) for seconds in (3, 10))
    for group in (None, first, second):
        dist.all_reduce(torch.ones(3, device=a.device), group=group)
    a.synchronize()
    if rank < n - 1:
        work = dist.all_reduce(torch.ones(3, device=a.device), group=first, async_op=True)
        assert work is not None
        began = time.monotonic()
        with pytest.raises(PeerTimeout, match=rf"all_reduce #1 .* rank {n - 1} \(host .* has not said"):
            work.wait(timedelta(seconds=25))
        assert time.monotonic() - began < 20
        assert not work.is_success()
        with pytest.raises(GroupClosed, match="cannot be used any more"):
            dist.all_reduce(torch.ones(3, device=a.device), group=first)
    a.synchronize()  # nothing of it hangs on the device
    dist.all_reduce(x := torch.ones(3, device=a.device))
    assert x.tolist() == [n] * 3
    # NCCL may let some of the ranks end that called different collectives, so not all of them need be told.
    many = 1 << 20
    work = dist.all_reduce(torch.ones(many if rank == 1 else 3, device=a.device), group=second, async_op=True)
    assert work is not None
    error: RuntimeError | None = None
    try:
        work.wait(timedelta(seconds=25))
    except (CollectiveMismatch, PeerTimeout) as raised:
        error = raised
        assert isinstance(error, PeerTimeout) or f"{many} elements" in str(error)
    everyone: list[Any] = [None] * n
    dist.all_gather_object(everyone, error and type(error).__name__)
    assert set(everyone) == {"CollectiveMismatch"} if a.tells_mismatch else any(everyone)
    a.synchronize()
    dist.all_reduce(x.fill_(1.0))  # other groups go on
    assert x.tolist() == [n] * 3


def refusals(rank: int, n: int, a: Accelerator) -> None:
    """Bad input is told before anything is sent: the group goes on afterwards."""
    world = dist.group.WORLD
    assert world is not None
    backend: Any = world._get_backend(torch.device(a.device))
    ones = torch.ones(4, device=a.device)
    wrong: dict[str, Callable[[], Any]] = {
        "NCCL has no sum of int16": lambda: dist.all_reduce(ones.to(torch.int16)),
        "NCCL has no bxor of int32": lambda: dist.all_reduce(ones.to(torch.int32), dist.ReduceOp.BXOR),
        "name the source": lambda: dist.recv(ones),
        "have no tag": lambda: dist.send(ones, (rank + 1) % n, tag=3),
        "of as many elements": lambda: backend.all_reduce_wire(ones, "sum", "fp8", torch.ones(3, device=a.device)),
    }
    if a.device == "cuda":
        on_cpu, on_cuda = (dist.new_group(backend=f"{device}:pycomm") for device in ("cpu", "cuda"))
        wrong |= {
            r"one tensor is on .*another on": lambda: dist.all_gather([ones, *[torch.ones(4)] * (n - 1)], ones),
            r"another on": lambda: dist.all_gather_into_tensor(torch.ones(4 * n), ones),
            r"device type cpu": lambda: dist.all_reduce(torch.ones(4), group=on_cuda),
            r"device type cuda": lambda: dist.all_reduce(ones, group=on_cpu),
        }
    for text, call in wrong.items():
        with pytest.raises((InvalidArgument, ValueError, RuntimeError), match=text):
            call()
    empty = torch.empty(0, 3, device=a.device)
    dist.all_reduce(empty)
    dist.all_reduce(ones)
    assert ones.tolist() == [n] * 4


def one_device_twice(rank: int, n: int, a: Accelerator) -> None:
    """Two ranks of a host on one GPU, where NCCL is not told that they may: said before NCCL hears of it."""
    os.environ.pop("NCCL_HOSTID", None)
    with pytest.raises(InvalidArgument, match=r"rank 0 .* and rank 1 .* use one device, .*NCCL_MULTI_RANK_GPU_ENABLE"):
        dist.all_reduce(torch.ones(3, device=a.device))


def trained(wrap: Callable[[Any, Any, str], Any], group: Any, device: str) -> list[float]:
    """The losses of a small model's first steps, wrapped by wrap(model, group, device)."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    wrapped = wrap(model.to(device), group, device)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    losses = []
    for step in range(4):
        x = normal(10 * step + dist.get_rank(), 16 * 64).view(16, 64).to(device)
        loss = wrapped(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ddp(model: Any, group: Any, device: str) -> Any:
    return DistributedDataParallel(model, process_group=group, bucket_cap_mb=0.01)


def fsdp(model: Any, group: Any, device: str) -> Any:
    mesh = dist.DeviceMesh.from_group(group or dist.group.WORLD, device)
    return fully_shard(model, mesh=mesh)


def models(rank: int, n: int, a: Accelerator) -> None:
    """DDP, FSDP2 and DTensor as on a backend of torch's own."""
    other = a.other_backend()
    for wrap in (ddp, fsdp):
        assert trained(wrap, None, a.device) == pytest.approx(trained(wrap, other, a.device), rel=1e-5)
    mesh = init_device_mesh(a.device, (n,))
    whole = torch.arange(24.0, device=a.device).view(6, 4)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    assert torch.equal((sharded @ sharded.t()).full_tensor(), whole @ whole.t())


def pipeline(rank: int, n: int, a: Accelerator) -> None:
    """torch's pipelining: a stage on each rank; the losses and the gradients of the whole model."""
    n_microbatches = 2 * n
    layers = []
    for stage in range(n):
        torch.manual_seed(stage)
        layers.append(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh()))
    x = normal(0, 4 * n_microbatches * 16).view(-1, 16)
    target = normal(1, 4 * n_microbatches * 16).view(-1, 16)
    whole = torch.nn.Sequential(*[copy.deepcopy(layer) for layer in layers])
    expected = [
        torch.nn.functional.mse_loss(whole(one), due)
        for one, due in zip(x.chunk(n_microbatches), target.chunk(n_microbatches), strict=True)
    ]
    (sum(expected) / n_microbatches).backward()
    mine = layers[rank].to(a.device)
    stage = PipelineStage(mine, rank, n, torch.device(a.device))
    schedule = ScheduleGPipe(stage, n_microbatches, loss_fn=torch.nn.functional.mse_loss)
    losses: list[torch.Tensor] = []
    last = {"target": target.to(a.device), "losses": losses} if rank == n - 1 else {}
    schedule.step(*([x.to(a.device)] if rank == 0 else []), **last)
    a.synchronize()
    if rank == n - 1:
        torch.testing.assert_close(torch.stack(losses).cpu(), torch.stack(expected), rtol=1e-5, atol=1e-6)
    for ours, due in zip(mine.parameters(), whole[rank].parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), due.grad, rtol=1e-4, atol=1e-6)
