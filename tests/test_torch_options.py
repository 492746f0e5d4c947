"""What torch.distributed offers around collectives: debug mode, timeouts, abort, splitting, merging, mixed backends,
sparse tensors, the profiler."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from test_torch_errors import SOON_S, caught, met_in_store
from torch_ranks import run_torch_ranks

import pycomm  # noqa: F401  (what it puts in the place of torch's functions is under test)


@pytest.fixture(params=["aa", "aabb"], ids=["2 ranks", "2x2"])
def hosts(request):
    return request.param


# Sparse tensors


def test_sparse_tensors_are_summed(hosts):
    run_torch_ranks(check_sparse, len(hosts), hosts=hosts)


def sparse(rank, n, dtype, n_values):
    """Rank r's values lie at rows r, 2r, ...: some in common with others, some not, for each rank another number."""
    generator = torch.Generator().manual_seed(100 * rank + n_values)
    rows = torch.randint(0, 40, (1, n_values * (rank % 3)), generator=generator)
    values = torch.randint(1, 9, (rows.shape[1], 5), generator=generator).to(dtype)
    return torch.sparse_coo_tensor(rows, values, (40, 5))


def check_sparse(rank, n):
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
        works = []
        for n_values in (0, 1, 1000):
            x = sparse(rank, n, dtype, n_values)
            work = dist.all_reduce(x, async_op=True)
            works.append((x, n_values, work))
        y = torch.ones(3)
        dist.all_reduce(y)  # between the stages of the sparse ones
        assert y.tolist() == [n] * 3
        for x, n_values, work in reversed(works):
            work.wait()
            assert work.is_completed() and x.is_coalesced()
            total = sum(sparse(r, n, dtype, n_values).to_dense() for r in range(n))
            torch.testing.assert_close(x.to_dense(), total)
    x = torch.sparse_coo_tensor([[rank, 0], [0, rank]], [1.0, 2.0], (n, n))
    dist.all_reduce(x)
    expected = sum(torch.sparse_coo_tensor([[r, 0], [0, r]], [1.0, 2.0], (n, n)).to_dense() for r in range(n))
    assert torch.equal(x.to_dense(), expected)
    if rank == 0:
        with pytest.raises(RuntimeError, match="SUM alone"):
            dist.all_reduce(torch.eye(3).to_sparse(), dist.ReduceOp.MAX)


def test_sparse_tensors_of_other_shapes_are_told_apart_on_every_rank(hosts):
    for rank, (message, seconds) in enumerate(run_torch_ranks(sparse_mismatch, len(hosts), hosts=hosts)):
        assert "[3, 3]" in message and "[4, 4]" in message and f"rank {rank}" in message, message
        assert seconds < SOON_S


def sparse_mismatch(rank, n):
    result = caught(lambda: dist.all_reduce(torch.eye(4 if rank == n - 1 else 3).to_sparse()))
    met_in_store("end", rank, n)
    return result


def test_embeddings_with_sparse_gradients_train_under_ddp(hosts):
    run_torch_ranks(check_sparse_ddp, len(hosts), hosts=hosts)


def check_sparse_ddp(rank, n):
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(20, 4, sparse=True)
    ddp = torch.nn.parallel.DistributedDataParallel(embedding)
    ddp(torch.tensor([rank, 7, 7])).sum().backward()
    expected = torch.zeros(20, 4)
    for r in range(n):
        for row in (r, 7, 7):
            expected[row] += 1 / n
    torch.testing.assert_close(embedding.weight.grad.to_dense(), expected)


# Debug mode


def test_debug_mode_detail():
    """torch's wrapper compares every call with Gloo's help, and calls monitored_barrier on it first."""
    results = run_torch_ranks(check_detail, 2)
    for rank, message in enumerate(results):
        assert "mismatch" in message.lower() or "Detected mismatch" in message, (rank, message)


def check_detail(rank, n):
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    os.environ.update(TORCH_DISTRIBUTED_DEBUG="DETAIL", GLOO_SOCKET_IFNAME="lo")
    dist.set_debug_level_from_env()
    dist.init_process_group("pycomm", store=dist.PrefixStore("detail", store), rank=rank, world_size=n)
    group = dist.new_group()
    for g in (None, group):
        x = torch.ones(1000)
        dist.all_reduce(x, group=g)
        assert torch.equal(x, torch.full((1000,), float(n)))
        work = dist.all_reduce(x, group=g, async_op=True)
        work.wait()
        everyone = torch.empty(n, 1000)
        dist.all_gather_into_tensor(everyone, x, group=g)
        assert torch.all(everyone == n * n)
        objects = [None] * n
        dist.all_gather_object(objects, {"rank": rank}, group=g)
        assert [o["rank"] for o in objects] == list(range(n))
        dist.barrier(group=g)
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    ddp(torch.ones(1, 3)).sum().backward()
    assert torch.all(ddp.module.weight.grad == 1)
    message, _ = caught(lambda: dist.all_reduce(torch.ones(3 + rank), group=group))
    met_in_store("end", rank, n)
    return message


# Monitored barrier, timeouts, abort


def test_monitored_barrier_of_torch_distributed():
    results = run_torch_ranks(check_monitored, 3)
    assert "Rank 1 failed to pass monitoredBarrier in 500 ms" in results[0][0]
    assert "Ranks 1, 2 failed to pass monitoredBarrier in 500 ms" in results[0][1]
    assert "Rank 2 successfully reached monitoredBarrier" in results[2][0]
    assert "Rank 1 failed" in results[2][0]  # and why it did not end
    assert results[1] == []


def check_monitored(rank, n):
    groups = [dist.new_group() for _ in range(3)]
    pair = dist.new_group([0, 1])
    dist.monitored_barrier(groups[0])
    dist.monitored_barrier(timeout=timedelta(seconds=10), wait_all_ranks=True)
    dist.monitored_barrier(pair, 10.0)  # in seconds; nothing on a rank outside
    results = []
    if rank != 1:
        results.append(caught(lambda: dist.monitored_barrier(groups[1], timedelta(milliseconds=500)))[0])
    if rank == 0:
        results.append(caught(lambda: dist.monitored_barrier(groups[2], timedelta(milliseconds=500), True))[0])
    gloo = dist.new_group(backend="gloo")
    dist.monitored_barrier(gloo)  # torch's own
    return results


def test_timeouts_of_a_group_of_a_call_and_of_a_wait():
    for message, seconds in run_torch_ranks(check_timeouts, 2)[0]:
        assert message is not None and 0.4 < seconds < 0.5 + SOON_S, (message, seconds)


def check_timeouts(rank, n):
    half = timedelta(milliseconds=500)
    short = dist.new_group(timeout=half)
    later, call, wait = dist.new_group(), dist.new_group(), dist.new_group()
    dist.distributed_c10d._set_pg_timeout(half, later)
    assert later._get_backend(torch.device("cpu")).options._timeout == half
    results = []
    if rank == 0:
        x = torch.ones(1000)
        options = dist.AllreduceOptions()
        options.timeout = half
        results = [
            caught(lambda: dist.all_reduce(x, group=short)),
            caught(lambda: dist.barrier(group=later)),
            caught(lambda: call.allreduce([x], options).wait()),
            caught(lambda: dist.all_reduce(x, group=wait, async_op=True).wait(half)),
        ]
        errors = [g._get_backend(torch.device("cpu")).get_error() for g in (short, wait)]
        assert [str(error).split(".")[-1] for error in errors] == ["TIMEOUT", "SUCCESS"]
    met_in_store("end", rank, n)
    return results


def test_abort_ends_what_is_under_way_on_every_rank(hosts):
    for rank, (message, seconds) in enumerate(run_torch_ranks(check_abort, len(hosts), hosts=hosts)):
        assert "rank 0 called abort()" in message, (rank, message)
        assert seconds < SOON_S


def check_abort(rank, n):
    group = dist.new_group()
    dist.barrier(group=group)
    if rank == 0:
        work = group.recv([torch.ones(1)], 1, 0)
        group.abort()
        result = caught(work.wait)
    else:
        result = caught(lambda: dist.all_reduce(torch.ones(5), group=group))
    with pytest.raises(RuntimeError, match=r"abort\(\)"):
        dist.barrier(group=group)
    met_in_store("end", rank, n)
    dist.distributed_c10d._abort_process_group(group)  # a second time, and as torch's own callers do
    dist.barrier()
    return result


# Groups of other groups


def test_split_group_of_torch_distributed(hosts):
    run_torch_ranks(check_split, len(hosts), hosts=hosts)


def check_split(rank, n):
    half = n // 2
    part = dist.split_group(split_ranks=[list(range(half)), list(range(half, n))], group_desc="half")
    x = torch.full((10,), float(rank))
    dist.all_reduce(x, group=part)
    assert x[0].item() == sum(range(half) if rank < half else range(half, n))
    alone = dist.split_group(part, [[r] for r in range(half)])
    assert dist.get_process_group_ranks(alone) == [rank]
    for wrong in ([[0, 0]], [[0, n]]):
        with pytest.raises(ValueError, match="distinct"):
            dist.split_group(split_ranks=wrong)


def test_groups_of_one_store_merge():
    run_torch_ranks(check_merge, 4, hosts="aabb")


def check_merge(rank, n):
    """Two jobs of two ranks each, which know a store in common, become one group of four."""
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    job = rank // 2
    dist.init_process_group("pycomm", store=dist.PrefixStore(f"job{job}", store), rank=rank % 2, world_size=2)
    merged = dist.group.WORLD.merge_remote_group(dist.PrefixStore("merged", store), n, timedelta(seconds=20), "both")
    ranks = torch.zeros(n)
    ranks[merged.rank()] = 1 + rank
    merged.allreduce([ranks]).wait()
    assert sorted(ranks.tolist()) == [1.0, 2.0, 3.0, 4.0]
    x = torch.ones(2)
    dist.all_reduce(x)
    assert x.tolist() == [2.0, 2.0]


def test_a_backend_per_device():
    run_torch_ranks(check_devices, 2, backend="cpu:pycomm,cuda:gloo")


def check_devices(rank, n):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    assert dist.get_backend_config() == "cpu:pycomm,cuda:gloo"
    assert dist.group.WORLD._get_backend(torch.device("cpu")).name() == "pycomm"
    for group in (None, dist.new_group(), dist.new_group(backend="cpu:pycomm,cuda:gloo")):
        x = torch.ones(4)
        dist.all_reduce(x, group=group)
        assert torch.all(x == n)
        objects = [None] * n
        dist.all_gather_object(objects, rank, group=group)
        assert objects == list(range(n))
        dist.barrier(group=group)
        dist.monitored_barrier(group)
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    ddp(torch.ones(1, 3)).sum().backward()
    half = dist.split_group(split_ranks=[[0], [1]])
    assert half.size() == 1


# Works


def test_profiler_events_durations_and_futures(hosts):
    run_torch_ranks(check_works, len(hosts), hosts=hosts)


def check_works(rank, n):
    x = torch.ones(1000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        dist.all_reduce(x)
        dist.all_reduce(x, async_op=True).wait()
        dist.broadcast(x, 0)
        dist.barrier()
    events = [e for e in profile.events() if e.name.startswith("pycomm:")]
    assert sorted(e.name for e in events) == [
        "pycomm:all_reduce", "pycomm:all_reduce", "pycomm:barrier", "pycomm:broadcast"
    ]  # fmt: skip
    assert all(e.is_async for e in events)
    assert all(e.input_shapes == [[1000]] for e in events if "reduce" in e.name)
    work = dist.all_reduce(torch.ones(1 << 20), async_op=True)
    doubled = work.get_future().then(lambda future: 2 * future.value()[0][0].item())
    assert doubled.wait() == 2 * n
    assert work._get_duration() > 0 and work.exception() is None and work.is_success()
    assert dist.all_reduce(x) is None


def test_memory_that_peers_map_for_torchs_own_buffers():
    run_torch_ranks(check_allocation, 2)


def check_allocation(rank, n):
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    assert backend.supports_tensor_alloc(torch.device("cpu"))
    x = backend.allocate_tensor(100_000, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert x.shape == (100_000,) and x.dtype == torch.bfloat16
    x.fill_(rank + 1)
    dist.all_reduce(x)
    assert torch.all(x == 3)
    with pytest.raises(RuntimeError, match="allocates on cpu"):
        backend.allocate_tensor(10, dtype=torch.float32, device=torch.device("meta"))


def test_a_monitored_barrier_is_fast_when_all_come():
    begin = time.monotonic()
    run_torch_ranks(check_many_barriers, 2)
    assert time.monotonic() - begin < 30


def check_many_barriers(rank, n):
    for _ in range(200):
        dist.monitored_barrier()
