"""The simulator against cases worked out by hand, and against the same model written one transfer at a time."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import EVERY_PLANNER, plan, topologies

from pycomm.errors import InvalidArgument
from pycomm.planners import PLANNERS
from pycomm.schedule import Schedule, chunk_nbytes, transfers
from pycomm.simulate import predict, simulate
from pycomm.topology import Host, Link, Nic, Topology

pytestmark = pytest.mark.timeout(60)

INSIDE = Link(latency_s=1.0, bytes_per_s=10.0, overhead_s=0.5)
NIC = Link(latency_s=7.0, bytes_per_s=2.0, overhead_s=3.0)
REDUCE = 4.0  # bytes per second
WHOLE = 1 << 40  # no chunk is longer: a chunk is passed on only when all of it has come


def hosts(*shape):
    emulated = Topology.emulated(shape, NIC, INSIDE)
    return Topology(emulated.hosts, INSIDE, REDUCE)


def moves(n_ranks, rows, n_chunks=4):
    return Schedule("broadcast", "mine", n_ranks, n_chunks, 0, transfers(*zip(*rows, strict=True)))


def test_one_message_inside_a_host():
    run = simulate(plan("broadcast", "tree", hosts(2)), hosts(2), 20)
    assert run.total_s == 0.5 + 20 / 10 + 1
    assert (run.begin_s.tolist(), run.end_s.tolist()) == ([0.0], [3.5])


def test_one_message_between_hosts():
    run = simulate(plan("broadcast", "tree", hosts(1, 1)), hosts(1, 1), 20)
    assert run.total_s == 3 + 20 / 2 + 7
    assert run.host_sent_bytes.tolist() == [20, 0]
    assert run.host_received_bytes.tolist() == [0, 20]
    assert run.bytes_between_hosts == 20


def test_ring_of_two_is_two_exchanges_and_a_reduction():
    run = simulate(plan("all_reduce", "ring", hosts(2)), hosts(2), 40, segment_bytes=WHOLE)
    assert run.total_s == 2 * (0.5 + 20 / 10 + 1) + 20 / REDUCE
    assert run.round_end_s.tolist() == [8.5, 12.0]


@pytest.mark.parametrize("n_ranks", [2, 3, 5, 8])
def test_ring_all_reduce_in_closed_form(n_ranks):
    run = simulate(plan("all_reduce", "ring", hosts(n_ranks)), hosts(n_ranks), 20 * n_ranks, segment_bytes=WHOLE)
    assert run.total_s == pytest.approx((n_ranks - 1) * (2 * (0.5 + 20 / 10 + 1) + 20 / REDUCE))


def test_ranks_of_a_host_share_its_nic():
    together = moves(4, [(0, 0, 2, 0), (0, 1, 3, 1)])
    assert simulate(together, hosts(2, 2), chunk_bytes=[20, 20, 0, 0]).total_s == 2 * (3 + 10) + 7


def test_a_nic_is_full_duplex():
    both_ways = moves(2, [(0, 0, 1, 0), (0, 1, 0, 1)])
    assert simulate(both_ways, hosts(1, 1), chunk_bytes=[20, 20, 0, 0]).total_s == 3 + 10 + 7


def test_a_busy_nic_does_not_hold_up_the_others():
    """Rank 0 sends to host b, then c; rank 2 on host b to c: c takes first what comes first."""
    schedule = moves(4, [(0, 0, 2, 0), (0, 0, 3, 1), (0, 2, 3, 2)])
    run = simulate(schedule, hosts(2, 1, 1), chunk_bytes=[20, 20, 20, 0])
    assert run.begin_s.tolist() == [0, 13, 0]


@pytest.mark.parametrize("shape", [(2, 2), (4, 4), (4, 4, 4, 4), (3, 1)])
def test_pairwise_all_to_all_keeps_the_nics_busy(shape):
    topology, nbytes = Topology.emulated(shape), 64 << 20
    run = simulate(plan("all_to_all", "pairwise", topology), topology, nbytes)
    assert run.total_s < 1.1 * run.host_sent_bytes.max() / topology.hosts[0].nic.bytes_per_s


def test_the_slower_nic_counts():
    slow = Link(latency_s=8.0, bytes_per_s=1.0, overhead_s=4.0)
    topology = Topology((Host("a", (0,), (Nic("eth0", NIC),)), Host("b", (1,), (Nic("eth0", slow),))))
    assert simulate(plan("broadcast", "tree", topology), topology, 20).total_s == 4 + 20 + 8


def test_transfers_of_a_round_between_two_ranks_are_one_message():
    one = moves(3, [(0, 0, 1, 0), (0, 0, 2, 1), (0, 0, 1, 2)])
    assert simulate(one, hosts(3), chunk_bytes=[10, 10, 10, 0]).total_s == 0.5 + 1 + 0.5 + 1 + 1 + 1
    two = moves(3, [(0, 0, 1, 0), (1, 0, 1, 1)])
    assert simulate(two, hosts(3), chunk_bytes=[10, 10, 0, 0]).total_s == 2 * (0.5 + 1) + 1


def test_a_chain_passes_segments_on():
    chain = plan("broadcast", "chain", hosts(4))
    assert simulate(chain, hosts(4), 100, segment_bytes=WHOLE).total_s == 3 * (0.5 + 10 + 1)
    assert simulate(chain, hosts(4), 100, segment_bytes=10).total_s == 3 * (0.5 + 1) + 10 + 2 * 1


def test_a_fast_link_behind_a_slow_one_ends_a_segment_later():
    topology = hosts(1, 2)
    run = simulate(plan("broadcast", "chain", topology), topology, 100, segment_bytes=10)
    slow_end = 3 + 100 / 2 + 7
    assert run.end_s.tolist() == [slow_end, slow_end + 10 / 10 + 1]


def test_reducing_goes_on_beside_the_nic_but_holds_a_rank():
    reduce_to_root = plan("reduce", "tree", hosts(1, 1))
    assert simulate(reduce_to_root, hosts(1, 1), 100, segment_bytes=10).total_s == 3 + 50 + 10 / REDUCE + 7
    inside = plan("reduce", "tree", hosts(2))
    assert simulate(inside, hosts(2), 100, segment_bytes=10).total_s == 0.5 + 10 + 100 / REDUCE + 1


def test_nothing_moves_on_one_rank():
    for collective, algorithm in EVERY_PLANNER:
        run = simulate(plan(collective, algorithm, hosts(1)), hosts(1), 1000)
        assert (run.total_s, run.bytes_between_hosts, len(run.round_end_s)) == (0.0, 0, 0)


def one_at_a_time(schedule, topology, sizes, segment_bytes):
    """The model in the simulator's docstring, told transfer by transfer."""
    free, value, messages, turns, queue, times = {}, {}, set(), Counter(), [], {}
    for index, (round_, src, dst, chunk, reduce) in enumerate(schedule.transfers.tolist()):
        inside = topology.host_of(src) is topology.host_of(dst)
        out = ("out", src) if inside else ("out", topology.host_of(src).name)
        queue.append((round_, turns[round_, out], index, src, dst, chunk, reduce, inside, out))
        turns[round_, out] += 1
    for round_, _, index, src, dst, chunk, reduce, inside, out in sorted(queue):
        link = topology.link(src, dst)
        into = ("in", dst) if inside else ("in", topology.host_of(dst).name)
        reduce_s = sizes[chunk] / topology.reduce_bytes_per_s if reduce else 0.0
        share = min(sizes[chunk], segment_bytes) / sizes[chunk] if sizes[chunk] else 0.0
        send_s = sizes[chunk] / link.bytes_per_s
        overhead_s = 0.0 if (round_, src, dst) in messages else link.overhead_s
        messages.add((round_, src, dst))
        inputs = [value.get((src, chunk), []), value.get((dst, chunk), []) if reduce else []]
        waits = [[v for v in values if v[0] < round_][-1] for values in inputs if any(v[0] < round_ for v in values)]
        begin = max([free.get(out, 0.0), free.get(into, 0.0), *(first for _, first, _ in waits)])
        leave = begin + overhead_s
        tail = share * (send_s + reduce_s)
        held = leave + send_s + (reduce_s if inside else 0.0)
        free[out], free[into] = leave + send_s, held
        done = max([held + (0.0 if inside else share * reduce_s), *(last + tail for _, _, last in waits)])
        value.setdefault((dst, chunk), []).append((round_, leave + tail + link.latency_s, done + link.latency_s))
        times[index] = begin, done + link.latency_s
    return np.array([times[index] for index in range(len(times))]).reshape(-1, 2)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_it_agrees_with_the_model_told_one_transfer_at_a_time(data):
    collective, algorithm = data.draw(st.sampled_from(EVERY_PLANNER))
    ids = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=8))
    topology = Topology.from_host_ids(ids, NIC, INSIDE)
    schedule = plan(collective, algorithm, topology, data.draw(st.integers(0, len(ids) - 1)))
    sizes = data.draw(st.lists(st.integers(0, 50), min_size=schedule.n_chunks, max_size=schedule.n_chunks))
    segment = data.draw(st.sampled_from([1, 7, WHOLE]))
    run = simulate(schedule, topology, chunk_bytes=sizes, segment_bytes=segment)
    slow = one_at_a_time(schedule, topology, sizes, segment)
    assert np.allclose(np.stack([run.begin_s, run.end_s], axis=1), slow, rtol=1e-12)


@pytest.mark.parametrize(("collective", "algorithm"), EVERY_PLANNER)
def test_predict_is_simulate_for_many_sizes(collective, algorithm):
    sizes = [0, 1, 1000, 1 << 20, (1 << 24) + 3]
    for topology in topologies(6):
        schedule = plan(collective, algorithm, topology)
        times = predict(schedule, topology, sizes)
        assert times.tolist() == [simulate(schedule, topology, nbytes).total_s for nbytes in sizes]
        assert np.all(np.diff(times) >= 0)


def test_no_prediction_beats_the_host_links():
    for collective, planners in PLANNERS.items():
        for algorithm in planners:
            for topology in topologies(6):
                run = simulate(plan(collective, algorithm, topology), topology, 1 << 22)
                busiest = max(run.host_sent_bytes.max(), run.host_received_bytes.max())
                assert run.total_s >= busiest / topology.hosts[0].nic.bytes_per_s


def test_hierarchical_nears_the_bound_of_the_host_links():
    """64 MiB over 1 Gbit/s: 2S(N-1)/N per host link, and little besides."""
    for shape in ([2, 2], [4, 4], [2, 2, 2, 2], [3, 1]):
        topology = Topology.emulated(shape, nic=Link(50e-6, 125e6, 5e-6))
        bound = 2 * (64 << 20) * (len(shape) - 1) / len(shape) / 125e6
        assert simulate(plan("all_reduce", "hierarchical", topology), topology, 64 << 20).total_s < 1.05 * bound
        assert simulate(plan("all_reduce", "hierarchical_tiled", topology), topology, 64 << 20).total_s < 1.02 * bound


def test_near_equal_chunks():
    topology = Topology.emulated([3])
    assert chunk_nbytes(plan("all_reduce", "ring", topology), 10).tolist() == [4, 3, 3]
    assert chunk_nbytes(plan("all_to_all", "pairwise", topology), 10).tolist() == [4, 3, 3] * 3
    assert chunk_nbytes(plan("all_gather", "ring", topology), [3, 4]).tolist() == [[1, 2], [1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either nbytes or chunk_bytes"),
        ({"nbytes": 4, "chunk_bytes": [4, 4]}, "either nbytes or chunk_bytes"),
        ({"chunk_bytes": [4]}, "2 sizes of 0 or more, one for each chunk"),
        ({"chunk_bytes": [4, -1]}, "2 sizes of 0 or more"),
        ({"nbytes": -1}, "2 sizes of 0 or more"),
        ({"nbytes": 4, "segment_bytes": 0}, "segment_bytes is 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        simulate(plan("all_reduce", "ring", hosts(2)), hosts(2), **arguments)


def test_a_topology_of_other_ranks_is_refused():
    with pytest.raises(InvalidArgument, match="the schedule has 2 ranks, the topology 3"):
        simulate(plan("all_reduce", "ring", hosts(2)), hosts(3), 8)
