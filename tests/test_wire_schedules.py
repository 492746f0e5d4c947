"""What a wire needs of a schedule (check_coded), of a program (its flags), and what its formats may lose; no ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import plan, topologies
from wire_oracle import WIRES, error_bound, expected, round_trip

import pycomm
from pycomm.check import check, check_coded
from pycomm.errors import ScheduleError
from pycomm.planners import PLANNERS
from pycomm.project import CODED as CODED_STEP
from pycomm.project import COPY, OUTPUT, RECV, RECV_REDUCE, SEALED, SEND, project
from pycomm.schedule import CODED, Schedule, transfers
from pycomm.topology import Topology
from pycomm.tuner import candidates, choice_table

PAIRS = [(collective, algorithm) for collective in CODED for algorithm in PLANNERS[collective]]


def n_codings(schedule, host):
    """By rank and chunk, how often the most coded contribution in the result was coded; by exact replay."""
    depth = [[{rank: 0} for _ in range(schedule.n_chunks)] for rank in range(schedule.n_ranks)]
    rows = schedule.transfers
    for number in range(schedule.n_rounds):
        arrived = []
        for row in rows[rows["round"] == number]:
            src, dst, chunk = int(row["src"]), int(row["dst"]), int(row["chunk"])
            more = int(host[src] != host[dst])
            arrived.append((dst, chunk, row["reduce"], {who: n + more for who, n in depth[src][chunk].items()}))
        for dst, chunk, reduces, came in arrived:
            depth[dst][chunk] = {**depth[dst][chunk], **came} if reduces else came
    return max(max(held.values()) for of_rank in depth for held in of_rank)


@pytest.mark.parametrize(("collective", "algorithm"), PAIRS)
@pytest.mark.parametrize("n_ranks", [2, 3, 4, 6, 9])
def test_what_passes_codes_contributions_and_results_once(collective, algorithm, n_ranks):
    for topology in topologies(n_ranks):
        schedule = plan(collective, algorithm, topology)
        try:
            check_coded(schedule, topology.host_index)
        except ScheduleError:
            assert algorithm not in ("pairwise", "hierarchical_direct"), topology.hosts
            continue
        assert n_codings(schedule, topology.host_index) <= (2 if collective == "all_reduce" else 1)


@pytest.mark.parametrize("collective", CODED)
def test_there_is_always_a_candidate_and_a_choice(collective):
    for n_ranks in (1, 2, 5, 8):
        for topology in topologies(n_ranks):
            usable = candidates(topology, collective, coded="hosts")
            assert {algorithm for _, algorithm in choice_table(topology, collective, coded="hosts")} <= set(usable)
            for planner in usable.values():
                check(planner(topology, 0))


@pytest.mark.parametrize(
    ("collective", "algorithm", "hosts", "reason"),
    [
        ("all_reduce", "ring", "abc", "partial sum holds values that were coded"),
        ("reduce_scatter", "ring", "abc", "partial sum holds values that were coded"),
        ("all_reduce", "hierarchical", "abcd", "partial sum holds values that were coded"),
        ("all_gather", "ring", "abc", "its sender did not make the value"),
        ("all_gather", "hierarchical", "abcd", "its sender did not make the value"),
        ("all_to_all", "bruck", "abcd", "it is coded again"),
        ("all_reduce", "doubling", "ab", "ranks 0 and 1 each make their own result of chunk 0"),
        ("broadcast", "tree", "ab", "broadcast has no wire"),
    ],
)
def test_what_would_code_again_or_differ_is_refused(collective, algorithm, hosts, reason):
    topology = Topology.from_host_ids(hosts)
    schedule = plan(collective, algorithm, topology)
    check(schedule)
    with pytest.raises(ScheduleError, match=reason):
        check_coded(schedule, topology.host_index)


def test_a_value_shared_before_it_is_complete_is_refused():
    # rank 0 shares its own contribution with rank 1 on another host, then adds rank 1's
    rows = transfers([0, 1, 2], [0, 1, 0], [2, 0, 1], 0, [False, True, False])
    with pytest.raises(ScheduleError, match="has been shared across hosts before it is complete"):
        check_coded(Schedule("all_reduce", "odd", 3, 1, 0, rows), np.array([0, 1, 2]))


@pytest.mark.parametrize(("collective", "algorithm"), [pair for pair in PAIRS if "direct" in pair[1]])
def test_programs_code_between_hosts_and_seal_what_they_share(collective, algorithm):
    for topology in topologies(6):
        host = topology.host_index
        schedule = plan(collective, algorithm, topology)
        for rank in range(6):
            plain, program = project(schedule, rank), project(schedule, rank, host)
            assert not plain.steps["flags"].any()
            steps = program.steps
            crosses = (steps["peer"] >= 0) & (host[steps["peer"]] != host[rank])
            assert np.array_equal(steps["flags"] & CODED_STEP != 0, crosses)
            sealed = steps["flags"] & SEALED != 0
            for index in np.flatnonzero(sealed & (steps["kind"] == SEND)):
                step = steps[index]
                before = np.flatnonzero(sealed & (steps["kind"] != SEND) & (steps["chunk"] == step["chunk"]))
                assert len(before) == 1 and before[0] < index
                assert step["src_buffer"] == OUTPUT and steps[before[0]]["kind"] in (RECV_REDUCE, COPY)
                begin = step["dep_begin"]
                assert before[0] in program.deps[begin : begin + step["dep_count"]]
            # What ranks of its own host get of a sealed chunk is read after it was sealed, too.
            for chunk in np.unique(steps["chunk"][sealed]):
                last = np.flatnonzero(sealed & (steps["kind"] != SEND) & (steps["chunk"] == chunk))[0]
                local = (steps["kind"] == SEND) & ~crosses & (steps["chunk"] == chunk)
                assert all(index > last for index in np.flatnonzero(local)) or collective == "reduce_scatter"
                assert not ((steps["kind"] == RECV) & (steps["chunk"] == chunk)).any()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_results_stay_within_the_bound_and_all_ranks_agree(data):
    ids = data.draw(st.lists(st.sampled_from("abc"), min_size=2, max_size=7))
    topology = Topology.from_host_ids(ids)
    n, host = topology.n_ranks, topology.host_index
    algorithm = data.draw(st.sampled_from(sorted(candidates(topology, "all_reduce", coded="hosts"))))
    wire = data.draw(st.sampled_from(WIRES))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    spread = data.draw(st.sampled_from([0, 8, 30]))
    numel = data.draw(st.integers(1, 700))
    xs = [
        (rng.standard_normal(numel) * np.exp2(rng.integers(-spread, spread + 1, numel))).astype(np.float32)
        for _ in range(n)
    ]
    outputs = expected(plan("all_reduce", algorithm, topology), host, xs, wire)
    assert all(np.array_equal(outputs[0], other) for other in outputs)
    exact = np.sum(np.array(xs, np.float64), axis=0)
    # docs/wire.md, with one block's largest value for all: every contribution is off by a step, and the sum again
    step = {"bf16": 2.0**-8, "fp8": 2.0**-4, "int8": 1 / 254, "int4": 1 / 14}[wire]
    most = sum(np.abs(x).max() for x in xs)
    assert np.abs(outputs[0] - exact).max() <= most * (2 * step + step * step + n * 2.0**-22)


@pytest.mark.parametrize("wire", WIRES)
def test_a_round_trip_stays_within_its_bound(wire):
    rng = np.random.default_rng(3)
    for scale in (1e-45, 1e-38, 1e-20, 1.0, 1e20, 3e38):
        for outlier in (1.0, 1e6):
            x = np.clip(rng.standard_normal(5000) * scale, -3e38, 3e38)
            x[::500] = np.clip(x[::500] * outlier, -3e38, 3e38)
            x = x.astype(np.float32)
            bound = error_bound(x, wire)
            assert (np.abs(round_trip(x, wire).astype(np.float64) - x) <= bound).all()
            assert (np.abs(pycomm.quantise(x, wire).astype(np.float64) - x) <= bound).all()
