"""Hosts emulated on one machine: network namespaces with veth pairs as NICs, each of its own rate. Needs root.

Two hosts are joined directly, more of them by one switch (a namespace with a bridge) for each NIC.

Everything made is named after this process and removed when the context ends, also after an exception or SIGTERM; what
a process that was killed left behind goes when the next Network is made. Nothing outside the namespaces is touched."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

HOSTS = ("a", "b")
_PREFIX = "pycomm-links"
_CLONE_NEWNET = 0x40000000
_BURST = (
    "96kb"  # one packet of 64 KiB as the kernel segments it, with its headers; more would be a gift to short transfers
)
_QUEUE = "20ms"
_CLASSES = 256  # of connections, by port


class Unavailable(RuntimeError):
    """Why no namespaces can be made here."""


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unavailable(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def remove_leftovers() -> None:
    """Removes namespaces of processes that are gone."""
    for path in Path("/run/netns").glob(f"{_PREFIX}-*"):
        match = re.fullmatch(rf"{_PREFIX}-(\d+)-\w+", path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            _run("ip", "netns", "delete", path.name)


class Network:
    """`hosts`, each with n_nics NICs; and with store_nic one more that is never shaped, for the ranks' store. Without,
    the store is at the first NIC: for libraries that would take any way they find."""

    def __init__(self, n_nics: int = 1, hosts: Sequence[str] = HOSTS, store_nic: bool = True) -> None:
        self.n_nics = n_nics
        self._store_nic = store_nic
        self.hosts = tuple(hosts)
        self.namespaces = {host: f"{_PREFIX}-{os.getpid()}-{host}" for host in self.hosts}
        self._switch = f"{_PREFIX}-{os.getpid()}-switch" if len(self.hosts) > 2 else None

    def addresses(self, host: str) -> list[str]:
        return [f"10.77.{nic}.{1 + self.hosts.index(host)}" for nic in range(self.n_nics)]

    def store_address(self) -> str:
        return "10.77.255.1" if self._store_nic else self.addresses(self.hosts[0])[0]

    def shape(self, rate: str | None) -> None:
        """Every NIC sends at most at this rate (tc's notation), counted as tc does: Ethernet frames. None: no limit."""
        for nic in range(self.n_nics):
            self.shape_nic(nic, rate)

    def shape_nic(self, nic: int, rate: str | None) -> None:
        ends = [(self.namespaces[host], f"nic{nic}") for host in self.hosts]
        if self._switch is not None:  # its ports send to hosts at no higher rate
            ends += [(self._switch, f"{host}{nic}") for host in self.hosts]
        for namespace, device in ends:
            with suppress(Unavailable):  # none stands yet
                _run("tc", "-n", namespace, "qdisc", "delete", "dev", device, "root")
            if rate is not None:
                limit = ("tbf", "rate", rate, "burst", _BURST, "latency", _QUEUE)
                _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *limit)

    def shape_connections(self, rate: str, each: str) -> None:
        """The only NIC sends at most at this rate, and each connection that a made at most at `each`: as where networks
        hash connections onto several links, or a provider limits them one by one. As there, two may share a class."""
        self.shape_nic(0, None)
        own = f"burst {_BURST} cburst {_BURST} quantum 60000"
        lines = ["qdisc add dev nic0 root handle 1: htb"]
        lines += [f"class add dev nic0 parent 1: classid 1:{_CLASSES + 1:x} htb rate {rate} {own}"]
        for k in range(1, _CLASSES + 1):
            lines += [f"class add dev nic0 parent 1:{_CLASSES + 1:x} classid 1:{k:x} htb rate 1mbit ceil {each} {own}"]
            lines += [f"qdisc add dev nic0 parent 1:{k:x} bfifo limit 640kb"]
        table = "filter add dev nic0 parent 1: prio 1 protocol ip"
        lines += [f"{table} handle 2: u32 divisor {_CLASSES}"]
        for k in range(_CLASSES):
            lines += [f"{table} u32 ht 2:{k:x}: match u32 0 0 flowid 1:{k + 1:x}"]
        for host in HOSTS:  # by the low byte of a's port, which the system chose
            of_port = "0x00ff0000" if host == "a" else "0x000000ff"
            by_port = f"{table} u32 ht 800: match ip protocol 6 0xff hashkey mask {of_port} at 20 link 2:"
            with tempfile.NamedTemporaryFile("w", suffix=".tc") as batch:
                batch.write("\n".join([*lines, by_port]) + "\n")
                batch.flush()
                self._in(host, "tc", "-batch", batch.name)

    def cut(self, nic: int, host: str = "b") -> None:
        """The NIC answers no more; its address stays."""
        self._in(host, "ip", "link", "set", f"nic{nic}", "down")

    def enter(self, host: str) -> None:
        """From here on this thread, and threads it starts, are on that host."""
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(f"/run/netns/{self.namespaces[host]}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(fd, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns to {self.namespaces[host]}")
        finally:
            os.close(fd)

    def _in(self, host: str, *command: str) -> None:
        _run("ip", "netns", "exec", self.namespaces[host], *command)

    def _make(self) -> None:
        for namespace in (*self.namespaces.values(), *([self._switch] if self._switch else ())):
            _run("ip", "netns", "add", namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
        nics = [(f"nic{nic}", nic) for nic in range(self.n_nics)]
        for name, subnet in [*nics, ("store", 255)] if self._store_nic else nics:
            self._join(name, f"{subnet}" if subnet < 255 else "s")
            for i, namespace in enumerate(self.namespaces.values()):
                _run("ip", "-n", namespace, "address", "add", f"10.77.{subnet}.{1 + i}/24", "dev", name)
                _run("ip", "-n", namespace, "link", "set", name, "up")

    def _join(self, name: str, suffix: str) -> None:
        """A device of that name on every host, and what joins them."""
        if self._switch is None:
            a, b = self.namespaces.values()
            _run("ip", "-n", a, "link", "add", name, "type", "veth", "peer", "name", name, "netns", b)
            return
        bridge = f"bridge{suffix}"
        _run("ip", "-n", self._switch, "link", "add", bridge, "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", bridge, "up")
        for host, namespace in self.namespaces.items():
            port = f"{host}{suffix}"
            _run(
                "ip", "-n", namespace, "link", "add", name, "type", "veth", "peer", "name", port, "netns", self._switch
            )
            _run("ip", "-n", self._switch, "link", "set", port, "master", bridge)
            _run("ip", "-n", self._switch, "link", "set", port, "up")

    def _remove(self) -> None:
        for namespace in (*self.namespaces.values(), *([self._switch] if self._switch else ())):
            with suppress(Unavailable):
                _run("ip", "netns", "delete", namespace)


def why_unavailable() -> str | None:
    """Why Network cannot be made here; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root; run as root, or in a container with CAP_NET_ADMIN and CAP_SYS_ADMIN"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install iproute2"
    try:
        with emulated_hosts() as network:
            network.shape("1gbit")
    except (Unavailable, OSError) as error:
        return str(error)
    return None


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextmanager
def emulated_hosts(n_nics: int = 1, hosts: Sequence[str] = HOSTS, store_nic: bool = True) -> Iterator[Network]:
    """A Network while the context lasts. In the main thread SIGTERM ends it as an exception does."""
    network = Network(n_nics, hosts, store_nic)
    remove_leftovers()
    try:
        before = signal.signal(signal.SIGTERM, _end)
    except ValueError:  # not the main thread
        before = None
    try:
        network._make()
        yield network
    finally:
        network._remove()
        if before is not None:
            signal.signal(signal.SIGTERM, before)
