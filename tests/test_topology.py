"""Topology: placement, links, switches, files, and contradictions refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pycomm.errors import TopologyError
from pycomm.topology import SHARED_MEMORY, TCP, Host, Link, Nic, Switch, Topology

FAST = Link(latency_s=1e-6, bytes_per_s=5e10)
SLOW = Link(latency_s=1e-3, bytes_per_s=1e8, overhead_s=1e-5)


def nics(*links):
    return tuple(Nic(f"nic{index}", link) for index, link in enumerate(links))


# Racks r and s in site x, rack t in site y, one host on the core.
SITES = Topology(
    (
        Host("r0", (0, 1), switch="r"),
        Host("t0", (2,), switch="t"),
        Host("s0", (3,), switch="s"),
        Host("r1", (4,), switch="r"),
        Host("core", (5,)),
    ),
    switches=(
        Switch("x", Link(5e-3, 1e8)),
        Switch("y", Link(4e-3, 5e7)),
        Switch("r", Link(1e-4, 8e8, 7e-6), "x"),
        Switch("s", Link(2e-4, 6e8), "x"),
        Switch("t", Link(3e-4, 7e8), "y"),
    ),
)


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
    topology = Topology((Host("a", (0, 1), nics(FAST)), Host("b", (2,), nics(SLOW))), inside=SHARED_MEMORY)
    assert topology.link(0, 1) == SHARED_MEMORY
    assert topology.link(0, 2) == topology.link(2, 0) == SLOW
    with pytest.raises(TopologyError, match="rank 3 is not in this topology of 3 ranks"):
        topology.link(0, 3)


def test_nics_of_a_host_add_up():
    assert Host("a", (0,), nics(FAST, SLOW)).nic == Link(1e-3, 5e10 + 1e8, 1e-5)


@pytest.mark.parametrize(
    ("src", "dst", "crossed", "link"),
    [
        (0, 1, [], SHARED_MEMORY),
        (0, 4, [], TCP),
        (0, 3, ["r", "s"], Link(2e-4, 6e8, 7e-6)),
        (3, 2, ["s", "x", "y", "t"], Link(5e-3, 5e7, 5e-6)),
        (5, 0, ["x", "r"], Link(5e-3, 1e8, 7e-6)),
    ],
)
def test_a_message_crosses_the_uplinks_below_the_first_common_switch(src, dst, crossed, link):
    assert [switch.name for switch in SITES.uplinks(src, dst)] == crossed
    assert [switch.name for switch in SITES.uplinks(dst, src)] == crossed[::-1]
    assert SITES.link(src, dst) == SITES.link(dst, src) == link


def test_hosts_in_order_keep_racks_and_sites_together():
    names = [SITES.hosts[index].name for index in SITES.hosts_in_order()]
    assert names == ["r0", "r1", "s0", "t0", "core"]
    assert SITES.by_host(3).tolist()[:4] == [3, 4, 0, 1]
    assert SITES.by_host(2).tolist()[0] == 2


@settings(deadline=None)
@given(st.data())
def test_in_order_no_switch_is_left_and_entered_again(data):
    """Walked as a ring, whatever the first host: the ranks below each switch are one piece of it."""
    switches = [
        Switch(f"s{i}", TCP, data.draw(st.sampled_from([None, *(f"s{j}" for j in range(i))]))) for i in range(5)
    ]
    places = data.draw(st.lists(st.sampled_from([None, "s0", "s1", "s2", "s3", "s4"]), min_size=1, max_size=9))
    found = [Host(f"h{i}", (i,), switch=switch) for i, switch in enumerate(places)]
    topology = Topology(tuple(found), switches=tuple(switches))
    first = data.draw(st.integers(0, len(found) - 1))
    order = topology.by_host(first)
    assert order[0] == first
    assert sorted(order.tolist()) == list(range(len(found)))
    for index in range(len(switches)):
        below = [bool((topology.above[rank] == index).any()) for rank in order]
        assert sum(here != there for here, there in zip(below, below[1:] + below[:1], strict=True)) <= 2


def test_ranks_by_host_begin_where_asked():
    topology = Topology.from_host_ids(["a", "b", "a", "c", "b"])
    assert topology.by_host().tolist() == [0, 2, 1, 4, 3]
    assert topology.by_host(4).tolist() == [4, 1, 3, 0, 2]


def test_a_sub_group_renumbers_its_ranks():
    topology = Topology((Host("a", (0, 2), nics(FAST)), Host("b", (1,), nics(SLOW)), Host("c", (3,))), SLOW, 1e9)
    assert topology.select([3, 2]) == Topology((Host("a", (1,), nics(FAST)), Host("c", (0,))), SLOW, 1e9)
    with pytest.raises(TopologyError, match="rank 4"):
        topology.select([4])


def test_a_sub_group_keeps_the_switches_and_numa_nodes_it_has_ranks_on():
    part = SITES.select([3, 4])
    assert [(host.name, host.ranks, host.switch) for host in part.hosts] == [("s0", (0,), "s"), ("r1", (1,), "r")]
    assert [switch.name for switch in part.switches] == ["x", "r", "s"]
    numa = Topology((Host("a", (0, 1, 2, 3), numa=((0, 2), (1,), (3,))),))
    assert numa.select([3, 2, 0]).hosts[0].numa == ((2, 1), (0,))


def test_a_file_with_switches_and_numa_nodes_reads_back_equal(tmp_path):
    hosts = (*SITES.hosts[:-1], Host("core", (5,), nics(FAST, SLOW), None, ((5,),)))
    topology = Topology(hosts, switches=SITES.switches)
    topology.save(tmp_path / "cluster.toml")
    assert Topology.load(tmp_path / "cluster.toml") == topology


def test_one_nic_may_be_written_short(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text('[[hosts]]\nname = "a"\nranks = [0]\nnic = {latency_s = 1e-3, bytes_per_s = 100000000}')
    assert Topology.load(path) == Topology((Host("a", (0,), nics(Link(1e-3, 1e8))),))


def test_a_file_reads_back_equal(tmp_path):
    topology = Topology(
        (Host('a "quoted" \\ name', (1, 0), nics(FAST, SLOW)), Host("größe", (2,), nics(SLOW))), SLOW, 1e10
    )
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
        ((Host("a", (0,), switch="r"),), r"host 'a' hangs from switch 'r', which is not among \[\]"),
    ],
)
def test_contradictions_are_refused(hosts, message):
    with pytest.raises(TopologyError, match=message):
        Topology(hosts)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ((Switch("r", TCP), Switch("r", SLOW)), "two switches are named 'r'"),
        ((Switch("r", TCP, "x"),), r"switch 'r' hangs from switch 'x', which is not among \['r'\]"),
        ((Switch("r", TCP, "r"),), "in a circle: r -> r;"),
        ((Switch("r", TCP, "x"), Switch("x", TCP, "y"), Switch("y", TCP, "x")), "in a circle: x -> y -> x;"),
    ],
)
def test_impossible_switches_are_refused(switches, message):
    with pytest.raises(TopologyError, match=message):
        Topology((Host("a", (0,)),), switches=switches)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Nic("", TCP), "NIC name ''"),
        (lambda: Switch("", TCP), "switch name ''"),
        (lambda: Host("a", (0,), ()), "host 'a' has no NICs"),
        (lambda: Host("a", (0,), (Nic("x", TCP), Nic("x", SLOW))), "two NICs are named 'x'"),
        (lambda: Host("a", (0, 1), numa=((0,),)), r"numa is \[\[0\]\]; each of the host's ranks \[0, 1\]"),
        (lambda: Host("a", (0, 1), numa=((0, 1), (1,))), "exactly one NUMA node"),
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
        ('[[hosts]]\nname = "a"\nranks = [0]\nswitch = "r"', "hangs from switch 'r'"),
        ('[[hosts]]\nname = "a"\nranks = [0]\nswitch = 3', "host 'a': switch is 3; give a string"),
        ('[[hosts]]\nname = "a"\nranks = [0]\nnics = 3', "host 'a': nics is 3; give a list of tables"),
        ('[[hosts]]\nname = "a"\nranks = [0]\nnics = []', "host 'a' has no NICs"),
        ('[[hosts]]\nname = "a"\nranks = [0]\nnics = [{latency_s = 1, bytes_per_s = 1}]', "NIC name is None"),
        ('[[hosts]]\nname = "a"\nranks = [0]\nnics = [{name = "e", latency_s = 1}]', "NIC 'e' lacks bytes_per_s"),
        (
            '[[hosts]]\nname = "a"\nranks = [0]\nnic = {latency_s = 1, bytes_per_s = 0}',
            "host 'a': nic: link: bytes_per_s is 0",
        ),
        ('[[hosts]]\nname = "a"\nranks = [0]\nnic = {}\nnics = []', "has both nic and nics"),
        ('[[hosts]]\nname = "a"\nranks = [0]\nnuma = 2', "numa is 2; give a list"),
        ('[[hosts]]\nname = "a"\nranks = [0]\nnuma = [0]', "a NUMA node is 0; give a list of whole numbers"),
        ('switches = 3\n[[hosts]]\nname = "a"\nranks = [0]', r"no \[\[switches\]\] tables but switches = 3"),
        ('[[switches]]\nname = "r"\n[[hosts]]\nname = "a"\nranks = [0]', "switch 'r': uplink is None"),
        ('[[switches]]\nuplink = 3\n[[hosts]]\nname = "a"\nranks = [0]', "switch name is None"),
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
