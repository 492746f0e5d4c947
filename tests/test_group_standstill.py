"""Ranks that wait for each other in different groups: a CollectiveMismatch names the circle, long before the deadline.

What only looks like it is left alone: a thread that comes late, work under way elsewhere, a deadline meant to pass."""

import threading
import time

import numpy as np
import pytest
import torch
from spawn import run_ranks

from pycomm.errors import CollectiveMismatch, PeerTimeout

LONG_S = 1.5  # of waiting: three times what it takes to find a circle


def run(fn, n_ranks, *args):
    run_ranks(fn, n_ranks, *args)


@pytest.mark.parametrize("started", (False, True))
@pytest.mark.parametrize("numel", (3, 100_000))
@pytest.mark.parametrize("n_ranks", (2, 3))
def test_groups_called_in_another_order(n_ranks, numel, started):
    run(check_order, n_ranks, numel, started)


def check_order(group, numel, started):
    """Of n groups of two neighbours each rank calls its own first, and waits in it for the next rank."""
    n, me = group.size, group.rank
    pairs = {(i, (i + 1) % n): group.new_group(sorted({i, (i + 1) % n}), f"g{i}") for i in range(n)}
    mine = pairs[me, (me + 1) % n]
    for pair in pairs.values():
        if pair is not None:
            pair.barrier()
    with pytest.raises(CollectiveMismatch) as raised:
        if started:
            mine.all_reduce(np.zeros(numel), async_op=True).wait()
        else:
            mine.all_reduce(np.zeros(numel))
    text = str(raised.value)
    for rank in range(n):
        assert f"waits in all_reduce #1 (sum, float64, {numel} elements, native) of group 'g{rank}'" in text
        assert f"for rank {rank}" in text
    group.barrier()


def test_what_only_looks_like_a_standstill():
    run(check_no_standstill, 2)


def check_no_standstill(group):
    me = group.rank
    a, b = (group.new_group([0, 1], name) for name in "ab")
    first, second = (a, b) if me == 0 else (b, a)
    x = np.ones(3)

    # Another thread comes, late: it never called before.
    def later():
        time.sleep(LONG_S)
        second.all_reduce(x.copy())

    thread = threading.Thread(target=later)
    thread.start()
    first.all_reduce(x.copy())
    thread.join()
    a.close()
    b.close()


def test_work_under_way_elsewhere_is_no_standstill():
    run(check_work_under_way, 2)


def check_work_under_way(group):
    me = group.rank
    a, b = (group.new_group([0, 1], name) for name in "ab")
    first, second = (a, b) if me == 0 else (b, a)
    work = second.all_reduce(np.ones(3), async_op=True)
    assert (first.all_reduce(np.ones(3)) == 2).all()
    work.wait()
    # One rank computes, meanwhile the other waits.
    if me == 0:
        time.sleep(LONG_S)
    a.barrier()
    # A deadline that is meant to pass.
    if me == 0:
        with pytest.raises(PeerTimeout):
            a.barrier(timeout_s=LONG_S)
    b.barrier()
    # A wait that is given up and comes back.
    c = group.new_group([0, 1], "c")
    if me == 0:
        work = c.all_reduce(np.ones(3), async_op=True)
        with pytest.raises(PeerTimeout):
            work.wait(timeout_s=LONG_S)
        b.barrier()
        work.wait()
    else:
        b.barrier()
        c.all_reduce(np.ones(3))
    # A message: whoever waits for it may give up alone.
    if me == 0:
        with pytest.raises(PeerTimeout):
            b.recv(torch.zeros(1), 1, timeout_s=LONG_S)
    b.barrier()
