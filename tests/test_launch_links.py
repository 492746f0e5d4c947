"""`pycomm launch --link`: hosts as network namespaces with shaped NICs, what ranks see of them, and that nothing of it
is left behind, however the launch ends. Without root what needs namespaces is skipped, loudly."""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from commands import PYCOMM
from test_launch import WAITS, assert_ended, heeds_ctrl_c

from pycomm.errors import InvalidArgument
from pycomm.launch import launch
from pycomm.launch.links import parse_links
from pycomm.netns import emulated_hosts, run, why_unavailable
from pycomm.qdisc import shaped_bytes_per_s

LAUNCH = [*PYCOMM, "launch"]
NETNS = Path("/run/netns")


@pytest.fixture(scope="module")
def namespaces():
    """Skips, loudly, where none can be made."""
    if (why := why_unavailable()) is not None:
        warnings.warn(f"NOT TESTED: pycomm launch --link: {why}", stacklevel=1)
        pytest.skip(why)


# What --link says


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        (["200mbit"], [["200mbit"], ["200mbit"], ["200mbit"]]),
        (["1gbit,200MBit"], [["1gbit", "200mbit"]] * 3),
        (["host1=10kbit", "2.5gbit"], [["2.5gbit"], ["10kbit"], ["2.5gbit"]]),
        (["host0=1gbit,1gbit", "host2=100gbit", "host1=1gbit"], [["1gbit", "1gbit"], ["1gbit"], ["100gbit"]]),
    ],
)
def test_rates_are_of_all_hosts_or_of_one(options, rates):
    assert parse_links(options, 3) == rates


@pytest.mark.parametrize(
    ("options", "n_hosts", "fact"),
    [
        *(
            ([f"1gbit,{rate}"], 2, f"'{rate}' is no rate; give RATE")
            for rate in ("200", "200mb", "0mbit", "-5mbit", "", "9kbit", "101gbit", "1e3mbit", "200 mbit", "٣mbit")
        ),
        (["host2=1gbit"], 2, "'host2' is no host; there are host0 to host1"),
        (["host01=1gbit"], 2, "'host01' is no host"),
        (["=1gbit"], 2, "'' is no host"),
        (["host0=host1=1gbit"], 2, "'host0=host1' is no host"),
        (["host0=1gbit", "host0=1gbit"], 2, "host0 has rates already"),
        (["1gbit", "2gbit"], 2, "--link 2gbit: every host has rates already"),
        (["host1=1gbit"], 3, "no rates for host0, host2"),
        ([",".join(["1gbit"] * 65)], 2, "65 NICs; a host has 64 at most"),
        (["1gbit"], 1, "joins 2 to 253 emulated hosts, there are 1"),
        (["1gbit"], 254, "there are 254"),
    ],
)
def test_what_makes_no_sense_is_named(options, n_hosts, fact):
    with pytest.raises(InvalidArgument) as refused:
        parse_links(options, n_hosts)
    assert fact in str(refused.value)


def test_nothing_is_made_where_the_command_line_is_wrong():
    for options, fact in (
        (["--hosts", "2,1", "--link", "-5mbit"], "'-5mbit' is no rate"),
        (["--ranks", "2", "--link", "1gbit"], "there are 1; see --hosts"),
    ):
        done = subprocess.run([*LAUNCH, *options, "--", "echo", "started"], capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith("pycomm launch: error: --link") and fact in done.stderr
    with pytest.raises(InvalidArgument, match="links are given for 3 hosts, there are 2"):
        launch(["true"], [1, 1], links=[["1gbit"]] * 3)


# Where it cannot be had


def without_sys_admin():
    """Root as in many a container."""
    assert ctypes.CDLL(None).prctl(24, 21, 0, 0, 0) == 0  # PR_CAPBSET_DROP, CAP_SYS_ADMIN


@pytest.mark.parametrize("how", ["no tc", "refused"])
def test_without_namespaces_hosts_are_labels_and_one_warning_says_why(tmp_path, how):
    options = {"env": os.environ | {"PATH": str(tmp_path)}} if how == "no tc" else {}
    fact = "need root"
    if os.geteuid() == 0:
        fact = {"no tc": "ip and tc not found; install iproute2", "refused": "`ip netns add pycomm-"}[how]
        options |= {"preexec_fn": without_sys_admin} if how == "refused" else {}
    done = subprocess.run(
        [*LAUNCH, "--hosts", "1,1", "--link", "200mbit", "--", "/bin/sh", "-c", "echo $PYCOMM_HOST_ID $MASTER_ADDR"],
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["[0] host0 127.0.0.1", "[1] host1 127.0.0.1"]
    assert done.stderr.startswith("pycomm launch: warning: --link has no effect: ") and done.stderr.count("\n") == 1
    assert fact in done.stderr and "their links are not shaped" in done.stderr


# What ranks see

PROGRAM = """
import json, os
from pathlib import Path
import numpy as np, torch, torch.distributed as dist
import pycomm

def carried():
    rows = [line.split() for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("nic")]
    return {row[0]: [int(row[1]), int(row[9])] for row in rows}  # received, sent

with pycomm.init(timeout_s=20) as group:
    before = carried()
    numbers = np.arange(1 << 20) % 97
    x = (numbers + group.rank).astype(np.float32)
    group.all_reduce(x)
    assert np.array_equal(x, numbers * 3 + 3)
    took = {name: [a - b for a, b in zip(now, before[name])] for name, now in carried().items()}
    rates = [[nic.link.bytes_per_s for nic in host.nics] for host in pycomm.Topology.discover(group).hosts]
    dist.init_process_group("gloo")
    y = torch.ones(3)
    dist.all_reduce(y)
    dist.destroy_process_group()
names = ("MASTER_ADDR", "PYCOMM_ADDRESS", "PYCOMM_HOST_ID")
found = {name: os.environ[name] for name in names}
found |= {"namespace": os.stat("/proc/self/ns/net").st_ino, "took": took, "rates": rates, "gloo": y.tolist()}
print(json.dumps(found))
"""


def test_hosts_with_nics_of_their_own_number_and_rate(namespaces, tmp_path):
    """NIC 1 of host0 has none of its number to speak to: what leaves from its address must leave by it all the same."""
    (tmp_path / "program.py").write_text(PROGRAM)
    links = ["--link", "host0=1gbit,2gbit", "--link", "500mbit"]
    done = subprocess.run(
        [*LAUNCH, "--hosts", "2,1", *links, "--", "program.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "not-there", "PYCOMM_ADDRESS": "192.0.2.1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    ranks = {int(line[1]): json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines()}
    assert [ranks[rank]["PYCOMM_HOST_ID"] for rank in range(3)] == ["host0", "host0", "host1"]
    assert [ranks[rank]["PYCOMM_ADDRESS"] for rank in (0, 2)] == ["10.77.0.1,10.77.1.1", "10.77.0.2"]
    assert {found["MASTER_ADDR"] for found in ranks.values()} == {"10.77.0.1"}
    places = [found["namespace"] for _, found in sorted(ranks.items())]
    assert places[0] == places[1] != places[2]
    assert os.stat("/proc/self/ns/net").st_ino not in places
    for found in ranks.values():
        assert found["rates"] == [[125e6, 250e6], [62.5e6]]
        assert found["gloo"] == [3.0] * 3
        for name, ways in found["took"].items():  # its part by pace of several MiB, beside none or some KiB of words
            assert min(ways) > 1 << 17, f"{name} of {found['PYCOMM_HOST_ID']} stood idle"


def test_rates_beyond_32_bits_and_one_nics_only(namespaces):
    """The rate that discovery reads, beside what tc was told; and an interface that nothing holds."""
    with emulated_hosts(2) as network:
        network.shape_nic(0, "1.5mbit", ["a"])
        network.shape_nic(1, "60gbit")
        for host, rates in (("a", {"nic0": 187500.0, "nic1": 7.5e9}), ("b", {"nic1": 7.5e9})):
            with network.inside(host):
                assert shaped_bytes_per_s() == rates
        network.shape(None)
        with network.inside("a"):
            assert shaped_bytes_per_s() == {}


# How it ends


def namespaces_of(pid):
    return {path.name for path in NETNS.glob(f"pycomm-*-{pid}-*")}


def start(*command, port="0"):
    return subprocess.Popen(
        [*LAUNCH, "--hosts", "1,1", "--link", "200mbit", "--master-port", port, "--", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        preexec_fn=heeds_ctrl_c,
    )


def start_waiting(port="0"):
    """A launch of two ranks that wait for a signal, each known by a pidfd once both run."""
    process = start(sys.executable, "-c", WAITS, port=port)
    return process, [os.pidfd_open(int(process.stdout.readline().split()[-1])) for _ in range(2)]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "test $RANK = 0 || exit 7; sleep 1000"], 7),
        (["no-such-program"], 2),
        ([sys.executable, "-c", WAITS], 128 + signal.SIGINT),
        ([sys.executable, "-c", WAITS], 128 + signal.SIGTERM),
    ],
    ids=["normal end", "failing rank", "exception", "Ctrl-C", "SIGTERM"],
)
def test_nothing_is_left(namespaces, command, code):
    process = start(*command)
    if WAITS in command:
        for _ in range(2):
            process.stdout.readline()
        assert len(namespaces_of(process.pid)) == 2
        process.send_signal(code - 128)
    process.communicate(timeout=300)
    assert process.returncode == code
    assert namespaces_of(process.pid) == set()


def test_a_killed_launchers_namespaces_go_with_the_next_start_and_nobody_elses(namespaces):
    """Two launchers beside each other, with one port, which someone has on the machine itself; one is killed."""
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("", 0)))
        port = str(taken.getsockname()[1])
        killed, pidfds = start_waiting(port)
        stack.callback(killed.kill)
        alive, alive_pidfds = start_waiting(port)
        stack.callback(alive.kill)
        killed.kill()
        assert_ended(pidfds)
        killed.communicate(timeout=60)
        left = namespaces_of(killed.pid)
        assert len(left) == 2
        # Of a process that had this one's number before, of another pid namespace, and of others' naming.
        here, number, started, _ = next(iter(namespaces_of(alive.pid))).removeprefix("pycomm-").split("-")
        reused = f"pycomm-{here}-{number}-{int(started) - 1}-host0"
        others = {f"pycomm-1-{killed.pid}-{started}-host0", f"pycomm-{killed.pid}-host0"}
        for name in {reused, *others}:
            run("ip", "netns", "add", name)
            stack.callback(lambda name=name: (NETNS / name).exists() and run("ip", "netns", "delete", name))
        _, stderr = start("true").communicate(timeout=300)
        assert stderr == ""
        names = {path.name for path in NETNS.iterdir()}
        assert not names & {reused, *left}
        assert others <= names
        assert len(namespaces_of(alive.pid)) == 2
        alive.terminate()
        assert_ended(alive_pidfds)
        assert alive.wait(timeout=60) == 128 + signal.SIGTERM
        assert namespaces_of(alive.pid) == set()


def test_what_a_killed_launchers_ranks_had_started_does_not_keep_its_namespaces(namespaces):
    """A data loader's workers, for example, which live on in their host's network."""
    with contextlib.ExitStack() as stack:
        killed = start("sh", "-c", "sleep 1000 & echo $!; wait")
        stack.callback(killed.kill)
        children = []
        for _ in range(2):
            children.append(os.pidfd_open(int(killed.stdout.readline().split()[-1])))
            stack.callback(os.close, children[-1])
            stack.callback(signal.pidfd_send_signal, children[-1], signal.SIGKILL)
        killed.kill()
        killed.communicate(timeout=60)
        assert len(namespaces_of(killed.pid)) == 2
        process = start("true")
        assert process.communicate(timeout=300) == ("", "") and process.returncode == 0
        assert namespaces_of(killed.pid) == set()
        assert select.select(children, [], [], 0)[0] == [], "no child of a rank was left to hold them"
