"""What a Group says when something is wrong: ranks that die, stall or never come, bad arguments. Calls that differ:
test_group_mismatch.py. No failure may show as a hang, and each error names who and what."""

import os
import re
import signal
import socket
import struct
import threading
import time
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import pytest
import torch
import torch.distributed as c10d
from spawn import run_ranks

import pycomm
from pycomm.errors import GroupClosed, InvalidArgument, PeerLost, PeerTimeout, PycommError

AT_ONCE_S = 10.0  # "within a second", on a machine that runs other tests meanwhile; the deadline is 30 s


def run(fn, hosts, *args, **kwargs):
    return run_ranks(fn, len(hosts), *args, hosts=list(hosts), **kwargs)


@contextmanager
def raises_soon(error, pattern, within_s=AT_ONCE_S):
    begin = time.monotonic()
    with pytest.raises(error, match=pattern):
        yield
    elapsed = time.monotonic() - begin
    assert elapsed < within_s, f"raised after {elapsed:.1f} s"


# Ranks that die.


@pytest.mark.parametrize("hosts", ("aa", "ab", "aab"))
@pytest.mark.parametrize("moment", ("before", "large", "small", "recv", "barrier", "asynchronous"))
@pytest.mark.parametrize("victim", ("first", "last"))
def test_a_killed_rank_is_named_by_every_survivor(hosts, moment, victim):
    victim = 0 if victim == "first" else len(hosts) - 1
    results = run(check_killed, hosts, moment, victim, may_die=[victim])
    for rank, result in enumerate(results):
        if rank != victim:
            kind, elapsed, text = result
            assert kind == "PeerLost" and elapsed < AT_ONCE_S, result
            assert re.search(rf"rank {victim}\b", text), result


def check_killed(group, moment, victim):
    if moment != "before":
        group.all_reduce(np.zeros(100_000))
    if group.rank == victim:
        if moment == "large":  # dies in the middle of it
            group.all_reduce(np.zeros(8_000_000), async_op=True)
        elif moment == "small":
            for _ in range(100):
                group.all_reduce(np.zeros(4))
        elif moment == "recv":
            group.send(np.zeros(1), (victim + 1) % group.size)
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        if moment in ("before", "small"):
            while True:
                group.all_reduce(np.zeros(4))
        elif moment == "large":
            while True:
                group.all_reduce(np.zeros(8_000_000))
        elif moment == "recv":
            while True:
                group.recv(np.zeros(1), victim)
        elif moment == "barrier":
            group.barrier()
        else:
            works = []
            with suppress(GroupClosed):  # the news may come before the fifth
                for _ in range(5):
                    works.append(group.all_reduce(np.zeros(100_000), async_op=True))
            for work in reversed(works):
                work.wait()
    except PycommError as error:
        return type(error).__name__, time.monotonic() - begin, str(error)


def test_a_rank_that_closes_before_its_first_call_is_named():
    run(check_closes_first, "ab")
    run(check_closes_first, "ba")
    run(check_closes_first, "aa")


def check_closes_first(group):
    for leaver in (0, 1):
        inner = group.new_group([0, 1])
        if group.rank == leaver:
            inner.close()
        else:
            with raises_soon(PeerLost, rf"rank {leaver}\b.*closed the group"):
                inner.all_reduce(np.zeros(3))
        group.barrier()


def test_nothing_of_a_rank_has_a_name_that_could_stay_behind():
    """What a killed rank leaves: its memory is anonymous, its unix sockets have no path, it has no child processes."""
    run(check_nothing_named, "aab")


def check_nothing_named(group):
    group.all_reduce(np.zeros(100_000))
    work = group.recv(np.zeros(1), (group.rank + 1) % group.size, async_op=True)
    with open("/proc/self/maps") as maps:
        shared = [line.split(maxsplit=5) for line in maps if line.split()[1].startswith("rw-s")]
    names = {fields[5].strip() for fields in shared if len(fields) > 5}
    shares = group.host_ids.count(group.host_ids[group.rank]) > 1
    assert any("pycomm" in name for name in names) == shares, names
    assert all(name.startswith("/memfd:") for name in names), names
    inodes = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if is_open(fd)}
    with open("/proc/net/unix") as table:
        for line in table.readlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[6]}]" in inodes and len(fields) > 7:
                assert fields[7].startswith("@") or "pymp" in fields[7] or "listener" in fields[7], line
    assert not any("/dev/shm" in name for name in inodes), inodes
    with open(f"/proc/self/task/{os.getpid()}/children") as children:
        assert children.read().split() == []
    group.send(np.zeros(1), (group.rank - 1) % group.size)
    work.wait()


def is_open(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")


# Ranks that stall.


@pytest.mark.parametrize("hosts", ("aa", "ab", "aab"))
def test_deadlines(hosts):
    run(check_deadlines, hosts)


def check_deadlines(group):
    n, me = group.size, group.rank
    absent = n - 1
    for numel, started in ((3, False), (3, True), (200_000, False), (200_000, True)):
        inner = group.new_group(range(n))
        if me != absent:
            # Who talks to the absent rank says so; whoever stands behind says that it waits for that one.
            with raises_soon(PeerTimeout, r"all_reduce #0 .*waited \d\.\d s for .*rank \d\b"):
                if started:
                    inner.all_reduce(np.zeros(numel), async_op=True, timeout_s=0.3).wait()
                else:
                    inner.all_reduce(np.zeros(numel), timeout_s=0.3)
            with pytest.raises(GroupClosed, match="waited"):
                inner.barrier()
        group.barrier()
        if me == absent:  # comes after all, and is told why
            with raises_soon(PycommError, "waited"):
                inner.all_reduce(np.zeros(numel))
                inner.all_reduce(np.zeros(numel))
        group.barrier()
        inner.close()

    # A call keeps its own deadline behind one that has longer.
    inner = group.new_group(range(n))
    if me != absent:
        inner.all_reduce(np.zeros(100_000), async_op=True, timeout_s=30)
        with raises_soon(PeerTimeout, "barrier #1 .*behind all_reduce #0"):
            inner.barrier(timeout_s=0.3)
    group.barrier()
    inner.close()

    # The group's own deadline serves a call that gives none.
    inner = group.new_group(range(n))
    inner.timeout_s = 0.25
    assert inner.timeout_s == 0.25
    if me != absent:
        with raises_soon(PeerTimeout, "waited"):
            inner.barrier()
    group.barrier()
    inner.close()

    # Messages: what had not begun ends alone, and the group goes on.
    inner = group.new_group(range(n))
    if me == 0:
        with raises_soon(PeerTimeout, r"recv from rank 1 .*waited \d\.\d"):
            inner.recv(np.zeros(1), 1, timeout_s=0.2)
        with raises_soon(PeerTimeout, r"recv from any rank .*waited \d\.\d"):
            inner.recv(np.zeros(1), timeout_s=0.2)
    assert (inner.all_reduce(np.ones(2)) == n).all()
    inner.close()

    # A large send that nobody takes. From the heap, inside a host, it waits aside and ends alone. Otherwise what comes
    # behind it waits too; it was cut in the middle, and takes the group along.
    for shared in (False, True):
        inner = group.new_group(range(n))
        inner.barrier()
        aside = shared and len(set(inner.host_ids)) == 1
        if me == 0:
            big = inner.empty(2_000_000) if shared else torch.empty(2_000_000)
            stuck = inner.send(big, 1, async_op=True, timeout_s=4)
            with nullcontext() if aside else raises_soon(PeerTimeout, r"send to rank 1 .*waited \d\.\d", 3.8):
                inner.send(torch.full((1,), 3.0), 1, timeout_s=0.2)
            with raises_soon(PeerTimeout, "send to rank 1"):
                stuck.wait()
        group.barrier()
        if aside and me == 0:
            inner.send(big.fill_(4), 1)
        elif aside and me == 1:  # the first of its tag was taken back
            x, y = torch.zeros(1), torch.zeros(2_000_000)
            inner.recv(x, 0)
            inner.recv(y, 0)
            assert x == 3 and (y == 4).all()
        group.barrier()
        inner.close()


@pytest.mark.parametrize("hosts", ("aa", "ab"))
def test_a_stopped_process_is_a_timeout(hosts):
    run(check_stopped, hosts)


def check_stopped(group):
    inner = group.new_group([0, 1])
    pids = group.all_gather(np.zeros(2, np.int64), np.array([os.getpid()]))
    inner.all_reduce(np.zeros(10))
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        with raises_soon(PycommError, "waited|closed"):
            inner.all_reduce(np.zeros(10))
            inner.all_reduce(np.zeros(10))
        return
    try:
        with raises_soon(PeerTimeout, r"waited \d\.\d s for .*rank 1"):
            inner.all_reduce(np.zeros(10), timeout_s=0.5)
    finally:
        os.kill(int(pids[1]), signal.SIGCONT)


def test_a_stopped_process_that_serves_the_store_is_a_timeout():
    """Whoever asks such a store for anything waits for ever; a deadline must hold all the same."""
    run(check_store_stopped, "abb")


def check_store_stopped(group):
    pids = group.all_gather(np.zeros(group.size, np.int64), np.array([os.getpid()]))
    store = c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if group.rank == 0 else None
    port = np.array([store.port if store else 0])
    group.broadcast(port)
    if store is None:
        store = c10d.TCPStore("127.0.0.1", int(port[0]), is_master=False)
    for warm in (False, True):
        with pycomm.init(store, group.rank, group.size, timeout_s=20) as inner:
            if warm:
                inner.all_reduce(np.zeros(10))
            group.barrier()
            if group.rank == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                begin = time.monotonic()
                try:
                    with pytest.raises((PeerTimeout, PeerLost), match=r"rank [012] waited \d\.\d s for"):
                        inner.all_reduce(np.zeros(10), timeout_s=1)
                    assert time.monotonic() - begin < 1 + AT_ONCE_S
                    inner.close()
                    assert time.monotonic() - begin < 2 + AT_ONCE_S
                finally:
                    tell = np.zeros(1)
                    if group.rank == 1:
                        group.recv(tell, 2)
                        os.kill(int(pids[0]), signal.SIGCONT)
                    else:
                        group.send(tell, 1)
        group.barrier()


@contextmanager
def slow_to_answer(port, seconds):
    """The port of a relay to another of this machine, which takes so long over each new connection."""

    def pump(source, sink):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def relay(near):
        time.sleep(seconds)
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            back = threading.Thread(target=pump, args=(far, near), daemon=True)
            back.start()
            pump(near, far)
            back.join()

    def accept():
        with suppress(OSError):  # closed
            while True:
                threading.Thread(target=relay, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]


def test_a_rank_whose_link_breaks_off_is_told_why_by_a_slow_store():
    """A rank that gives up in the middle of a frame cannot say why over that connection."""
    store = c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with slow_to_answer(store.port, 1.2) as port:
        run(check_cut_off, "ab", port)


def check_cut_off(group, port):
    store = c10d.TCPStore("127.0.0.1", port, is_master=False)
    with pycomm.init(store, group.rank, group.size, host_id="ab"[group.rank], timeout_s=20) as inner:
        inner.barrier()
        if group.rank == 0:
            with raises_soon(PeerTimeout, r"all_reduce #1 .*waited \d\.\d"):
                inner.all_reduce(np.zeros(1_000_000), timeout_s=0.3)
        group.barrier()
        if group.rank == 1:
            with raises_soon(PeerTimeout, r"all_reduce #1 .*rank 0 waited \d\.\d"):
                inner.all_reduce(np.zeros(1_000_000))
        group.barrier()


@pytest.mark.parametrize("hosts", ("aa", "ab", "ba", "aabb"))
def test_revoke_reaches_every_rank(hosts):
    run(check_revoke, hosts)


def check_revoke(group):
    n, me = group.size, group.rank
    for revoker in (0, n - 1):
        for wait in ("collective", "message", "any", "nothing"):
            inner = group.new_group(range(n))
            if me == revoker:
                inner.revoke("the run is over")
            elif wait != "nothing":
                with raises_soon(GroupClosed, f"rank {revoker} revoked it: the run is over"):
                    if wait == "collective":
                        inner.all_reduce(np.zeros(10_000))
                    else:
                        inner.recv(np.zeros(1), revoker if wait == "message" else None)
            group.barrier()
            if me == revoker or wait != "nothing":
                with raises_soon(GroupClosed, "the run is over"):
                    inner.barrier()
            inner.close()
            group.barrier()


def test_closing_ends_what_is_under_way_here():
    run(check_close_under_way, "aa")
    run(check_close_under_way, "ab")


def check_close_under_way(group):
    inner = group.new_group([0, 1])
    if group.rank == 0:
        works = [inner.recv(np.zeros(1), 1, async_op=True), inner.all_reduce(np.zeros(9), async_op=True)]
        raised = []

        def wait():
            try:
                inner.recv(np.zeros(1), 1, tag=5)
            except PycommError as error:
                raised.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        while inner.stats().ops == 0 and waiting.is_alive() and not waiting.ident:
            pass
        inner.close()
        waiting.join(10)
        assert len(raised) == 1 and isinstance(raised[0], GroupClosed), raised
        for work in works:
            with raises_soon(GroupClosed, "closed"):
                work.wait()
    group.barrier()


# Ranks that never come, and strangers.


def test_init_names_the_ranks_that_do_not_come():
    store = c10d.HashStore()
    raised = {}

    def come(rank):
        try:
            pycomm.init(store, rank, 4, timeout_s=0.5)
        except PycommError as error:
            raised[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(raised) == [0, 1]
    for error in raised.values():
        assert isinstance(error, PeerTimeout) and isinstance(error, TimeoutError)
        assert re.search(r"\b2\b", str(error)) and re.search(r"\b3\b", str(error)), error


def test_init_refuses_what_makes_no_sense(monkeypatch):
    store = c10d.HashStore()
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for call, pattern in (
        (lambda: pycomm.init(store, 2, 2), "rank 2 is not in 0 .. 1"),
        (lambda: pycomm.init(store, -1, 2), "rank -1"),
        (lambda: pycomm.init(store), "give store, rank and world_size"),
        (lambda: pycomm.init(rank=0, world_size=1), "give store, rank and world_size"),
        (lambda: pycomm.init(store, 0, 1, timeout_s=0), "timeout"),
        (lambda: pycomm.init(store, 0, 1, timeout_s=float("nan")), "timeout"),
        (lambda: pycomm.init(store, 0, 1, host_id="a\nb"), "line break"),
        (pycomm.init, "RANK"),
    ):
        with pytest.raises(PycommError, match=pattern):
            call()


@pytest.mark.parametrize("hosts", ("ab", "ba"))
def test_strangers_at_the_listener_do_no_harm(hosts):
    run(check_strangers, hosts)


def listening_ports():
    """This process's own TCP listeners."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            inodes.add(os.readlink(f"/proc/self/fd/{fd}"))
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]


def check_strangers(group):
    ports = group.all_gather(np.zeros(2, np.int64), np.array(listening_ports()[:1]))
    held = []

    def harass():
        rng = np.random.default_rng(group.rank)
        greeting = struct.pack("=QiiiiQQ", 1, 0, 1, 0, 0, 7, 9)  # well-formed, by someone without the secret
        for _ in range(15):  # fewer than a listener's backlog
            for port in ports:
                for what in (b"", b"GET / HTTP/1.0\r\n\r\n", rng.bytes(8), rng.bytes(4000), greeting, greeting * 50):
                    with suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), 5) as stranger:
                        stranger.sendall(what)
                for _ in range(3):
                    with suppress(OSError):
                        held.append(socket.create_connection(("127.0.0.1", int(port)), 5))

    thread = threading.Thread(target=harass)
    thread.start()
    try:
        inner = group
        for i in range(12):
            if i % 4 == 3:
                inner = group.new_group([0, 1])  # new connections among the strangers'
            assert (inner.all_reduce(np.ones(20_000)) == 2).all()
            x = np.zeros(2)
            works = [inner.recv(x, 1 - group.rank, async_op=True)]
            works.append(inner.send(np.ones(2), 1 - group.rank, async_op=True))
            for work in works:
                work.wait()
            assert (x == 1).all()
    finally:
        thread.join()
    for connection in held:
        connection.close()
    group.barrier()


# Bad arguments: refused before anything is sent, with what to do; the group works on.


def bad_calls(group):
    n, me = group.size, group.rank
    x, ints = np.ones(6, np.float32), np.ones(6, np.int32)
    read_only = np.ones(6)
    read_only.flags.writeable = False
    leaf = torch.ones(4, requires_grad=True)
    whole = np.ones((2 * n, 3))
    piece = np.ones((2, 3))
    yield lambda: group.all_reduce(torch.ones(3, device="meta")), "on meta.*CPU"
    yield lambda: group.all_reduce(torch.ones(3).to_sparse()), "sparse"
    yield lambda: group.all_reduce(torch.zeros(3, dtype=torch.complex32)), "dtype .*not supported"
    yield lambda: group.all_reduce(np.ones(3, np.longdouble)), "not supported"
    yield lambda: group.all_reduce(np.array(["a"])), "not supported"
    yield lambda: group.all_reduce(np.array([None])), "not supported"
    yield lambda: group.all_reduce([1, 2]), "takes a torch tensor, a numpy array"
    yield lambda: group.all_reduce(None), "takes a torch tensor, a numpy array"
    yield lambda: group.all_reduce(torch.ones(4, 4).t()), "not contiguous.*contiguous()"
    yield lambda: group.all_reduce(np.ones((4, 4))[:, :2]), "not C-contiguous.*ascontiguousarray"
    yield lambda: group.all_reduce(np.ones(8)[::-1]), "not C-contiguous"
    yield lambda: group.all_reduce(read_only), "read-only"
    yield lambda: group.all_gather(read_only, np.ones(2)), "read-only"
    yield lambda: group.recv(read_only, (me + 1) % n), "read-only"
    yield lambda: group.all_reduce(leaf), "requires grad"
    yield lambda: group.all_reduce(x, "mean"), "'mean' is none of sum"
    yield lambda: group.all_reduce(x, "bxor"), "no meaning for float32"
    yield lambda: group.all_reduce(np.ones(3, complex), "max"), "no meaning for complex128"
    yield lambda: group.all_reduce(np.ones(3, bool), "avg"), "no meaning for bool"
    yield lambda: group.all_reduce(x, algorithm="fastest"), "no algorithm 'fastest'; choose from .*ring"
    yield lambda: group.broadcast(x, algorithm="ring"), "no algorithm 'ring'"
    if len(set(group.host_ids)) > 1 or group.size == 1:
        yield lambda: group.all_reduce(np.ones(100_000), algorithm="native"), "native"
    yield lambda: group.all_reduce(x, timeout_s=0), "timeout must be positive"
    yield lambda: group.all_reduce(x, timeout_s=-1), "timeout must be positive"
    yield lambda: group.all_reduce(x, timeout_s=float("nan")), "timeout must be positive"
    yield lambda: setattr(group, "timeout_s", -3), "timeout must be positive"
    for root in (n, -1):
        yield lambda root=root: group.broadcast(x, root), f"root {root} is not a rank"
        yield lambda root=root: group.reduce(x, root), f"root {root} is not a rank"
        yield lambda root=root: group.gather(None, x, root), f"root {root} is not a rank"
        yield lambda root=root: group.scatter(x, None, root), f"root {root} is not a rank"
    yield lambda: group.all_gather(np.ones(6 * n + 1, np.float32), x), "piece must have"
    yield lambda: group.all_gather(np.ones(5 * n, np.float32), x), "piece must have 5"
    yield lambda: group.all_gather(np.ones(6 * n, np.int32), x), "output is int32, input is float32"
    yield lambda: group.reduce_scatter(x, np.ones(6 * n + 1, np.float32)), "piece must have"
    yield lambda: group.reduce_scatter(ints, np.ones(6 * n, np.float32)), "float32.*int32"
    yield lambda: group.all_gather(whole, piece, [2] * (n + 1)), "counts for"
    yield lambda: group.all_gather(whole, piece, []), "0 counts for"
    yield lambda: group.all_gather(whole, piece, [2] * (n - 1) + [3]), "add up to"
    yield lambda: group.all_gather(whole, piece, [-2] + [2] * (n - 1)), "cannot be negative"
    if n > 1:
        yield lambda: group.all_gather(whole, np.ones((3, 3)), [2] * n), "piece must have 6"
    if n == 3 and me == 2:
        wrapped = [2**63 - 1, 2**63 - 1, 8]  # six rows, modulo 2**64
        yield lambda: group.all_gather(whole, np.ones((8, 3)), wrapped), "a count is|add up"
    if n > 1:
        yield lambda: group.gather(None if me == 1 else np.ones(6 * n, np.float32), x, 1), "root \\(rank 1\\)"
        yield lambda: group.scatter(x, None if me == 1 else np.ones(6 * n, np.float32), 1), "root \\(rank 1\\)"
        yield lambda: group.all_to_all(np.ones(2 * n + 1), np.ones(2 * n + 1)), "do not divide"
        mine = [1 if rank == me else 3 if rank == (me + 1) % n else 2 for rank in range(n)]
        yield lambda: group.all_to_all(whole.copy(), whole, mine, [2] * n), "sends itself 6 elements and expects 3"
    yield lambda: group.all_to_all(np.ones(2 * n), np.ones(3 * n)), "must be equal"
    yield lambda: group.all_to_all(np.ones(2 * n), np.ones(2 * n, np.float32)), "differ in dtype"
    yield lambda: group.all_to_all(whole.copy(), whole, [2] * n), "give both"
    yield lambda: group.all_to_all(whole.copy(), whole, [2] * n, [1] * n), "add up to"
    if n > 1:
        counts = [2] * n
        yield (
            lambda: group.all_to_all(whole.copy(), whole, counts, counts, algorithm="bruck"),
            "uneven counts runs 'pairwise'",
        )


@pytest.mark.parametrize("hosts", ("a", "aa", "ab", "aab"))
def test_bad_arguments_are_refused_before_anything_is_sent(hosts):
    run(check_bad_arguments, hosts)


def check_bad_arguments(group):
    before = group.stats()
    for i, (bad, pattern) in enumerate(bad_calls(group)):
        try:
            bad()
        except InvalidArgument as error:
            assert isinstance(error, ValueError) and re.search(pattern, str(error)), f"#{i}, {pattern!r}: {error}"
        else:
            raise AssertionError(f"#{i} was not refused: {pattern}")
    after = group.stats()
    assert (after.ops, after.bytes_inside_hosts, after.bytes_between_hosts) == (
        before.ops,
        before.bytes_inside_hosts,
        before.bytes_between_hosts,
    )
    # One rank's bad argument, and the group works on once it called again as it should.
    if group.rank == 0:
        with pytest.raises(InvalidArgument):
            group.all_reduce(np.ones(3), "mean")
    assert (group.all_reduce(np.ones(3)) == group.size).all()
    with torch.no_grad():
        assert group.all_reduce(torch.ones(2, requires_grad=True))[0] == group.size
    group.all_reduce(np.ones(3), timeout_s=float("inf"))
    group.all_reduce(np.ones(3), timeout_s=1e300)


@pytest.mark.parametrize("kind", ("bytes swapped", "not aligned", "conjugated"))
def test_arrays_that_are_not_what_their_memory_says_are_refused(kind):
    with pycomm.init(c10d.HashStore(), 0, 1, timeout_s=10) as group, pytest.raises(InvalidArgument):
        if kind == "bytes swapped":
            group.all_reduce(np.arange(4, dtype=">i4"))
        elif kind == "not aligned":
            group.all_reduce(np.frombuffer(bytearray(4 * 8 + 1), np.float32, offset=1))
        else:
            group.all_reduce(torch.tensor([1 + 2j, 3 + 4j]).conj())


def test_a_closed_group_refuses_everything():
    run(check_closed, "aa")


def check_closed(group):
    group.barrier()
    group.close()
    x = np.ones(3)
    peer = 1 - group.rank
    for late in (
        lambda: group.all_reduce(x),
        lambda: group.barrier(async_op=True),
        lambda: group.send(x, peer),
        lambda: group.recv(x, peer),
        lambda: group.recv(x, async_op=True),
    ):
        with pytest.raises(GroupClosed, match="it was closed"):
            late()
    assert group.stats().ops == 1
    assert "all_reduce" in group.explain("all_reduce", 8)
    repr(group)
