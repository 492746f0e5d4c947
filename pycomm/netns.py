"""Hosts emulated on one machine: network namespaces with veth pairs as NICs, each of its own rate. Needs root.

Two hosts are joined directly, more of them, or two whose NICs differ, by one switch (a namespace with a bridge) for
each NIC. Where they have different numbers of NICs the switch also routes from one NIC's network to another's.

Everything made is named after this process and removed when the context ends, also after an exception or SIGTERM; what
a process that was killed left behind goes when the next Network is made. Nothing outside the namespaces is touched: two
programs may have the same addresses in theirs."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final

MOST_HOSTS: Final = 253  # of a /24, whose last address is the router's
MOST_NICS: Final = 64  # paths that the engine has between two ranks (csrc/cpu/tcp_listener.h)
_NAMESPACES: Final = Path("/run/netns")  # where ip has them
_PREFIX: Final = "pycomm"
_CLONE_NEWNET: Final = 0x40000000
# One packet of 64 KiB as the kernel segments it, with its headers; more would be a gift to short transfers.
BURST: Final = "96kb"
_QUEUE: Final = "20ms"
_STORE: Final = 255  # the number of the store's network
_SIOCGIFFLAGS, _IFF_RUNNING = 0x8913, 0x40  # linux/sockios.h, linux/if.h
_PATIENCE_S: Final = 5.0
_TABLES: Final = 100  # from here on, one routing table for each NIC


class Unavailable(RuntimeError):
    """Why no namespaces can be made here."""


def run(*command: str, lines: Iterable[str] = ()) -> str:
    """What the command says, with lines as its input. Raises Unavailable with its complaint where it fails."""
    done = subprocess.run(
        command,
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        check=False,
        process_group=0,  # Ctrl-C is for this process, which then removes what it has made
    )
    if done.returncode != 0:
        raise Unavailable(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _stat(pid: int | str) -> list[str]:
    """proc_pid_stat(5) from the third field, the state, on; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _owner() -> str:
    """This process among all that ever had its number, and its pid namespace."""
    return f"{os.stat('/proc/self/ns/pid').st_ino}-{os.getpid()}-{_stat('self')[19]}"


def remove_leftovers() -> None:
    """Removes namespaces of processes that are gone, as far as this process's pid namespace can tell."""
    here = str(os.stat("/proc/self/ns/pid").st_ino)
    for path in _NAMESPACES.glob(f"{_PREFIX}-*"):
        match = re.fullmatch(rf"{_PREFIX}-(\d+)-(\d+)-(\d+)-\w+", path.name)
        if match is None or match[1] != here:
            continue
        stat = _stat(match[2])
        if not stat or stat[0] in "ZX" or stat[19] != match[3]:
            with suppress(Unavailable):  # another program that starts now has been faster
                run("ip", "netns", "delete", path.name)


def _setns(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


def _enter(namespace: str) -> None:
    fd = os.open(_NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(fd)
    finally:
        os.close(fd)


@contextmanager
def _inside(namespace: str) -> Iterator[None]:
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(namespace)
        try:
            yield
        finally:
            _setns(before)
    finally:
        os.close(before)


def _wait_until_running(interface: str, host: str) -> None:
    """The kernel says so a moment after both ends are up; until then whoever asks for interfaces misses this one."""
    until = time.monotonic() + _PATIENCE_S
    request = struct.pack("16sH22x", interface.encode(), 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        while not struct.unpack_from("H", fcntl.ioctl(control, _SIOCGIFFLAGS, request), 16)[0] & _IFF_RUNNING:
            if time.monotonic() > until:
                raise Unavailable(f"{interface} of {host} has no carrier {_PATIENCE_S:g} s after both its ends are up")
            time.sleep(0.005)


class Network:
    """`hosts`, each with n_nics NICs (or with a number of its own each); and with store_nic one more that is never
    shaped, for the ranks' store. Without, the store is at the first NIC: for programs that would take any way they
    find. switched: join two hosts by switches too; a direct way between NICs of different rates would have, in each
    direction, its sender's.

    NIC i of a host is the interface nic<i>, in a network of its own, 10.77.<i>.0/24. Made by emulated_hosts()."""

    def __init__(self, n_nics: int | Sequence[int], hosts: Sequence[str], store_nic: bool, switched: bool) -> None:
        self.hosts = tuple(hosts)
        self.nics = dict(zip(self.hosts, [n_nics] * len(hosts) if isinstance(n_nics, int) else n_nics, strict=True))
        self._networks = [*range(max(self.nics.values())), *([_STORE] if store_nic else [])]
        self._routed = len(set(self.nics.values())) > 1
        owner = f"{_PREFIX}-{_owner()}"
        self.namespaces = {host: f"{owner}-{host}" for host in self.hosts}
        self._switch = f"{owner}-switch" if len(self.hosts) > 2 or switched or self._routed else None

    def addresses(self, host: str) -> list[str]:
        return [self._address(host, nic) for nic in range(self.nics[host])]

    def store_address(self) -> str:
        return self._address(self.hosts[0], _STORE if _STORE in self._networks else 0)

    def shape(self, rate: str | None) -> None:
        """Every NIC sends at most at this rate (tc's notation), counted as tc does: Ethernet frames. None: no limit."""
        for nic in range(max(self.nics.values())):
            self.shape_nic(nic, rate)

    def shape_nic(self, nic: int, rate: str | None, hosts: Sequence[str] | None = None) -> None:
        """This NIC of these hosts, or of all: what it sends, and where there is a switch what it is sent."""
        ends = [(self.namespaces[host], f"nic{nic}") for host in hosts or self.hosts]
        if self._switch is not None:
            ends += [(self._switch, f"{host}-{nic}") for host in hosts or self.hosts]
        for namespace, device in ends:
            if rate is not None:
                limit = ("tbf", "rate", rate, "burst", BURST, "latency", _QUEUE)
                run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *limit)
            else:
                with suppress(Unavailable):  # none stands
                    run("tc", "-n", namespace, "qdisc", "delete", "dev", device, "root")

    def enter(self, host: str) -> None:
        """From here on this thread, and threads and processes it starts, are on that host."""
        _enter(self.namespaces[host])

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """This thread is on that host while the context lasts: sockets made and processes started in it stay there."""
        with _inside(self.namespaces[host]):
            yield

    def _address(self, host: str, network: int) -> str:
        return f"10.77.{network}.{1 + self.hosts.index(host)}"

    def _all_namespaces(self) -> list[str]:
        return [*self.namespaces.values(), *([self._switch] if self._switch is not None else [])]

    def _make(self) -> None:
        for namespace in self._all_namespaces():
            run("ip", "netns", "add", namespace)
        if self._switch is not None:
            self._configure(self._switch, [line for network in self._networks for line in self._bridge(network)])
            if self._routed:
                with _inside(self._switch):
                    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        for host, namespace in self.namespaces.items():
            own = [network for network in self._networks if network == _STORE or network < self.nics[host]]
            self._configure(namespace, ["link set lo up", *(line for nic in own for line in self._nic(host, nic))])
            if self._switch is not None:
                ports = [(f"{host}-{network}", f"bridge{network}") for network in own]
                self._configure(self._switch, [f"link set {port} master {bridge} up" for port, bridge in ports])
        for host in self.hosts:
            with self.inside(host):
                for nic in range(self.nics[host]):
                    _wait_until_running(f"nic{nic}", host)

    def _bridge(self, network: int) -> list[str]:
        lines = [f"link add bridge{network} type bridge", f"link set bridge{network} up"]
        return [*lines, f"address add {self._router(network)}/24 dev bridge{network}"] if self._routed else lines

    def _nic(self, host: str, network: int) -> list[str]:
        """A host's device, with its other end at the switch or at the other host, where it makes that one's as well."""
        name, first = "store" if network == _STORE else f"nic{network}", host == self.hosts[0]
        lines = []
        if self._switch is not None or first:
            other = f"{host}-{network} netns {self._switch}"
            if self._switch is None:
                other = f"{name} netns {self.namespaces[self.hosts[1]]}"
            lines.append(f"link add {name} type veth peer name {other}")
        address = self._address(host, network)
        lines += [f"address add {address}/24 dev {name}", f"link set {name} up"]
        if self._routed:  # what leaves from a NIC's address leaves by that NIC, wherever it goes
            table, router = _TABLES + network, self._router(network)
            lines += [
                f"rule add from {address} lookup {table}",
                f"route add 10.77.{network}.0/24 dev {name} table {table}",
                f"route add default via {router} dev {name} table {table}",
            ]
            if network == 0:
                lines.append(f"route add default via {router} dev {name}")
        return lines

    def _router(self, network: int) -> str:
        return f"10.77.{network}.{MOST_HOSTS + 1}"

    def _configure(self, namespace: str, lines: Sequence[str]) -> None:
        try:
            run("ip", "-n", namespace, "-batch", "-", lines=lines)
        except Unavailable as error:
            failed = re.search(r"Command failed -:(\d+)", str(error))
            which = f" (`{lines[int(failed[1]) - 1]}`)" if failed else ""
            raise Unavailable(f"{error}{which}") from None

    def _remove(self) -> None:
        for namespace in self._all_namespaces():
            with suppress(Unavailable):
                run("ip", "netns", "delete", namespace)


def why_unavailable() -> str | None:
    """Why emulated_hosts() cannot be made here; None where they can."""
    try:
        with emulated_hosts() as network:
            network.shape("1gbit")
    except (Unavailable, OSError) as error:
        return str(error)
    return None


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextmanager
def emulated_hosts(
    n_nics: int | Sequence[int] = 1,
    hosts: Sequence[str] = ("a", "b"),
    store_nic: bool = True,
    switched: bool = False,
) -> Iterator[Network]:
    """A Network while the context lasts. SIGTERM, where it would end the process at once, ends it as an exception does.

    Raises Unavailable where this process is not root, ip or tc is missing, or one of them is refused something."""
    if os.geteuid() != 0:
        raise Unavailable(
            "network namespaces need root; run as root, or in a container with CAP_NET_ADMIN and CAP_SYS_ADMIN"
        )
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise Unavailable(f"{' and '.join(missing)} not found; install iproute2")
    network = Network(n_nics, hosts, store_nic, switched)
    remove_leftovers()
    before = None
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        with suppress(ValueError):  # not the main thread
            before = signal.signal(signal.SIGTERM, _end)
    try:
        network._make()
        yield network
    finally:
        network._remove()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def shaped_hosts(hosts: Sequence[str], rates: Sequence[Sequence[str]]) -> Iterator[Network]:
    """emulated_hosts() whose NICs have these rates, in tc's notation, by host and NIC; both ways each."""
    alike = all(of_host == rates[0] for of_host in rates)
    n_nics = [len(of_host) for of_host in rates]
    with emulated_hosts(n_nics, hosts, store_nic=False, switched=not alike) as network:
        for host, of_host in zip(hosts, rates, strict=True):
            for nic, rate in enumerate(of_host):
                network.shape_nic(nic, rate, [host])
        yield network
