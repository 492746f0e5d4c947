"""What a process can find out about the machine it runs on: identity, cores, NUMA nodes, network interfaces.

Every question is asked of the kernel, and answered for this process's own namespaces: /sys/class/net shows those of
whoever mounted /sys, so interfaces come from getifaddrs and ethtool's ioctl. Nothing is sent. What cannot be found out
is a line in `unknown`, with the reason."""

from __future__ import annotations

import array
import ctypes
import dataclasses
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pycomm.errors import InvalidArgument, PycommError
from pycomm.qdisc import shaped_bytes_per_s

# Drivers whose rate is a number that somebody made up: veth says 10 Gbit/s, tun 10 Mbit/s, whatever carries them.
_NO_RATE_OF_ITS_OWN: Final = frozenset(
    {"bridge", "dummy", "ifb", "ipvlan", "loopback", "macvlan", "tun", "veth", "vxlan", "wireguard"}
)
_IFF_UP, _IFF_LOOPBACK, _IFF_RUNNING = 0x1, 0x8, 0x40  # linux/if.h
_SIOCETHTOOL, _ETHTOOL_GSET, _ETHTOOL_GDRVINFO = 0x8946, 0x1, 0x3  # linux/sockios.h, linux/ethtool.h
_SPEED_UNKNOWN = (0, 0xFFFF, 0xFFFFFFFF)


@dataclass(frozen=True)
class Interface:
    """A network interface that is up, or loopback. bytes_per_s: what tc holds it to, or its driver states, the lower;
    None where unknown, and `why` then has the reason."""

    name: str
    driver: str
    addresses: tuple[str, ...]
    bytes_per_s: float | None
    why: str = ""


@dataclass(frozen=True)
class Machine:
    """One process's view. `numa`: (node, its cores) of the whole machine; `numa_node`: the one that all of the
    process's cores belong to, None where it may run on several. `carriers`: names of the interfaces that pycomm's
    traffic to other hosts takes, in the order of their addresses."""

    host_name: str
    boot_id: str
    network_namespace: str
    ipc_namespace: str
    cpu: str
    cores: tuple[int, ...]
    numa: tuple[tuple[int, tuple[int, ...]], ...]
    numa_node: int | None
    interfaces: tuple[Interface, ...]
    carriers: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def host_id(self) -> str:
        """The name that the engine gives a host without a label (csrc/cpu/endpoint.cc)."""
        return f"{self.host_name}-{_fnv1a(f'{self.boot_id}/{self.network_namespace}'.encode()) & 0xFFFFFFFF:x}"

    def interface(self, name: str) -> Interface:
        return next(interface for interface in self.interfaces if interface.name == name)


def this_machine(in_a_job: bool = True) -> Machine:
    """Asks the kernel. in_a_job: `carriers` are the interfaces of local_address(); else all that have an address.

    Raises PycommError where MASTER_ADDR is given and there is no route to it."""
    unknown: list[str] = []
    cores = tuple(sorted(os.sched_getaffinity(0)))
    numa = _numa_nodes(unknown)
    nodes = [node for node, of_node in numa if set(of_node) & set(cores)]
    interfaces = _interfaces(unknown)
    return Machine(
        host_name=socket.gethostname(),
        boot_id=_read("/proc/sys/kernel/random/boot_id", "the boot id", unknown) or "unknown",
        network_namespace=_namespace("net", unknown),
        ipc_namespace=_namespace("ipc", unknown),
        cpu=_cpu_name(unknown),
        cores=cores,
        numa=numa,
        numa_node=nodes[0] if len(nodes) == 1 else None,
        interfaces=interfaces,
        carriers=_carriers(interfaces, unknown) if in_a_job else _outward(interfaces),
        unknown=tuple(unknown),
    )


def local_address() -> str:
    """The addresses other hosts reach this one at, one per NIC (docs/tcp.md): PYCOMM_ADDRESS, else the one that routes
    to MASTER_ADDR, else loopback. Nothing is sent."""
    if given := os.environ.get("PYCOMM_ADDRESS"):
        return given
    master = os.environ.get("MASTER_ADDR")
    if master is None:
        return "127.0.0.1"
    try:
        family, kind, protocol, _, to = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(to)  # chooses a route and an address; datagram sockets send nothing here
            return str(probe.getsockname()[0])
    except OSError as error:
        raise PycommError(
            f"no route to MASTER_ADDR={master} ({error}); set PYCOMM_ADDRESS to this host's address"
        ) from error


def local_addresses() -> tuple[str, ...]:
    """local_address() word by word as numeric addresses: an interface's name is its first one, IPv4 before IPv6, as the
    engine has it (csrc/cpu/tcp_listener.cc); what names no interface that is up stands as it is."""
    interfaces = _interfaces([])
    found = []
    for word in _words():
        addresses = next((_bindable(one) for one in interfaces if one.name == word), [])
        found.append(min(addresses, key=lambda address: ":" in address, default=word))
    return tuple(found)


def local_interfaces() -> tuple[str, ...]:
    """The names of the interfaces that local_address() speaks of, in its order; without those that are not up."""
    return _carriers(_interfaces([]), [])


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The kernel's notation for sets of cores: "0-2,8" is (0, 1, 2, 8). Raises InvalidArgument for anything else."""
    cores: list[int] = []
    try:
        for part in filter(None, text.strip().split(",")):
            first, dash, last = part.partition("-")
            cores += range(int(first), int(last if dash else first) + 1)
    except ValueError:
        raise InvalidArgument(f"{text!r} is no list of cores such as 0-3,8") from None
    return tuple(cores)


def _read(path: str, what: str, unknown: list[str]) -> str | None:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError as error:
        unknown.append(f"{what}: {path} cannot be read ({error.strerror})")
        return None


def _namespace(kind: str, unknown: list[str]) -> str:
    try:
        return str(os.stat(f"/proc/self/ns/{kind}").st_ino)
    except OSError as error:
        unknown.append(f"the {kind} namespace: /proc/self/ns/{kind} cannot be read ({error.strerror})")
        return "?"


def _cpu_name(unknown: list[str]) -> str:
    text = _read("/proc/cpuinfo", "the CPU's name", unknown) or ""
    named = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return named[0] if named else os.uname().machine


def _numa_nodes(unknown: list[str]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    found = []
    for folder in sorted(Path("/sys/devices/system/node").glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        text = _read(f"{folder}/cpulist", f"NUMA {folder.name}", unknown)
        if text:  # a node may have memory and no cores
            found.append((int(folder.name[4:]), parse_cpu_list(text)))
    if not found:
        unknown.append("NUMA nodes: /sys/devices/system/node lists none")
    return tuple(found)


# Interfaces


class _SockAddr(ctypes.Structure):
    _fields_ = (("family", ctypes.c_uint16), ("data", ctypes.c_ubyte * 26))


class _IfAddrs(ctypes.Structure):
    pass


_IfAddrs._fields_ = (
    ("next", ctypes.POINTER(_IfAddrs)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.POINTER(_SockAddr)),
    ("netmask", ctypes.c_void_p),
    ("broadcast", ctypes.c_void_p),
    ("data", ctypes.c_void_p),
)


def _interfaces(unknown: list[str]) -> tuple[Interface, ...]:
    """Those that are up, loopback among them, by name."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = ctypes.POINTER(_IfAddrs)()
    if libc.getifaddrs(ctypes.byref(head)) != 0:
        unknown.append(f"network interfaces: getifaddrs failed ({os.strerror(ctypes.get_errno())})")
        return ()
    addresses: dict[str, list[str]] = {}
    loopback: set[str] = set()
    try:
        entry = head
        while entry:
            item: Any = entry.contents
            name, flags = item.name.decode(), item.flags
            if flags & _IFF_UP and flags & _IFF_RUNNING:
                addresses.setdefault(name, [])
                if flags & _IFF_LOOPBACK:
                    loopback.add(name)
                if item.address and (text := _address(item.address)):
                    addresses[name].append(text)
            entry = item.next
    finally:
        libc.freeifaddrs(head)
    try:
        shaped = shaped_bytes_per_s()
    except OSError as error:
        shaped = {}
        unknown.append(f"rates that tc holds interfaces to: rtnetlink has no answer ({error})")
    found = []
    for name in sorted(addresses):
        interface = _interface(name, tuple(addresses[name]), name in loopback)
        if name in shaped:
            rate = min(shaped[name], interface.bytes_per_s or shaped[name])
            interface = dataclasses.replace(interface, bytes_per_s=rate, why="")
        found.append(interface)
    return tuple(found)


def _address(pointer: Any) -> str | None:
    family, data = pointer.contents.family, bytes(pointer.contents.data)
    if family == socket.AF_INET:
        return socket.inet_ntop(family, data[2:6])
    if family == socket.AF_INET6:
        return socket.inet_ntop(family, data[6:22])
    return None


def _interface(name: str, addresses: tuple[str, ...], loopback: bool) -> Interface:
    if loopback:
        return Interface(name, "loopback", addresses, None, "loopback is memory, not a link")
    driver = _ethtool(name, struct.pack("I", _ETHTOOL_GDRVINFO).ljust(196, b"\0"))
    driver_name = driver[4:36].split(b"\0")[0].decode(errors="replace") if driver else "unknown"
    if driver_name in _NO_RATE_OF_ITS_OWN:
        return Interface(name, driver_name, addresses, None, f"a {driver_name} interface has no rate of its own")
    settings = _ethtool(name, struct.pack("I", _ETHTOOL_GSET).ljust(44, b"\0"))
    if settings is None:
        return Interface(name, driver_name, addresses, None, "its driver does not say")
    low, high = struct.unpack_from("H", settings, 12)[0], struct.unpack_from("H", settings, 28)[0]
    mbit = high << 16 | low
    if mbit in _SPEED_UNKNOWN:
        return Interface(name, driver_name, addresses, None, f"its driver, {driver_name}, does not know")
    return Interface(name, driver_name, addresses, mbit * 1e6 / 8)


def _ethtool(name: str, request: bytes) -> bytes | None:
    """The answer to one ethtool command, None where the driver has none."""
    buffer = array.array("B", request)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            fcntl.ioctl(control, _SIOCETHTOOL, struct.pack("16sP16x", name.encode(), buffer.buffer_info()[0]))
        except OSError:
            return None
    return buffer.tobytes()


def _words() -> list[str]:
    return [word.strip() for word in local_address().split(",")]


def _bindable(interface: Interface) -> list[str]:
    """Its addresses, those of a link alone (fe80::1) with the link's name, without which they cannot be bound."""
    return [f"{text}%{interface.name}" if text.startswith("fe80:") else text for text in interface.addresses]


def _carriers(interfaces: tuple[Interface, ...], unknown: list[str]) -> tuple[str, ...]:
    found = []
    for word in _words():
        names = [one.name for one in interfaces if word in (one.name, *one.addresses, *_bindable(one))]
        if not names and word.startswith("127."):  # all of 127/8 is loopback
            names = [one.name for one in interfaces if one.driver == "loopback"]
        if names:
            found.append(names[0])
        else:
            unknown.append(f"the interface of {word}: no interface that is up has this name or address")
    return tuple(dict.fromkeys(found))


def _outward(interfaces: tuple[Interface, ...]) -> tuple[str, ...]:
    return tuple(one.name for one in interfaces if one.addresses and one.driver != "loopback")


def _fnv1a(data: bytes) -> int:
    """64 bits, as csrc/core/fingerprint.h. Source: Fowler, Noll, Vo; draft-eastlake-fnv."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value
