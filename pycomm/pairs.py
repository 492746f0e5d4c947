"""Which ranks and which hosts are measured with each other, and in which order.

Rounds are a 1-factorisation of the complete graph, thinned so that no machine, and so no NIC, serves two pairs of a
round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from pycomm.topology import Topology

ALL_HOSTS_UP_TO: Final = 16  # hosts of which each meets every other one

Pair = tuple[int, int]


def pair_rounds(pairs: Iterable[Pair], machines: Sequence[str]) -> list[list[Pair]]:
    """The pairs in rounds in which no machine serves two. machines: the machine of each number that the pairs have, of
    ranks or of hosts; emulated hosts of one machine take turns, as its ranks do."""
    busy: list[set[str]] = []
    rounds: list[list[Pair]] = []
    for pair in pairs:
        holds = {machines[number] for number in pair}
        free = next((index for index, taken in enumerate(busy) if not taken & holds), None)
        if free is None:
            busy.append(set())
            rounds.append([])
            free = -1
        busy[free] |= holds
        rounds[free].append(pair)
    return rounds


def circle(n: int) -> list[Pair]:
    """All pairs of 0 .. n-1, perfect matching after perfect matching (the circle method). Source: Kirkman, 1847."""
    seats = n + n % 2
    pairs = []
    for turn in range(seats - 1):
        ring = [seats - 1, *((turn + place) % (seats - 1) for place in range(seats - 1))]
        for here, there in zip(ring[: seats // 2], reversed(ring[seats // 2 :]), strict=True):
            if max(here, there) < n:
                pairs.append(_pair(here, there))
    return pairs


def host_pairs(topology: Topology) -> list[Pair]:
    """Which hosts meet, by their positions in topology.hosts: all of up to ALL_HOSTS_UP_TO. Of more, each meets the two
    beside it, rack after rack, and one that stands half of all hosts away, which is in another rack unless one rack
    has more than half of the hosts; with an odd number of hosts, two such."""
    n_hosts = len(topology.hosts)
    if n_hosts <= ALL_HOSTS_UP_TO:
        return circle(n_hosts)
    order = topology.hosts_in_order().tolist()
    found: dict[Pair, None] = {}  # in order, each once
    for away in (1, n_hosts // 2):
        # Every second one first, so that neighbours do not wait for each other.
        for place in [*range(0, n_hosts, 2), *range(1, n_hosts, 2)]:
            found[_pair(order[place], order[(place + away) % n_hosts])] = None
    return list(found)


def link_rounds(topology: Topology, machines: Sequence[str]) -> list[list[Pair]]:
    """Ranks: one pair inside each host, and one for each two hosts of host_pairs(). Those inside come before the others
    and again after them: two ranks that had one core between them at first have moved by then, and a host has no other
    pair to outvote them. machines: [n_ranks]."""
    hosts = [host.ranks for host in topology.hosts]
    inside = [_pair(*ranks[:2]) for ranks in hosts if len(ranks) > 1]
    between = [_pair(hosts[a][0], hosts[b][0]) for a, b in host_pairs(topology)]
    before_and_after = pair_rounds(inside, machines)
    return [*before_and_after, *pair_rounds(between, machines), *before_and_after]


def host_rounds(topology: Topology, machines: Sequence[str]) -> list[list[Pair]]:
    """host_pairs() in rounds. machines: [n_ranks]."""
    return pair_rounds(host_pairs(topology), [machines[host.ranks[0]] for host in topology.hosts])


def _pair(one: int, other: int) -> Pair:
    return min(one, other), max(one, other)
