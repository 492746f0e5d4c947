"""The simulator against cases worked out by hand, and its parts against their definitions."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import EVERY_PLANNER, plan, topologies

from pycomm.errors import InvalidArgument
from pycomm.fairness import max_min_rates
from pycomm.planners import PLANNERS
from pycomm.schedule import Schedule, chunk_nbytes, transfers
from pycomm.simulate import simulate
from pycomm.topology import TCP, Host, Link, Nic, Switch, Topology

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
    between = simulate(reduce_to_root, hosts(1, 1), 100, segment_bytes=10)
    assert between.total_s == pytest.approx(3 + 50 + 10 / REDUCE + 7)
    inside = plan("reduce", "tree", hosts(2))
    run = simulate(inside, hosts(2), 100, segment_bytes=10)
    assert run.total_s == pytest.approx(0.5 + 10 + 100 / REDUCE + 1)


def test_nothing_moves_on_one_rank():
    for collective, algorithm in EVERY_PLANNER:
        run = simulate(plan(collective, algorithm, hosts(1)), hosts(1), 1000)
        assert (run.total_s, run.bytes_between_hosts, len(run.round_end_s)) == (0.0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rates_are_max_min_fair(data):
    """Each flow has a port that is full, or its own limit, and none on that port has more bytes per second."""
    n_ports, n_flows = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    draw = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    ports = draw.integers(0, n_ports, (3, n_flows)).astype(np.int32)
    ports[1], ports[2] = (ports[0] + 1) % (n_ports + 1), n_ports + 1  # two ports that differ, and no port
    weights = draw.choice([0.1, 0.5, 1.0, 3.0], n_ports + 2)
    weights[-1] = 0.0
    at_most = draw.choice([0.05, 0.3, 2.0, 100.0], n_flows)
    rates = max_min_rates(ports, weights[ports], at_most, n_ports + 2)
    busy = np.zeros(n_ports + 2)
    np.add.at(busy, ports, weights[ports] * rates)
    assert np.all(busy <= 1 + 1e-9)
    assert np.all(rates <= at_most)
    for flow, rate in enumerate(rates):
        full = [port for port in ports[:2, flow] if busy[port] > 1 - 1e-9]
        most = [rates[(ports[:2] == port).any(axis=0)].max() for port in full]
        assert rate == at_most[flow] or any(rate >= other * (1 - 1e-9) for other in most)


def test_flows_through_one_nic_share_it_evenly():
    together = moves(4, [(0, 0, 2, 0), (0, 1, 3, 1)])
    run = simulate(together, hosts(2, 2), chunk_bytes=[20, 40, 0, 0], segment_bytes=1)
    # 23 - 26 bytes-worth until the first is through (3 s of overhead are 6 bytes), then the second has all of it.
    assert run.end_s == pytest.approx([(26 + 26) / 2 + 7, (26 + 46) / 2 + 7])


def test_small_messages_of_a_rank_go_one_by_one():
    run = simulate(moves(3, [(0, 0, 1, 0), (0, 0, 2, 1)]), hosts(3), chunk_bytes=[20, 20, 0, 0])
    assert run.end_s == pytest.approx([0.5 + 2 + 1, 2 * (0.5 + 2) + 1])


def test_hosts_below_a_switch_share_its_uplink():
    topology = Topology(
        tuple(Host(f"h{rank}", (rank,), (Nic("eth0", NIC),), "ab"[rank % 2]) for rank in range(4)),
        switches=(Switch("a", Link(9.0, 1.0, 4.0)), Switch("b", Link(8.0, 8.0, 1.0))),
    )
    apart = moves(4, [(0, 0, 1, 0), (0, 2, 3, 1)])
    assert simulate(apart, topology, chunk_bytes=[20, 20, 0, 0]).total_s == pytest.approx(2 * (4 + 20) + 9)
    near = moves(4, [(0, 0, 2, 0), (0, 1, 3, 1)])
    assert simulate(near, topology, chunk_bytes=[20, 20, 0, 0]).total_s == pytest.approx(3 + 10 + 7)


def test_nics_of_a_host_work_together():
    two = tuple(Nic(f"eth{i}", NIC) for i in range(2))
    topology = Topology((Host("a", (0,), two), Host("b", (1,), two)))
    assert simulate(plan("broadcast", "tree", topology), topology, 20).total_s == pytest.approx(3 + 20 / 4 + 7)


def test_a_rank_that_enters_late_holds_up_what_waits_for_it():
    chain = plan("broadcast", "chain", hosts(3))
    on_time = simulate(chain, hosts(3), 20)
    late = simulate(chain, hosts(3), 20, late_s=[0, 0, 100])
    assert late.end_s[0] == on_time.end_s[0]
    assert late.begin_s[1] == 100
    assert late.total_s == pytest.approx(100 + 0.5 + 20 / 10 + 1)
    assert late.rank_end_s == pytest.approx([3.5, 103.5, 103.5])


def test_a_slow_rank_is_slow_in_all_it_does():
    pair = plan("reduce", "tree", hosts(2))
    assert simulate(pair, hosts(2), 40, slowdown=[3, 1]).total_s == pytest.approx(3 * (0.5 + 4 + 40 / REDUCE) + 1)
    copy = plan("broadcast", "tree", hosts(2))
    for slowdown in ([3, 1], [1, 3]):
        assert simulate(copy, hosts(2), 40, slowdown=slowdown).total_s == pytest.approx(3 * (0.5 + 4) + 1)
    apart = plan("broadcast", "tree", hosts(1, 1))
    assert simulate(apart, hosts(1, 1), 20, slowdown=[2, 1]).total_s == pytest.approx(2 * (3 + 10) + 7)


def test_what_a_failed_link_keeps_from_ending_is_named_rank_by_rank():
    """A chain over four hosts, cut between rank 1 and rank 2."""
    chain = plan("broadcast", "chain", hosts(1, 1, 1, 1))
    whole = simulate(chain, hosts(1, 1, 1, 1), 20)
    run = simulate(chain, hosts(1, 1, 1, 1), 20, failed_links=[(2, 1)])
    assert run.total_s == math.inf
    assert run.end_s.tolist() == [whole.end_s[0], math.inf, math.inf]
    assert run.failed.tolist() == [False, True, False]
    assert [line.split(",")[0] for line in run.unfinished()] == [
        "rank 1: 1 of 2 transfers never end; the first",
        "rank 2: 2 of 2 transfers never end; the first",
        "rank 3: 1 of 1 transfers never end; the first",
    ]
    assert run.unfinished()[0].endswith("in round 1: chunk 0 from rank 1 to rank 2: the link has failed")
    assert run.unfinished()[2].endswith("chunk 0 from rank 2 to rank 3: what it waits for never ends")
    assert whole.unfinished() == []


def reach(schedule, failed):
    """Which transfers end, told round by round: those that do not fail, whose values and channel have not stopped."""
    last, stopped, ends = {}, set(), []
    state = {}
    for index, (round_, src, dst, chunk, reduce) in enumerate(schedule.transfers.tolist()):
        if last.get("round") != round_:
            state.update(last.get("new", {}))
            last = {"round": round_, "new": {}}
        good = not failed[index] and state.get((src, chunk), True) and (src, dst) not in stopped
        good = good and (not reduce or state.get((dst, chunk), True))
        if not good:
            stopped.add((src, dst))
        last["new"][dst, chunk] = good
        ends.append(good)
    return ends


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_failures_stop_all_that_follows_from_them_and_nothing_else(data):
    collective, algorithm = data.draw(st.sampled_from(EVERY_PLANNER))
    ids = data.draw(st.lists(st.sampled_from("abcd"), min_size=2, max_size=8))
    topology = Topology.from_host_ids(ids, NIC, INSIDE)
    schedule = plan(collective, algorithm, topology)
    links = data.draw(st.lists(st.tuples(*[st.integers(0, len(ids) - 1)] * 2), max_size=2))
    run = simulate(
        schedule, topology, 1000, failed_links=links, failed_hosts=data.draw(st.sampled_from([[], [ids[0]]]))
    )
    assert np.isfinite(run.end_s).tolist() == reach(schedule, run.failed)


def test_events_taken_together_change_little():
    for shape in ([8] * 24, [3, 1, 2] * 10):
        topology = Topology.emulated(shape, Link(5e-6, 50e9, 2e-6), Link(2e-6, 200e9, 1e-6))
        for algorithm in ("hierarchical_tree", "leader"):
            schedule = plan("all_reduce", algorithm, topology)
            for nbytes in (1000, 1 << 20, 1 << 26):
                exact = simulate(schedule, topology, nbytes)
                coarse = simulate(schedule, topology, nbytes, same_time=1e-3)
                assert coarse.total_s == pytest.approx(exact.total_s, rel=0.01)


def test_thousands_of_ranks():
    """Two and three levels, leader-wise and along trees; benchmarks/predictions.py has 100,000."""
    for topology in (Topology.emulated([8] * 400), racks(20, 20, 8)):
        for algorithm in ("leader", "hierarchical_tree"):
            run = simulate(plan("all_reduce", algorithm, topology), topology, 1 << 10, same_time=1e-3)
            assert 0 < run.total_s < 0.1


def racks(n_racks, n_hosts, n_ranks, uplink=TCP):
    flat = Topology.emulated([n_ranks] * (n_racks * n_hosts))
    placed = tuple(replace(host, switch=f"r{index // n_hosts}") for index, host in enumerate(flat.hosts))
    return Topology(placed, switches=tuple(Switch(f"r{rack}", uplink) for rack in range(n_racks)))


def test_no_prediction_beats_the_host_links():
    for collective, planners in PLANNERS.items():
        for algorithm in planners:
            for topology in topologies(6):
                run = simulate(plan(collective, algorithm, topology), topology, 1 << 22)
                busiest = max(run.host_sent_bytes.max(), run.host_received_bytes.max())
                assert run.total_s >= busiest / topology.hosts[0].nic.bytes_per_s


def test_hierarchical_nears_the_bound_of_the_host_links():
    """64 MiB over 1 Gbit/s: 2S(N-1)/N per host link, and little besides; flows of later rounds take their share too."""
    for shape in ([2, 2], [4, 4], [2, 2, 2, 2], [3, 1]):
        topology = Topology.emulated(shape, nic=Link(50e-6, 125e6, 5e-6))
        bound = 2 * (64 << 20) * (len(shape) - 1) / len(shape) / 125e6
        assert simulate(plan("all_reduce", "hierarchical", topology), topology, 64 << 20).total_s < 1.2 * bound
        assert simulate(plan("all_reduce", "hierarchical_tiled", topology), topology, 64 << 20).total_s < 1.2 * bound


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
        ({"nbytes": 4, "same_time": 1.0}, "same_time is 1.0"),
        ({"nbytes": 4, "late_s": [1]}, "late_s must be 2 figures of 0 or more"),
        ({"nbytes": 4, "late_s": math.nan}, "late_s must be 2 figures"),
        ({"nbytes": 4, "slowdown": [1, 0.5]}, "slowdown must be 2 figures of 1 or more"),
        ({"nbytes": 4, "failed_links": [(0, 2)]}, r"failed link \(0, 2\): no such ranks of 0 .. 1"),
        ({"nbytes": 4, "failed_hosts": ["b"]}, r"failed host 'b' is not among \['host0'\]"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        simulate(plan("all_reduce", "ring", hosts(2)), hosts(2), **arguments)


def test_a_topology_of_other_ranks_is_refused():
    with pytest.raises(InvalidArgument, match="the schedule has 2 ranks, the topology 3"):
        simulate(plan("all_reduce", "ring", hosts(2)), hosts(3), 8)
