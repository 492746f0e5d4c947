"""What torch.distributed offers on CPU tensors and Gloo refuses: lists in all_to_all, averages, uneven pieces, fp8."""

import pytest
import test_torch_collectives as usual
import torch
import torch.distributed as dist
from test_torch_collectives import LAYOUTS, pattern, reduced, same
from torch_ranks import run_torch_ranks

RARE_DTYPES = [torch.int16, torch.complex64, torch.complex128]
ReduceOp = dist.ReduceOp


@pytest.fixture(params=["2 ranks", "2+1", "2x2"])
def hosts(request):
    return LAYOUTS[request.param]


def test_every_dtype_moves(hosts):
    run_torch_ranks(check_moves, len(hosts), hosts=hosts)


def check_moves(rank, n):
    usual.check_moving_from_and_to_a_root(rank, n, RARE_DTYPES)
    usual.check_all_gather(rank, n, RARE_DTYPES)
    usual.check_all_to_all_single(rank, n, RARE_DTYPES)


def test_all_to_all_with_lists(hosts):
    run_torch_ranks(check_all_to_all, len(hosts), hosts=hosts)


def check_all_to_all(rank, n):
    def numel(src, dst, size):
        return size * ((src + 2 * dst) % 3)  # each pair its own, some of them 0

    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        for size in (1, 7, 30_001):
            sent = [pattern(rank, numel(rank, p, size), dtype, salt=p) for p in range(n)]
            received = [torch.empty(numel(r, rank, size), dtype=dtype) for r in range(n)]
            dist.all_to_all(received, sent)
            for r in range(n):
                same(received[r], pattern(r, numel(r, rank, size), dtype, salt=rank), r, dtype, size)
    sent = [torch.full((2, p + 1), float(rank)) for p in range(n)]
    received = [torch.empty(2, rank + 1) for _ in range(n)]
    dist.all_to_all(received, sent, async_op=True).wait()
    for r in range(n):
        same(received[r], torch.full((2, rank + 1), float(r)))


def test_averages(hosts):
    run_torch_ranks(check_average, len(hosts), hosts=hosts)


def check_average(rank, n):
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x = pattern(rank, 1000, dtype)
        dist.all_reduce(x, ReduceOp.AVG)
        total = reduced(ReduceOp.SUM, [pattern(r, 1000) for r in range(n)], torch.float64)
        torch.testing.assert_close(x, (total / n).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
        out = torch.empty(500, dtype=dtype)
        whole = torch.cat([pattern(rank, 500, dtype, salt=p) for p in range(n)])
        dist.reduce_scatter_tensor(out, whole, ReduceOp.AVG)
        total = reduced(ReduceOp.SUM, [pattern(r, 500, salt=rank) for r in range(n)], torch.float64)
        torch.testing.assert_close(out, (total / n).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_pieces_of_unequal_sizes(hosts):
    run_torch_ranks(check_uneven, len(hosts), hosts=hosts)


def check_uneven(rank, n):
    numels = [5000 * (r % 2) + r for r in range(n)]
    gathered = [torch.empty(numel) for numel in numels]
    dist.all_gather(gathered, pattern(rank, numels[rank]))
    for r in range(n):
        same(gathered[r], pattern(r, numels[r]))
    out = torch.empty(numels[rank])
    dist.reduce_scatter(out, [pattern(rank, numel, salt=p) for p, numel in enumerate(numels)])
    same(out, reduced(ReduceOp.SUM, [pattern(r, numels[rank], salt=rank) for r in range(n)], torch.float32))


def test_stacked_and_strided_tensors_and_completion(hosts):
    run_torch_ranks(check_stacked, len(hosts), hosts=hosts)


def check_stacked(rank, n):
    for numel in (0, 1, 1000):
        stacked = torch.empty(n, numel)
        dist.all_gather_into_tensor(stacked, pattern(rank, numel))
        same(stacked, torch.stack([pattern(r, numel) for r in range(n)]))
        out = torch.empty(numel)
        dist.reduce_scatter_tensor(out, torch.stack([pattern(rank, numel, salt=p) for p in range(n)]))
        same(out, reduced(ReduceOp.SUM, [pattern(r, numel, salt=rank) for r in range(n)], torch.float32))
    matrix = torch.stack([pattern(rank, 100, salt=p) for p in range(3)], 1)
    dist.all_reduce(matrix[:, 1])  # elements that do not lie together
    expected = [torch.stack([pattern(r, 100, salt=p) for p in range(3)], 1) for r in range(n)]
    same(matrix[:, 1], torch.stack(expected).sum(0)[:, 1])
    same(matrix[:, [0, 2]], expected[rank][:, [0, 2]])
    for start in (
        lambda: dist.all_reduce(torch.ones(5), async_op=True),
        lambda: dist.broadcast(torch.ones(5), 0, async_op=True),
        lambda: dist.barrier(async_op=True),
        lambda: dist.all_gather_into_tensor(torch.ones(5 * n), torch.ones(5), async_op=True),
    ):
        work = start()
        work.wait()
        assert work.is_completed()


def test_coalesced_gathers_and_scatters(hosts):
    run_torch_ranks(check_coalesced, len(hosts), hosts=hosts)


def check_coalesced(rank, n):
    from torch.distributed.distributed_c10d import _coalescing_manager

    sizes = (3, 1000, 70_001)
    gathered = [torch.empty(n * numel) for numel in sizes]
    with _coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        for out, numel in zip(gathered, sizes, strict=True):
            dist.all_gather_into_tensor(out, pattern(rank, numel))
    manager.wait()
    scattered = [torch.empty(numel) for numel in sizes]
    with _coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        for out, numel in zip(scattered, sizes, strict=True):
            dist.reduce_scatter_tensor(out, torch.cat([pattern(rank, numel, salt=p) for p in range(n)]))
    manager.wait()
    for numel, g, s in zip(sizes, gathered, scattered, strict=True):
        same(g, torch.cat([pattern(r, numel) for r in range(n)]))
        same(s, reduced(ReduceOp.SUM, [pattern(r, numel, salt=rank) for r in range(n)], torch.float32))


def test_sums_of_premultiplied_inputs(hosts):
    run_torch_ranks(check_premultiplied, len(hosts), hosts=hosts)


def check_premultiplied(rank, n):
    doubled, halved = dist._make_nccl_premul_sum(2.0), dist._make_nccl_premul_sum(torch.tensor([0.5]))
    for numel in (1, 1000, 30_001):
        whole, ranks = torch.arange(float(numel * n)) % 97, sum(range(n))
        x = whole + rank
        dist.all_reduce(x, doubled)
        assert torch.equal(x, 2 * (n * whole + ranks))
        piece = torch.empty(numel)
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(piece, whole + rank, doubled)
        assert torch.equal(piece, 2 * (n * whole + ranks)[rank * numel :][:numel])
        x = whole + rank
        dist.reduce(x, n - 1, halved)
        assert torch.equal(x, (n * whole + ranks) / 2 if rank == n - 1 else whole + rank)


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def test_float8_moves_and_is_summed_in_float32(hosts):
    run_torch_ranks(check_float8, len(hosts), hosts=hosts)


def check_float8(rank, n):
    for dtype in FLOAT8:
        for numel in (1, 7, 1000, 30_001):
            # Sums that fp8 does not hold, so that a rounding at every hop would show.
            inputs = [
                (torch.randn(numel * n, generator=torch.Generator().manual_seed(r)) * 3).to(dtype) for r in range(n)
            ]
            wide = torch.stack([x.float() for x in inputs])
            expected = {
                ReduceOp.SUM: wide.cumsum(0)[-1].to(dtype),
                ReduceOp.AVG: (wide.cumsum(0)[-1] / n).to(dtype),
                ReduceOp.MAX: wide.amax(0).to(dtype),
                ReduceOp.MIN: wide.amin(0).to(dtype),
            }
            for op, right in expected.items():
                x = inputs[rank].clone()
                dist.all_reduce(x, op)
                close_float8(x, right, op)
                piece = torch.empty(numel, dtype=dtype)
                dist.reduce_scatter_tensor(piece, inputs[rank], op)
                close_float8(piece, right.view(n, numel)[rank], op)
            x = inputs[rank].clone()
            dist.reduce(x, n - 1)
            close_float8(x, expected[ReduceOp.SUM] if rank == n - 1 else inputs[rank], "reduce")
            everyone = torch.empty(n * numel * n, dtype=dtype)
            dist.all_gather_into_tensor(everyone, inputs[rank])
            assert torch.equal(everyone.view(torch.uint8), torch.cat(inputs).view(torch.uint8))
        swapped = [torch.empty(3, dtype=dtype) for _ in range(n)]
        dist.all_to_all(swapped, [torch.full((3,), float(rank - to)).to(dtype) for to in range(n)])
        assert [x.float().tolist() for x in swapped] == [[float(r - rank)] * 3 for r in range(n)]
    x = torch.tensor([400.0, -400.0, 1.0]).to(torch.float8_e4m3fn)
    dist.all_reduce(x)  # 800 is beyond e4m3fn: NaN, as torch casts it
    assert x.float().isnan().tolist() == [True, True, False] and x.float()[2] == n
    x = torch.full((4,), 2.0).to(torch.float8_e5m2fnuz)
    dist.broadcast(x, 0)  # the others move, and are not summed
    if rank == 0:
        with pytest.raises(RuntimeError, match="no meaning for bytes"):
            dist.all_reduce(x)


def close_float8(x, right, what):
    """Equal but where the order of fp32 sums decides a tie."""
    x, right = x.float(), right.float()
    assert (x == right).float().mean() > 0.99, what
    assert torch.all((x - right).abs() <= right.abs() / 4 + 1e-6), what


def test_lists_that_lie_in_one_tensor_and_lists_that_do_not(hosts):
    run_torch_ranks(check_adjacent, len(hosts), hosts=hosts)


def check_adjacent(rank, n):
    """chunk() gives pieces of one tensor, which go without a copy; the right bytes arrive also in a shuffled list."""
    for order in (list(range(n)), list(reversed(range(n)))):
        whole = torch.empty(n, 1000)
        dist.all_gather([whole[i] for i in order], pattern(rank, 1000))
        same(whole[order], torch.stack([pattern(r, 1000) for r in range(n)]))
        source, target = torch.stack([pattern(rank, 1000, salt=p) for p in range(n)]), torch.empty(n, 1000)
        dist.all_to_all([target[i] for i in order], list(source))
        same(target[order], torch.stack([pattern(r, 1000, salt=rank) for r in range(n)]))
        out = torch.empty(1000)
        dist.reduce_scatter(out, [source[i] for i in order])
        mine = [pattern(r, 1000, salt=order[rank]) for r in range(n)]
        same(out, reduced(ReduceOp.SUM, mine, torch.float32))
        scattered = torch.empty(1000)
        dist.scatter(scattered, [source[i] for i in order] if rank == n - 1 else None, src=n - 1)
        same(scattered, pattern(n - 1, 1000, salt=order[rank]))
        places = torch.empty(n, 1000)
        dist.gather(pattern(rank, 1000), [places[i] for i in order] if rank == 0 else None)
        if rank == 0:
            same(places[order], torch.stack([pattern(r, 1000) for r in range(n)]))
