"""Links as measured: who is measured with whom and when, what becomes of the figures, and a run on emulated hosts."""

import dataclasses
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spawn import run_ranks

import pycomm.measure as measure_module
from pycomm.discover import survey
from pycomm.errors import InvalidArgument
from pycomm.hosts import Link, Nic, Switch
from pycomm.measure import Links, measure_links, measured_topology, slow_paths
from pycomm.pairs import circle, host_pairs, host_rounds, link_rounds, pair_rounds
from pycomm.topology import Topology


@given(st.integers(1, 40))
def test_ranks_of_their_own_machines_need_the_fewest_rounds(n):
    rounds = pair_rounds(circle(n), [str(rank) for rank in range(n)])
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(n), 2))
    assert len(rounds) == (0 if n == 1 else n - 1 if n % 2 == 0 else n)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_no_machine_serves_two_pairs_of_a_round(machine_of):
    machines = [f"m{number}" for number in machine_of]
    rounds = pair_rounds(circle(len(machines)), machines)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(len(machines)), 2))
    for pairs in rounds:
        assert pairs
        used = [machine for pair in pairs for machine in {machines[rank] for rank in pair}]
        assert len(used) == len(set(used))


@pytest.mark.parametrize("machines", ["mmmmmmmmm", "aababccde", "aababccee"])
def test_large_groups_measure_each_pair_of_hosts_once_and_inside_hosts_before_and_after(machines):
    topology = Topology.from_host_ids("aababccde")
    rounds = link_rounds(topology, machines)
    of_hosts = [[tuple(sorted(topology.host_index[list(pair)])) for pair in pairs] for pairs in rounds]
    inside = [(0, 0), (1, 1), (2, 2)]
    is_inside = [{a == b for a, b in pairs} for pairs in of_hosts]
    n_first = is_inside.index({False})
    assert is_inside == [{True}] * n_first + [{False}] * (len(rounds) - 2 * n_first) + [{True}] * n_first
    assert sorted(pair for pairs in of_hosts[:n_first] for pair in pairs) == inside
    assert rounds[:n_first] == rounds[-n_first:]
    between = [pair for pairs in of_hosts[n_first:-n_first] for pair in pairs]
    assert sorted(between) == list(combinations(range(5), 2))


@given(st.integers(1, 150))
def test_many_hosts_meet_a_few_others_in_few_rounds(n_hosts):
    topology = Topology.emulated([1] * n_hosts)
    pairs = host_pairs(topology)
    assert len(set(pairs)) == len(pairs) and all(a < b for a, b in pairs)
    rounds = host_rounds(topology, [str(host) for host in range(n_hosts)])
    assert sorted(pair for pairs in rounds for pair in pairs) == sorted(pairs)
    if n_hosts <= 16:
        assert sorted(pairs) == list(combinations(range(n_hosts), 2))
        return
    assert set(Counter(host for pair in pairs for host in pair).values()) == {3 + n_hosts % 2}
    assert len(rounds) <= 7


@given(st.lists(st.integers(1, 12), min_size=2, max_size=12), st.randoms())
def test_many_hosts_meet_one_of_their_rack_and_one_of_another(sizes, random):
    n_hosts = sum(sizes)
    racks = [rack for rack, size in enumerate(sizes) for _ in range(size)]
    random.shuffle(racks)
    plain = Topology.emulated([1] * n_hosts)
    hosts = tuple(dataclasses.replace(host, switch=f"r{rack}") for host, rack in zip(plain.hosts, racks, strict=True))
    switches = tuple(Switch(f"r{rack}", Link(0, 1e9)) for rack in range(len(sizes)))
    meets = [[] for _ in hosts]
    for a, b in host_pairs(dataclasses.replace(plain, hosts=hosts, switches=switches)):
        meets[a].append(racks[b])
        meets[b].append(racks[a])
    for host, rack in enumerate(racks):
        assert rack in meets[host] or sizes[rack] == 1
        assert set(meets[host]) != {rack} or (n_hosts > 16 and sizes[rack] > n_hosts / 2)


class SlowLink:
    """A group of two ranks on a link on which each message takes its bytes and a header; tokens: bytes that pass at
    once, as through a shaper. It keeps its own time."""

    def __init__(self, bytes_per_s, latency_s=0.0, tokens=0):
        self.bytes_per_s, self.latency_s, self.tokens = bytes_per_s, latency_s, tokens
        self.now_s, self.receives = 0.0, False

    def perf_counter(self):
        return self.now_s

    def send(self, data, peer):
        self.cross(data.nbytes + 80)
        self.receives = False

    def recv(self, data, peer):
        self.cross(data.nbytes + 80)
        self.now_s += 0 if self.receives else self.latency_s  # of what follows another, the bytes alone
        self.receives = True

    def cross(self, nbytes):
        self.now_s += 1e-6 + max(0, nbytes - self.tokens) / self.bytes_per_s
        self.tokens = max(0, self.tokens - nbytes)


def test_a_transfer_that_was_held_up_is_not_taken_for_a_long_one():
    held_up_s = iter([0.06, 0, 0, 0.1])

    def transfer(nbytes):
        return nbytes / 1e8 + next(held_up_s, 0) + 1e-4

    assert measure_module._rate(transfer, 256 << 20, 0.05, 1e-3) == pytest.approx(1e8, rel=0.05)


@pytest.mark.parametrize(
    ("link", "stated", "within_s"),
    [
        (SlowLink(1250), np.inf, 8),
        (SlowLink(1250, tokens=96_000), 1250, 8),  # all that is measured comes from the bucket
        (SlowLink(1e5), np.inf, 1),
        (SlowLink(1e5, latency_s=0.2), np.inf, 4),
        (SlowLink(1.25e8), np.inf, 1),
        (SlowLink(1.25e8, latency_s=0.1), np.inf, 4),
        (SlowLink(1e10), np.inf, 1),
    ],
)
def test_a_slow_link_takes_a_bounded_time(monkeypatch, link, stated, within_s):
    figures = np.full((3, 2, 2), np.nan)
    monkeypatch.setattr(measure_module, "time", link)
    measure_module._lead(link, (0, 1), 0.05, stated, figures)
    assert link.now_s < within_s
    assert np.isnan(figures[:, [0, 1], [0, 1]]).all()
    (latency, _), (overhead, _), rates = figures[:, [0, 1], [1, 0]]
    assert rates == pytest.approx([link.bytes_per_s] * 2, rel=0.15)
    if not np.isfinite(stated):
        assert latency == pytest.approx(link.latency_s / 2 + 1e-6 + 88 / link.bytes_per_s)
        assert overhead == pytest.approx(1e-6 + 88 / link.bytes_per_s)


def links_of(topology, latency_s, bytes_per_s, host_rates):
    n = topology.n_ranks
    between = topology.host_index[:, None] != topology.host_index
    latency = np.where(between, latency_s, 2e-6)
    rate = np.where(between, bytes_per_s, 5e9)
    overhead = np.where(between, 4e-6, 1e-6)
    for figure in (latency, rate, overhead):
        np.fill_diagonal(figure, np.nan)
    hosts = np.array(host_rates, float)
    np.fill_diagonal(hosts, np.nan)
    assert latency.shape == (n, n)
    return Links(latency, overhead, rate, hosts, 9e9)


def test_figures_become_a_topology():
    plain = Topology.from_host_ids("aabbc")
    nics = (Nic("eth0", Link(1e-5, 3e9)), Nic("eth1", Link(1e-5, 1e9)))
    topology = dataclasses.replace(plain, hosts=(dataclasses.replace(plain.hosts[0], nics=nics), *plain.hosts[1:]))
    links = links_of(topology, 30e-6, 1e8, [[0, 4e8, 1e8], [3.9e8, 0, 1e8], [1e8, 1e8, 0]])
    for figure, disturbed in ((links.latency_s, 1e-3), (links.overhead_s, 1e-3), (links.bytes_per_s, 1e8)):
        figure[[2, 3], [3, 2]] = disturbed  # two ranks that shared a core
    measured = measured_topology(topology, links)
    assert measured.inside == Link(2e-6, 5e9, 1e-6)
    assert measured.reduce_bytes_per_s == 9e9
    assert [host.nic.bytes_per_s for host in measured.hosts] == pytest.approx([4e8, 4e8, 1e8])
    assert [(nic.name, nic.link.bytes_per_s) for nic in measured.hosts[0].nics] == [
        ("eth0", pytest.approx(3e8)),
        ("eth1", pytest.approx(1e8)),
    ]
    path = measured.link(0, 4)
    assert (path.latency_s, path.overhead_s, path.bytes_per_s) == (30e-6, 4e-6, pytest.approx(1e8))
    assert slow_paths(topology, links) == []


def test_a_path_slower_than_both_nics_is_said():
    topology = Topology.from_host_ids("abc")
    links = links_of(topology, 30e-6, 1e8, [[0, 4e8, 4e8], [4e8, 0, 1e8], [4e8, 1e8, 0]])
    (said,) = slow_paths(topology, links)
    assert "between hosts b and c: the path carries 25%" in said and "switch" in said
    hosts = tuple(dataclasses.replace(host, switch="rack" if host.name == "c" else None) for host in topology.hosts)
    assert slow_paths(dataclasses.replace(topology, hosts=hosts, switches=(Switch("rack", Link(0, 1e8)),)), links) == []


def test_pairs_of_hosts_that_did_not_meet_are_no_slow_paths():
    topology = Topology.from_host_ids("abc")
    nan = np.nan
    links = links_of(topology, 30e-6, 1e8, [[0, 4e8, nan], [4e8, 0, 1e8], [nan, 1e8, 0]])
    links.latency_s[[0, 2], [2, 0]] = nan
    assert [host.nic.bytes_per_s for host in measured_topology(topology, links).hosts] == pytest.approx([4e8, 4e8, 1e8])
    assert slow_paths(topology, links) == []


def test_what_was_not_measured_keeps_its_figures():
    topology = Topology.emulated([1])
    links = Links(*np.full((4, 1, 1), np.nan), 9e9)
    assert measured_topology(topology, links) == dataclasses.replace(topology, reduce_bytes_per_s=9e9)


def measure(group, all_pairs, machines):
    found = survey(group)
    machines = machines or [machine.boot_id for machine in found.machines]
    links = measure_links(group, found.topology, machines, all_pairs=all_pairs, target_s=0.002)
    with pytest.raises(InvalidArgument, match=r"1 ranks in the topology, 5 in the group"):
        measure_links(group, Topology.emulated([1]), machines)
    return links


@pytest.mark.parametrize(("all_pairs", "hosts", "machines"), [(True, "aabac", ""), (False, "aabcd", "aabcd")])
def test_emulated_hosts_are_measured_alike_on_every_rank(all_pairs, hosts, machines):
    results = run_ranks(measure, 5, all_pairs, machines, hosts=hosts)
    first = results[0]
    for other in results:
        for name in ("latency_s", "overhead_s", "bytes_per_s", "host_bytes_per_s", "reduce_bytes_per_s"):
            assert np.array_equal(getattr(other, name), getattr(first, name), equal_nan=True)
    for figure in (first.latency_s, first.bytes_per_s):
        assert np.isnan(np.diag(figure)).all()
        measured = ~np.isnan(figure)
        assert (measured == measured.T).all()
        assert measured.sum() == (20 if all_pairs else 2 * (1 + 6))
        assert (figure[measured] > 0).all()
    apart = ~np.eye(len(set(hosts)), dtype=bool)
    assert (first.host_bytes_per_s[apart] > 0).all() and np.isnan(first.host_bytes_per_s[~apart]).all()
    assert first.reduce_bytes_per_s > 0
