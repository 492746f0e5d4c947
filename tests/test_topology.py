"""Topology: placement, links, files, and contradictions refused."""

import pytest

from pycomm.errors import TopologyError
from pycomm.topology import SHARED_MEMORY, TCP, Host, Link, Topology

FAST = Link(latency_s=1e-6, bytes_per_s=5e10)
SLOW = Link(latency_s=1e-3, bytes_per_s=1e8, overhead_s=1e-5)


def test_labels_in_rank_order_may_be_scattered():
    topology = Topology.from_host_ids(["a", "b", "a"])
    assert topology.hosts == (Host("a", (0, 2)), Host("b", (1,)))
    assert topology.n_ranks == 3
    assert topology.host_index.tolist() == [0, 1, 0]
    assert topology.local_rank.tolist() == [0, 0, 1]
    assert topology.host_of(1).name == "b"


def test_emulated_hosts_hold_consecutive_ranks():
    assert [host.ranks for host in Topology.emulated([3, 1]).hosts] == [(0, 1, 2), (3,)]


def test_a_link_is_inside_or_the_slower_nic():
    topology = Topology((Host("a", (0, 1), FAST), Host("b", (2,), SLOW)), inside=SHARED_MEMORY)
    assert topology.link(0, 1) == SHARED_MEMORY
    assert topology.link(0, 2) == topology.link(2, 0) == SLOW
    with pytest.raises(TopologyError, match="rank 3 is not in this topology of 3 ranks"):
        topology.link(0, 3)


def test_ranks_by_host_begin_where_asked():
    topology = Topology.from_host_ids(["a", "b", "a", "c", "b"])
    assert topology.by_host().tolist() == [0, 2, 1, 4, 3]
    assert topology.by_host(4).tolist() == [4, 1, 3, 0, 2]


def test_a_sub_group_renumbers_its_ranks():
    topology = Topology((Host("a", (0, 2), FAST), Host("b", (1,), SLOW), Host("c", (3,))), SLOW, 1e9)
    assert topology.select([3, 2]) == Topology((Host("a", (1,), FAST), Host("c", (0,))), SLOW, 1e9)
    with pytest.raises(TopologyError, match="rank 4"):
        topology.select([4])


def test_a_file_reads_back_equal(tmp_path):
    topology = Topology((Host('a "quoted" \\ name', (1, 0), FAST), Host("größe", (2,), SLOW)), SLOW, 1e10)
    topology.save(tmp_path / "cluster.toml")
    assert Topology.load(tmp_path / "cluster.toml") == topology


def test_a_short_file_takes_the_defaults(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text('[[hosts]]\nname = "a"\nranks = [0]\n[[hosts]]\nname = "b"\nranks = [1]\n')
    assert Topology.load(path) == Topology.from_host_ids(["a", "b"], TCP)


def test_fingerprints_tell_topologies_apart():
    one = Topology.emulated([2, 1])
    assert one.fingerprint() == Topology.emulated([2, 1]).fingerprint()
    others = [Topology.emulated([1, 2]), Topology.emulated([2, 1], nic=SLOW), Topology.from_host_ids("aba")]
    assert len({one.fingerprint(), *(other.fingerprint() for other in others)}) == 4


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        ((), "no hosts"),
        ((Host("a", (0,)), Host("a", (1,))), "two hosts are named 'a'"),
        ((Host("a", (0, 1)), Host("b", (1,))), "rank 1 is on host 'a' and on host 'b'"),
        ((Host("a", (0, 0)),), "rank 0 is on host 'a' and on host 'a'"),
        ((Host("a", (0, 3)),), r"2 ranks must be numbered 0 .. 1; missing or out of range: \[1, 3\]"),
        ((Host("a", (-1, 0)),), r"missing or out of range: \[-1, 1\]"),
    ],
)
def test_contradictions_are_refused(hosts, message):
    with pytest.raises(TopologyError, match=message):
        Topology(hosts)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Host("a", ()), "host 'a' has no ranks"),
        (lambda: Host("", (0,)), "printable name"),
        (lambda: Link(-1.0, 1e9), "latency_s is -1.0"),
        (lambda: Link(float("nan"), 1e9), "latency_s is nan"),
        (lambda: Link(0.0, 0.0), "bytes_per_s is 0.0; give a positive rate"),
        (lambda: Link(0.0, float("inf")), "bytes_per_s is inf"),
        (lambda: Link(0.0, 1e9, -1e-6), "overhead_s is -1e-06"),
        (lambda: Topology((Host("a", (0,)),), reduce_bytes_per_s=-1.0), "reduce_bytes_per_s is -1.0"),
    ],
)
def test_impossible_figures_are_refused(make, message):
    with pytest.raises(TopologyError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hosts = [", "cannot read topology"),
        ("", r"no \[\[hosts\]\] tables"),
        ("hosts = 3", r"no \[\[hosts\]\] tables"),
        ('[[hosts]]\nname = "a"\nranks = [0]\nspeed = 3', "host: unknown key 'speed'; known are name, ranks, nic"),
        ('racks = 2\n[[hosts]]\nname = "a"\nranks = [0]', "unknown key 'racks'"),
        ("[[hosts]]\nranks = [0]", "host name is None"),
        ('[[hosts]]\nname = "a"', "host 'a': ranks is None"),
        ('[[hosts]]\nname = "a"\nranks = [0.5]', r"ranks is \[0.5\]"),
        ('[[hosts]]\nname = "a"\nranks = [0]\nnic = 3', "host 'a': nic is 3; give a table"),
        ('[[hosts]]\nname = "a"\nranks = [0]\nnic = {latency_s = 1}', "host 'a': nic lacks bytes_per_s"),
        ('inside = {latency_s = "x", bytes_per_s = 1}\n[[hosts]]\nname = "a"\nranks = [0]', "latency_s is 'x'"),
        ('reduce_bytes_per_s = true\n[[hosts]]\nname = "a"\nranks = [0]', "reduce_bytes_per_s is True"),
        ('[[hosts]]\nname = "a"\nranks = [1]', "missing or out of range"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(TopologyError, match=message) as refused:
        Topology.load(path)
    assert "cluster.toml" in str(refused.value)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(TopologyError, match=r"cannot read topology .*absent.toml"):
        Topology.load(tmp_path / "absent.toml")
