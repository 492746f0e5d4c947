"""Ranks as threads of one process, over stores of every kind, and one rank's group used by several threads."""

import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as c10d
import torch_ranks  # noqa: F401  (its RES_OPTIONS serve the TCPStore here too)

import pycomm
from pycomm.errors import GroupClosed, PeerLost, PeerTimeout, PycommError

LAYOUTS = ("a", "aa", "aaaa", "ab", "aabb", "ababb")


def run_threads(fn, hosts, store, timeout_s=20):
    """What fn(group) returned, by rank, each in a thread of its own."""
    results = [None] * len(hosts)
    errors = {}

    def rank_main(rank):
        try:
            own = store() if callable(store) else store
            with pycomm.init(own, rank, len(hosts), host_id=hosts[rank], timeout_s=timeout_s) as group:
                results[rank] = fn(group)
        except BaseException as error:
            errors[rank] = error

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(len(hosts))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 300
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), f"hangs; {errors}"
    if errors:
        raise next(iter(errors.values()))
    return results


def several(*works):
    """Runs each in a thread of its own and raises what one of them raised."""
    errors = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert not any(thread.is_alive() for thread in threads), errors
    if errors:
        raise errors[0]


@pytest.fixture(params=["HashStore", "FileStore", "TCPStore"])
def store(request, tmp_path):
    if request.param == "HashStore":
        return c10d.HashStore()
    if request.param == "FileStore":
        return lambda: c10d.FileStore(str(tmp_path / "store"), -1)
    return c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.mark.parametrize("hosts", LAYOUTS)
def test_threads_are_ranks_as_processes_are(hosts, store):
    def body(group):
        n, me = group.size, group.rank
        for numel in (0, 1, 13, 8193, 200_003):
            x = np.arange(numel, dtype=np.int64) + me
            assert np.array_equal(group.all_reduce(x), np.arange(numel) * n + n * (n - 1) // 2)
            parts = group.all_to_all(np.empty((n, numel), np.int32), np.full((n, numel), me, np.int32))
            assert (parts == np.arange(n)[:, None]).all()
            y = torch.full((numel,), float(me))
            assert bool((group.broadcast(y, n - 1) == n - 1).all())
        work = group.all_reduce(np.ones(50_000), async_op=True)
        group.barrier()
        work.wait()
        halves = group.split(me % 2)
        assert (halves.all_reduce(np.ones(3)) == halves.size).all()
        if n > 1:
            work = group.send(np.array([me]), (me + 1) % n, async_op=True)
            x = np.empty(1, np.int64)
            assert group.recv(x) == (me - 1) % n == x[0]
            work.wait()
        return group.host_ids

    assert run_threads(body, hosts, store) == [tuple(hosts)] * len(hosts)


@pytest.mark.parametrize("hosts", ("aa", "ab", "aabb"))
def test_groups_used_from_several_threads_at_once(hosts):
    def body(group):
        n = group.size
        groups = [group.new_group(range(n)) for _ in range(4)]

        def collectives(i):
            for step in range(40):
                size = (3, 70_000, 500)[(i + step) % 3]
                assert (groups[i].all_reduce(np.full(size, i + 1)) == n * (i + 1)).all()
                if step % 7 == i:
                    groups[i].barrier()

        def messages(tag):
            right, left = (group.rank + 1) % n, (group.rank - 1) % n
            for step in range(40):
                x = np.empty((5, 100))
                works = [group.send(np.full((5, 100), float(step)), right, tag, async_op=True)]
                group.recv(x, left, tag)
                works[0].wait()
                assert (x == step).all()

        several(*[lambda i=i: collectives(i) for i in range(4)], *[lambda t=t: messages(t) for t in (1, 2)])
        for inner in groups:
            inner.close()

    run_threads(body, hosts, c10d.HashStore())


def test_works_are_waited_for_by_other_threads():
    def body(group):
        arrays = [np.full(20_000, i) for i in range(24)]
        works = [group.all_reduce(x, async_op=True) for x in arrays]
        several(*[lambda w=w: w.wait(timeout_s=20) for w in reversed(works)])
        several(*[lambda: works[3].wait() for _ in range(4)])  # one work, several waiters
        assert all((x == 2 * i).all() for i, x in enumerate(arrays))

    run_threads(body, "aa", c10d.HashStore())
    run_threads(body, "ab", c10d.HashStore())


@pytest.mark.parametrize("hosts", ("aa", "ab"))
def test_close_while_other_threads_use_the_group(hosts):
    def body(group):
        inner = group.new_group([0, 1])
        entered = threading.Barrier(4)

        def use(call):
            entered.wait(20)
            with pytest.raises((GroupClosed, PeerLost)):  # whichever end closed first
                while True:
                    call()

        def close():
            entered.wait(20)
            for _ in range(3):
                group.barrier()
            inner.close()

        several(
            close,
            lambda: use(lambda: inner.all_reduce(np.ones(1000))),
            lambda: use(lambda: inner.recv(np.ones(3), 1 - group.rank)),
            lambda: use(lambda: inner.send(np.ones(3), 1 - group.rank, 5, async_op=True).wait()),
        )
        with pytest.raises(GroupClosed):
            inner.barrier()
        group.barrier()

    run_threads(body, hosts, c10d.HashStore())


@pytest.mark.parametrize("hosts", ("aa", "ab"))
def test_groups_and_works_let_go_of_in_any_order(hosts):
    def body(group):
        for i in range(25):
            inner = group.new_group([0, 1])
            works = [inner.all_reduce(np.ones(20_000), async_op=True) for _ in range(4)]
            works += [inner.recv(np.ones(2), async_op=True)]
            group.barrier()
            if i % 3 == 0:
                del works
                inner.close()
            elif i % 3 == 1:
                del inner
                works.clear()
            else:
                works.pop().is_completed()
                del inner
                with pytest.raises(PycommError):
                    while True:
                        works.pop().wait(timeout_s=5)
                        if not works:
                            raise GroupClosed("all were done before")
            if i % 8 == 0:
                gc.collect()
        assert (group.all_reduce(np.ones(2)) == 2).all()

    run_threads(body, hosts, c10d.HashStore())


def test_one_group_in_trouble_leaves_the_others_alone():
    def body(group):
        inner = group.new_group([0, 1])
        if group.rank == 0:
            with pytest.raises(PeerTimeout):
                inner.all_reduce(np.ones(100_000), timeout_s=0.2)
        assert (group.all_reduce(np.ones(100_000)) == 2).all()
        with pytest.raises(PycommError, match="waited"):
            inner.all_reduce(np.ones(100_000))
            inner.all_reduce(np.ones(100_000))

    run_threads(body, "aa", c10d.HashStore())
    run_threads(body, "ab", c10d.HashStore())


def test_no_thread_and_no_descriptor_is_left_behind():
    import os

    def body(group):
        work = group.all_reduce(np.ones(50_000), async_op=True)
        works = [work, group.send(np.ones(2), 1 - group.rank, async_op=True)]
        group.recv(np.ones(2))
        for work in works:
            work.wait()
        inner = group.new_group([0, 1])
        inner.all_reduce(np.ones(50_000))
        inner.close()
        group.barrier()

    def count():
        pycomm.group._last_endpoint = None  # kept for empty() without a group, with its thread if it has started one
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    for hosts in ("aa", "ab"):
        run_threads(body, hosts, c10d.HashStore())
        before = count()
        for _ in range(5):
            run_threads(body, hosts, c10d.HashStore())
        deadline = time.monotonic() + 30
        while count() > before and time.monotonic() < deadline:
            pass  # a thread that was told to end may still be at it
        fds, threads = count()
        assert fds <= before[0] and threads <= before[1], (before, fds, threads)


@pytest.mark.parametrize("hosts", ("aa", "ab"))
def test_a_program_may_end_with_operations_under_way(hosts):
    """Their arrays are let go of while Python is still there; the process ends as any other."""
    program = """
import sys, threading
import numpy as np
import torch.distributed as c10d
import pycomm
store, kept = c10d.HashStore(), []
def rank_main(rank):
    group = pycomm.init(store, rank, 2, host_id=sys.argv[1][rank], timeout_s=10)
    kept.append([group.all_reduce(np.ones(100_000), async_op=True) for _ in range(20)])
    kept.append((group.recv(np.ones(3), async_op=True), group))
threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", program, hosts], capture_output=True, text=True, timeout=300)
        assert (ended.returncode, ended.stderr) == (0, "")
