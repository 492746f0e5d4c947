"""Large collectives of one host, over the stages and in place, at the sizes where their blocks, slots and stages end.

Every mix of ordinary and shared memory takes one of the two ways (csrc/cpu/large.h), and both must give the same."""

import itertools
import random
import time

import numpy as np
import pytest
import torch
from spawn import run_ranks

import pycomm

SLOT, STAGE = 64 * 1024, 2 << 20
EDGES = (SLOT // 2, SLOT, 4 * SLOT, STAGE)  # bytes
NUMELS = sorted({8193, *(edge // 4 + d for edge in EDGES for d in (-1, 0, 1)), 3 * STAGE // 4 + 77})


def values(rank, numel):
    return (np.arange(numel) % 1009 + 5000 * rank).astype(np.int32)


def array(group, numel, shared):
    """Uninitialised; in the heap where `shared` says so."""
    return group.empty(numel, dtype=torch.int32).numpy() if shared else np.empty(numel, np.int32)


def filled(group, numel, shared, rank=None):
    x = array(group, numel, shared)
    x[:] = values(group.rank if rank is None else rank, numel)
    return x


@pytest.mark.parametrize("n_ranks", [2, 3, 4, 5])
def test_even_collectives(n_ranks):
    run_ranks(check_even, n_ranks, hosts=["a"] * n_ranks)


def check_even(group):
    n, me = group.size, group.rank
    draw = random.Random(n)  # the same on every rank
    for numel, root in itertools.product(NUMELS, (0, n - 1)):
        shared = [draw.choice((False, True, "mixed")) for _ in range(8)]
        own = [s if s != "mixed" else bool((me + i) % 2) for i, s in enumerate(shared)]
        numel = numel // n * n
        piece = numel // n
        everyone = [values(rank, numel) for rank in range(n)]
        total = np.sum(everyone, axis=0, dtype=np.int32)

        x = filled(group, numel, own[0])
        group.all_reduce(x)
        np.testing.assert_array_equal(x, total)
        group.all_reduce(x, "max")
        np.testing.assert_array_equal(x, total)

        x = filled(group, numel, own[1])
        group.reduce(x, root)
        np.testing.assert_array_equal(x, total if me == root else everyone[me])

        x = filled(group, numel, own[2])
        group.broadcast(x, root)
        np.testing.assert_array_equal(x, everyone[root])

        out = array(group, piece, own[3])
        group.reduce_scatter(out, filled(group, numel, own[4]))
        np.testing.assert_array_equal(out, total[me * piece : (me + 1) * piece])
        x = filled(group, numel, own[4])  # in place
        group.reduce_scatter(x[me * piece : (me + 1) * piece], x)
        np.testing.assert_array_equal(x[me * piece : (me + 1) * piece], total[me * piece : (me + 1) * piece])

        gathered = np.concatenate([e[:piece] for e in everyone])
        out = array(group, numel, own[5])
        group.all_gather(out, filled(group, piece, own[6]))
        np.testing.assert_array_equal(out, gathered)
        x = array(group, numel, own[5])
        x[me * piece : (me + 1) * piece] = values(me, piece)
        group.all_gather(x, x[me * piece : (me + 1) * piece])
        np.testing.assert_array_equal(x, gathered)
        out = array(group, numel, own[5]) if me == root else None
        group.gather(out, filled(group, piece, own[6]), root)
        if me == root:
            np.testing.assert_array_equal(out, gathered)

        out = array(group, piece, own[7])
        group.scatter(out, filled(group, numel, own[0]) if me == root else None, root)
        np.testing.assert_array_equal(out, everyone[root][me * piece : (me + 1) * piece])

        out = array(group, numel, own[1])
        group.all_to_all(out, filled(group, numel, own[2]))
        np.testing.assert_array_equal(out, np.concatenate([e[me * piece : (me + 1) * piece] for e in everyone]))


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
def test_uneven_collectives(n_ranks):
    run_ranks(check_uneven, n_ranks, hosts=["a"] * n_ranks)


def check_uneven(group):
    n, me = group.size, group.rank
    draw = random.Random(n)
    for most in (10, SLOT // 4, STAGE // 4 + 99):
        counts = [[draw.choice((0, 1, most, draw.randrange(most))) for _ in range(n)] for _ in range(n)]
        sizes = counts[0]
        own = [bool(draw.getrandbits(1)) for _ in range(4)]
        begin = sum(sizes[:me])
        everyone = [values(rank, sum(sizes)) for rank in range(n)]
        out = array(group, sizes[me], own[0])
        group.reduce_scatter(out, filled(group, sum(sizes), own[1]), counts=sizes)
        np.testing.assert_array_equal(out, np.sum(everyone, axis=0, dtype=np.int32)[begin : begin + sizes[me]])
        out = array(group, sum(sizes), own[2])
        group.all_gather(out, filled(group, sizes[me], own[3]), counts=sizes)
        np.testing.assert_array_equal(out, np.concatenate([values(rank, sizes[rank]) for rank in range(n)]))

        received = [counts[rank][me] for rank in range(n)]
        out = array(group, sum(received), own[0])
        group.all_to_all(out, filled(group, sum(counts[me]), own[1]), received, counts[me])
        expected = []
        for rank in range(n):
            start = sum(counts[rank][:me])
            expected.append(values(rank, sum(counts[rank]))[start : start + received[rank]])
        np.testing.assert_array_equal(out, np.concatenate(expected))


def test_input_and_output_that_overlap():
    run_ranks(check_overlap, 2, hosts=["a"] * 2)


def check_overlap(group):
    n, me = group.size, group.rank
    for shared in (False, True):
        piece = 3 * SLOT
        x = filled(group, 2 * n * piece, shared)
        whole = [values(rank, 2 * n * piece) for rank in range(n)]
        group.all_gather(x[7 : 7 + n * piece], x[:piece])  # the input lies across two pieces of the output
        np.testing.assert_array_equal(x[7 : 7 + n * piece], np.concatenate([w[:piece] for w in whole]))
        x = filled(group, 2 * n * piece, shared)
        group.all_to_all(x[: n * piece], x[: n * piece])
        np.testing.assert_array_equal(x[: n * piece], np.concatenate([w[me * piece : (me + 1) * piece] for w in whole]))


def test_large_messages_to_and_from_the_heap():
    run_ranks(check_messages, 3, hosts=["a"] * 3)


def check_messages(group):
    n, me = group.size, group.rank
    to, source = (me + 1) % n, (me - 1) % n
    for numel, sends, takes in itertools.product(NUMELS, (False, True), (False, True)):
        x = filled(group, numel, sends)
        y = array(group, numel, takes)
        work = group.send(x, to, tag=numel, async_op=True)
        assert group.recv(y, None, tag=numel) == source
        work.wait()
        np.testing.assert_array_equal(y, values(source, numel))


def fill_the_ring_then_offer(group):
    n_small, small, large = 64, (32768 - 64) // 8, 1 << 20  # with their headers, just what the ring holds
    if group.rank == 0:
        sends = [group.send(np.full(small, float(i)), 1, async_op=True) for i in range(n_small)]
        x = pycomm.empty(large)
        x.fill_(7)
        sends.append(group.send(x, 1, async_op=True))
        time.sleep(0.3)  # the progress thread tries again and again meanwhile
        group.barrier()
        for send in sends:
            send.wait()
        return True
    group.barrier()
    got, part = [], np.zeros(small)
    for _ in range(n_small):
        group.recv(part, 0)
        got.append(part[0])
    x = np.zeros(large, np.float32)
    group.recv(x, 0)
    return got == [float(i) for i in range(n_small)] and bool((x == 7).all())


def test_an_offer_behind_a_full_ring_is_made_once():
    assert run_ranks(fill_the_ring_then_offer, 2, op_timeout_s=10) == [True, True]
