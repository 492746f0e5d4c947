"""check: refuses what is broken, with a message that names transfer, round and chunk, and nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import EVERY_PLANNER, plan

from pycomm.check import check
from pycomm.errors import ScheduleError
from pycomm.schedule import COLLECTIVES, TRANSFER, Schedule, required_chunks
from pycomm.topology import Topology


def schedule(collective, n_ranks, rows, n_chunks=None, root=0):
    if n_chunks is None:
        n_chunks = required_chunks(collective, n_ranks) or 1
    return Schedule(collective, "mine", n_ranks, n_chunks, root, np.array(rows, TRANSFER))


def changed(original, index, **fields):
    rows = original.transfers.copy()
    for name, value in fields.items():
        rows[name][index] = value
    return with_rows(original, rows)


def with_rows(original, rows):
    return Schedule(original.collective, "mine", original.n_ranks, original.n_chunks, original.root, rows)


RING = plan("all_reduce", "ring", Topology.emulated([4]))  # 4 transfers a round, 6 rounds; reduces, then copies
COPY, RED = False, True


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            changed(RING, 5, src=4),
            r"transfer 5 \(round 1, reduce of chunk \d, rank 4 -> \d\): src must be one",
        ),
        (
            changed(RING, 5, dst=-1),
            r"transfer 5 \(round 1, reduce of chunk \d, rank \d -> -1\): dst must be one",
        ),
        (changed(RING, 0, chunk=4), r"transfer 0 \(round 0, reduce of chunk 4, .*\): chunk must be one of 0 .. 3"),
        (changed(RING, 3, chunk=-1), r"transfer 3 \(round 0, reduce of chunk -1, .*\): chunk must be one of 0 .. 3"),
        (
            changed(RING, 2, src=RING.transfers["dst"][2]),
            r"transfer 2 \(round 0, .* chunk \d.*\): a rank cannot send to itself",
        ),
        (
            changed(RING, 9, round=1),
            r"transfer 9 \(round 1, .* chunk \d.*\): it follows round 2; sort transfers",
        ),
        (changed(RING, 0, round=-1), r"transfer 0 \(round -1, .* chunk \d.*\): rounds count from 0"),
        (
            schedule("all_reduce", 3, [(0, 1, 0, 0, RED), (0, 2, 0, 0, RED), (1, 0, 1, 0, COPY), (1, 0, 2, 0, COPY)]),
            r"transfer 1 \(round 0, reduce of chunk 0, rank 2 -> 0\): transfer 0 writes the same chunk there",
        ),
        (
            schedule("broadcast", 3, [(0, 0, 1, 0, COPY), (0, 1, 2, 0, COPY)]),
            r"transfer 1 \(round 0, copy of chunk 0, rank 1 -> 2\): rank 1 holds no value of it yet",
        ),
        (
            schedule("all_gather", 2, [(0, 0, 1, 0, RED), (0, 1, 0, 1, COPY)]),
            r"transfer 0 \(round 0, reduce of chunk 0, rank 0 -> 1\): rank 1 holds no value to combine it with",
        ),
        (
            schedule("all_reduce", 2, [(0, 0, 1, 0, RED), (1, 1, 0, 0, RED)]),
            r"transfer 1 \(round 1, reduce of chunk 0, rank 1 -> 0\): the contribution of rank 0 is in both values",
        ),
        (
            schedule("reduce", 3, [(0, 1, 0, 0, RED), (1, 2, 0, 0, COPY)]),
            r"transfer 1 \(round 1, copy of chunk 0, rank 2 -> 0\): after this last write rank 0 ends without the "
            r"contribution of ranks 0, 1 to chunk 0",
        ),
        (
            changed(RING, -1, chunk=RING.transfers["chunk"][-5]),
            r"rank 0 ends without the contribution of ranks 1, 2, 3 to chunk 1: no transfer of any of the 6 rounds",
        ),
        (
            schedule("all_reduce", 2, [(0, 1, 0, 0, RED)]),
            r"rank 1 ends without the contribution of rank 0 to chunk 0: no transfer of any of the 1 rounds brings it",
        ),
        (schedule("scatter", 3, [(0, 0, 1, 1, COPY)]), r"rank 2 ends without a value of chunk 2: no transfer"),
        (schedule("all_gather", 3, [], n_chunks=2), "n_chunks is 2; all_gather needs 3 on 3 ranks"),
        (schedule("all_to_all", 3, [], n_chunks=3), "n_chunks is 3; all_to_all needs 9 on 3 ranks"),
        (schedule("all_reduce", 3, [], n_chunks=0), "n_chunks is 0; all_reduce needs at least 1"),
        (schedule("all_reduce", 0, [], n_chunks=1), "n_ranks is 0"),
        (schedule("broadcast", 2, [], root=2), r"root 2 is not among ranks 0 .. 1"),
        (schedule("broadcast", 2, [], root=-1), r"root -1 is not among ranks 0 .. 1"),
        (schedule("all_reduce_v", 2, [], n_chunks=1), "no such collective; choose from all_reduce"),
    ],
)
def test_a_broken_schedule_is_refused(broken, message):
    with pytest.raises(ScheduleError, match=rf"^{broken.collective}/mine: .*{message}"):
        check(broken)


def test_the_ring_it_began_with_is_accepted():
    check(RING)


def test_more_than_64_contributions():
    check(plan("all_reduce", "ring", Topology.emulated([70])))
    short = plan("reduce", "chain", Topology.emulated([70]))
    with pytest.raises(ScheduleError, match=r"without the contribution of ranks 65, 66, 67, 68, 69 to chunk 0"):
        check(with_rows(short, short.transfers[5:]))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_planner_with_a_transfer_dropped_repeated_or_turned_is_refused(data):
    collective, algorithm = data.draw(st.sampled_from(EVERY_PLANNER))
    topology = Topology.from_host_ids(data.draw(st.lists(st.sampled_from("abc"), min_size=2, max_size=9)))
    good = plan(collective, algorithm, topology, data.draw(st.integers(0, topology.n_ranks - 1)))
    rows = good.transfers
    index = data.draw(st.integers(0, len(rows) - 1))
    kind = data.draw(st.sampled_from(["dropped", "repeated", "other kind"]))
    if kind == "dropped":
        broken = with_rows(good, np.delete(rows, index))
    elif kind == "repeated":
        broken = with_rows(good, np.insert(rows, index, rows[index]))
    else:
        broken = changed(good, index, reduce=not rows["reduce"][index])
    with pytest.raises(ScheduleError):
        check(broken)


def keeps_its_promise(candidate):
    """The meaning of a schedule, word for word, in sets: an oracle for small ones."""
    collective = COLLECTIVES[candidate.collective]
    shape = (candidate.n_ranks, candidate.n_chunks, candidate.root)
    start, end = collective.start(*shape), collective.end(*shape)
    held = {(int(r), int(c)): {int(r)} for r, c in np.argwhere(start)}
    full = [{r for r in range(candidate.n_ranks) if start[r, c]} for c in range(candidate.n_chunks)]
    for round_ in sorted(set(candidate.transfers["round"].tolist())):
        before, written = dict(held), set()
        for _, src, dst, chunk, reduce in candidate.transfers[candidate.transfers["round"] == round_].tolist():
            if src == dst or (src, chunk) not in before or (dst, chunk) in written:
                return False
            value = before[src, chunk]
            if reduce:
                if (dst, chunk) not in before or value & before[dst, chunk]:
                    return False
                value = value | before[dst, chunk]
            held[dst, chunk] = value
            written.add((dst, chunk))
    return all(held.get((int(r), int(c))) == full[c] for r, c in np.argwhere(end))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_check_agrees_with_the_words_on_random_schedules(data):
    collective = data.draw(st.sampled_from(["all_reduce", "reduce", "broadcast", "all_gather", "scatter"]))
    n_ranks = data.draw(st.integers(1, 3))
    n_chunks = required_chunks(collective, n_ranks) or data.draw(st.integers(1, 2))
    rank = st.integers(0, n_ranks - 1)
    row = st.tuples(st.integers(0, 3), rank, rank, st.integers(0, n_chunks - 1), st.booleans())
    rows = sorted(data.draw(st.lists(row, max_size=7)), key=lambda r: r[0])
    candidate = schedule(collective, n_ranks, rows, n_chunks)
    try:
        check(candidate)
        accepted = True
    except ScheduleError:
        accepted = False
    assert accepted == keeps_its_promise(candidate)
