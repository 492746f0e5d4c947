"""Ranks' facts gathered into one topology: the same on every rank, emulated and asymmetric hosts, what is unknown."""

import dataclasses

import pytest
from spawn import run_ranks

import pycomm
from pycomm.discover import _merge, _pack, _unpack, describe, discover, survey
from pycomm.gpus import Gpu
from pycomm.hosts import TCP
from pycomm.machine import Interface, this_machine

MACHINE = dataclasses.replace(
    this_machine(in_a_job=False),
    cpu="Test CPU",
    boot_id="boot-a",
    numa=((0, (0, 1)), (1, (2, 3))),
    numa_node=0,
    cores=(0, 1),
    interfaces=(
        Interface("eth0", "mlx5_core", ("10.0.0.1",), 12.5e9),
        Interface("eth1", "veth", ("10.0.1.1",), None, "a veth interface has no rate of its own"),
    ),
    carriers=("eth0", "eth1"),
    unknown=(),
)


def see(group):
    found = survey(group)
    return found, pycomm.Topology.discover(group), group.topology


@pytest.mark.parametrize("hosts", ["aaabcc", "abcabc", "aaa"])
def test_every_rank_finds_the_same_and_the_groups_own_hosts(hosts):
    results = run_ranks(see, len(hosts), hosts=list(hosts))
    found, topology, of_group = results[0]
    assert all(other[:2] == (found, topology) for other in results)
    assert found.topology == topology
    assert [(host.name, host.ranks) for host in topology.hosts] == [(h.name, h.ranks) for h in of_group.hosts]
    for name in set(hosts):
        ranks = tuple(rank for rank, host in enumerate(hosts) if host == name)
        assert ranks in [host.ranks for host in topology.hosts if host.name == name]
    emulated = [text for text in found.unknown if "they are one machine" in text]
    assert len(emulated) == (len(set(hosts)) > 1)
    assert sum("the rate of lo" in text for text in found.unknown) == len(set(hosts))


def test_a_rank_alone_has_its_label_or_the_machines_name(monkeypatch):
    monkeypatch.delenv("PYCOMM_HOST_ID", raising=False)
    alone = discover()
    assert [(host.name, host.ranks) for host in alone.hosts] == [(this_machine().host_id, (0,))]
    monkeypatch.setenv("PYCOMM_HOST_ID", "b7")
    assert pycomm.Topology.discover().hosts[0].name == "b7"


def test_facts_survive_the_way_to_other_ranks():
    gpus = (Gpu(0, "H100", "GPU-1", 18, (1, 2)),)
    machine, same_gpus = _unpack(_pack(MACHINE, gpus, ("GPUs: no",)))
    assert machine == dataclasses.replace(MACHINE, unknown=("GPUs: no",))
    assert same_gpus == gpus


def test_nics_numa_nodes_and_gpus_come_from_their_hosts():
    other = dataclasses.replace(MACHINE, numa_node=1, cores=(2, 3))
    far = dataclasses.replace(MACHINE, boot_id="boot-b", numa_node=None, cores=(0, 1, 2, 3), carriers=())
    gpu = Gpu(0, "H100", "GPU-1", 18, ())
    found = _merge(
        ("a", "a", "a", "b"), [_pack(m, (gpu,) if m is far else (), ()) for m in (other, MACHINE, other, far)]
    )
    a, b = found.topology.hosts
    assert [(nic.name, nic.link.bytes_per_s) for nic in a.nics] == [("eth0", 12.5e9), ("eth1", TCP.bytes_per_s)]
    assert a.nic.bytes_per_s == 12.5e9 + TCP.bytes_per_s
    assert a.numa == ((1,), (0, 2))
    assert b.numa == ()
    assert found.gpus == ((), (gpu,))
    assert sorted(found.unknown) == [
        "host a: the rate of eth1: a veth interface has no rate of its own; 9.6 Gbit/s is assumed",
        "host b: its NICs: none carries this job's addresses; 9.6 Gbit/s is assumed",
        "host b: the NUMA nodes of ranks 3: they have cores of several; pin each rank to one",
    ]
    assert found.hardware() == (
        "Test CPU, 4 cores, eth0 (mlx5_core, 100000 Mbit/s), eth1 (veth)",
        "Test CPU, 4 cores, no link, 1 H100",
    )
    assert describe(found.machine_of(0), found.gpus[0]) == found.hardware()[0]
