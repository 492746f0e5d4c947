"""Links as measured: who is measured with whom and when, what becomes of the figures, and a run on emulated hosts."""

import dataclasses
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from spawn import run_ranks

from pycomm.discover import survey
from pycomm.errors import InvalidArgument
from pycomm.hosts import Link, Nic
from pycomm.measure import Links, _circle, _links, measure_links, measured_topology, pair_rounds, slow_paths
from pycomm.topology import Topology

pytestmark = pytest.mark.timeout(90)


@given(st.integers(1, 40))
def test_ranks_of_their_own_machines_need_the_fewest_rounds(n):
    rounds = pair_rounds(_circle(n), [str(rank) for rank in range(n)])
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(n), 2))
    assert len(rounds) == (0 if n == 1 else n - 1 if n % 2 == 0 else n)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_no_machine_serves_two_pairs_of_a_round(machine_of):
    machines = [f"m{number}" for number in machine_of]
    rounds = pair_rounds(_circle(len(machines)), machines)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(len(machines)), 2))
    for pairs in rounds:
        assert pairs
        used = [machine for pair in pairs for machine in {machines[rank] for rank in pair}]
        assert len(used) == len(set(used))


def test_large_groups_measure_each_pair_of_hosts_once_and_inside_hosts_twice():
    topology = Topology.from_host_ids("aababccd")
    pairs = [tuple(sorted(topology.host_index[list(pair)])) for pair in _links(topology)]
    between = list(combinations(range(4), 2))
    inside = [(0, 0), (1, 1), (2, 2)]
    assert sorted(pairs) == sorted([*inside, *inside, *between])
    assert pairs[:3] == pairs[-3:] == inside


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


def test_what_was_not_measured_keeps_its_figures():
    topology = Topology.emulated([1])
    links = Links(*np.full((4, 1, 1), np.nan), 9e9)
    assert measured_topology(topology, links) == dataclasses.replace(topology, reduce_bytes_per_s=9e9)


def measure(group, all_pairs):
    found = survey(group)
    machines = [machine.boot_id for machine in found.machines]
    links = measure_links(group, found.topology, machines, all_pairs=all_pairs, target_s=0.002)
    with pytest.raises(InvalidArgument, match=r"1 ranks in the topology, 5 in the group"):
        measure_links(group, Topology.emulated([1]), machines)
    return links


@pytest.mark.parametrize("all_pairs", [True, False])
def test_emulated_hosts_are_measured_alike_on_every_rank(all_pairs):
    results = run_ranks(measure, 5, all_pairs, hosts=list("aabac"))
    first = results[0]
    for other in results:
        for name in ("latency_s", "overhead_s", "bytes_per_s", "host_bytes_per_s", "reduce_bytes_per_s"):
            assert np.array_equal(getattr(other, name), getattr(first, name), equal_nan=True)
    for figure in (first.latency_s, first.bytes_per_s):
        assert np.isnan(np.diag(figure)).all()
        measured = ~np.isnan(figure)
        assert (measured == measured.T).all()
        assert measured.sum() == (20 if all_pairs else 2 * 4)
        assert (figure[measured] > 0).all()
    assert (first.host_bytes_per_s[~np.eye(3, dtype=bool)] > 0).all()
    assert first.reduce_bytes_per_s > 0
