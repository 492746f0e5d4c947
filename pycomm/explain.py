"""explain(topology, collective, nbytes): the candidates, what each would cost, and which one the tuner takes and why.

It reads the same tables as the engine, so what it says is what runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pycomm.errors import InvalidArgument
from pycomm.own import Own
from pycomm.schedule import chunk_nbytes
from pycomm.table import TuningTable
from pycomm.topology import Topology, WireLinks
from pycomm.traffic import host_bytes
from pycomm.tuner import LARGE, TIE, TIE_OF_FEWER, candidates, choice_table, choose, costs

_UNITS = {"": 0, "b": 0, "k": 10, "kib": 10, "m": 20, "mib": 20, "g": 30, "gib": 30, "t": 40, "tib": 40}
_DECIMAL_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class Candidate:
    """One algorithm's cost: `total_s` as the model predicts it, `measured_s` as `pycomm tune` measured it at this size
    or on both sides of it (None where it did not), `expected_s` what the tuner compares (tuner.py). `link_bytes` is
    what crosses the busiest host link in its busier direction; it reaches a host over at most `n_connections`
    (0 of devices, whose library decides)."""

    algorithm: str
    total_s: float
    expected_s: float
    measured_s: float | None
    link_bytes: int
    bytes_between_hosts: int
    n_rounds: int
    n_connections: int = 0


@dataclass(frozen=True)
class Explanation:
    """Which algorithm `nbytes` of a collective would take, and the candidates, the fastest expected first. str() is
    for people: a line for each candidate."""

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
        if len(self.candidates) == 1:
            return f"{self.choice} is the only way there is here."
        chosen = next(candidate for candidate in self.candidates if candidate.algorithm == self.choice)
        rival = next(candidate for candidate in self.candidates if candidate is not chosen)
        lead, name = rival.expected_s / chosen.expected_s, rival.algorithm
        if lead > 1:
            how = "measured"
            if chosen.measured_s is None:
                how = "predicted" if chosen.expected_s == chosen.total_s else "expected, from its times at other sizes,"
            return f"{self.choice} is {how} fastest; {name} takes {lead:.2f} times as long{_fewer(chosen, rival)}."
        is_measured = chosen.expected_s != chosen.total_s
        is_large = is_measured and self.nbytes > LARGE // 2
        tie, why = TIE, "comes later in the planners' order"
        if is_large and rival.total_s > chosen.total_s * TIE_OF_FEWER:
            tie, why = TIE_OF_FEWER, f"is predicted to take {rival.total_s / chosen.total_s:.2f} times as long"
        elif is_large and chosen.n_connections < rival.n_connections:
            connections = f"{rival.n_connections} connections instead of {chosen.n_connections}"
            tie, why = TIE_OF_FEWER, f"reaches a host over {connections}"
        elif is_measured:
            why = f"{self.choice} was the fastest at a size measured nearby, or comes first in the planners' order"
        if lead * tie >= 1:
            return f"{self.choice} is taken: {name} is within {tie - 1:.0%}, and {why}."
        return f"{self.choice} is best at the table's next size; here {name} would take {lead:.2f} of the time."

    def __str__(self) -> str:
        hosts = ", ".join(f"{host.name}: {len(host.ranks)}" for host in self.topology.hosts[:8])
        if len(self.topology.hosts) > 8:
            hosts += ", .."
        head = (
            f"{self.collective} of {format_nbytes(self.nbytes)} on {count_of(self.topology.n_ranks, 'rank')}, "
            f"{count_of(len(self.topology.hosts), 'host')} ({hosts})"
        )
        rows: list[tuple[str, ...]] = [
            ("", "algorithm", "predicted", "measured", "busiest host link", "between hosts", "rounds")
        ]
        for candidate in self.candidates:
            rows.append(
                (
                    "->" if candidate.algorithm == self.choice else "",
                    candidate.algorithm,
                    format_s(candidate.total_s),
                    "-" if candidate.measured_s is None else format_s(candidate.measured_s),
                    format_nbytes(candidate.link_bytes),
                    format_nbytes(candidate.bytes_between_hosts),
                    str(candidate.n_rounds),
                )
            )
        if all(candidate.measured_s is None for candidate in self.candidates):
            rows = [row[:3] + row[4:] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"  {row[0]:{widths[0]}} {row[1]:{widths[1]}}" + "".join(f"  {cell:>{width}}" for cell, width in cells)
            for row in rows
            for cells in [zip(row[2:], widths[2:], strict=True)]
        ]
        return "\n".join([head, *lines, self.reason])


def explain(
    topology: Topology,
    collective: str,
    nbytes: int,
    root: int = 0,
    table: TuningTable | None = None,
    own: Own = (),
    coded: WireLinks | None = None,
) -> Explanation:
    """`nbytes` is meant as in schedule.chunk_nbytes: the longest buffer a rank passes in or gets. table: of this
    topology's layout. own: a group's own algorithms; coded: for a call with a wire on these links (tuner.candidates).

    Raises InvalidArgument for an unknown collective, a negative size or a root that is no rank."""
    if nbytes < 0:
        raise InvalidArgument(f"explain: nbytes is {nbytes}; give 0 or more")
    if not 0 <= root < topology.n_ranks:
        raise InvalidArgument(f"explain: root {root} is not among ranks 0 .. {topology.n_ranks - 1}")
    found = []
    planners = candidates(topology, collective, own, coded, root)
    cost = costs(topology, collective, (nbytes,), root, table, own, coded)
    columns = (cost.predicted_s[:, 0], cost.expected_s[:, 0], cost.measured[:, 0], cost.connections)
    for algorithm, predicted, expected, measured, connections in zip(cost.algorithms, *columns, strict=True):
        schedule = planners[algorithm](topology, root)
        sent, received = host_bytes(schedule, topology, chunk_nbytes(schedule, nbytes))
        found.append(
            Candidate(
                algorithm,
                float(predicted),
                float(expected),
                float(expected) if measured else None,
                int(max(sent.max(), received.max())),
                int(sent.sum()),
                schedule.n_rounds,
                int(connections),
            )
        )
    found.sort(key=lambda candidate: candidate.expected_s)
    choice = choose(choice_table(topology, collective, root, table, own, coded), nbytes)
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


def count_of(count: int, what: str) -> str:
    """ "2 hosts", "1 host"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def format_s(seconds: float) -> str:
    """ "1.5 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.4g} {unit}"
    return f"{seconds * 1e6:.4g} us"
