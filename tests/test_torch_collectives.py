"""Every collective of torch.distributed on CPU tensors, against results that each rank computes alone.

Inputs are small integers that depend on rank and position, so sums are exact in every dtype and a piece from a wrong
rank, or at a wrong place, is a wrong number. What Gloo does too is here; the rest is in test_torch_beyond_gloo.py.
"""

import pytest
import torch
import torch.distributed as dist
from torch_ranks import run_torch_ranks

LAYOUTS = {
    "1 rank": ["a"],
    "2 ranks": ["a", "a"],
    "2 hosts": ["a", "b"],
    "2+1": ["a", "a", "b"],
    "4 ranks": ["a", "a", "a", "a"],
    "2x2": ["a", "a", "b", "b"],
}
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTS = [torch.uint8, torch.int8, torch.int32, torch.int64]
DTYPES = [*FLOATS, *INTS, torch.bool]
SIZES = [0, 1, 2, 3, 4, 5, 1000, 70001]  # around the rank counts, one not a multiple, one above a slot
ReduceOp = dist.ReduceOp


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def hosts(request):
    return request.param


def pattern(rank, numel, dtype=torch.float32, salt=0):
    """What rank contributes: integers in 1 .. 4, for bool a third of them true, for complex an imaginary part too."""
    i = torch.arange(numel)
    if dtype == torch.bool:
        return (i + rank + salt) % 3 == 0
    real = (i * 3 + rank * 5 + salt * 7) % 4 + 1
    if dtype.is_complex:
        return torch.complex(real.double(), ((i + rank) % 3).double()).to(dtype)
    return real.to(dtype)


def reduced(op, contributions, dtype):
    """The reduction of all contributions, computed in int64 or double and rounded once."""
    if dtype == torch.bool:
        stacked = torch.stack(contributions)
        if op in (ReduceOp.SUM, ReduceOp.MAX, ReduceOp.BOR):
            return stacked.any(0)
        return stacked.sum(0) % 2 == 1 if op == ReduceOp.BXOR else stacked.all(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else torch.int64
    total = contributions[0].to(wide)
    for x in contributions[1:]:
        x = x.to(wide)
        if op == ReduceOp.SUM:
            total = total + x
        elif op == ReduceOp.PRODUCT:
            total = total * x
        elif op == ReduceOp.MIN:
            total = torch.minimum(total, x)
        elif op == ReduceOp.MAX:
            total = torch.maximum(total, x)
        else:
            total = {
                ReduceOp.BAND: torch.bitwise_and,
                ReduceOp.BOR: torch.bitwise_or,
                ReduceOp.BXOR: torch.bitwise_xor,
            }[op](total, x)
    return total.to(dtype)


def ops_of(dtype):
    if dtype.is_complex:
        return [ReduceOp.SUM]
    ops = [ReduceOp.SUM, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX]
    return ops if dtype.is_floating_point else [*ops, ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR]


def same(actual, expected, *what):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (what, actual, expected)
    assert torch.equal(actual, expected), (what, actual, expected)


def test_all_reduce(hosts):
    run_torch_ranks(check_all_reduce, len(hosts), hosts=hosts)


def check_all_reduce(rank, n):
    for dtype in [*DTYPES, torch.complex64]:
        for op in ops_of(dtype):
            for numel in SIZES if dtype == torch.float32 else [0, 1, 7, 1000]:
                x = pattern(rank, numel, dtype)
                expected = reduced(op, [pattern(r, numel, dtype) for r in range(n)], dtype)
                dist.all_reduce(x, op)
                same(x, expected, dtype, op, numel)
    matrix = pattern(rank, 60).view(3, 4, 5)
    dist.all_reduce(matrix)
    same(matrix, reduced(ReduceOp.SUM, [pattern(r, 60) for r in range(n)], torch.float32).view(3, 4, 5))
    scalar = torch.tensor(float(rank + 1))
    dist.all_reduce(scalar, ReduceOp.MAX)
    same(scalar, torch.tensor(float(n)))


def test_all_reduce_is_the_same_on_every_rank_and_from_run_to_run(hosts):
    results = run_torch_ranks(random_all_reduce, len(hosts), hosts=hosts)
    again = run_torch_ranks(random_all_reduce, len(hosts), hosts=hosts)
    assert all(result == results[0] for result in results + again)


def random_all_reduce(rank, n):
    """The bytes of sums whose rounding depends on the order in which they are added."""
    found = []
    for dtype in FLOATS:
        contributions = [torch.randn(40001, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(n)]
        x = contributions[rank].clone()
        dist.all_reduce(x)
        exact = torch.stack(contributions).double().sum(0)
        bound = torch.finfo(dtype).eps * n * torch.stack(contributions).double().abs().sum(0)
        assert ((x.double() - exact).abs() <= bound).all(), dtype
        found.append(bytes(x.view(torch.uint8).numpy().tobytes()))
    return found


def test_rooted_collectives(hosts):
    run_torch_ranks(check_moving_from_and_to_a_root, len(hosts), DTYPES, hosts=hosts)
    run_torch_ranks(check_reduce, len(hosts), hosts=hosts)


def check_moving_from_and_to_a_root(rank, n, dtypes):
    for root in range(n):
        for dtype in dtypes:
            for numel in SIZES if dtype == torch.float32 else [0, 1, 7, 1000]:
                x = pattern(rank, numel, dtype)
                dist.broadcast(x, root)
                same(x, pattern(root, numel, dtype), "broadcast", root, dtype, numel)

                mine = pattern(rank, numel, dtype)
                gathered = [torch.empty_like(mine) for _ in range(n)] if rank == root else None
                dist.gather(mine, gathered, dst=root)
                for r in range(n) if rank == root else []:
                    same(gathered[r], pattern(r, numel, dtype), "gather", root, r, dtype, numel)
                same(mine, pattern(rank, numel, dtype), "gather leaves its input", root)

                out = torch.empty_like(mine)
                pieces = [pattern(r, numel, dtype, salt=root) for r in range(n)] if rank == root else None
                dist.scatter(out, pieces, src=root)
                same(out, pattern(rank, numel, dtype, salt=root), "scatter", root, dtype, numel)


def check_reduce(rank, n):
    for root in range(n):
        for dtype in [torch.float32, torch.int64, torch.bfloat16]:
            for op in ops_of(dtype):
                for numel in (0, 1, 5, 1000):
                    x = pattern(rank, numel, dtype)
                    dist.reduce(x, root, op)
                    if rank == root:
                        same(x, reduced(op, [pattern(r, numel, dtype) for r in range(n)], dtype), "reduce", op)


def test_all_gather(hosts):
    run_torch_ranks(check_all_gather, len(hosts), DTYPES, hosts=hosts)


def check_all_gather(rank, n, dtypes):
    for dtype in dtypes:
        for numel in SIZES if dtype == torch.float32 else [0, 1, 7, 1000]:
            mine = pattern(rank, numel, dtype)
            expected = [pattern(r, numel, dtype) for r in range(n)]
            listed = [torch.empty_like(mine) for _ in range(n)]
            dist.all_gather(listed, mine)
            for r in range(n):
                same(listed[r], expected[r], "all_gather", r, dtype, numel)
            whole = torch.empty(n * numel, dtype=dtype)
            dist.all_gather_into_tensor(whole, mine)
            same(whole, torch.cat(expected), "all_gather_into_tensor", dtype, numel)
    views = torch.zeros(n, 12)
    dist.all_gather(list(views.unbind()), pattern(rank, 12))  # the outputs are rows of one tensor
    same(views, torch.stack([pattern(r, 12) for r in range(n)]), "all_gather into views")


def test_reduce_scatter(hosts):
    run_torch_ranks(check_reduce_scatter, len(hosts), hosts=hosts)


def check_reduce_scatter(rank, n):
    for dtype in [torch.float32, torch.float64, torch.bfloat16, torch.int32]:
        for op in ops_of(dtype):
            for numel in SIZES if dtype == torch.float32 else [0, 1, 7, 1000]:
                # piece p of rank r has salt p
                expected = reduced(op, [pattern(r, numel, dtype, salt=rank) for r in range(n)], dtype)
                pieces = [pattern(rank, numel, dtype, salt=p) for p in range(n)]
                out = torch.empty(numel, dtype=dtype)
                dist.reduce_scatter(out, pieces, op)
                same(out, expected, "reduce_scatter", dtype, op, numel)
                out = torch.empty(numel, dtype=dtype)
                whole = torch.cat(pieces)
                dist.reduce_scatter_tensor(out, whole, op)
                same(out, expected, "reduce_scatter_tensor", dtype, op, numel)
                same(whole, torch.cat(pieces), "reduce_scatter_tensor leaves its input")


def test_all_to_all_single(hosts):
    run_torch_ranks(check_all_to_all_single, len(hosts), DTYPES, hosts=hosts)


def check_all_to_all_single(rank, n, dtypes):
    for dtype in dtypes:
        for numel in SIZES if dtype == torch.float32 else [0, 1, 7, 1000]:
            out = torch.empty(n * numel, dtype=dtype)
            dist.all_to_all_single(out, torch.cat([pattern(rank, numel, dtype, salt=p) for p in range(n)]))
            same(out, torch.cat([pattern(r, numel, dtype, salt=rank) for r in range(n)]), dtype, numel)

    def rows(src, dst):
        return (2 * src + 3 * dst) % 4  # some of them 0

    for width in (1, 513):
        sent = [pattern(rank, rows(rank, p) * width, salt=p).view(-1, width) for p in range(n)]
        wanted = [pattern(r, rows(r, rank) * width, salt=rank).view(-1, width) for r in range(n)]
        out = torch.empty(sum(map(len, wanted)), width)
        dist.all_to_all_single(out, torch.cat(sent), [len(w) for w in wanted], [len(s) for s in sent])
        same(out, torch.cat(wanted), "uneven", width)


def test_asynchronous_collectives_finish_in_any_order_of_waiting(hosts):
    run_torch_ranks(check_async, len(hosts), hosts=hosts)


def check_async(rank, n):
    for order in (1, -1):
        tensors = [pattern(rank, numel, salt=numel) for numel in (1, 5000, 300000, 17)]
        works = [dist.all_reduce(x, async_op=True) for x in tensors]
        gathered = torch.empty(n * 1000)
        works.append(dist.all_gather_into_tensor(gathered, pattern(rank, 1000), async_op=True))
        scattered = torch.empty(1000)
        works.append(dist.reduce_scatter_tensor(scattered, pattern(rank, 1000 * n), async_op=True))
        swapped = torch.empty(4 * n)
        works.append(dist.all_to_all_single(swapped, pattern(rank, 4 * n), async_op=True))
        told = torch.full((9,), float(rank))
        works.append(dist.broadcast(told, n - 1, async_op=True))
        works.append(dist.barrier(async_op=True))
        for work in works[::order]:
            assert work.wait() is not False
        for x in tensors:
            same(x, reduced(ReduceOp.SUM, [pattern(r, len(x), salt=len(x)) for r in range(n)], x.dtype), len(x))
        same(gathered, torch.cat([pattern(r, 1000) for r in range(n)]))
        everyone = [pattern(r, 1000 * n).view(n, 1000)[rank] for r in range(n)]
        same(scattered, reduced(ReduceOp.SUM, everyone, torch.float32))
        same(swapped, torch.cat([pattern(r, 4 * n).view(n, 4)[rank] for r in range(n)]))
        same(told, torch.full((9,), float(n - 1)))

    future = dist.all_reduce(torch.ones(3), async_op=True).get_future()
    future.wait()
    doubled = dist.all_reduce(torch.ones(3), async_op=True).get_future().then(lambda f: f.value()[0] * 2)
    same(doubled.wait(), torch.full((3,), 2.0 * n))


def test_a_hundred_outstanding_works(hosts):
    run_torch_ranks(check_outstanding, len(hosts), hosts=hosts)


def check_outstanding(rank, n):
    tensors = [torch.full((i + 1,), float(rank + i)) for i in range(100)]
    works = [dist.all_reduce(x, async_op=True) for x in tensors]
    for i, (x, work) in enumerate(zip(tensors, works, strict=True)):
        work.wait()
        same(x, torch.full((i + 1,), float(sum(r + i for r in range(n)))))


def test_object_collectives(hosts):
    run_torch_ranks(check_objects, len(hosts), hosts=hosts)


def check_objects(rank, n):
    def thing(r, salt=0):
        return {"rank": r, "text": "x" * (1000 * r + salt), "tensor": torch.arange(r + 1)}

    def alike(a, b):
        return a["rank"] == b["rank"] and a["text"] == b["text"] and torch.equal(a["tensor"], b["tensor"])

    gathered = [None] * n
    dist.all_gather_object(gathered, thing(rank))
    assert all(alike(gathered[r], thing(r)) for r in range(n))
    for root in range(n):
        told = [thing(root, 3), root, None] if rank == root else [None] * 3
        dist.broadcast_object_list(told, src=root)
        assert alike(told[0], thing(root, 3)) and told[1:] == [root, None]
        gathered = [None] * n if rank == root else None
        dist.gather_object(thing(rank), gathered, dst=root)
        if rank == root:
            assert all(alike(gathered[r], thing(r)) for r in range(n))
        mine = [None]
        dist.scatter_object_list(mine, [thing(r, 5) for r in range(n)] if rank == root else [None] * n, src=root)
        assert alike(mine[0], thing(rank, 5))
    if n > 1:
        if rank == 0:
            dist.send_object_list([thing(0), "end"], dst=n - 1)
        elif rank == n - 1:
            received = [None, None]
            dist.recv_object_list(received, src=0)
            assert alike(received[0], thing(0)) and received[1] == "end"


def test_coalesced_and_functional_collectives(hosts):
    run_torch_ranks(check_coalesced, len(hosts), hosts=hosts)
    run_torch_ranks(check_functional, len(hosts), hosts=hosts)


def check_coalesced(rank, n):
    from torch.distributed.distributed_c10d import _coalescing_manager

    sizes = (3, 1000, 70001)
    for async_ops in (False, True):
        tensors = [pattern(rank, numel) for numel in sizes]
        with _coalescing_manager(async_ops=async_ops) as manager:
            for x in tensors:
                dist.all_reduce(x)
        if async_ops:
            manager.wait()
        for x in tensors:
            same(x, reduced(ReduceOp.SUM, [pattern(r, len(x)) for r in range(n)], x.dtype), async_ops)
    tensors = [pattern(rank, numel) for numel in sizes]
    dist.all_reduce_coalesced(tensors, ReduceOp.MAX)
    for x in tensors:
        same(x, reduced(ReduceOp.MAX, [pattern(r, len(x)) for r in range(n)], x.dtype))
    lists = [[torch.empty(numel) for numel in sizes] for _ in range(n)]
    dist.all_gather_coalesced(lists, [pattern(rank, numel) for numel in sizes])
    for r in range(n):
        for x in lists[r]:
            same(x, pattern(r, len(x)))


def check_functional(rank, n):
    import torch.distributed._functional_collectives as functional

    world = dist.group.WORLD
    mine = pattern(rank, 12 * n)
    expected = [pattern(r, 12 * n) for r in range(n)]
    total = torch.stack(expected).sum(0)
    same(functional.all_reduce(mine, "sum", world) + 0, total)
    same(mine, expected[rank])
    same(functional.all_gather_tensor(mine, 0, world) + 0, torch.cat(expected))
    columns = functional.all_gather_tensor(mine.view(12, n), 1, world) + 0
    same(columns, torch.cat([e.view(12, n) for e in expected], 1))
    same(functional.reduce_scatter_tensor(mine, "sum", 0, world) + 0, total.view(n, 12)[rank])
    swapped = functional.all_to_all_single(mine, None, None, world) + 0
    same(swapped, torch.cat([e.view(n, 12)[rank] for e in expected]))
    same(functional.broadcast(mine, 0, world) + 0, expected[0])
    both = functional.all_reduce_coalesced([mine, mine + 1], "sum", world)
    same(both[0] + 0, total)
    same(both[1] + 0, total + n)
    gathered = functional.all_gather_into_tensor_coalesced([mine, mine + 1], world)
    same(gathered[1] + 0, torch.cat(expected) + 1)
    scattered = functional.reduce_scatter_tensor_coalesced([mine, mine + 1], "sum", [0, 0], world)
    same(scattered[1] + 0, total.view(n, 12)[rank] + n)

    x = mine.clone().requires_grad_()
    functional.all_reduce(x, "sum", world)
    (functional.all_gather_tensor_autograd(x, 0, world) * (rank + 1)).sum().backward()
    same(x.grad, torch.full_like(x, float(sum(range(1, n + 1)))))


def test_a_futures_callback_may_wait_for_another_future(hosts):
    run_torch_ranks(check_nested_futures, len(hosts), hosts=hosts)


def check_nested_futures(rank, n):
    """PowerSGD's hook does it. Such a callback must hold up neither the bytes it waits for nor other callbacks."""

    def again(depth, group):
        def callback(future):
            x = future.value()[0]
            if depth == 0:
                return x.sum()
            return dist.all_reduce(x, group=group, async_op=True).get_future().then(again(depth - 1, group)).wait()

        return callback

    numels = (3, 100_000, 5)
    groups = [dist.new_group() for _ in numels]  # callbacks run at once; in one group their calls would have no order
    futures = [
        dist.all_reduce(torch.ones(numel), group=group, async_op=True).get_future().then(again(3, group))
        for numel, group in zip(numels, groups, strict=True)
    ]
    for future, numel in zip(futures, numels, strict=True):
        assert future.wait().item() == numel * n**4


def test_barrier_holds_until_the_last_rank_comes(hosts):
    run_torch_ranks(check_barrier, len(hosts), hosts=hosts)


def check_barrier(rank, n):
    """Each rank in turn comes late: when the others have said that they come, and some messages to the store later."""
    store = dist.distributed_c10d._get_default_store()
    for turn in range(2 * n):
        late = turn % n
        if rank == late:
            store.wait([f"{turn}: {r} comes" for r in range(n) if r != late])
            for _ in range(100):
                store.check(["nothing"])
            store.set(f"{turn}: late one comes", "")
            store.check(["nothing"])  # set() alone may return before the server has the value
        else:
            store.set(f"{turn}: {rank} comes", "")
        dist.barrier()
        assert store.check([f"{turn}: late one comes"]), f"rank {rank} left barrier {turn} before rank {late} came"
