"""Calls that differ between ranks: every rank raises CollectiveMismatch, and it names both sides.

Every collective, on every path that its bytes can take, against every way to differ. Ranks start once per layout and
path; each case has a group of its own. The deadline is far away, so that what ends is what was found out."""

import re
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from spawn import run_ranks

from pycomm.errors import CollectiveMismatch, GroupClosed, PycommError
from pycomm.planners import PLANNERS

REDUCING = ("all_reduce", "reduce", "reduce_scatter")
ROOTED = ("broadcast", "reduce", "gather", "scatter")
UNEVEN = ("all_gather", "reduce_scatter", "all_to_all")  # take counts
COLLECTIVES = (*PLANNERS, "barrier")

SMALL, LARGE = 12, 50_004  # elements of the whole tensor, for 2 and 3 ranks: the board's, and beyond it
# Layout, path, elements, named algorithms. A letter is a rank's host.
PATHS = (
    ("aa", "board", SMALL, False),
    ("aaa", "board", SMALL, False),
    ("aaa", "staged", LARGE, False),
    ("aaa", "direct", LARGE, False),
    ("aaa", "program", SMALL, True),
    ("aaa", "program", LARGE, True),
    ("ab", "hosts", SMALL, False),
    ("aab", "hosts", SMALL, False),
    ("abb", "hosts", LARGE, False),
    ("abab", "hosts", SMALL, False),
    ("aab", "hosts", SMALL, True),
)
AT_ONCE_S = 10.0  # "within a second", on a busy machine
BOTH_SIDES = re.compile(
    r"(?s)group '.*': collective mismatch: rank (\d) called (.*), rank (\d) called (.*)\. Every rank.*"
)
STYLES = ("blocking", "async", "mixed")  # mixed: the odd rank blocks, the others do not


def differences(collective, algorithm, numel, n):
    """(name, what most ranks call, what one of them calls) as keywords of call()."""
    usual = {"collective": collective, "algorithm": algorithm, "numel": numel}
    others = [other for other in COLLECTIVES if other != collective]
    if algorithm is not None:  # there are many: each with another one
        others = [others[list(PLANNERS[collective]).index(algorithm) % len(others)]]
    for other in others:
        yield other, usual, usual | {"collective": other, "algorithm": None}
    if collective == "barrier":
        return
    yield "dtype", usual, usual | {"dtype": torch.int32}
    yield "count", usual, usual | {"numel": numel + n}
    yield "path", usual, usual | {"numel": SMALL + LARGE - numel}
    if collective in REDUCING:
        yield "op", usual, usual | {"op": "max"}
    if collective in ROOTED:
        yield "root", usual, usual | {"root": n - 1}
    if algorithm is not None:
        yield "algorithm", usual, usual | {"algorithm": next(a for a in PLANNERS[collective] if a != algorithm)}
        yield "no algorithm", usual, usual | {"algorithm": None, "numel": numel + n}
    elif collective in UNEVEN:
        pieces = [numel // n] * n
        shifted = [numel // n + 1, *pieces[2:], numel // n - 1]
        yield "counts", usual | {"counts": pieces}, usual | {"counts": shifted}
        yield "uneven", usual, usual | {"counts": shifted}


def call(group, memory, *, collective, numel, algorithm, dtype=torch.float32, op="sum", root=0, counts=None, **options):
    """numel: elements of the whole tensor, of which a rank's piece is an even part, or counts[rank]."""
    if collective == "barrier":
        return group.barrier(**options)
    first, second = (tensor.view(dtype) for tensor in memory)
    if algorithm is not None:
        options["algorithm"] = algorithm
    piece = (counts or [numel // group.size] * group.size)[group.rank]
    if counts is not None and collective == "all_to_all":
        options |= {"output_counts": counts, "input_counts": counts}
        piece = sum(counts)
    elif counts is not None:
        options["counts"] = counts
    if collective == "all_reduce":
        return group.all_reduce(first[:numel], op, **options)
    if collective == "reduce":
        return group.reduce(first[:numel], root, op, **options)
    if collective == "broadcast":
        return group.broadcast(first[:numel], root, **options)
    if collective == "all_gather":
        return group.all_gather(first[:numel], second[:piece], **options)
    if collective == "reduce_scatter":
        return group.reduce_scatter(first[:piece], second[:numel], op, **options)
    if collective == "gather":
        return group.gather(first[:numel] if group.rank == root else None, second[:piece], root, **options)
    if collective == "scatter":
        return group.scatter(first[:piece], second[:numel] if group.rank == root else None, root, **options)
    return group.all_to_all(first[:numel], second[:numel], **options)


@pytest.mark.parametrize(("hosts", "path", "numel", "named"), PATHS)
def test_every_collective_against_every_difference(hosts, path, numel, named):
    run_ranks(check_differences, len(hosts), path, numel, named, hosts=list(hosts))


def check_differences(group, path, numel, named):
    n = group.size
    nbytes = (LARGE + n) * 4
    make = group.empty if path == "direct" else torch.empty
    memory = [make(nbytes, dtype=torch.uint8).zero_() for _ in range(2)]
    cases = [
        case
        for collective in COLLECTIVES
        for algorithm in (PLANNERS.get(collective, ()) if named else (None,))
        for case in differences(collective, algorithm, numel, n)
    ]
    each_style = not named and path != "hosts"
    wrong = []
    for i, (name, usual, other) in enumerate(cases):
        for j, style in enumerate(STYLES):
            if not each_style and j != i % len(STYLES):
                continue
            odd = (i // len(STYLES) + j) % n
            text = outcome(group, memory, other if group.rank == odd else usual, style, group.rank == odd)
            sides = BOTH_SIDES.fullmatch(text)
            if not sides or str(odd) not in sides.group(1, 3) or sides[1] == sides[3] or sides[2] == sides[4]:
                wrong.append(f"{name}, {style}, rank {odd} differs: {usual}, {other}: {text}")
    assert not wrong, f"{len(wrong)} of {len(cases)} cases:\n" + "\n".join(wrong[:20])


def outcome(group, memory, arguments, style, is_odd):
    """What the call said on this rank, or the next one where it had done its part."""
    inner = group.new_group(range(group.size))
    text = "nothing"
    begin = time.monotonic()
    try:
        if style == "async" or (style == "mixed" and not is_odd):
            call(inner, memory, **arguments, async_op=True).wait()
        else:
            call(inner, memory, **arguments)
        inner.barrier()
    except CollectiveMismatch as error:
        elapsed = time.monotonic() - begin
        text = str(error) if elapsed < AT_ONCE_S else f"after {elapsed:.1f} s: {error}"
        for later in (inner.barrier, lambda: inner.send(np.zeros(1), 1 - min(group.rank, 1))):
            with pytest.raises(GroupClosed, match=r"cannot be used any more: .*collective mismatch"):
                later()
    except PycommError as error:
        text = f"{type(error).__name__}: {error}"
    group.barrier()  # who ends at once may take the word along where the store is slow
    inner.close()
    return text


@pytest.mark.parametrize("hosts", ("aa", "aaa", "ab", "aab"))
@pytest.mark.parametrize("numel", (SMALL, LARGE))
def test_collectives_in_another_order(hosts, numel):
    run_ranks(check_order, len(hosts), numel, hosts=list(hosts))


def check_order(group, numel):
    x, y = torch.zeros(numel), torch.zeros(numel)
    calls = [lambda **options: group.all_reduce(x, **options), lambda **options: group.broadcast(y, **options)]
    first, then = reversed(calls) if group.rank == group.size - 1 else calls
    with pytest.raises(CollectiveMismatch, match=BOTH_SIDES):
        work = first(async_op=True)  # raises where the others found out before this rank began
        with suppress(GroupClosed):  # where the first has failed by now
            then()
        work.wait()


@pytest.mark.parametrize("hosts", ("aa", "aaa"))
def test_two_roots_that_both_run_ahead_find_out(hosts):
    run_ranks(check_two_roots, len(hosts), hosts=list(hosts))


def check_two_roots(group):
    x = np.zeros(2, np.float32)
    group.barrier()
    with pytest.raises(CollectiveMismatch, match=r"(?s)root \d.*root \d"):
        for _ in range(1000):
            group.broadcast(x, root=min(group.rank, 1))


def test_what_every_rank_may_do_differently_is_no_mismatch():
    run_ranks(check_allowed_differences, 3, hosts=list("aab"))


def check_allowed_differences(group):
    """Deadlines, blocking or not, numpy or torch."""
    x = np.ones(5, np.float32) if group.rank else torch.ones(5)
    if group.rank == 1:
        group.all_reduce(x, async_op=True, timeout_s=5).wait()
    else:
        group.all_reduce(x, timeout_s=10 + group.rank)
    assert float(x[0]) == 3
