"""What benchmarks and tests do to emulated hosts (pycomm/netns.py) beyond making and shaping them."""

from __future__ import annotations

from pycomm.netns import BURST, Network, run

HOSTS = ("a", "b")
_CLASSES = 256  # of connections, by port


def shape_connections(network: Network, rate: str, each: str) -> None:
    """The only NIC sends at most at this rate, and each connection that a made at most at `each`: as where networks
    hash connections onto several links, or a provider limits them one by one. As there, two may share a class."""
    network.shape_nic(0, None)
    own = f"burst {BURST} cburst {BURST} quantum 60000"
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
        run("tc", "-n", network.namespaces[host], "-batch", "-", lines=[*lines, by_port])


def cut(network: Network, nic: int, host: str = "b") -> None:
    """The NIC answers no more; its address stays."""
    run("ip", "-n", network.namespaces[host], "link", "set", f"nic{nic}", "down")
