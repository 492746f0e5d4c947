"""What the system refuses at set-up, ranks that make other groups, and Ctrl-C: an error, or the next-best path and one
warning, never a hang. Refusals are real: a seccomp filter or a resource limit in the rank's own process."""

import ctypes
import errno
import os
import platform
import re
import resource
import signal
import struct
import sys
import threading
import time
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as c10d
from spawn import run_ranks
from torch_ranks import run_processes as run_them

import pycomm
from pycomm.errors import CollectiveMismatch, GroupClosed, PeerLost, PycommError, PycommWarning

AT_ONCE_S = 10.0  # on a machine that runs other tests meanwhile; deadlines are 20 s and more

X86 = platform.machine() == "x86_64"
SYSCALLS = {
    "memfd_create": 319 if X86 else 279,
    "process_vm_readv": 310 if X86 else 270,
    "process_vm_writev": 311 if X86 else 271,
    "pidfd_open": 434,
    "fallocate": 285 if X86 else 47,
    "socket": 41 if X86 else 198,
}
AF_UNIX = 1


def refuse(calls):
    """From here on `calls` fail in this process, {name: errno}; of "socket" unix sockets alone."""
    load, jump_if_equal, give = 0x20, 0x15, 0x06
    program = [(load, 0, 0, 0)]
    for name, number in calls.items():
        if name == "socket":
            program += [(jump_if_equal, 0, 4, SYSCALLS[name]), (load, 0, 0, 16), (jump_if_equal, 0, 1, AF_UNIX)]
            program += [(give, 0, 0, 0x00050000 | number), (load, 0, 0, 0)]
        else:
            program += [(jump_if_equal, 0, 1, SYSCALLS[name]), (give, 0, 0, 0x00050000 | number)]
    program.append((give, 0, 0, 0x7FFF0000))
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code)
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((38, 1, 0, 0, 0), (22, 2, ctypes.addressof(filter_), 0, 0)):  # NO_NEW_PRIVS, SECCOMP
        if libc.prctl(*(ctypes.c_ulong(a) for a in arguments)) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


def limit_files(room):
    """Room for so many more open files. Those above the next number count for nothing, so that is what is limited."""
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + room, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def run_processes(body, n_ranks, *args, may_die=()):
    return run_them(body, n_ranks, *args, hosts=["a"] * n_ranks, may_die=may_die)


def start(port, rank, n_ranks, prepare, body, timeout_s=20):
    """body(group) after prepare(rank), and what pycomm warned of."""
    store = c10d.TCPStore("127.0.0.1", port, is_master=False)
    prepare(rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pycomm.init(store, rank, n_ranks, timeout_s=timeout_s) as group:
            result = body(group)
    return [str(w.message) for w in caught if issubclass(w.category, PycommWarning)], result


def use(group):
    """Every path, verified; the hosts as the group sees them."""
    n, me = group.size, group.rank
    for numel in (1, 3000, 200_000):
        assert (group.all_reduce(np.full(numel, me + 1.0)) == n * (n + 1) / 2).all()
        x = np.zeros(numel)
        sent = group.send(np.full(numel, float(me)), (me + 1) % n, async_op=True)
        group.recv(x, (me - 1) % n)
        sent.wait()
        assert (x == (me - 1) % n).all()
    inner = group.new_group(range(n))
    inner.barrier()
    on_heap = pycomm.empty(1000)
    on_heap.fill_(me + 1)
    assert (inner.all_reduce(on_heap) == n * (n + 1) / 2).all()
    inner.close()
    return group.host_ids


def run_refused(prepare, n_ranks=3, body=use):
    outcomes = run_processes(start, n_ranks, prepare, body)
    return [texts for texts, _ in outcomes], [result for _, result in outcomes]


def no_peer_memory(rank):
    refuse({"process_vm_readv": errno.EPERM, "process_vm_writev": errno.EPERM})


def no_memfd(rank):
    refuse({"memfd_create": errno.EPERM})


def no_shared_memory(rank):
    refuse({"memfd_create": errno.ENOSYS, "fallocate": errno.ENOSPC})


def no_unix_socket_at_rank_1(rank):
    if rank == 1:
        refuse({"socket": errno.EACCES})


def no_pidfd(rank):
    refuse({"pidfd_open": errno.ENOSYS})


def small_files(rank):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("prepare", "who", "pattern", "hosts"),
    (
        (no_memfd, 0, r"ranks 0, 1, 2: no memfd.*a file in /dev/shm.*memfd_create: Operation not perm", "a a a"),
        (no_shared_memory, 0, r"ranks 0, 1, 2: no memory shared.*memfd_create.*/dev/shm.*No space.*TCP", "a/0 a/1 a/2"),
        (no_unix_socket_at_rank_1, 1, r"rank 1: no memory shared.*unix socket: Permission denied.*TCP", "a a/1 a"),
        (no_peer_memory, 0, r"ranks 0, 1, 2: no reading.*process_vm_readv: Operation not perm.*pycomm.empty", "a a a"),
        (no_pidfd, 0, r"ranks 0, 1, 2: no watch.*pidfd_open.*/proc", "a a a"),
        (small_files, 0, r"ranks 0, 1, 2: no memory shared.*ulimit -f.*TCP", "a/0 a/1 a/2"),
    ),
)
def test_a_refusal_is_reported_once_and_the_next_best_path_taken(prepare, who, pattern, hosts):
    texts, seen = run_refused(prepare)
    assert [len(of_rank) for of_rank in texts] == [int(rank == who) for rank in range(3)], texts
    assert re.search(pattern, texts[who][0]), texts[who][0]
    assert [" ".join(of_rank) for of_rank in seen] == [hosts] * 3


def test_without_pidfds_a_killed_rank_is_seen_at_once():
    outcomes = run_processes(start, 2, no_pidfd, die, may_die=[1])
    kind, text, elapsed = outcomes[0][1]
    assert kind == "PeerLost" and "rank 1" in text and "ended" in text and elapsed < AT_ONCE_S, outcomes[0]


def die(group):
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        group.all_reduce(np.zeros(4))
        group.all_reduce(np.zeros(4))
    except PycommError as error:
        return type(error).__name__, str(error), time.monotonic() - begin


def test_a_rank_out_of_file_descriptors_says_so_and_the_others_are_told():
    for outcome in run_processes(out_of_files, 3):
        rank, text, elapsed = outcome
        assert elapsed < AT_ONCE_S, outcome
        assert "ulimit -n" in text and (rank == 1 or "rank 1 could not set itself up" in text), outcome


def out_of_files(port, rank, n_ranks):
    # Room for the connection of its own that set-up makes to the store, for the listener and the mailbox.
    begin = time.monotonic()
    try:
        start(port, rank, n_ranks, no_files_at_rank_1, use, 30)
    except PycommError as error:
        return rank, str(error), time.monotonic() - begin
    return rank, "no error", 0


def no_files_at_rank_1(rank):
    if rank == 1:
        limit_files(3)


# Groups that differ.


@contextmanager
def raises_soon(error, pattern, within_s=AT_ONCE_S):
    begin = time.monotonic()
    with pytest.raises(error, match=pattern):
        yield
    assert time.monotonic() - begin < within_s


def test_ranks_that_make_other_groups_find_out():
    run_ranks(check_other_groups, 3, hosts=["a"] * 3)


def check_other_groups(group):
    me = group.rank
    # One leader: the member sees it at once, the leader in its next call.
    if me < 2:
        with raises_soon(CollectiveMismatch, r"\[0, 1, 2\].*\[0, 1\]|\[0, 1\].*\[0, 1, 2\]"):
            inner = group.new_group([0, 1, 2] if me == 0 else [0, 1])
            inner.barrier()
    else:
        with raises_soon(CollectiveMismatch, r"\[0, 1\]"):
            group.new_group([0, 1, 2]).barrier()
    group.barrier()
    # Two leaders.
    if me < 2:
        with raises_soon(CollectiveMismatch, r"rank 1 makes it of \[1, 2\], rank 0 of \[0, 1\]"):
            inner = group.new_group([0, 1] if me == 0 else [1, 2])
            inner.barrier()
    group.barrier()
    # Disjoint ones of one call are none of each other's business.
    inner = group.new_group([0, 1] if me < 2 else [2])
    assert (inner.all_reduce(np.ones(1)) == inner.size).all()
    group.barrier()


def test_a_rank_that_does_not_make_the_group_is_named():
    run_ranks(check_absent_leader, 2, hosts=["a"] * 2)


def check_absent_leader(group):
    if group.rank == 1:
        group.timeout_s = 0.3
        with raises_soon(pycomm.errors.PeerTimeout, r"rank 1 waits for rank 0 \(host a, pid \d+\) to make the group"):
            group.new_group([0, 1], "late")
        group.timeout_s = 20
    group.barrier()


# Ctrl-C.


@contextmanager
def interrupted_in(name):
    """SIGINT in the first call of a C function of that name, which begins here: never before it, however slowly this
    process gets there."""
    me = threading.get_ident()

    def interrupt(caller):
        while sys._current_frames()[me] is not caller:  # then no Python runs between here and the call
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    def called(caller, event, function):
        if event == "c_call" and function.__name__ == name:
            sys.setprofile(None)
            threading.Thread(target=interrupt, args=[caller]).start()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    sys.setprofile(called)
    with raises_soon(KeyboardInterrupt, None):
        yield


@pytest.mark.parametrize("hosts", ("aa", "ab"))
def test_a_blocking_call_can_be_interrupted(hosts):
    run_ranks(check_interrupt, 2, hosts=list(hosts))


def check_interrupt(group):
    waits = {
        "small": ("all_reduce", lambda g: g.all_reduce(np.zeros(3))),
        "large": ("all_reduce", lambda g: g.all_reduce(np.zeros(100_000))),
        "recv": ("recv", lambda g: g.recv(np.zeros(3), 1)),
        "work": ("wait", lambda g: g.all_reduce(np.zeros(3), async_op=True).wait()),
    }
    for what, (name, wait) in waits.items():
        inner = group.new_group([0, 1])
        if group.rank == 0:
            with interrupted_in(name):
                wait(inner)
            if what == "work":
                group.send(np.zeros(1), 1)
            else:  # its array is the caller's again, so the group cannot go on
                with pytest.raises(GroupClosed, match="rank 0 was interrupted in"):
                    inner.barrier()
        elif what != "work":
            with raises_soon(GroupClosed, "rank 0 was interrupted in"):
                inner.recv(np.zeros(1), 0)
                inner.barrier()
        else:
            group.recv(np.zeros(1), 0)
            inner.all_reduce(np.zeros(3))  # what was started goes on
        group.barrier()
        inner.close()


def test_torch_calls_can_be_interrupted():
    run_processes(interrupt_torch, 2)


def interrupt_torch(port, rank, n_ranks):
    store = c10d.TCPStore("127.0.0.1", port, is_master=False)
    c10d.init_process_group("pycomm", store=store, rank=rank, world_size=n_ranks)
    if rank == 0:
        with interrupted_in("allreduce"):
            c10d.all_reduce(torch.zeros(3))
    else:
        with raises_soon((GroupClosed, PeerLost), "interrupted"):
            c10d.recv(torch.zeros(1), 0)
    c10d.destroy_process_group()
