"""torch.distributed on a device: the c10d backend over the CUDA engine, on a fake NCCL and host memory, beside Gloo."""

from __future__ import annotations

import ctypes
import os
import time
import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_nccl import run_device_ranks
from gpu_bodies import ddp, trained

from pycomm.errors import CollectiveMismatch, GroupClosed, InvalidArgument, PeerTimeout, PycommWarning


def test_collectives_equal_gloos() -> None:
    run_device_ranks(_collectives, 3, environment={"PYCOMM_CUDA_PEER_BYTES": "4096"})


def _collectives(rank: int, n: int, switches: Any) -> None:
    gloo = dist.new_group(backend="gloo")
    assert switches.fake_nccl_n_communicators() == 0

    def both(run: Any) -> None:
        """run(group, is_gloo) gives tensors, which must be equal."""
        ours, theirs = run(None), run(gloo)
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other), (mine, other)

    def ints(*shape: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        made = torch.randint(-50, 50, shape, generator=torch.Generator().manual_seed(100 * seed + rank))
        return made.to(dtype)

    def all_reduces(group: Any) -> list[torch.Tensor]:
        found = []
        for dtype in (torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float64):
            for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN):
                found.append(ints(37, dtype=dtype))
                dist.all_reduce(found[-1], op, group)
        # Gloo reduces wrong elements of views like these, so it gets copies.
        strided, other = ints(6, 8).t(), ints(5, 4)[:, :2]
        if group is gloo:
            strided, other = strided.contiguous(), other.contiguous()
        dist.all_reduce(strided, group=group)
        work = dist.all_reduce(other, group=group, async_op=True)
        assert work is not None
        work.wait()
        empty = torch.empty(0)
        dist.all_reduce(empty, group=group)
        return [*found, strided, other, empty]

    both(all_reduces)
    assert switches.fake_nccl_n_communicators() == 1
    assert switches.fake_device_n_peer_launches() == 9  # those of float32, bfloat16 and float16

    def moves(group: Any) -> list[torch.Tensor]:
        x, y = ints(10), ints(10, seed=1)
        dist.broadcast(x, 1, group)
        dist.reduce(y, 2, group=group)
        gathered = [torch.empty(10, dtype=torch.int64) for _ in range(n)]
        dist.all_gather(gathered, ints(10))
        whole = torch.empty(n * 4, 3, dtype=torch.int32)
        dist.all_gather_into_tensor(whole, ints(4, 3, dtype=torch.int32), group)
        at_root = [torch.empty(7, dtype=torch.int64) for _ in range(n)] if rank == 1 else None
        dist.gather(ints(7), at_root, 1, group)
        piece = torch.empty(3, dtype=torch.int64)
        dist.scatter(piece, list(ints(n, 3)) if rank == 0 else None, 0, group)
        split_in, split_out = [rank + 2 * r for r in range(n)], [r + 2 * rank for r in range(n)]
        swapped = torch.empty(sum(split_out), 2, dtype=torch.int64)
        dist.all_to_all_single(swapped, ints(sum(split_in), 2), split_out, split_in, group)
        even = torch.empty(n * 2, dtype=torch.int64)
        dist.all_to_all_single(even, ints(n * 2), group=group)
        return [x, *([y] if rank == 2 else []), *gathered, whole, *(at_root or []), piece, swapped, even]

    both(moves)

    out = torch.empty(4, dtype=torch.int64)
    dist.reduce_scatter_tensor(out, ints(4 * n))
    summed = ints(4 * n)
    dist.all_reduce(summed, group=gloo)
    assert torch.equal(out, summed[4 * rank : 4 * rank + 4])
    sizes = [1, 0, 5]
    uneven = torch.empty(sizes[rank], dtype=torch.int64)
    dist.reduce_scatter(uneven, list(ints(6, seed=3).split(sizes)))
    whole = ints(6, seed=3)
    dist.all_reduce(whole, group=gloo)
    assert torch.equal(uneven, whole.split(sizes)[rank])
    average = torch.full((4,), float(rank))
    dist.all_reduce(average, dist.ReduceOp.AVG)
    assert average.tolist() == [1.0] * 4
    objects: list[Any] = [None] * n
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": r} for r in range(n)]

    # Several as one, futures, messages.
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    a, b = torch.full((3,), float(rank)), torch.full((2, 2), float(rank))
    with dist._coalescing_manager(device=torch.device("cpu"), async_ops=True) as together:
        dist.all_reduce(a)
        dist.all_reduce(b)
    together.wait()
    assert a.tolist() == [3.0] * 3 and b.flatten().tolist() == [3.0] * 4
    work = dist.all_reduce(c := torch.full((3,), float(rank)), async_op=True)
    assert work is not None
    assert work.get_future().then(lambda done: done.value()[0] * 2).wait().tolist() == [6.0] * 3
    assert work.is_completed() and work.is_success() and c.tolist() == [3.0] * 3
    got = torch.empty(20000)
    ring = [
        dist.P2POp(dist.isend, torch.full((20000,), float(rank)), (rank + 1) % n),
        dist.P2POp(dist.irecv, got, (rank - 1) % n),
    ]
    for each in dist.batch_isend_irecv(ring):
        each.wait()
    chain, hop = torch.full((5,), float(rank)), torch.empty(5)  # ends have one message, others two
    messages = [dist.P2POp(dist.irecv, hop, rank - 1)] if rank else []
    messages += [dist.P2POp(dist.isend, chain, rank + 1)] if rank < n - 1 else []
    for each in dist.batch_isend_irecv(messages):
        each.wait()
    assert rank == 0 or hop.tolist() == [rank - 1.0] * 5
    assert got.unique().tolist() == [float((rank - 1) % n)]
    if rank < 2:
        first = torch.full((3,), float(rank))
        (dist.send if rank == 0 else dist.recv)(first, 1 - rank)
        assert first.tolist() == [0.0] * 3
    dist.barrier()

    # Groups: of new_group, and by NCCL's split.
    part = dist.new_group([0, 2])
    if rank != 1:
        pair = torch.tensor([rank])
        dist.all_reduce(pair, group=part)
        assert pair.item() == 2
    before = switches.fake_nccl_n_communicators()
    halves = [0, 2] if rank != 1 else [1]
    half = dist.group.WORLD.split_group(halves, timedelta(seconds=30), None, f"half{halves[0]}", "a half")  # type: ignore[union-attr]
    assert switches.fake_nccl_n_communicators() == before + 1
    alone = torch.tensor([rank + 1])
    half.allreduce([alone]).wait()
    assert alone.item() == (2 if rank == 1 else 4)

    # What NCCL cannot is said before anything is sent.
    for wrong, message in (
        (lambda: dist.all_reduce(torch.ones(2, dtype=torch.int16)), "NCCL has no sum of int16"),
        (lambda: dist.all_reduce(torch.ones(2, dtype=torch.int32), dist.ReduceOp.BXOR), "NCCL has no bxor of int32"),
        (lambda: dist.recv(torch.ones(2)), "name the source"),
        (lambda: dist.send(torch.ones(2), (rank + 1) % n, tag=3), "have no tag"),
        (lambda: backend.all_reduce_wire(torch.ones(2), "sum", "fp8", torch.ones(3)), "of as many elements"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            wrong()
    dist.all_reduce(last := torch.ones(1))
    assert last.item() == n


def test_ddp_trains_through_the_host_where_nccl_cannot_connect_hosts() -> None:
    variables = {"FAKE_NCCL_NO_NETWORK": "1"}
    run_device_ranks(_through_host, 3, hosts=["a", "a", "b"], environment=variables)


def _through_host(rank: int, n: int, switches: Any) -> None:
    gloo = dist.new_group(backend="gloo")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", PycommWarning)
        for dtype in (torch.int32, torch.float32, torch.int16):  # the last has no sum in NCCL
            dist.all_reduce(x := torch.full((3,), rank + 1, dtype=dtype))
            assert x.tolist() == [6] * 3
    told = [str(one.message) for one in warned if one.category is PycommWarning]
    assert len(told) == (rank == 0), told
    assert all("no route to host" in text and "PYCOMM_CUDA_BETWEEN_HOSTS=tcp" in text for text in told)
    assert trained(ddp, None, "cpu") == pytest.approx(trained(ddp, gloo, "cpu"), rel=1e-5)
    peers = [(rank + 1) % n, (rank - 1) % n]
    given, got = torch.arange(5) + 10 * rank, torch.zeros(5, dtype=torch.int64)
    messages = [dist.P2POp(dist.isend, given, peers[0]), dist.P2POp(dist.irecv, got, peers[1])]
    for work in dist.batch_isend_irecv(messages):
        work.wait()
    assert got.tolist() == (torch.arange(5) + 10 * peers[1]).tolist()
    part = dist.new_group([0, 2])
    if rank != 1:
        dist.all_reduce(x := torch.ones(2, 3).t(), group=part)
        assert (x == 2).all()
    # A part of the group knows already, and parts of parts count their own ranks.
    mine = [1, 2] if rank else [0]
    pair = dist.group.WORLD.split_group(mine, timedelta(seconds=30), None, f"pair{mine[0]}", "a pair")  # type: ignore[union-attr]
    pair.allreduce([x := torch.full((4,), rank)]).wait()
    assert x.tolist() == [sum(mine)] * 4
    alone = pair.split_group([pair.rank()], timedelta(seconds=30), None, f"alone{rank}", "a rank")
    alone.allreduce([x := torch.full((4,), rank)]).wait()
    assert x.tolist() == [rank] * 4
    # One for the ranks of host a, one for each group of one rank that has communicated.
    assert switches.fake_nccl_n_communicators() == (rank < 2) + (rank == 0) + 1


def test_a_late_rank_and_a_mistaken_one_raise_and_the_processes_live() -> None:
    run_device_ranks(_failures, 2, environment={"PYCOMM_CUDA_PEER_BYTES": "4096"})


def _failures(rank: int, n: int, switches: Any) -> None:
    dist.all_reduce(torch.ones(3))
    first, second = dist.new_group(timeout=timedelta(seconds=2)), dist.new_group()
    for group in (first, second):
        dist.all_reduce(torch.ones(3), group=group)
    if rank == 0:
        work = dist.all_reduce(torch.ones(3), group=first, async_op=True)
        assert work is not None
        began = time.monotonic()
        # Of the first, which may take long on a busy machine, it may have said that it waits.
        word = "(has not said that it waits in it|last waited in all_reduce #0)"
        with pytest.raises(PeerTimeout, match=rf"all_reduce #1 .* rank 1 \(host .* {word}"):
            work.wait(timedelta(seconds=20))
        assert time.monotonic() - began < 10
        assert not work.is_success() and isinstance(work.exception(), RuntimeError)
        with pytest.raises(GroupClosed, match="cannot be used any more"):
            dist.all_reduce(torch.ones(3), group=first)
    dist.barrier()
    with pytest.raises(CollectiveMismatch, match=r"rank 0 .*called all_reduce #1 .*3 elements.* rank 1|rank 1"):
        dist.all_reduce(torch.ones(3 + rank), group=second)
    dist.all_reduce(x := torch.ones(3))  # other groups go on
    assert x.tolist() == [2.0] * 3


def test_hierarchical_calls_equal_gloos() -> None:
    variables = {"PYCOMM_CUDA_HIERARCHICAL_BYTES": "1"}
    run_device_ranks(_hierarchical, 4, hosts=["a", "b", "a", "b"], environment=variables)


def _hierarchical(rank: int, n: int, switches: Any) -> None:
    gloo, planned = dist.new_group(backend="gloo"), dist.new_group()

    def values(numel: int, dtype: torch.dtype) -> torch.Tensor:
        made = torch.randint(-20, 20, (numel,), generator=torch.Generator().manual_seed(numel + 7 * rank))
        return made.to(dtype)

    def results(group: Any, numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
        x, y = values(numel, dtype), values(numel, dtype)
        dist.all_reduce(x, group=group)
        dist.all_reduce(y, dist.ReduceOp.MAX, group=group)
        gathered = torch.empty(n * numel, dtype=dtype)
        dist.all_gather_into_tensor(gathered, values(numel, dtype), group)
        again = gathered.clone()
        work = dist.all_reduce(again, group=group, async_op=True)
        assert work is not None
        work.wait()
        exchanged = torch.empty(n * numel, dtype=dtype)
        dist.all_to_all_single(exchanged, values(n * numel, dtype), group=group)
        return [x, y, gathered, again, exchanged]

    for numel in (0, 1, 5, 64, 4097, 40000):
        for dtype in (torch.int64, torch.float32, torch.bfloat16):
            for ours, theirs in zip(results(planned, numel, dtype), results(gloo, numel, dtype), strict=True):
                if dtype == torch.bfloat16 and numel > 5:  # sums of 16 bit are rounded in another order
                    assert torch.allclose(ours, theirs, rtol=2e-2, atol=1)
                else:
                    assert torch.equal(ours, theirs), (numel, dtype)
        out = torch.empty(numel, dtype=torch.int64)
        dist.reduce_scatter_tensor(out, values(n * numel, torch.int64), group=planned)
        whole = values(n * numel, torch.int64)
        dist.all_reduce(whole, group=gloo)
        assert torch.equal(out, whole[rank * numel : (rank + 1) * numel])
    average = torch.full((100,), float(rank))
    dist.all_reduce(average, dist.ReduceOp.AVG, planned)
    assert average.unique().tolist() == [1.5]
    average = torch.full((3,), rank)  # of integers, which NCCL rounds once
    dist.all_reduce(average, dist.ReduceOp.AVG, planned)
    assert average.tolist() == [1, 1, 1]
    # With a wire: all ranks get the same bits, off by half a step of each host's sum and of the result.
    backend = planned._get_backend(torch.device("cpu"))
    for numel in (1, 300, 40000):
        for wire, relative in (("int8", 0.5 / 127), ("fp8", 1 / 16)):
            for op in ("sum", "avg"):
                x = torch.randn(numel, generator=torch.Generator().manual_seed(numel + rank))
                exact = x.clone()
                dist.all_reduce(exact, group=gloo)
                largest = x.abs().max()
                dist.all_reduce(largest, dist.ReduceOp.MAX, gloo)
                backend.all_reduce_wire(x, op, wire).wait()
                exact = exact / n if op == "avg" else exact
                steps = (2 * 2 + n * (1 + relative)) * largest.item() * relative * (1 / n if op == "avg" else 1)
                assert 0 <= (x - exact).abs().max().item() <= steps * 1.001
                assert numel == 1 or not torch.equal(x, exact)
                everyone = [torch.empty(numel) for _ in range(n)]
                dist.all_gather(everyone, x, group=gloo)
                assert all(torch.equal(x, other) for other in everyone)
    # Error feedback: results and what is lost at the end add up to the exact sums, whichever rank coded what.
    for numel in (1, 300, 40000):
        for wire, op in (("int8", "sum"), ("fp8", "avg")):
            generator = torch.Generator().manual_seed(numel + rank)
            lost, total, exact = torch.full((numel,), 9.0), torch.zeros(numel), torch.zeros(numel, dtype=torch.float64)
            without, scale = torch.zeros(numel), n if op == "avg" else 1
            for turn in range(6):
                given = torch.randn(numel, generator=generator)
                exact += given / scale
                plain, x = given.clone(), given + lost if turn else given.clone()
                backend.all_reduce_wire(plain, op, wire).wait()
                backend.all_reduce_wire(x, op, wire, lost).wait()
                total, without = total + x, without + plain
            everything = torch.stack([exact, lost.double() / scale])
            dist.all_reduce(everything, group=gloo)
            assert torch.allclose(total + everything[1], everything[0], rtol=1e-5, atol=1e-4)
            assert numel == 1 or not torch.allclose(without.double(), everything[0], rtol=1e-3, atol=1e-2)
    lost = torch.ones(8)
    one_host = dist.new_group([0, 2])  # nothing crosses, so nothing is lost
    if rank in (0, 2):
        one_host._get_backend(torch.device("cpu")).all_reduce_wire(torch.ones(8), "sum", "int8", lost).wait()
        assert not lost.any()
    with pytest.raises(InvalidArgument, match="fp8 or int8"):
        backend.all_reduce_wire(torch.ones(2), "sum", "bf16").wait()
    assert switches.fake_nccl_n_communicators() == 3 + (rank in (0, 2))  # the group's, inside hosts, across
    # Memory that one rank does not get is an error on all, and nobody waits for the deadline.
    short = dist.new_group()
    if rank == 1:
        switches.fake_device_refuse(f"{os.getpid()}/{rank}".encode(), ctypes.c_size_t(1 << 16))
    with pytest.raises(RuntimeError, match=r"rank 1 of 4 .*of device memory .*out of memory") as error:
        dist.all_to_all_single(torch.empty(40000), torch.ones(40000), group=short)
    assert not isinstance(error.value, PeerTimeout)
    switches.fake_device_refuse(None, ctypes.c_size_t(0))
    # Parts of the group plan for themselves: two hosts of one rank each, or one host, which has no way but NCCL's.
    for name, ranks in (("across", [[0, 1], [2, 3]]), ("inside", [[0, 2], [1, 3]])):
        mine = next(one for one in ranks if rank in one)
        part = planned.split_group(mine, timedelta(seconds=30), None, f"{name}{mine[0]}", name)  # type: ignore[union-attr]
        dist.all_to_all_single(got := torch.empty(2, dtype=torch.int64), torch.tensor([rank, rank + 10]), group=part)
        assert got.tolist() == [one + 10 * mine.index(rank) for one in mine]


def test_tensors_of_another_device_than_the_groups_or_the_calls_are_refused() -> None:
    """What a torch for the CPU can show of it; between CPU and GPU, `make test-gpu` does (gpu_bodies.refusals)."""
    run_device_ranks(_other_devices, 2)


def _other_devices(rank: int, n: int, switches: Any) -> None:
    on_cuda = dist.new_group(backend="cuda:pycomm")
    ones, meta = torch.ones(4), torch.ones(4, device="meta")
    wrong: dict[str, Any] = {
        r"device type cpu": lambda: dist.all_reduce(ones, group=on_cuda),
        r"all_gather in group .* the tensor is on meta": lambda: dist.all_gather([ones, meta], ones),
    }
    for text, call in wrong.items():
        with pytest.raises((InvalidArgument, RuntimeError), match=text):
            call()
    dist.all_reduce(ones)
    assert ones.tolist() == [n] * 4
