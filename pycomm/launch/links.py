"""--link: the rates of emulated hosts' NICs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from pycomm.errors import InvalidArgument
from pycomm.netns import MOST_HOSTS, MOST_NICS

_UNITS: Final = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_LEAST, _MOST = 10e3, 100e9  # bits/s; beyond, tc cannot say a burst of 96 kB in its units of 64 ns
_FORM: Final = (
    "give RATE[,RATE...] for the NICs of every host, or hostN=RATE[,RATE...] for those of one; a rate is a number and "
    "kbit, mbit or gbit, from 10kbit to 100gbit, such as 200mbit"
)


def parse_links(options: Sequence[str], n_hosts: int) -> list[list[str]]:
    """The rate of each NIC in tc's notation, by host: [n_hosts][the host's NICs].

    options: what --link was given, one string each time: "1gbit,200mbit" for all hosts that no other speaks of,
    "host0=1gbit" for one. Raises InvalidArgument, naming the part that is wrong."""
    if not 2 <= n_hosts <= MOST_HOSTS:
        raise InvalidArgument(f"--link joins 2 to {MOST_HOSTS} emulated hosts, there are {n_hosts}; see --hosts")
    of_host: dict[int, list[str]] = {}
    of_others: list[str] | None = None
    for option in options:
        name, equals, rates = option.rpartition("=")
        parsed = [_rate(rate, option) for rate in rates.split(",")]
        if len(parsed) > MOST_NICS:
            raise InvalidArgument(f"--link {option}: {len(parsed)} NICs; a host has {MOST_NICS} at most")
        if not equals:
            if of_others is not None:
                raise InvalidArgument(f"--link {option}: every host has rates already; {_FORM}")
            of_others = parsed
            continue
        host = _host(name, n_hosts, option)
        if host in of_host:
            raise InvalidArgument(
                f"--link {option}: host{host} has rates already; list its NICs as in host{host}=1gbit,1gbit"
            )
        of_host[host] = parsed
    without = [f"host{host}" for host in range(n_hosts) if host not in of_host]
    if of_others is None and without:
        raise InvalidArgument(f"--link: no rates for {', '.join(without)}; {_FORM}")
    return [of_host[host] if host in of_host else list(of_others or ()) for host in range(n_hosts)]


def _host(name: str, n_hosts: int, option: str) -> int:
    match = re.fullmatch(r"host(0|[1-9]\d*)", name)
    if match is None or int(match[1]) >= n_hosts:
        raise InvalidArgument(f"--link {option}: {name!r} is no host; there are host0 to host{n_hosts - 1}")
    return int(match[1])


def _rate(text: str, option: str) -> str:
    word = text.strip().lower()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]bit)", word, re.ASCII)
    if match is None or not _LEAST <= float(match[1]) * _UNITS[match[2]] <= _MOST:
        raise InvalidArgument(f"--link {option}: {text!r} is no rate; {_FORM}")
    return word
