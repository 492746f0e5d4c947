"""The rates that tc holds network interfaces to, asked of the kernel (rtnetlink(7)); any user may ask.

Of tc's queueing disciplines only tbf at an interface's root is one rate for all that the interface sends."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Final

# linux/netlink.h, linux/rtnetlink.h, linux/pkt_sched.h
_NETLINK_ROUTE: Final = 0
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWQDISC, _RTM_GETQDISC = 36, 38
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_TBF_PARMS, _TCA_TBF_RATE64 = 1, 4
_TYPE_MASK: Final = 0x3FFF  # without the flags that newer kernels set beside an attribute's type
_TC_H_ROOT: Final = 0xFFFFFFFF
_HEADER: Final = struct.Struct("IHHII")  # nlmsghdr: length, type, flags, number, port
_TCMSG: Final = struct.Struct("BxxxiIII")  # family, interface, handle, parent, info
_RATE_AT: Final = 8  # of tc_tbf_qopt.rate.rate, bytes per second in 32 bits
_DEADLINE_S: Final = 2.0  # the kernel answers at once


def shaped_bytes_per_s() -> dict[str, float]:
    """By the name of an interface of this network namespace: what it sends at most, in bytes of Ethernet frames a
    second. Interfaces that tbf does not hold are left out. Raises OSError where the kernel does not answer."""
    found = {}
    for kind, index, parent, options in _qdiscs():
        if kind == "tbf" and parent == _TC_H_ROOT:
            attributes = dict(_attributes(options))
            rate = struct.unpack_from("I", attributes[_TCA_TBF_PARMS], _RATE_AT)[0]
            if _TCA_TBF_RATE64 in attributes:  # where 32 bits are too few
                rate = struct.unpack("Q", attributes[_TCA_TBF_RATE64])[0]
            found[socket.if_indextoname(index)] = float(rate)
    return found


def _qdiscs() -> Iterator[tuple[str, int, int, bytes]]:
    """Kind, interface, parent and options of each."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE) as kernel:
        kernel.settimeout(_DEADLINE_S)
        body = _TCMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        kernel.send(_HEADER.pack(_HEADER.size + len(body), _RTM_GETQDISC, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0) + body)
        while True:
            data = kernel.recv(1 << 16)
            at = 0
            while at < len(data):
                length, kind, _, _, _ = _HEADER.unpack_from(data, at)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    number = -struct.unpack_from("i", data, at + _HEADER.size)[0]
                    raise OSError(number, "asking for queueing disciplines")
                if kind == _RTM_NEWQDISC:
                    begin = at + _HEADER.size
                    _, index, _, parent, _ = _TCMSG.unpack_from(data, begin)
                    attributes = dict(_attributes(data[begin + _TCMSG.size : at + length]))
                    name = attributes[_TCA_KIND].rstrip(b"\0").decode()
                    yield name, index, parent, attributes.get(_TCA_OPTIONS, b"")
                at += _aligned(length)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """rtattr: length, type, value; each aligned to 4 bytes."""
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("HH", data, at)
        yield kind & _TYPE_MASK, data[at + 4 : at + length]
        at += _aligned(length)


def _aligned(length: int) -> int:
    return length + 3 & ~3
