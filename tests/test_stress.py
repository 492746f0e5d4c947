"""Groups, collectives, sizes, dtypes, messages, threads and asynchronous work over several processes, all at once,
every result verified. tests/cc/test_stress.cc does the same with ranks as threads, for the sanitizers.

PYCOMM_STRESS_S says for how many seconds (`make stress`: minutes), PYCOMM_STRESS_SEED repeats a run."""

import os
import random
import threading
import time

import numpy as np
import pytest
import torch
from spawn import run_ranks
from torch_ranks import HANGS_S

import pycomm

SECONDS = float(os.environ.get("PYCOMM_STRESS_S", "3"))
SEED = int(os.environ.get("PYCOMM_STRESS_SEED", str(random.SystemRandom().randrange(1 << 30))))

DTYPES = (np.uint8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64, np.complex64, torch.bfloat16)
LIMITS = (2, 16, 3000, 10_000, 70_000)
OPS = (
    *("barrier", "all_reduce", "reduce", "broadcast", "all_gather", "gather", "scatter", "reduce_scatter"),
    *("all_to_all", "uneven", "exchange", "messages", "messages"),
)
TURNS = 15  # of a group in a round


def values(rank, turn, numel):
    """Small integers: exact in every dtype and in any order."""
    return (np.arange(numel) * 7 + rank * 3 + turn) % 5


class Turn:
    """One operation of a group's script: the same on every rank but for what is asynchronous or on the shared heap."""

    def __init__(self, script, number, n):
        self.number = number
        self.n = n
        self.op = script.choice(OPS)
        self.dtype = script.choice(DTYPES)
        self.numel = script.randrange(script.choice(LIMITS))
        self.root = script.randrange(n)
        self.rows = [[script.randrange(4) for _ in range(n)] for _ in range(n)]
        self.seed = script.random()

    def array(self, content, heap):
        content = np.asarray(content)
        if self.dtype is torch.bfloat16 or heap:
            dtype = self.dtype if self.dtype is torch.bfloat16 else torch.from_numpy(np.empty(0, self.dtype)).dtype
            tensor = pycomm.empty(content.shape, dtype=dtype) if heap else torch.empty(content.shape, dtype=dtype)
            return tensor.copy_(torch.from_numpy(content))
        return content.astype(self.dtype)

    def start(self, group, own):
        """Starts it on this rank. Returns (works, [(array, what it must be)])."""
        n, me, numel = self.n, group.rank, self.numel
        heap = own.random() < 0.3
        asynchronous = own.random() < 0.5
        array = lambda content: self.array(content, heap)  # noqa: E731
        mine = lambda rank=me, length=numel: values(rank, self.number, length)  # noqa: E731
        total = lambda length=numel: sum(mine(rank, length) for rank in range(n))  # noqa: E731
        call = lambda op, *args: getattr(group, op)(*args, async_op=asynchronous)  # noqa: E731
        at_root = me == self.root
        works, expected = [], []
        if self.op == "barrier":
            works.append(call("barrier"))
        elif self.op == "all_reduce":
            x = array(mine())
            works.append(call("all_reduce", x))
            expected.append((x, total()))
        elif self.op == "reduce":
            x = array(mine())
            works.append(call("reduce", x, self.root))
            expected.append((x, total() if at_root else mine()))
        elif self.op == "broadcast":
            x = array(mine())
            works.append(call("broadcast", x, self.root))
            expected.append((x, mine(self.root)))
        elif self.op in ("all_gather", "gather"):
            wanted = np.concatenate([mine(rank) for rank in range(n)])
            output = array(wanted * 0) if self.op == "all_gather" or at_root else None
            x = array(mine())
            works.append(call(self.op, output, x, *((self.root,) if self.op == "gather" else ())))
            expected += [(output, wanted)] if output is not None else []
        elif self.op == "scatter":
            x = array(values(self.root, self.number, numel * n)) if at_root else None
            output = array(mine() * 0)
            works.append(call("scatter", output, x, self.root))
            expected.append((output, values(self.root, self.number, numel * n)[me * numel : (me + 1) * numel]))
        elif self.op == "reduce_scatter":
            output, x = array(mine() * 0), array(mine(me, numel * n))
            works.append(call("reduce_scatter", output, x))
            expected.append((output, total(numel * n)[me * numel : (me + 1) * numel]))
        elif self.op == "all_to_all":
            output, x = array(np.zeros(numel * n)), array(mine(me, numel * n))
            works.append(call("all_to_all", output, x))
            pieces = [mine(rank, numel * n)[me * numel : (me + 1) * numel] for rank in range(n)]
            expected.append((output, np.concatenate(pieces)))
        elif self.op == "uneven":
            counts, row = self.rows[0], max(1, numel // 4)
            pieces = [mine(rank, counts[rank] * row).reshape(-1, row) for rank in range(n)]
            output, x = array(np.zeros((sum(counts), row))), array(pieces[me])
            works.append(call("all_gather", output, x, counts))
            expected.append((output, np.concatenate(pieces)))
        elif self.op == "exchange":
            row = max(1, numel // 8)
            sends = [self.rows[me][rank] if rank != me else 1 for rank in range(n)]
            recvs = [self.rows[rank][me] if rank != me else 1 for rank in range(n)]
            content = lambda source, to, rows: np.full((rows, row), (source * 3 + to + self.number) % 5)  # noqa: E731
            x = array(np.concatenate([content(me, rank, rows) for rank, rows in enumerate(sends)]))
            wanted = np.concatenate([content(rank, me, rows) for rank, rows in enumerate(recvs)])
            output = array(wanted * 0)
            works.append(call("all_to_all", output, x, recvs, sends))
            expected.append((output, wanted))
        elif n > 1:
            output, x = array(mine() * 0), array(mine())
            before = None if self.number % 3 == 0 else (me - 1) % n
            both = [
                lambda: group.send(x, (me + 1) % n, self.number, async_op=True),
                lambda: group.recv(output, before, self.number, async_op=True),
            ]
            own.shuffle(both)
            works += [begin() for begin in both]
            expected.append((output, mine((me - 1) % n)))
        return [work for work in works if hasattr(work, "wait")], expected

    def finish(self, works, expected):
        for work in works:
            work.wait(timeout_s=60)
        for array, wanted in expected:
            got = (
                array.to(torch.float32).numpy()
                if getattr(array, "dtype", None) is torch.bfloat16
                else np.asarray(array)
            )
            if not np.array_equal(got, wanted):
                at = np.argwhere(got != wanted)[0]
                raise AssertionError(
                    f"turn {self.number}, {self.op} of {self.numel} {self.dtype}: element {at} is wrong"
                )


def play(group, seed, turns):
    script, own = random.Random(seed), random.Random(f"{seed} {group.rank}")
    under_way = []
    for number in range(turns):
        turn = Turn(script, number, group.size)
        under_way.append((turn, *turn.start(group, own)))
        while len(under_way) > 4 or (under_way and own.random() < 0.3):
            first, *rest = under_way.pop(0)
            first.finish(*rest)
    for first, *rest in under_way:
        first.finish(*rest)


def play_in_thread(group, seed, raised):
    try:
        play(group, seed, TURNS)
    except BaseException as error:
        raised.append(error)  # the rank's main thread reports it


def check_stress(world, seed, seconds):
    end = np.zeros(1)
    begin = time.monotonic()
    rounds = 0
    while not end[0]:
        script = random.Random(seed + rounds)
        groups = []
        for _ in range(script.randrange(1, 4)):
            ranks = script.sample(range(world.size), script.randrange(1, world.size + 1))
            groups.append(world.new_group(ranks))
        groups.append(world.split(world.rank % 2, key=-world.rank))
        raised = []
        threads = [
            threading.Thread(target=play_in_thread, args=(group, seed * 31 + rounds * 7 + i, raised))
            for i, group in enumerate(groups)
            if group is not None
        ]
        for thread in threads:
            thread.start()
        play(world, seed + rounds, TURNS)
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), f"a group stands still in round {rounds}"
        if raised:
            raise raised[0]
        for group in groups:
            if group is not None:
                group.close()
        rounds += 1
        end[0] = time.monotonic() - begin > seconds
        world.broadcast(end)
    return rounds


@pytest.mark.timeout(SECONDS + 400)
@pytest.mark.parametrize("hosts", ("aaa", "aab"))
def test_everything_at_once(hosts):
    print(f"PYCOMM_STRESS_SEED={SEED}")  # shown where it fails
    rounds = run_ranks(check_stress, len(hosts), SEED, SECONDS, hosts=list(hosts), timeout_s=SECONDS + HANGS_S)
    assert min(rounds) >= 1
