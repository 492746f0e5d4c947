"""TCP between hosts over several NICs and connections. With root the hosts are network namespaces with veth pairs of
their own (pycomm/netns.py); the tests over loopback addresses run everywhere."""

import os
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as c10d
from spawn import run_ranks
from torch_ranks import run_processes

import pycomm
from pycomm.errors import PeerLost, PeerTimeout
from pycomm.netns import Network, emulated_hosts, why_unavailable

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from netns import cut


@pytest.fixture(scope="module")
def namespaces():
    """Skips, loudly, where none can be made."""
    if (why := why_unavailable()) is not None:
        warnings.warn(f"NOT TESTED: hosts with NICs of their own, failing NICs: {why}", stacklevel=1)
        pytest.skip(why)


def collectives(group):
    """A few calls, small and large; every value checked."""
    numbers = np.arange(700_001) % 97
    for numel in (1, 5000, 700_001):
        x = (numbers[:numel] + group.rank).astype(np.float32)
        group.all_reduce(x)
        assert np.array_equal(x, numbers[:numel] * group.size + sum(range(group.size)))
        y = numbers[:numel] * (group.rank == 1)
        group.broadcast(y, 1)
        assert np.array_equal(y, numbers[:numel])
    other = (group.rank + group.size // 2) % group.size  # on the other host
    work = group.send(numbers + group.rank, other, async_op=True)
    got = np.empty_like(numbers)
    group.recv(got, other)
    work.wait()
    assert np.array_equal(got, numbers + other)
    group.barrier()


def on_loopback(group, addresses, sockets):
    """Another group in the same processes, whose ranks listen on these addresses."""
    os.environ.update(PYCOMM_ADDRESS=addresses, PYCOMM_SOCKETS=sockets)
    store = c10d.PrefixStore("links", group._store)
    with pycomm.init(store, group.rank, group.size, timeout_s=20) as links:
        collectives(links)
        return links.stats().bytes_between_hosts


@pytest.mark.parametrize("sockets", ["1", "3"])
def test_two_addresses_on_loopback(sockets):
    hosts = ["a", "a", "b", "b"]
    assert min(run_ranks(on_loopback, 4, "127.0.0.1,127.0.0.2", sockets, hosts=hosts)) > 1 << 20


def received(network: Network) -> list[int]:
    """Bytes that have come in on each NIC of this rank's host."""
    rows = dict(line.split(":") for line in Path("/proc/net/dev").read_text().splitlines() if ":" in line)
    found = {name.strip(): int(row.split()[0]) for name, row in rows.items()}
    return [found[name] for name in found if name.startswith("nic")]


def rank_on_host(_port, rank, n_ranks, network, folder, timeout_s, body):
    """body(group, network) on a host of its own: (what it returned or raised, seconds, what was said on stderr)."""
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        host = os.environ["PYCOMM_HOST_ID"]
        network.enter(host)
        os.environ["PYCOMM_ADDRESS"] = ",".join(network.addresses(host))
        store = c10d.FileStore(f"{folder}/store", n_ranks)
        store.set_timeout(timedelta(seconds=20))
        begin = time.monotonic()
        try:
            with pycomm.init(store, rank, n_ranks, timeout_s=timeout_s) as group:
                begin = time.monotonic()
                outcome = body(group, network)
        except pycomm.errors.PycommError as error:
            outcome = error
        seconds = time.monotonic() - begin
        said.seek(0)
        return outcome, seconds, said.read().decode()


def run_on_hosts(network, folder, body, timeout_s=20.0):
    (Path(folder) / "store").unlink(missing_ok=True)
    arguments = (network, str(folder), timeout_s, body)
    return run_processes(rank_on_host, len(network.hosts), *arguments, hosts=network.hosts)


def over_every_nic(group, network):
    before = received(network)
    collectives(group)
    return [after - b for after, b in zip(received(network), before, strict=True)]


def plain(group, network):
    collectives(group)
    return "done"


def until_something_is_said(group, network):
    """On stderr, by any rank."""
    collectives(group)
    until = time.monotonic() + 15
    said = np.zeros(1, np.int32)
    while not said[0] and time.monotonic() < until:
        said[0] = os.fstat(2).st_size
        group.all_reduce(said, "max")
    collectives(group)
    return "done"


def test_traffic_takes_every_nic(namespaces, tmp_path):
    with emulated_hosts(2) as network:
        for outcome, _, said in run_on_hosts(network, tmp_path, over_every_nic):
            assert min(outcome) > 1 << 20, "a NIC stood idle"
            assert said == ""


def test_four_hosts_behind_a_switch(namespaces, tmp_path):
    with emulated_hosts(hosts="abcd", store_nic=False) as network:
        network.shape("1gbit")
        for outcome, _, said in run_on_hosts(network, tmp_path, plain):
            assert (outcome, said) == ("done", "")


def test_a_nic_that_is_down_is_left_out_with_one_warning(namespaces, tmp_path):
    with emulated_hosts(2) as network:
        cut(network, 0)
        (outcome, _, said), (other, _, silent) = run_on_hosts(network, tmp_path, until_something_is_said)
    assert (outcome, other) == ("done", "done")
    assert silent == ""
    assert said.count("\n") == said.count("pycomm: warning: ") == 1
    for part in ("rank 0", "rank 1", "host b", "10.77.0.1 to 10.77.0.2:"):
        assert part in said


def test_a_nic_that_is_down_on_each_host_leaves_the_third_with_one_warning(namespaces, tmp_path):
    with emulated_hosts(3) as network:
        cut(network, 0, "a")
        cut(network, 1, "b")
        (outcome, _, said), (other, _, silent) = run_on_hosts(network, tmp_path, until_something_is_said)
    assert (outcome, other) == ("done", "done")
    assert silent == ""
    assert said.count("\n") == said.count("pycomm: warning: ") == 1
    for part in ("rank 0", "rank 1", "host b", "10.77.0.1 to 10.77.0.2:", "10.77.1.1 to 10.77.1.2:"):
        assert part in said


def test_a_nic_that_is_down_on_each_host_of_two_is_an_error_of_every_rank(namespaces, tmp_path):
    """NIC i reaches NIC i alone: nothing is left."""
    with emulated_hosts(2) as network:
        cut(network, 0, "a")
        cut(network, 1, "b")
        for outcome, seconds, _ in run_on_hosts(network, tmp_path, plain, timeout_s=20):
            assert isinstance(outcome, (PeerLost, PeerTimeout))
            assert seconds < 30
            for part in ("rank 0", "rank 1", "host b", "all_reduce #0", "10.77.0.", "10.77.1."):
                assert part in str(outcome)


def test_without_any_nic_every_rank_gets_an_error_before_the_deadline_is_long_past(namespaces, tmp_path):
    with emulated_hosts(2) as network:
        cut(network, 0)
        cut(network, 1)
        for outcome, seconds, _ in run_on_hosts(network, tmp_path, plain, timeout_s=3):
            assert isinstance(outcome, (PeerLost, PeerTimeout))
            assert seconds < 10
            for part in ("rank 0", "rank 1", "10.77.0.", "10.77.1."):
                assert part in str(outcome)
