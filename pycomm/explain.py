"""explain(topology, collective, nbytes): the candidates, what each would cost, and which one the tuner takes and why.

It reads the same table as the engine, so what it says is what runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pycomm.errors import InvalidArgument
from pycomm.own import Own
from pycomm.predict import predict
from pycomm.schedule import chunk_nbytes
from pycomm.topology import Topology
from pycomm.traffic import host_bytes
from pycomm.tuner import TIE, candidates, choice_table, choose

_UNITS = {"": 0, "b": 0, "k": 10, "kib": 10, "m": 20, "mib": 20, "g": 30, "gib": 30, "t": 40, "tib": 40}
_DECIMAL_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class Candidate:
    """One algorithm's predicted cost. `link_bytes` is what crosses the busiest host link in its busier direction."""

    algorithm: str
    total_s: float
    link_bytes: int
    bytes_between_hosts: int
    n_rounds: int


@dataclass(frozen=True)
class Explanation:
    """Which algorithm `nbytes` of a collective would take, and the candidates, fastest first. str() is for people."""

    topology: Topology
    collective: str
    nbytes: int
    choice: str
    candidates: tuple[Candidate, ...]

    @property
    def reason(self) -> str:
        """One sentence."""
        if self.topology.n_ranks == 1:
            return "One rank has nobody to exchange with."
        chosen = next(candidate for candidate in self.candidates if candidate.algorithm == self.choice)
        rival = next(candidate for candidate in self.candidates if candidate is not chosen)
        lead, name = rival.total_s / chosen.total_s, rival.algorithm
        if lead > 1:
            return f"{self.choice} is predicted fastest; {name} takes {lead:.2f} times as long{_fewer(chosen, rival)}."
        if lead * TIE >= 1:
            return f"{self.choice} is taken: {name} is within {TIE - 1:.0%} and comes later in the planners' order."
        return f"{self.choice} is best at the table's next size; here {name} would take {lead:.2f} of the time."

    def __str__(self) -> str:
        hosts = ", ".join(f"{host.name}: {len(host.ranks)}" for host in self.topology.hosts[:8])
        if len(self.topology.hosts) > 8:
            hosts += ", .."
        head = (
            f"{self.collective} of {format_nbytes(self.nbytes)} on {_count(self.topology.n_ranks, 'rank')}, "
            f"{_count(len(self.topology.hosts), 'host')} ({hosts})"
        )
        rows = [("", "algorithm", "predicted", "busiest host link", "between hosts", "rounds")]
        for candidate in self.candidates:
            rows.append(
                (
                    "->" if candidate.algorithm == self.choice else "",
                    candidate.algorithm,
                    _format_s(candidate.total_s),
                    format_nbytes(candidate.link_bytes),
                    format_nbytes(candidate.bytes_between_hosts),
                    str(candidate.n_rounds),
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"  {row[0]:{widths[0]}} {row[1]:{widths[1]}}" + "".join(f"  {cell:>{width}}" for cell, width in cells)
            for row in rows
            for cells in [zip(row[2:], widths[2:], strict=True)]
        ]
        return "\n".join([head, *lines, self.reason])


def explain(topology: Topology, collective: str, nbytes: int, root: int = 0, own: Own = ()) -> Explanation:
    """`nbytes` is meant as in schedule.chunk_nbytes: the longest buffer a rank passes in or gets. own: a group's own
    algorithms (tuner.candidates).

    Raises InvalidArgument for an unknown collective, a negative size or a root that is no rank."""
    if nbytes < 0:
        raise InvalidArgument(f"explain: nbytes is {nbytes}; give 0 or more")
    if not 0 <= root < topology.n_ranks:
        raise InvalidArgument(f"explain: root {root} is not among ranks 0 .. {topology.n_ranks - 1}")
    found = []
    for algorithm, plan in candidates(topology, collective, own).items():
        schedule = plan(topology, root)
        sent, received = host_bytes(schedule, topology, chunk_nbytes(schedule, nbytes))
        total_s = float(predict(schedule, topology, nbytes)[0])
        link_bytes = int(max(sent.max(), received.max()))
        found.append(Candidate(algorithm, total_s, link_bytes, int(sent.sum()), schedule.n_rounds))
    found.sort(key=lambda candidate: candidate.total_s)
    choice = choose(choice_table(topology, collective, root, own), nbytes)
    return Explanation(topology, collective, nbytes, choice, tuple(found))


def parse_nbytes(text: str) -> int:
    """Bytes from "64MiB", "64M", "1.5 GiB", "10MB" or "512"; K, M, G and T alone are binary, as in nccl-tests."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].lower() if match else ""
    if match is None or not (unit in _UNITS or unit in _DECIMAL_UNITS):
        raise InvalidArgument(f"size {text!r} is not understood; write for example 512, 4KiB, 64MiB or 1.5GiB")
    scale = _DECIMAL_UNITS[unit] if unit in _DECIMAL_UNITS else 1 << _UNITS[unit]
    nbytes = float(match[1]) * scale if "." in match[1] else int(match[1]) * scale
    if nbytes != int(nbytes):
        raise InvalidArgument(f"size {text!r} is {nbytes} bytes; give a whole number of bytes")
    return int(nbytes)


def format_nbytes(nbytes: int) -> str:
    """ "64 MiB"; parse_nbytes reads it back where it is exact."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << power:
            return f"{nbytes / (1 << power):.4g} {unit}"
    return f"{nbytes} B"


def _fewer(chosen: Candidate, other: Candidate) -> str:
    """What the other sends more between hosts."""
    if chosen.link_bytes < other.link_bytes:
        return (
            f": the busiest host link carries {format_nbytes(other.link_bytes)} "
            f"instead of {format_nbytes(chosen.link_bytes)}"
        )
    return ""


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _format_s(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.4g} {unit}"
    return f"{seconds * 1e6:.4g} us"
