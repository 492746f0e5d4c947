"""What goes wrong shows as an error on every rank, soon, and says who and what: never as a hang.

Ranks return what they caught and how long it took; the test compares. A rank that must not take part waits in the store
for the others to be done.
"""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch_ranks import run_torch_ranks

SOON_S = 6.0  # on a machine that runs other tests meanwhile; the engine itself needs milliseconds


@pytest.fixture(params=["aa", "ab", "aabb"], ids=["2 ranks", "2 hosts", "2x2"])
def hosts(request):
    return request.param


def caught(fn):
    """(error's text or None, seconds)."""
    begin = time.monotonic()
    try:
        fn()
    except RuntimeError as error:
        return str(error), time.monotonic() - begin
    return None, time.monotonic() - begin


def met_in_store(key, rank, n):
    """Wait for every rank, by the store alone."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{key}{rank}", "here")
    store.wait([f"{key}{r}" for r in range(n)], timedelta(seconds=30))


# Mismatched calls

MISMATCHES = {
    "op": [lambda x: dist.all_reduce(x), lambda x: dist.all_reduce(x, dist.ReduceOp.MAX)],
    "dtype": [lambda x: dist.all_reduce(x), lambda x: dist.all_reduce(x.double())],
    "count": [lambda x: dist.all_reduce(x), lambda x: dist.all_reduce(x[:5])],
    "root": [lambda x: dist.broadcast(x, 0), lambda x: dist.broadcast(x, 1)],
    "collective": [lambda x: dist.all_reduce(x), lambda x: dist.broadcast(x, 0)],
    "collective, barrier": [lambda x: dist.barrier(), lambda x: dist.all_reduce(x)],
    "large count": [lambda x: dist.all_reduce(x.repeat(9000)), lambda x: dist.all_reduce(x.repeat(9001))],
}


@pytest.mark.parametrize("what", MISMATCHES)
def test_mismatched_calls_raise_on_every_rank(hosts, what):
    n = len(hosts)
    for rank, (message, seconds) in enumerate(run_torch_ranks(mismatch, n, what, hosts=hosts)):
        assert message is not None, f"rank {rank} saw no mismatch"
        assert seconds < SOON_S, (rank, message)
        assert message.count("rank ") >= 2, f"both sides are to be named: {message}"


def mismatch(rank, n, what):
    """The last rank calls something else. A rank may be done with its part of a broadcast before anyone sees the
    mismatch; then its next call raises."""
    met_in_store("begin", rank, n)

    def calls():
        MISMATCHES[what][rank == n - 1](torch.ones(10))
        dist.barrier()

    result = caught(calls)
    met_in_store("end", rank, n)  # nobody's error comes from a rank that had left already
    return result


# Ranks that do not call, or die


def test_a_rank_that_never_calls_is_named_at_the_deadline(hosts):
    n = len(hosts)
    results = run_torch_ranks(absent, n, hosts=hosts)
    for message, seconds in results[:-1]:
        assert message is not None and 1.0 < seconds < 1.5 + SOON_S
    # deadlines are a moment apart: the first to pass may be that of a rank that waits for the absent one's host
    on_its_host = [rank for rank in range(n) if hosts[rank] == hosts[-1]]
    assert any(f"for rank {rank}" in message for message, _ in results[:-1] for rank in on_its_host), results


def absent(rank, n):
    impatient = dist.new_group(timeout=timedelta(seconds=1.5))
    met_in_store("begin", rank, n)
    result = None
    if rank != n - 1:
        result = caught(lambda: dist.all_reduce(torch.ones(1000), group=impatient))
    met_in_store("end", rank, n)
    return result


def test_a_receive_without_a_send_ends_at_the_deadline(hosts):
    n = len(hosts)
    (message, seconds), *_ = run_torch_ranks(unsent, n, hosts=hosts)
    assert message is not None and f"rank {n - 1}" in message and 1.0 < seconds < 1.5 + SOON_S


def unsent(rank, n):
    impatient = dist.new_group(timeout=timedelta(seconds=1.5))
    met_in_store("begin", rank, n)
    result = caught(lambda: dist.recv(torch.ones(3), n - 1, group=impatient)) if rank == 0 else None
    met_in_store("end", rank, n)
    return result


def test_a_works_own_timeout_counts(hosts):
    message, seconds = run_torch_ranks(impatient_wait, len(hosts), hosts=hosts)[0]
    assert message is not None and 0.5 < seconds < 1 + SOON_S


def impatient_wait(rank, n):
    def wait():
        dist.all_reduce(torch.ones(3), async_op=True).wait(timedelta(seconds=1))

    result = caught(wait) if rank == 0 else None
    met_in_store("end", rank, n)
    return result


@pytest.mark.parametrize("during", ["all_reduce", "recv"])
def test_a_killed_rank_is_seen_by_the_others_at_once(hosts, during):
    n = len(hosts)
    results = run_torch_ranks(killed, n, during, hosts=hosts, may_die={n - 1}, op_timeout_s=30)
    assert results[-1] is None
    for message, seconds in results[:-1]:
        assert message is not None and seconds < SOON_S
    assert any(f"rank {n - 1}" in message for message, _ in results[:-1]), results


def killed(rank, n, during):
    dist.all_reduce(torch.ones(100_000))  # channels are open
    for peer in range(n - 1):
        dist.send(torch.ones(1), peer) if rank == n - 1 else None
        dist.recv(torch.ones(1), n - 1) if rank == peer else None
    if rank == n - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if during == "recv":
        result = caught(lambda: dist.recv(torch.ones(3), n - 1))
    else:
        result = caught(lambda: dist.all_reduce(torch.ones(100_000)))
    met_in_store("end", rank, n - 1)
    return result


def test_monitored_barrier_names_the_missing_ranks(hosts):
    n = len(hosts)
    first, every = run_torch_ranks(check_monitored, n, hosts=hosts)[0]
    assert first is not None and f"{n - 1}" in first[0] and first[1] < 1 + SOON_S
    for rank in range(1, n):
        assert f"{rank}" in every[0], every


def check_monitored(rank, n):
    """Alone, with the last rank away, then with all but rank 0 away: wait_all_ranks names every one."""
    groups = [dist.new_group() for _ in range(3)]
    groups[0].monitored_barrier(timedelta(seconds=10))
    results = []
    if rank != n - 1:
        first = caught(lambda: groups[1].monitored_barrier(timedelta(seconds=1)))
        results.append(first)
    if rank == 0:
        results.append(caught(lambda: groups[2].monitored_barrier(timedelta(seconds=1), wait_all_ranks=True)))
    met_in_store("end", rank, n)
    return results


# Arguments


def test_wrong_arguments_are_refused_before_anything_is_sent(hosts):
    run_torch_ranks(check_arguments, len(hosts), hosts=hosts)


def check_arguments(rank, n):
    """Each is wrong on its own: it fails on one rank alone, and the group works on."""
    wrong = {
        "output too small": lambda: dist.all_gather_into_tensor(torch.empty(n * 3 - 1), torch.ones(3)),
        "other dtype": lambda: dist.all_gather_into_tensor(torch.empty(n * 3).double(), torch.ones(3)),
        "too few outputs": lambda: dist.all_gather([torch.empty(3)] * (n - 1), torch.ones(3)),
        "input too small": lambda: dist.reduce_scatter_tensor(torch.empty(3), torch.ones(n * 3 - 1)),
        "splits that do not add up": lambda: dist.all_to_all_single(torch.empty(n), torch.ones(n), [1] * n, [2] * n),
        "no such rank": lambda: dist.broadcast(torch.ones(3), n),
        "send to oneself": lambda: dist.send(torch.ones(3), rank),
        "bitwise on floats": lambda: dist.all_reduce(torch.ones(3), dist.ReduceOp.BAND),
        "product of complex": lambda: dist.all_reduce(torch.ones(3) * 1j, dist.ReduceOp.PRODUCT),
        "sparse": lambda: dist.broadcast(torch.eye(3).to_sparse(), 0),
        "sparse maximum": lambda: dist.all_reduce(torch.eye(3).to_sparse(), dist.ReduceOp.MAX),
        "bitwise on fp8": lambda: dist.all_reduce(torch.ones(3).to(torch.float8_e5m2), dist.ReduceOp.BOR),
        "fp8 that is not summed": lambda: dist.all_reduce(torch.ones(3).to(torch.float8_e4m3fnuz)),
        "too few in a list": lambda: dist.all_to_all([torch.empty(1)] * n, [torch.ones(1)] * (n - 1)),
        "a list of two dtypes": lambda: dist.all_gather(
            [torch.empty(3, dtype=torch.float64 if r else torch.float32) for r in range(n)], torch.ones(3)
        ),
        "another piece than the list has": lambda: dist.reduce_scatter(torch.empty(4), [torch.ones(3)] * n),
    }
    for what, call in wrong.items():
        if rank == 0:
            with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as raised:
                call()
            assert len(str(raised.value)) > 15, what
        x = torch.ones(10)
        dist.all_reduce(x)
        assert torch.equal(x, torch.full((10,), float(n))), what


def test_a_destroyed_group_refuses_calls():
    run_torch_ranks(check_destroyed, 2)


def check_destroyed(rank, n):
    group = dist.new_group()
    dist.all_reduce(torch.ones(1), group=group)
    dist.destroy_process_group(group)
    with pytest.raises((RuntimeError, ValueError)):
        dist.all_reduce(torch.ones(1), group=group)
    dist.barrier()


def test_after_a_mismatch_a_new_group_works():
    run_torch_ranks(check_recovery, 2, hosts="ab")


def check_recovery(rank, n):
    spare = dist.new_group()
    assert caught(lambda: dist.all_reduce(torch.ones(3 + rank)))[0] is not None
    x = torch.ones(5)
    dist.all_reduce(x, group=spare)
    assert torch.equal(x, torch.full((5,), 2.0))
