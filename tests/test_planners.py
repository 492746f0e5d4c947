"""Planners: every one keeps its promise for 1 to 33 ranks on hosts of every shape, and moves the bytes it should."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import EVERY_PLANNER, plan, some_roots, topologies

from pycomm.check import check
from pycomm.planners import EXCHANGES, PLANNERS, shapes
from pycomm.schedule import (
    COLLECTIVES,
    TRANSFER,
    Schedule,
    chunk_nbytes,
    first_copies,
    in_sequence,
    place,
    reverse,
    transfers,
)
from pycomm.simulate import simulate
from pycomm.topology import TCP, Host, Link, Switch, Topology
from pycomm.tuner import candidates

EVEN = [[2, 2], [4, 4], [3, 3, 3], [4, 4, 4, 4], [1, 1, 1]]
RANKS = [*range(1, 13), 15, 16, 17, 24, 32, 33]
UNEVEN = [[3, 1], [3, 1, 2], [1, 4], [5, 2, 2, 1]]


def scattered(shape):
    """The same hosts with their ranks dealt out in turn."""
    hosts = [[name] * count for name, count in zip("abcdefgh", shape, strict=False)]
    ids = []
    while any(hosts):
        ids += [host.pop() for host in hosts if host]
    return Topology.from_host_ids(ids)


def link_bytes(schedule, topology, nbytes):
    """(sent, received) of every host."""
    run = simulate(schedule, topology, nbytes)
    return run.host_sent_bytes.tolist(), run.host_received_bytes.tolist()


def test_every_collective_has_its_planners_under_their_names():
    assert set(PLANNERS) == set(COLLECTIVES)
    topology = Topology.emulated([2, 1])
    for collective, algorithm in EVERY_PLANNER:
        planner = PLANNERS[collective][algorithm]
        schedule = planner(topology)
        assert planner.__name__ == f"{algorithm}_{collective}"
        assert (schedule.collective, schedule.algorithm) == (collective, algorithm)
        assert planner.__doc__


@pytest.mark.parametrize(("collective", "algorithm"), EVERY_PLANNER)
def test_every_schedule_for_1_to_33_ranks_is_proved(collective, algorithm):
    for n_ranks in RANKS:
        for topology in topologies(n_ranks):
            roots = some_roots(collective, n_ranks)
            for root in roots if n_ranks < 12 else roots[n_ranks % len(roots) :][:1]:
                check(plan(collective, algorithm, topology, root))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_placement_is_proved_and_planned_alike_every_time(data):
    collective, algorithm = data.draw(st.sampled_from(EVERY_PLANNER))
    topology = Topology.from_host_ids(data.draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=14)))
    root = data.draw(st.integers(0, topology.n_ranks - 1))
    schedule = plan(collective, algorithm, topology, root)
    check(schedule)
    assert np.array_equal(schedule.transfers, plan(collective, algorithm, topology, root).transfers)


@pytest.mark.parametrize(("collective", "algorithm"), [p for p in EVERY_PLANNER if p[1] not in EXCHANGES])
def test_no_rank_reads_and_writes_a_chunk_in_one_round(collective, algorithm):
    """Else two ranks that swap a chunk would each wait for the other to read first, were there no room in between."""
    for n_ranks in (2, 6, 9):
        for topology in topologies(n_ranks):
            rows = plan(collective, algorithm, topology, n_ranks - 1).transfers
            reads = set(zip(rows["round"].tolist(), rows["src"].tolist(), rows["chunk"].tolist(), strict=True))
            writes = set(zip(rows["round"].tolist(), rows["dst"].tolist(), rows["chunk"].tolist(), strict=True))
            assert not reads & writes


@pytest.mark.parametrize(("collective", "algorithm"), EVERY_PLANNER)
def test_no_transfer_is_wasted(collective, algorithm):
    """Every rank gets at most one copy of a chunk, and never one that it already holds; one rank moves nothing."""
    collective_of = COLLECTIVES[collective]
    for topology in topologies(9):
        rows = plan(collective, algorithm, topology).transfers
        copies = rows[~rows["reduce"]]
        assert len(np.unique(copies[["dst", "chunk"]])) == len(copies)
        if not collective_of.reduces:
            schedule = plan(collective, algorithm, topology)
            start = collective_of.start(9, schedule.n_chunks, 0)
            assert len(first_copies(rows, start)) == len(rows)
    assert len(plan(collective, algorithm, Topology.emulated([1])).transfers) == 0


@pytest.mark.parametrize("make", [Topology.emulated, scattered])
@pytest.mark.parametrize("shape", EVEN + UNEVEN)
def test_hierarchical_all_reduce_moves_2S_N_minus_1_over_N_on_each_host_link(make, shape):
    topology = make(shape)
    n_hosts = len(shape)
    for algorithm in ("hierarchical", "hierarchical_tiled", "leader"):
        schedule = plan("all_reduce", algorithm, topology)
        nbytes = 64 * schedule.n_chunks
        sent, received = link_bytes(schedule, topology, nbytes)
        if algorithm == "leader":
            power = 1 << (n_hosts.bit_length() - 1)
            messages = power * (power.bit_length() - 1) + 2 * (n_hosts - power)  # whole, for fewer rounds
            assert sum(sent) == sum(received) == messages * nbytes
        else:
            assert sent == received == [2 * nbytes * (n_hosts - 1) // n_hosts] * n_hosts


@pytest.mark.parametrize("make", [Topology.emulated, scattered])
@pytest.mark.parametrize("shape", EVEN + UNEVEN)
def test_ring_all_reduce_moves_2S_P_minus_1_over_P_on_each_host_link(make, shape):
    topology = make(shape)
    n_ranks, nbytes = sum(shape), 64 * sum(shape)
    sent, received = link_bytes(plan("all_reduce", "ring", topology), topology, nbytes)
    assert sent == received == [2 * nbytes * (n_ranks - 1) // n_ranks] * len(shape)


@pytest.mark.parametrize("shape", [[2, 2], [4, 4], [4, 4, 4, 4], [8, 8]])
def test_halving_doubling_keeps_bytes_inside_equal_hosts_of_a_power_of_two(shape):
    topology, nbytes = Topology.emulated(shape), 64 * sum(shape)
    sent, _ = link_bytes(plan("all_reduce", "halving_doubling", topology), topology, nbytes)
    assert sent == [2 * nbytes * (len(shape) - 1) // len(shape)] * len(shape)


@pytest.mark.parametrize("make", [Topology.emulated, scattered])
@pytest.mark.parametrize("shape", EVEN + UNEVEN)
def test_hierarchical_gathers_and_reductions_cross_each_link_once(make, shape):
    topology = make(shape)
    n_ranks, sizes = sum(shape), [len(host.ranks) for host in topology.hosts]
    nbytes, others = 8 * n_ranks, [8 * (n_ranks - size) for size in sizes]
    _, received = link_bytes(plan("all_gather", "hierarchical", topology), topology, nbytes)
    assert received == others
    sent, _ = link_bytes(plan("reduce_scatter", "hierarchical", topology), topology, nbytes)
    assert sent == others
    root = n_ranks - 1
    away = [0 if root in host.ranks else 1 for host in topology.hosts]
    for collective, direction in (("broadcast", 1), ("reduce", 0), ("gather", 0), ("scatter", 1)):
        got = link_bytes(plan(collective, "hierarchical", topology, root), topology, nbytes)[direction]
        whole = collective in ("broadcast", "reduce")
        assert got == [a * (nbytes if whole else 8 * size) for a, size in zip(away, sizes, strict=True)]


@pytest.mark.parametrize("algorithm", ["pairwise", "hierarchical"])
@pytest.mark.parametrize("shape", EVEN + UNEVEN)
def test_all_to_all_crosses_hosts_only_where_it_must(algorithm, shape):
    topology, n_ranks = scattered(shape), sum(shape)
    sent, received = link_bytes(plan("all_to_all", algorithm, topology), topology, 8 * n_ranks)
    assert sent == received == [8 * len(host.ranks) * (n_ranks - len(host.ranks)) for host in topology.hosts]


@pytest.mark.parametrize("n_ranks", [2, 3, 5, 8, 13, 16, 33])
def test_rounds(n_ranks):
    topology, log2 = Topology.emulated([n_ranks]), (n_ranks - 1).bit_length()
    rounds = {
        ("all_reduce", "ring"): 2 * (n_ranks - 1),
        ("all_reduce", "pairwise"): 2 * (n_ranks - 1),
        ("all_reduce", "doubling"): log2 if n_ranks & (n_ranks - 1) == 0 else log2 + 1,
        ("all_reduce", "halving_doubling"): 2 * log2,
        ("all_reduce", "tree"): 2 * log2,
        ("reduce_scatter", "halving_doubling"): log2,
        ("all_gather", "halving_doubling"): log2,
        ("broadcast", "tree"): log2,
        ("broadcast", "chain"): n_ranks - 1,
        ("gather", "tree"): log2,
        ("scatter", "direct"): 1,
        ("all_to_all", "pairwise"): n_ranks - 1,
        ("all_to_all", "bruck"): log2,
    }
    assert rounds == {(collective, name): plan(collective, name, topology).n_rounds for collective, name in rounds}


@pytest.mark.parametrize("n", range(2, 20))
def test_halving_sends_chunks_in_the_order_in_which_they_came(n):
    """Else a link waits for a chunk while a later one stands ready, and hosts idle in turn."""
    rows = shapes.halving_gather(n)
    came = np.full((n, n), -1)
    came[rows["dst"], rows["chunk"]] = rows["round"]
    for round in range(int(rows["round"].max()) + 1):
        now = rows[rows["round"] == round]
        for src in range(n):
            order = came[src, now["chunk"][now["src"] == src]]
            assert np.all(np.diff(order) >= 0)


def test_combinators():
    one = transfers(0, [0, 1], [1, 0], [0, 1])
    assert one.dtype == TRANSFER
    both = in_sequence(one, one)
    assert both["round"].tolist() == [0, 0, 1, 1]
    placed = place(one, [5, 7], [[3, 4], []])
    assert placed[["src", "dst", "chunk"]].tolist() == [(5, 7, 3), (5, 7, 4)]
    back = reverse(transfers([0, 1], [0, 1], [1, 2], 0), reduce=True)
    assert back.tolist() == [(0, 2, 1, 0, True), (1, 1, 0, 0, True)]


def test_a_schedule_is_read_only():
    schedule = plan("all_reduce", "ring", Topology.emulated([3]))
    with pytest.raises(ValueError, match="read-only"):
        schedule.transfers["src"] = 0
    with pytest.raises(Exception, match="dtype TRANSFER"):
        Schedule("all_reduce", "mine", 2, 1, 0, np.zeros(3))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 21])
def test_two_trees_have_every_rank_inside_at_most_one(n):
    """But for one rank where n is odd; each ends on one rank with all contributions, over at most two children."""
    inner = []
    for mirrored in (False, True):
        rows, root = shapes.in_order_reduce(n, mirrored)
        up = place(rows, range(n), [[0]])
        check(Schedule("reduce", "mine", n, 1, root, up))
        assert np.bincount(up["dst"], minlength=1).max() <= 2
        inner.append(set(up["dst"].tolist()))
    assert len(inner[0] & inner[1]) <= n % 2 + (n == 1)


def test_three_levels_cross_an_uplink_as_seldom_as_possible():
    """2(R-1)/R of the tensor out of each of R racks, however many hosts they hold; the ring sends nearly twice it."""
    hosts = [Host(f"h{i}", (2 * i, 2 * i + 1), switch=f"r{i % 2}") for i in range(6)]
    topology = Topology(tuple(hosts), switches=(Switch("r0", TCP), Switch("r1", TCP)))
    crossed = {}
    for algorithm in ("hierarchical", "ring", "hierarchical_tree", "leader", "rack_leader"):
        schedule = plan("all_reduce", algorithm, topology)
        sizes, rows = chunk_nbytes(schedule, 1200), schedule.transfers
        rack = topology.above[topology.host_index, 0]
        leaves = (rack[rows["src"]] == 0) & (rack[rows["dst"]] == 1)
        crossed[algorithm] = int(sizes[rows["chunk"][leaves]].sum())
    assert crossed["hierarchical"] == 1200
    assert crossed["hierarchical_tree"] == 1200
    assert crossed["rack_leader"] == 1200
    assert crossed["ring"] > 1.8 * 1200
    assert crossed["leader"] > 1200


@pytest.mark.parametrize(
    ("collective", "algorithm", "two_level", "messages"),
    [
        ("all_to_all", "rack_hierarchical", "hierarchical", (6, 18)),  # by host and rail; by two hosts and rail
        ("gather", "rack_leader", "hierarchical", (1, 3)),  # by rack; by host
    ],
)
def test_three_levels_cross_an_uplink_in_few_messages(collective, algorithm, two_level, messages):
    hosts = [Host(f"h{i}", (2 * i, 2 * i + 1), switch=f"r{i % 2}") for i in range(6)]
    topology = Topology(tuple(hosts), switches=(Switch("r0", TCP), Switch("r1", TCP)))
    rack = topology.above[topology.host_index, 0]
    for name, expected in zip((algorithm, two_level), messages, strict=True):
        rows = plan(collective, name, topology).transfers
        crossing = rows[(rack[rows["src"]] == 1) & (rack[rows["dst"]] == 0)]
        assert len(np.unique(crossing[["round", "src", "dst"]])) == expected
        assert len(crossing) == (36 if collective == "all_to_all" else 6)


def test_three_levels_win_where_uplinks_are_slow():
    hosts = [Host(f"h{i}", (2 * i, 2 * i + 1), switch=f"r{i // 3}") for i in range(6)]
    wan = Link(10e-3, 125e6, 5e-6)
    topology = Topology(tuple(hosts), switches=(Switch("r0", wan), Switch("r1", wan)))
    times = {
        name: simulate(planner(topology, 0), topology, nbytes).total_s
        for nbytes in (1 << 10, 1 << 26)
        for name, planner in candidates(topology, "all_reduce").items()
        if (nbytes > 1 << 20) == (name not in ("leader", "rack_leader"))
    }
    assert times["rack_leader"] < times["leader"]
    assert min(times["hierarchical"], times["hierarchical_tree"]) < 0.6 * times["ring"]
