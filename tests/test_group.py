"""Group's collectives and messages against numpy, over every layout of hosts; ranks are processes.

Inputs are small integers, so that a piece that went astray is a wrong number and never rounding noise. Ranks start once
per layout and check all that fits in it."""

import math
import random
import time

import numpy as np
import pytest
import torch
from spawn import run_ranks

import pycomm
from pycomm.errors import GroupClosed, InvalidArgument, PeerTimeout
from pycomm.planners import PLANNERS

LAYOUTS = ("a", "aa", "aaa", "aaaa", "ab", "aabb", "ababb", "aaab")  # a letter is a rank's host
FEW_LAYOUTS = ("aa", "aaa", "ab", "aabb")
REDUCING = ("all_reduce", "reduce", "reduce_scatter")
SPLIT = ("all_gather", "reduce_scatter", "gather", "scatter", "all_to_all")
NUMPY_DTYPES = tuple(
    np.dtype(name)
    for name in (
        *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "bool", "complex64", "complex128"),
    )
)
TORCH_DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.complex64, torch.complex128),
)


def run(fn, hosts, *args, **kwargs):
    return run_ranks(fn, len(hosts), *args, hosts=list(hosts), **kwargs)


# The oracle: what each rank gives, and what each must get.


def given(rank, numel, dtype=np.int32):
    values = (np.arange(numel) * 7 + rank * 3 + numel) % 5
    dtype = np.dtype(dtype)
    if dtype.kind == "c":
        return (values + 1j * ((values + rank) % 3)).astype(dtype)
    if dtype.kind == "b":
        return values % 2 == 0
    return values.astype(dtype)


def reduced(arrays, op):
    kind = arrays[0].dtype.kind
    stacked = np.stack(arrays)
    if kind in "ui":
        stacked = stacked.astype(np.int64)
    elif kind in "fc":
        stacked = stacked.astype(np.float64 if kind == "f" else np.complex128)
    if kind == "b":
        ufunc = {"sum": "or", "bor": "or", "max": "or", "product": "and", "band": "and", "min": "and", "bxor": "xor"}
        return getattr(np, f"logical_{ufunc[op]}").reduce(stacked, axis=0)
    if op == "avg":
        total = stacked.sum(axis=0)
        n = len(arrays)
        mean = (
            np.trunc(total / n)
            if kind in "ui"
            else total / n
            if kind == "f"
            else total.real / n + 1j * (total.imag / n)
        )
        return mean.astype(arrays[0].dtype)
    ufunc = {"sum": np.add, "product": np.multiply, "min": np.minimum, "max": np.maximum}
    ufunc |= {"band": np.bitwise_and, "bor": np.bitwise_or, "bxor": np.bitwise_xor}
    return ufunc[op].reduce(stacked, axis=0).astype(arrays[0].dtype)


def call(group, collective, numel, dtype=np.int32, op="sum", root=0, wrap=lambda array: array, **options):
    """One collective on given() arrays. numel: the tensor's, or where ranks have pieces one piece's. Returns
    (what came, what should have come) on ranks that get something, else None."""
    n, me = group.size, group.rank
    whole = [given(rank, numel * n, dtype) for rank in range(n)]
    pieces = [given(rank, numel, dtype) for rank in range(n)]
    fresh = np.full(numel, 3).astype(dtype)
    if collective == "all_reduce":
        x = wrap(pieces[me].copy())
        return group.all_reduce(x, op, **options), reduced(pieces, op)
    if collective == "reduce":
        x = wrap(pieces[me].copy())
        # Where this rank is not the root its x must stay as it is.
        return group.reduce(x, root, op, **options), reduced(pieces, op) if me == root else pieces[me]
    if collective == "broadcast":
        x = wrap(pieces[me].copy())
        return group.broadcast(x, root, **options), pieces[root]
    if collective == "all_gather":
        output = wrap(np.tile(fresh, n))
        return group.all_gather(output, wrap(pieces[me]), **options), np.concatenate(pieces)
    if collective == "reduce_scatter":
        expected = reduced(whole, op)[me * numel : (me + 1) * numel]
        return group.reduce_scatter(wrap(fresh), wrap(whole[me]), op, **options), expected
    if collective == "gather":
        output = wrap(np.tile(fresh, n)) if me == root else None
        result = group.gather(output, wrap(pieces[me]), root, **options)
        return (result, np.concatenate(pieces)) if me == root else None
    if collective == "scatter":
        result = group.scatter(wrap(fresh), wrap(whole[me]) if me == root else None, root, **options)
        return result, whole[root][me * numel : (me + 1) * numel]
    assert collective == "all_to_all"
    expected = np.concatenate([whole[rank][me * numel : (me + 1) * numel] for rank in range(n)])
    return group.all_to_all(wrap(np.tile(fresh, n)), wrap(whole[me]), **options), expected


def assert_call(group, collective, numel, *args, **options):
    outcome = call(group, collective, numel, *args, **options)
    if outcome is None:
        return
    got, expected = outcome
    if isinstance(got, torch.Tensor):
        got = got.float().numpy() if got.dtype == torch.bfloat16 else got.numpy()
    assert np.array_equal(got, expected), (
        f"{collective} of {numel} {args} {options} on rank {group.rank}: {np.flatnonzero(got != expected)[:5]} differ"
    )


def sizes_of(collective, n):
    """Elements of int32 around what changes the path: ranks, the board's 48 inline bytes and its 16 KiB, a ring."""
    board = 4096 // n if collective in SPLIT else 4096  # the board takes the whole tensor
    inline = 12 // n if collective in SPLIT else 12
    around = {edge + d for edge in (n, board) for d in (-1, 0, 1)} | {inline, inline + 1}
    large = 600_001 if n <= 4 else 150_001  # above a ring
    return sorted({size for size in around if size >= 0} | {0, 1, 1013, large // (n if collective in SPLIT else 1)})


@pytest.mark.parametrize("hosts", LAYOUTS)
def test_every_collective_and_algorithm_at_every_size(hosts):
    run(check_algorithms, hosts)


def check_algorithms(group):
    roots = sorted({0, group.size - 1})
    for collective, planners in PLANNERS.items():
        for algorithm in (None, *planners):
            for numel in sizes_of(collective, group.size):
                rooted = collective in ("reduce", "broadcast", "gather", "scatter") and numel < 2000
                for root in roots if rooted else (0,):
                    assert_call(group, collective, numel, root=root, algorithm=algorithm)
    group.barrier()


@pytest.mark.parametrize("hosts", ("a", *FEW_LAYOUTS))
def test_every_dtype_and_op(hosts):
    run(check_dtypes, hosts)


def check_dtypes(group):
    def as_torch(array):
        return torch.from_numpy(array)

    def as_bfloat16(array):
        return torch.from_numpy(array).to(torch.bfloat16)

    for numel in (1, 37, 20_011):
        for dtype in NUMPY_DTYPES:
            ops = ["sum", "product", "min", "max", "avg", "band", "bor", "bxor"]
            if dtype.kind == "f":
                ops = ops[:5]
            elif dtype.kind == "c":
                ops = ["sum", "avg"]
            elif dtype.kind == "b":
                ops.remove("avg")
            for collective in REDUCING:
                for op in ops:
                    assert_call(group, collective, numel, dtype, op)
            for collective in ("broadcast", *SPLIT):
                if collective not in REDUCING:
                    assert_call(group, collective, numel, dtype, root=group.size - 1, wrap=as_torch)
        for collective in REDUCING:
            for op in ("sum", "product", "min", "max"):
                assert_call(group, collective, numel, np.float32, op, wrap=as_bfloat16)
    for dtype in TORCH_DTYPES:
        x = torch.ones(3, dtype=dtype)
        assert group.all_reduce(x, "max" if not dtype.is_complex else "sum") is x


@pytest.mark.parametrize("hosts", FEW_LAYOUTS)
def test_float8_is_summed_in_float32_and_rounded_once(hosts):
    run(check_float8, hosts)


def check_float8(group):
    n, me = group.size, group.rank
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        for numel in (1, 1001, 20_011):
            # Multiples of 1/4 up to 4: exact in fp8 and in any order of fp32 sums. Of fp8 sums they would not be.
            wide = [(torch.arange(numel * n) * (r + 3) % 17 / 4) for r in range(n)]
            wide = [x.to(dtype).float() for x in wide]
            total = torch.stack(wide).sum(0)
            for op, right in (
                ("sum", total),
                ("avg", total / n),
                ("max", torch.stack(wide).amax(0)),
                ("product", torch.stack(wide).prod(0)),
            ):
                x = wide[me].to(dtype)
                group.all_reduce(x, op)
                assert torch.equal(x.float(), right.to(dtype).float()), (dtype, numel, op)
            piece = torch.empty(numel, dtype=dtype)
            work = group.reduce_scatter(piece, wide[me].to(dtype), async_op=True)
            x = wide[me].to(dtype)
            group.reduce(x, n - 1)
            work.wait()
            assert torch.equal(piece.float(), total.to(dtype).float().view(n, numel)[me])
            assert torch.equal(x.float(), total.to(dtype).float() if me == n - 1 else wide[me])
            everyone = torch.empty(numel * n * n, dtype=dtype)
            group.all_gather(everyone, wide[me].to(dtype))
            assert torch.equal(everyone.float(), torch.cat(wide))
        with pytest.raises(ValueError, match="band has no meaning for float8"):
            group.all_reduce(torch.ones(3).to(dtype), "band")


@pytest.mark.parametrize("hosts", FEW_LAYOUTS)
def test_numbers_at_the_edge(hosts):
    run(check_edges, hosts)


def check_edges(group):
    n, me = group.size, group.rank
    for numel in (5, 20_000):
        # Integers wrap; a mean truncates towards zero.
        for dtype in (np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64):
            info = np.iinfo(dtype)
            x = np.full(numel, info.max, dtype)
            with np.errstate(over="ignore"):
                expected = np.full(n, info.max, dtype).sum(dtype=dtype)
            assert (group.all_reduce(x) == expected).all()
        x = np.full(numel, -1 if me == 0 else 0, np.int32)
        assert (group.all_reduce(x, "avg") == 0).all()
        x = np.full(numel, -2 * n - 1 if me == 0 else 0, np.int64)
        assert (group.all_reduce(x, "avg") == -2).all()
        # NaN wins in min and max, whoever has it.
        for algorithm in (None, *PLANNERS["all_reduce"]):
            for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
                for op in ("min", "max"):
                    x = torch.arange(numel, dtype=torch.float64).remainder(50).to(dtype) + me
                    x[me::n] = math.nan
                    assert bool(group.all_reduce(x, op, algorithm=algorithm).isnan().all()), (algorithm, dtype, op)
            x = torch.full((numel,), math.inf if me % 2 else -math.inf)
            assert bool(group.all_reduce(x, algorithm=algorithm).isnan().all())
        # Rounded once a hop, at most n - 1 hops and one division; never worse.
        for dtype, unit in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
            inputs = [
                torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(dtype).double()
                for rank in range(n)
            ]
            magnitude = sum(x.abs() for x in inputs)
            for op, scale in (("sum", 1), ("avg", n)):
                for algorithm in (None, *PLANNERS["all_reduce"]):
                    got = group.all_reduce(inputs[me].to(dtype), op, algorithm=algorithm).double()
                    error = (got - sum(inputs) / scale).abs()
                    bound = (n - 1 + (op == "avg")) * unit * magnitude / scale * 1.01 + 2.0**-24
                    assert bool((error <= bound).all()), (dtype, op, algorithm)


@pytest.mark.parametrize("hosts", LAYOUTS[1:])
def test_results_are_the_same_bits_on_every_rank(hosts):
    run(check_bits, hosts)


def check_bits(group):
    """Any float32 at all, NaNs with payloads and both zeros too: whose operand wins must be the same everywhere."""
    rng = np.random.default_rng(group.rank)
    special = np.array([0, 0x80000000, 0x7FC00001, 0x7FC0BEEF, 0xFFC00005, 0x7F800000, 0xFF800000, 1], np.uint32)
    for algorithm in (None, *PLANNERS["all_reduce"]):
        for numel in (1, 3, 17, 5001, 20_000):
            bits = rng.integers(0, 2**32, numel, dtype=np.uint32)
            bits = np.where(rng.random(numel) < 0.5, special[rng.integers(0, len(special), numel)], bits)
            for op in ("sum", "avg", "product", "min", "max"):
                first, again = bits.copy(), bits.copy()
                group.all_reduce(first.view(np.float32), op, algorithm=algorithm)
                group.all_reduce(again.view(np.float32), op, algorithm=algorithm)
                everyone = group.all_gather(np.empty((group.size, numel), np.uint32), first)
                assert (everyone == everyone[0]).all(), (algorithm, op, numel)
                # Of two NaNs the processor takes one's payload, by its place in a register: that alone may vary.
                both_nan = np.isnan(first.view(np.float32)) & np.isnan(again.view(np.float32))
                assert ((first == again) | both_nan).all(), (
                    f"another result the second time: {algorithm}, {op}, {numel}"
                )


@pytest.mark.parametrize("hosts", ("a", *FEW_LAYOUTS, "ababb"))
def test_uneven_counts(hosts):
    run(check_counts, hosts)


def check_counts(group):
    n, me = group.size, group.rank
    rng = random.Random(n)  # the same on every rank
    for columns in (1, 3, 1000):
        for trial in range(6):
            counts = [rng.choice((0, 0, 1, 2, 7, 100)) for _ in range(n)]
            if trial == 0:
                counts = [0] * n
            begin, end = sum(counts[:me]), sum(counts[: me + 1])
            rows = [given(rank, sum(counts) * columns).reshape(-1, columns) for rank in range(n)]
            for algorithm in (None, *PLANNERS["all_gather"]):
                output = np.full_like(rows[0], -1)
                group.all_gather(output, rows[0][begin:end], counts, algorithm=algorithm)
                assert np.array_equal(output, rows[0]), (counts, algorithm)
            for algorithm in (None, *PLANNERS["reduce_scatter"]):
                output = np.full((counts[me], columns), -1, np.int32)
                group.reduce_scatter(output, rows[me], "sum", counts, algorithm=algorithm)
                assert np.array_equal(output, sum(rows)[begin:end]), (counts, algorithm)
            matrix = [[rng.choice((0, 0, 1, 5, 60)) for _ in range(n)] for _ in range(n)]  # rows from i to j
            sent = [given(rank, sum(matrix[rank]) * columns).reshape(-1, columns) for rank in range(n)]
            parts = [np.split(sent[i], np.cumsum(matrix[i])[:-1])[me] for i in range(n)]
            incoming = [matrix[i][me] for i in range(n)]
            output = np.full((sum(incoming), columns), -1, np.int32)
            group.all_to_all(output, sent[me], incoming, matrix[me])
            assert np.array_equal(output, np.concatenate(parts)), matrix


@pytest.mark.parametrize("hosts", FEW_LAYOUTS)
def test_a_random_program_of_calls(hosts):
    """What a fixed list of cases would not think of: order, sizes and kinds as they come, half of it asynchronous."""
    run(check_random_program, hosts, hash(hosts) & 0xFFFF)


def check_random_program(group, seed):
    rng = random.Random(seed)
    collectives = list(PLANNERS)
    pending = []
    for step in range(250):
        collective = rng.choice(collectives)
        numel = rng.choice((0, 1, 2, 5, 13, 100, 2047, 8192, 70_001))
        options = {
            "root": rng.randrange(group.size),
            "algorithm": rng.choice((None, None, rng.choice(list(PLANNERS[collective])))),
        }
        dtype = rng.choice((np.uint8, np.int16, np.int32, np.float64, np.complex128))
        if rng.random() < 0.5:
            assert_call(group, collective, numel, dtype, **options)
        else:
            pending.append((seed, step, call_async(group, collective, numel, dtype, **options)))
        if len(pending) > 12:
            rng.shuffle(pending)
            while len(pending) > 4:
                finish(*pending.pop())
    for entry in pending:
        finish(*entry)
    group.barrier()  # who only gives, as to a gather, has nothing to wait for, and would leave too early


@pytest.mark.parametrize("hosts", ("aa", "aaa", "aaaa"))
def test_who_only_gives_may_run_ahead(hosts):
    """Nothing is overwritten before it was read, whatever comes next: every step has values of its own."""
    run(check_running_ahead, hosts)


def check_running_ahead(group):
    n, me = group.size, group.rank
    same, own = random.Random(n), random.Random(me)
    for step in range(600):
        collective = same.choice(("broadcast", "scatter", "reduce", "gather"))
        root, numel = same.choice((0, 0, 0, n - 1)), same.choice((1, 12, 13, 512 // n, 513, 8192 // n, 20_000))
        algorithm = "tree" if same.random() < 0.03 else None
        if own.random() < 0.02:
            time.sleep(0.001)  # the others get ahead
        x, pieces = np.full(numel, step * n + me, np.int32), np.arange(n, dtype=np.int32).repeat(numel) + step * n
        output = np.full(numel * n, -1, np.int32)
        if collective == "broadcast":
            group.broadcast(x, root, algorithm=algorithm)
            assert (x == step * n + root).all(), step
        elif collective == "scatter":
            group.scatter(x, pieces if me == root else None, root)
            assert (x == step * n + me).all(), step
        elif collective == "reduce":
            group.reduce(x, root, algorithm=algorithm)
            assert (x == (step * n * n + n * (n - 1) // 2 if me == root else step * n + me)).all(), step
        else:
            group.gather(output if me == root else None, x, root)
            assert me != root or np.array_equal(output, pieces), step


def call_async(group, collective, numel, dtype, **options):
    """As call(), with async_op: (work, the array that will hold the result, what should be in it)."""
    arrays = []

    def wrap(array):
        arrays.append(array)
        return array

    outcome = call(group, collective, numel, dtype, wrap=wrap, async_op=True, **options)
    if outcome is None:
        return None, None, None
    return outcome[0], arrays[0], outcome[1]


def finish(seed, step, entry):
    work, array, expected = entry
    if work is not None:
        work.wait(timeout_s=20)
        assert work.is_completed() and np.array_equal(array, expected), (seed, step)


@pytest.mark.parametrize("hosts", FEW_LAYOUTS)
def test_asynchronous_operations(hosts):
    run(check_async, hosts)


def check_async(group):
    n, me = group.size, group.rank
    total = n * (n + 1) // 2
    tensors = [torch.full((size,), me + 1, dtype=torch.int32) for size in [3, 70_000, 0, 10_000, 12] * 10]
    works = [group.all_reduce(x, async_op=True) for x in tensors]
    for i in random.Random(me).sample(range(len(works)), len(works)):  # waited for in another order on each rank
        works[i].wait(timeout_s=20)
        assert bool((tensors[i] == total).all())
        works[i].wait()  # again is nothing
        assert works[i].is_completed() and works[i].duration_s >= 0

    # A dropped Work, and arrays that only the operation still holds, do not disturb what follows.
    for _ in range(30):
        group.all_reduce(torch.full((50_000,), 1.0), async_op=True)
        group.all_gather(np.empty((n, 5000)), np.zeros(5000), async_op=True)
    x = np.full(4, me + 1)
    assert (group.all_reduce(x) == total).all()

    # wait() that is too short raises and leaves the operation alone.
    if me == 0:
        work = group.all_reduce(x, "max", async_op=True)
        with pytest.raises(PeerTimeout, match="still under way"):
            work.wait(timeout_s=0.01)
        group.send(np.zeros(1), n - 1)
        work.wait(timeout_s=20)
    else:
        if me == n - 1:
            group.recv(np.zeros(1), 0)
        group.all_reduce(x, "max")
    assert (x == total).all()

    # Progress is made with nobody waiting.
    work = group.all_reduce(np.zeros(100_000), async_op=True)
    while not work.is_completed():
        pass
    group.barrier(async_op=True).wait()


@pytest.mark.parametrize("hosts", ("aa", "aabb", "aaab"))
def test_groups_of_fewer_ranks(hosts):
    run(check_groups, hosts)


def check_groups(group):
    n, me = group.size, group.rank
    backwards = group.new_group(range(n - 1, -1, -1))
    assert (backwards.rank, backwards.size, backwards.host_ids) == (n - 1 - me, n, group.host_ids[::-1])
    order = backwards.all_gather(np.empty(n, np.int64), np.array([me]))
    assert order.tolist() == list(range(n - 1, -1, -1))

    alone = group.new_group([0], name="alone")
    assert (alone is None) == (me != 0)
    if alone is not None:
        assert alone.name == "alone" and alone.size == 1
        assert alone.all_reduce(np.array([7])).tolist() == [7]
        alone.close()

    halves = group.split(me % 2, key=-me)  # backwards again
    members = [rank for rank in range(n - 1, -1, -1) if rank % 2 == me % 2]
    assert halves.size == len(members) and members[halves.rank] == me
    got = halves.all_gather(np.empty(len(members), np.int64), np.array([me]))
    assert got.tolist() == members
    assert group.split(None if me == 0 else 5) is None or me != 0

    # A sub-group of a sub-group of a sub-group numbers ranks by itself.
    inner = backwards.new_group([1, 0])
    if inner is not None:
        innermost = inner.split(0, key=-inner.rank)
        assert innermost.rank == 1 - inner.rank
        x = np.array([me])
        assert (innermost.all_reduce(x) == n - 1 + n - 2).all()
        assert innermost.host_ids == (group.host_ids[n - 1], group.host_ids[n - 2])
        innermost.close()
        inner.close()

    # One group closes; the others go on, an operation under way among them.
    x = np.full(200_000, 1)
    work = group.all_reduce(x, async_op=True)
    halves.close()
    work.wait()
    assert (x == n).all()
    with pytest.raises(GroupClosed, match="it was closed"):
        halves.barrier()
    halves.close()  # again is nothing
    assert (group.all_reduce(np.ones(3)) == n).all()
    for wrong in ([], [0, 0], [n], [-1]):
        with pytest.raises(InvalidArgument, match="not distinct ranks"):
            group.new_group(wrong)
    with group.new_group(range(n)) as temporary:
        temporary.barrier()
    with pytest.raises(GroupClosed):
        temporary.barrier()
    group.barrier()


@pytest.mark.parametrize("hosts", ("aa", "ab"))
def test_closing_one_group_does_not_wait_for_another(hosts):
    run(check_close_beside_a_receive, hosts)


def check_close_beside_a_receive(group):
    other = group.new_group([0, 1])
    if group.rank == 0:
        x = np.zeros(1)
        work = group.recv(x, 1, async_op=True)
        moving = other.recv(np.zeros(300_000), 1, async_op=True)  # the progress thread is at work for sure
        moving.wait()
        other.close()  # while the receive is open
        group.send(x, 1)
        work.wait()
        assert x == [7]
    else:
        other.send(np.zeros(300_000), 0)
        group.recv(np.zeros(1), 0)
        group.send(np.array([7.0]), 0)


@pytest.mark.parametrize("hosts", ("aa", "aaa", "aabb"))
def test_a_rank_that_did_its_part_may_leave(hosts):
    """Whoever is early and closes has sent all it owes; who still waits for a late one must not call it lost."""
    run(check_leaving_early, hosts)


def check_leaving_early(group):
    n, me = group.size, group.rank
    for algorithm in PLANNERS["reduce"]:
        for late in range(1, n):
            x = np.ones(700, np.int32)
            with group.new_group(range(n)) as brief:
                if me == late:  # comes when whoever could end without it has left
                    for rank in range(n):
                        if rank != me:
                            group.recv(np.zeros(1), rank, tag=1)
                    brief.reduce(x, algorithm=algorithm)
                else:
                    work = brief.reduce(x, algorithm=algorithm, async_op=True)
                    try:
                        work.wait(timeout_s=0.05)
                        brief.close()
                    except PeerTimeout:
                        pass
                    group.send(np.zeros(1), late, tag=1)
                    work.wait()
                    assert me != 0 or (x == n).all()
            group.barrier()


@pytest.mark.parametrize("hosts", ("aa", "ab"))
def test_a_group_that_is_forgotten_at_once(hosts):
    """Groups, works and arrays let go of in the middle of operations: no rank may hang in a destructor."""
    run(check_forgotten, hosts)


def check_forgotten(group):
    for _ in range(40):
        brief = group.new_group([0, 1])
        for _ in range(3):
            brief.all_reduce(np.ones(30_000, np.float32), async_op=True)
            brief.recv(np.ones(3), async_op=True)
        group.barrier()  # both ranks have the group, and their part of it on the way
        del brief
    assert (group.all_reduce(np.ones(5)) == 2).all()


@pytest.mark.parametrize("hosts", ("aaaa", "aabb", "ababb"))
def test_bytes_sent_are_counted(hosts):
    run(check_stats, hosts)


def check_stats(group):
    n, me, hosts = group.size, group.rank, group.host_ids
    numel = 60 * 4096
    nbytes = numel * 4
    hello = 64  # what each link says ahead

    def sent(algorithm):
        before = group.stats()
        group.all_reduce(np.ones(numel, np.float32), algorithm=algorithm)
        after = group.stats()
        assert after.ops == before.ops + 1 and after.busy_s > before.busy_s
        return np.array(
            [
                after.bytes_inside_hosts - before.bytes_inside_hosts,
                after.bytes_between_hosts - before.bytes_between_hosts,
            ]
        )

    inside, between = sent("ring")
    assert 0 <= inside + between - 2 * nbytes * (n - 1) // n <= 2 * hello

    counts = group.all_gather(np.empty((n, 2), np.int64), sent("hierarchical"))
    names = sorted(set(hosts))
    if [hosts.count(name) for name in names] == [2, 2]:
        for name in names:
            crossed = sum(int(counts[rank, 1]) for rank in range(n) if hosts[rank] == name)
            exact = 2 * nbytes * (len(names) - 1) // len(names)
            assert exact <= crossed <= exact * 1.02, (name, crossed, exact)
    if len(names) == 1:
        assert counts[me, 1] == 0
    before = group.stats()
    group.close()
    after = group.stats()
    assert (after.bytes_inside_hosts, after.bytes_between_hosts) == (
        before.bytes_inside_hosts,
        before.bytes_between_hosts,
    )


# Messages.


@pytest.mark.parametrize("hosts", ("aa", "ab", "aabb"))
def test_messages(hosts):
    run(check_messages, hosts)


def numbered(numel, salt):
    return (np.arange(numel, dtype=np.int64) * 3 + salt) % 1009


def check_messages(group):
    n, me = group.size, group.rank
    last = n - 1
    # Big and small, tags in any order, more than a ring and a socket hold.
    sizes = [300_000, 1, 0, 5000, 70_000, 3, 130_000, 12]
    if me == 0:
        works = [group.send(numbered(size, tag), last, tag, async_op=True) for tag, size in enumerate(sizes)]
        for work in works:
            work.wait(timeout_s=20)
    elif me == last:
        for tag in (7, 1, 0, 6, 2, 5, 3, 4):
            x = np.empty(sizes[tag], np.int64)
            assert group.recv(x, 0, tag) == 0
            assert np.array_equal(x, numbered(sizes[tag], tag)), tag

    # Asked for while it is being set aside for another tag that was asked for first.
    group.barrier()
    if me == 0:
        works = [group.send(numbered(size, 5), last, tag, async_op=True) for tag, size in ((1, 1_000_000), (2, 3))]
        group.barrier()
        for work in works:
            work.wait(timeout_s=20)
    else:
        group.barrier()  # as much as fits is under way
        if me == last:
            small, big = np.empty(3, np.int64), np.empty(1_000_000, np.int64)
            works = [group.recv(small, 0, 2, async_op=True), group.recv(big, 0, 1, async_op=True)]
            for work in works:
                work.wait(timeout_s=20)
                assert work.source == 0
            assert np.array_equal(small, numbered(3, 5)) and np.array_equal(big, numbered(1_000_000, 5))

    # From any rank: everyone but 0 sends two; what comes says who sent it, and each sender's own order holds.
    group.barrier()
    if me == 0:
        seen = dict.fromkeys(range(1, n), 0)
        for _ in range(2 * (n - 1)):
            x = np.empty(2, np.int64)
            source = group.recv(x, tag=9)
            assert x.tolist() == [source, seen[source]]
            seen[source] += 1
        assert set(seen.values()) == {2}
    else:
        for i in range(2):
            group.send(np.array([me, i]), 0, tag=9)

    # Thousands both ways at once; nobody receives before it has sent all.
    group.barrier()
    right, left = (me + 1) % n, (me - 1) % n
    works = [group.send(np.array([i, me]), right, async_op=True) for i in range(3000)]
    x = np.empty((3000, 2), np.int64)
    works += [group.recv(row, left, async_op=True) for row in x]
    for work in works:
        work.wait(timeout_s=20)
    assert np.array_equal(x, np.column_stack([np.arange(3000), np.full(3000, left)]))

    # Of another size than asked for: the receiver hears of it, the stream stays whole.
    if me == 0:
        for size in (5, 100_000, 2):
            group.send(numbered(size, 1), last, tag=4)
    elif me == last:
        for size in (6, 3):
            with pytest.raises(InvalidArgument, match="Both sides must give tensors of one size"):
                group.recv(np.empty(size, np.int64), 0, tag=4)
        x = np.empty(2, np.int64)
        group.recv(x, 0, tag=4)
        assert np.array_equal(x, numbered(2, 1))

    for call, pattern in (
        (lambda: group.send(np.zeros(1), me), "cannot send to rank"),
        (lambda: group.recv(np.zeros(1), me), "cannot receive from rank"),
        (lambda: group.send(np.zeros(1), n), "cannot send to rank"),
        (lambda: group.recv(np.zeros(1), n), "cannot receive from rank"),
        (lambda: group.recv(np.zeros(1), -1), "give a rank, or None"),
    ):
        with pytest.raises(InvalidArgument, match=pattern):
            call()
    group.barrier()


@pytest.mark.parametrize("hosts", ("aa", "ab", "aabb"))
def test_messages_and_collectives_do_not_wait_for_each_other(hosts):
    run(check_lanes, hosts)


def check_lanes(group):
    n, me = group.size, group.rank
    right, left = (me + 1) % n, (me - 1) % n
    inbox = np.empty((20, 50_000))
    works = [group.recv(row, left, tag=i, async_op=True) for i, row in enumerate(inbox)]
    for i in range(20):
        assert (group.all_reduce(np.ones(60_000)) == n).all()
        works.append(group.send(np.full(50_000, float(i + me)), right, tag=i, async_op=True))
    for work in works:
        work.wait(timeout_s=20)
    assert (inbox == np.arange(20)[:, None] + left).all()


@pytest.mark.parametrize("hosts", ("aaa", "abb", "aabb", "ababb"))
def test_a_barrier_waits_for_every_rank(hosts):
    run(check_barrier, hosts)


def check_barrier(group):
    store = group._store
    for trial in range(3):
        for late in range(group.size):
            key = f"rank {late} enters barrier {trial}"
            if group.rank == late:
                time.sleep(0.01)  # only so that the others are there first
                store.set(key, "")
            group.barrier()
            assert store.check([key]), f"rank {group.rank} left before rank {late} came"


def test_init_twice_on_one_store():
    run(check_init_again, "ab")


def check_init_again(group):
    store = group._store.underlying_store
    with pycomm.init(store, group.rank, group.size, name="second", timeout_s=20) as second:
        assert (second.all_reduce(np.ones(2)) == 2).all()
        assert second.name == "second"
    assert (group.all_reduce(np.ones(2)) == 2).all()


def test_explain_and_the_choice_are_of_one_mind():
    run(check_explain, "aabb")
    run(check_explain, "aa")


def check_explain(group):
    for collective in PLANNERS:
        for nbytes in (8, 1 << 20):
            text = group.explain(collective, nbytes)
            assert collective in text
    group.barrier()
