"""Programs: run by an independent interpreter in random order, they compute what the collective promises."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import EVERY_PLANNER, plan, some_roots, topologies
from replay import Deadlock, run

from pycomm.errors import ScheduleError
from pycomm.planners import EXCHANGES, PLANNERS
from pycomm.project import COPY, INPUT, OUTPUT, RECV, RECV_REDUCE, SCRATCH, SEND, STEP, project
from pycomm.schedule import COLLECTIVES, Schedule, transfers
from pycomm.topology import Topology


def all_programs(schedule):
    return [project(schedule, rank) for rank in range(schedule.n_ranks)]


def contributions(schedule, sizes, rng, dtype):
    """Per rank {chunk: array} where the rank has one at the start; whole numbers add exactly in every order."""
    start = COLLECTIVES[schedule.collective].start(schedule.n_ranks, schedule.n_chunks, schedule.root)
    draw = rng.standard_normal if dtype == np.float32 else lambda size: rng.integers(-50, 50, size)
    return [
        {int(chunk): draw(sizes[chunk]).astype(dtype) for chunk in np.flatnonzero(start[rank])}
        for rank in range(schedule.n_ranks)
    ]


def execute(schedule, sizes, rng, dtype=np.int64, in_place=False, capacity=3):
    """Runs it and returns (contributions, inputs afterwards, outputs), each per rank {chunk: array}."""
    given_values = contributions(schedule, sizes, rng, dtype)
    inputs = [{chunk: array.copy() for chunk, array in chunks.items()} for chunks in given_values]
    end = COLLECTIVES[schedule.collective].end(schedule.n_ranks, schedule.n_chunks, schedule.root)
    outputs = []
    for rank in range(schedule.n_ranks):
        same = in_place or (schedule.collective == "broadcast" and rank == schedule.root)
        outputs.append(
            {
                int(chunk): inputs[rank][chunk] if same and chunk in inputs[rank] else np.full(sizes[chunk], 99, dtype)
                for chunk in np.flatnonzero(end[rank])
            }
        )
    run(all_programs(schedule), inputs, outputs, sizes, rng, max(capacity, schedule.algorithm in EXCHANGES))
    return given_values, inputs, outputs


def expected(schedule, given_values, chunk):
    return sum(chunks[chunk] for chunks in given_values if chunk in chunks)


def some_sizes(schedule, rng):
    sizes = rng.integers(0, 6, schedule.n_chunks)
    sizes[rng.random(schedule.n_chunks) < 0.2] = 0
    return sizes


@pytest.mark.parametrize(("collective", "algorithm"), EVERY_PLANNER)
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4, 7])
def test_programs_compute_the_collective_in_any_order(collective, algorithm, n_ranks):
    rng = np.random.default_rng(n_ranks)
    for topology in topologies(n_ranks):
        for root in some_roots(collective, n_ranks):
            schedule = plan(collective, algorithm, topology, root)
            in_place = collective != "all_to_all" and bool(rng.random() < 0.5)
            capacity = int(rng.choice([0, 1, 5]))
            values, inputs, outputs = execute(schedule, some_sizes(schedule, rng), rng, np.int64, in_place, capacity)
            for rank in range(n_ranks):
                for chunk, array in outputs[rank].items():
                    assert np.array_equal(array, expected(schedule, values, chunk)), (topology.hosts, rank, chunk)
                for chunk, array in inputs[rank].items():
                    assert in_place or np.array_equal(array, values[rank][chunk]), "an input was written"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_uneven_chunks_uneven_hosts_and_every_channel(data):
    collective, algorithm = data.draw(st.sampled_from(EVERY_PLANNER))
    ids = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=8))
    root = data.draw(st.integers(0, len(ids) - 1))
    schedule = plan(collective, algorithm, Topology.from_host_ids(ids), root)
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=schedule.n_chunks, max_size=schedule.n_chunks))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values, _, outputs = execute(schedule, np.array(sizes), rng, capacity=data.draw(st.integers(0, 4)))
    for chunks in outputs:
        for chunk, array in chunks.items():
            assert np.array_equal(array, expected(schedule, values, chunk))


@pytest.mark.parametrize("algorithm", PLANNERS["all_reduce"])
@pytest.mark.parametrize("ids", ["aaaaaa", "aaabbb", "ababac", "aaaab"])
def test_all_reduce_of_floats_is_bit_identical_on_all_ranks_and_in_every_order(algorithm, ids):
    schedule = plan("all_reduce", algorithm, Topology.from_host_ids(ids))
    sizes = np.full(schedule.n_chunks, 4)
    results = []
    for order in range(3):
        rng = np.random.default_rng(0)  # the same contributions
        values = contributions(schedule, sizes, rng, np.float32)
        inputs = [{chunk: array.copy() for chunk, array in chunks.items()} for chunks in values]
        outputs = [{chunk: np.zeros(4, np.float32) for chunk in range(schedule.n_chunks)} for _ in ids]
        run(all_programs(schedule), inputs, outputs, sizes, np.random.default_rng(order), capacity=order + 1)
        results += [np.concatenate([chunks[c] for c in range(schedule.n_chunks)]).tobytes() for chunks in outputs]
    assert len(set(results)) == 1


@pytest.mark.parametrize(("collective", "algorithm"), EVERY_PLANNER)
def test_what_the_engine_relies_on(collective, algorithm):
    for n_ranks in (2, 5, 8):
        for topology in topologies(n_ranks):
            programs = all_programs(plan(collective, algorithm, topology, n_ranks - 1))
            sends, receives = defaultdict(list), defaultdict(list)
            for rank, program in enumerate(programs):
                steps = program.steps
                assert np.all(np.diff(steps["round"]) >= 0)
                for index, step in enumerate(steps):
                    own = program.deps[step["dep_begin"] : step["dep_begin"] + step["dep_count"]]
                    assert all(dep < index and steps["chunk"][dep] == step["chunk"] for dep in own)
                    assert step["call"] == -1 and (step["peer"] == -1) == (step["kind"] == COPY)
                    assert (step["scratch_slot"] >= 0) == (SCRATCH in (step["src_buffer"], step["dst_buffer"]))
                    if step["kind"] == SEND:
                        sends[rank, int(step["peer"])].append((int(step["round"]), int(step["chunk"])))
                    elif step["kind"] != COPY:
                        receives[int(step["peer"]), rank].append((int(step["round"]), int(step["chunk"])))
                assert program.peers == tuple(sorted({int(peer) for peer in steps["peer"]} - {-1}))
                assert len(set(steps["scratch_slot"]) - {-1}) == program.n_scratch
            assert sends == receives


def test_steps_are_the_32_bytes_of_program_h():
    assert STEP.itemsize == 32
    assert [STEP.fields[name][1] for name in STEP.names] == [0, 1, 2, 3, 4, 8, 12, 16, 20, 24, 28]


def steps_of(program):
    names = ("kind", "src_buffer", "dst_buffer", "peer", "chunk")
    return [tuple(int(step[name]) for name in names) for step in program.steps]


def test_own_chunks_are_copied_after_the_first_sends():
    one_host = Topology.emulated([2])
    assert steps_of(project(plan("all_gather", "ring", one_host), 0)) == [
        (SEND, INPUT, INPUT, 1, 0),
        (COPY, INPUT, OUTPUT, -1, 0),
        (RECV, INPUT, OUTPUT, 1, 1),
    ]
    assert steps_of(project(plan("all_to_all", "pairwise", one_host), 1)) == [
        (SEND, INPUT, INPUT, 0, 2),
        (COPY, INPUT, OUTPUT, -1, 3),
        (RECV, INPUT, OUTPUT, 0, 1),
    ]
    alone = Topology.emulated([1])
    for collective, algorithm in EVERY_PLANNER:
        steps = project(plan(collective, algorithm, alone), 0).steps
        assert all(step["kind"] == COPY for step in steps)
        assert len(steps) == (0 if collective == "broadcast" else plan(collective, algorithm, alone).n_chunks)


def test_the_root_of_a_broadcast_copies_nothing():
    assert steps_of(project(plan("broadcast", "tree", Topology.emulated([2]), 1), 1)) == [(SEND, INPUT, INPUT, 0, 0)]


def test_partial_sums_stay_out_of_the_input():
    inner = project(plan("reduce", "chain", Topology.emulated([3])), 1)
    assert steps_of(inner) == [(RECV_REDUCE, INPUT, SCRATCH, 2, 0), (SEND, SCRATCH, INPUT, 0, 0)]
    assert (inner.n_scratch, inner.steps["scratch_slot"].tolist(), inner.deps.tolist()) == (1, [0, 0], [0])


def test_pairwise_reductions_need_no_scratch():
    topology = Topology.emulated([5])
    for collective in ("reduce_scatter", "all_reduce"):
        assert all(p.n_scratch == 0 for p in all_programs(plan(collective, "pairwise", topology)))


def test_a_swap_within_a_round_reads_before_it_writes():
    rows = transfers(0, [0, 1], [1, 0], 0, True)
    swap = Schedule("all_reduce", "swap", 2, 1, 0, rows)
    values, _, outputs = execute(swap, np.array([5]), np.random.default_rng(0), in_place=True, capacity=1)
    assert all(np.array_equal(chunks[0], values[0][0] + values[1][0]) for chunks in outputs)


def test_the_interpreter_sees_a_deadlock():
    """The rendezvous of a swap cannot begin: each waits to be read before it is written. So no planner makes swaps."""
    swap = Schedule("all_reduce", "swap", 2, 1, 0, transfers(0, [0, 1], [1, 0], 0, True))
    with pytest.raises(Deadlock):
        execute(swap, np.array([5]), np.random.default_rng(0), in_place=True, capacity=0)


def test_the_interpreter_sees_a_missing_dependency():
    schedule = plan("all_reduce", "ring", Topology.emulated([3]))
    programs = all_programs(schedule)
    for program in programs:
        program.steps["dep_count"] = 0
    inputs = [{chunk: np.full(8, 1) for chunk in range(3)} for _ in range(3)]
    run(programs, inputs, inputs, np.full(3, 8), np.random.default_rng(0), capacity=2)
    assert any(not np.array_equal(array, np.full(8, 3)) for chunks in inputs for array in chunks.values())


def test_no_such_rank():
    with pytest.raises(ScheduleError, match="no rank 2 among 2"):
        project(plan("all_reduce", "ring", Topology.emulated([2])), 2)
