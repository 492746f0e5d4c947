"""What each way of exchanging costs, in exact expected rows, and which one `dedup="auto"` takes.

Uniform routing: a token's K experts are a uniform choice of K distinct ones of E, its rank any of W on N hosts; experts
and ranks are spread evenly. Rows per token that cross hosts (C is the binomial coefficient):

    none   one a (token, expert):  K (N-1)/N
    rank   one a (token, rank):    W (1 - C(E - E/W, K) / C(E, K)) (N-1)/N
    host   one a (token, host):    N (1 - C(E - E/N, K) / C(E, K)) (N-1)/N"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Final, Literal

from pycomm.group import Group
from pycomm.hosts import SHARED_MEMORY, TCP, Link
from pycomm.moe.placement import Geometry
from pycomm.moe.waits import RowsGroup

Dedup = Literal["none", "rank", "host"]
MODES: Final[tuple[Dedup, ...]] = ("none", "rank", "host")
_MESSAGES: Final = {"none": 2, "rank": 2, "host": 6}  # collectives that a dispatch and a combine wait for, about

_MEETINGS: Final = 4  # of a host's ranks on devices, in a dispatch and a combine; with several hosts as many again as
# sides are crossed


def share_reached(num_experts: int, top_k: int, parts: int) -> float:
    """The probability that at least one of a token's experts is in one of `parts` equal parts of all experts."""
    inside = num_experts / parts
    if inside == int(inside):
        return 1 - comb(num_experts - int(inside), top_k) / comb(num_experts, top_k)
    missed = 1.0  # uneven: the product that the quotient of binomials is, at a fractional size
    for k in range(top_k):
        missed *= max(0.0, num_experts - inside - k) / (num_experts - k)
    return 1 - missed


def rows_between_hosts(mode: Dedup, num_experts: int, top_k: int, n_ranks: int, n_hosts: int) -> float:
    """Expected rows per token that cross hosts."""
    crossing = (n_hosts - 1) / n_hosts
    if mode == "none":
        return top_k * crossing
    parts = n_ranks if mode == "rank" else n_hosts
    return parts * share_reached(num_experts, top_k, parts) * crossing


@dataclass(frozen=True)
class Estimate:
    """Of one way, expected: bytes per token of a dispatch and a combine together, seconds for all tokens."""

    mode: Dedup
    rows_between: float  # per token, one direction
    bytes_between: float
    bytes_inside: float  # moved between the ranks of a host
    seconds: float
    possible: bool


@dataclass(frozen=True)
class Links:
    """What rows cross: n_ranks spread evenly over n_hosts."""

    n_ranks: int
    n_hosts: int
    between: Link
    inside: Link

    @staticmethod
    def of(group: RowsGroup, geometry: Geometry) -> Links:
        between, inside = TCP, SHARED_MEMORY
        if isinstance(group, Group):
            inside = group.topology.inside
            if geometry.n_hosts > 1:
                between = group.topology.link(geometry.members[0][0], geometry.members[1][0])
        return Links(group.size, geometry.n_hosts, between, inside)


@dataclass(frozen=True)
class Choice:
    mode: Dedup
    reason: str
    estimates: tuple[Estimate, ...]
    links: Links

    def crossing_s(self, n_tokens: int) -> float:
        """Seconds of the link between hosts for one direction of n_tokens a rank."""
        if self.links.n_hosts == 1:
            return 0.0
        chosen = next(each for each in self.estimates if each.mode == self.mode)
        on_host = self.links.n_ranks / self.links.n_hosts
        return n_tokens * on_host * chosen.bytes_between / 2 / self.links.between.bytes_per_s

    def __str__(self) -> str:
        lines = [f"dedup={self.mode!r}: {self.reason}"]
        lines += [
            f"  {e.mode:<5}{e.rows_between:7.3f} rows/token between hosts; both ways: {e.bytes_between:,.0f} "
            f"B/token between and {e.bytes_inside:,.0f} inside hosts, {e.seconds * 1e3:.3f} ms"
            + ("" if e.possible else " (not possible here)")
            for e in self.estimates
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class DeviceAllToAll:
    """Of devices: latency_s + nbytes / bytes_per_s for nbytes that a rank gives, its own part among them
    (devices.collective_cost)."""

    latency_s: float
    bytes_per_s: float
    source: str

    def seconds(self, nbytes: float, n_calls: int) -> float:
        return n_calls * self.latency_s + nbytes / self.bytes_per_s


@dataclass(frozen=True)
class DeviceLinks:
    """Of devices, what an all_to_all of all ranks takes, and one of a host's ranks; None where rows cannot go through
    hosts."""

    between: DeviceAllToAll
    inside: DeviceAllToAll | None


def _estimate(
    mode: Dedup,
    links: Links,
    on_device: DeviceLinks | None,
    num_experts: int,
    hidden: int,
    top_k: int,
    n_tokens: int,
    row_nbytes: int,
    value_nbytes: int,
    possible: bool,
) -> Estimate:
    n_ranks, n_hosts = links.n_ranks, links.n_hosts
    rows = rows_between_hosts(mode, num_experts, top_k, n_ranks, n_hosts)
    # A rank's sums are fp32, a host's and an expert's outputs have value_nbytes (transport.py).
    bytes_between = rows * (row_nbytes + hidden * (4 if mode == "rank" else value_nbytes))
    others = n_ranks / n_hosts - 1  # of a rank's host
    if mode == "none":
        rows_inside, back, copies = others * top_k / n_ranks, hidden * value_nbytes, 3
    else:  # through hosts a token is read by ranks of each host, where it lies; else packed, moved and unpacked
        rows_inside = others * share_reached(num_experts, top_k, n_ranks) * (n_hosts if mode == "host" else 1)
        back, copies = hidden * 4, 1 if mode == "host" else 3
    bytes_inside = rows_inside * (row_nbytes + back)
    if on_device is not None:
        given = top_k if mode == "none" else n_ranks * share_reached(num_experts, top_k, n_ranks)
        if mode != "host" or on_device.inside is None:
            seconds = on_device.between.seconds(n_tokens * given * (row_nbytes + back), 2)
        else:  # what crosses, as in an all_to_all of all hosts' rows; then each rank reads what its experts need
            meetings = _MEETINGS + 2 * (n_hosts > 1)
            seconds = on_device.inside.seconds(n_tokens * given * (row_nbytes + back), meetings)
            if n_hosts > 1:
                crossing = n_hosts * share_reached(num_experts, top_k, n_hosts) * (row_nbytes + hidden * value_nbytes)
                seconds += on_device.between.seconds(n_tokens * crossing, 2)
        return Estimate(mode, rows, bytes_between, bytes_inside, seconds, possible)
    tokens = n_tokens * n_ranks / n_hosts
    seconds = tokens * bytes_inside * copies / links.inside.bytes_per_s
    seconds += _MESSAGES[mode] * (links.between if n_hosts > 1 else links.inside).latency_s
    if n_hosts > 1:
        seconds += tokens * bytes_between / links.between.bytes_per_s
    return Estimate(mode, rows, bytes_between, bytes_inside, seconds, possible)


def estimates(
    links: Links,
    num_experts: int,
    hidden: int,
    top_k: int,
    n_tokens: int,
    row_nbytes: int,
    value_nbytes: int,
    possible: tuple[Dedup, ...],
    wanted: Dedup | Literal["auto"],
    on_device: DeviceLinks | None = None,
) -> Choice:
    """All ways for n_tokens a rank, and the wanted one; of "auto" the possible one of the least time, the simplest
    where times are equal. row_nbytes: a dispatched row on the wire. value_nbytes: a value of an expert's output.
    on_device: what rows of a device take instead of links."""
    sizes = (num_experts, hidden, top_k, n_tokens, row_nbytes, value_nbytes)
    found = tuple(
        _estimate(mode, links, on_device, *sizes, mode in possible)
        for mode in MODES
        if on_device is None or on_device.inside is not None or mode != "host"
    )
    of = "" if on_device is None else f"; an all_to_all, {on_device.between.source}"
    if wanted != "auto":
        return Choice(wanted, "as given" + of, found, links)
    best = min((e for e in found if e.possible), key=lambda e: e.seconds)
    others = [f"{e.mode} {e.seconds / best.seconds:.2f}x" for e in found if e.possible and e is not best]
    return Choice(
        best.mode, "auto, the least expected time" + f" ({', '.join(others)})" * bool(others) + of, found, links
    )
