"""What is printed: nccl-tests' columns and more, as rows come; then the choices, the averages, what was refused."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from pycomm.bench.cases import IN_PLACE, OUT_OF_PLACE, OVERLAP, Case
from pycomm.bench.measure import Row, Timing
from pycomm.explain import format_nbytes

_NO = "N/A"


class Table:
    """Lines of one run. baselines: the libraries beside pycomm, in the order of their columns."""

    def __init__(self, baselines: Sequence[str]) -> None:
        self._baselines = list(baselines)

    def heading(self, case: Case) -> list[str]:
        """For the rows of one collective."""
        name = f"# {case.collective}"
        if case.moe is not None:
            name += f", {case.moe.experts} experts, top {case.moe.top_k}, hidden {case.moe.hidden}"
        if case.collective in OVERLAP:
            columns = [(14, "compute"), *((11, name) for name in ("comm", "serial", "together", "exposed"))]
            units = [(14, "(us)"), *[(11, "(us)")] * 4, (10, "(%)"), (8, "")]
            columns += [(10, "E_overlap"), (8, "T/max")]
            for library in self._baselines:
                columns += [(12, library), (8, "T/max")]
                units += [(12, "(E, %)"), (8, "")]
            return ["#", name, _head() + _cells(columns), _head(units=True) + _cells(units)]
        timing = [(9, "time"), (8, "algbw"), (8, "busbw"), (7, "#wrong")]
        timing_units = [(9, "(us)"), (8, "(GB/s)"), (8, "(GB/s)"), (7, "")]
        more = [(10, "p50"), (9, "p95"), (9, "p99"), (17, "algorithm"), (7, "% roof"), (10, "inside"), (10, "between")]
        more_units = [(10, "(us)"), (9, "(us)"), (9, "(us)"), (17, ""), (7, ""), (10, "(B)"), (10, "(B)")]
        more += [(9, f"/{name}") for name in self._baselines]
        blocks = f"{'out-of-place':^32}{'in-place':^32}"
        return [
            "#",
            f"{name:<{len(_head())}}{blocks}".rstrip(),
            _head() + _cells(timing * 2 + more),
            _head(units=True) + _cells(timing_units * 2 + more_units),
        ]

    def row(self, row: Row) -> str:
        case = row.case
        root = "-1"
        if case.pair is not None:
            root = "{}-{}".format(*case.pair)
        elif case.kind.rooted:
            root = str(case.root)
        dtype = "none" if case.collective == "barrier" else case.dtype.replace("float8_", "f8")
        op = case.op if case.kind.reduces else "none"
        start = _cells([(13, str(case.nbytes)), (13, str(case.count)), (9, dtype), (8, op), (8, root)])
        if case.collective in OVERLAP:
            return start + _cells(self._overlap_cells(row))
        native = row.native()
        assert native is not None
        more = [(10, _us(native.p50_us)), (9, _us(native.p95_us)), (9, _us(native.p99_us)), (17, row.algorithm)]
        more.append((7, _NO if row.limit_us is None else f"{100 * row.limit_us / native.p50_us:.0f}"))
        more += [(10, str(row.bytes_inside)), (10, str(row.bytes_between))]
        for name in self._baselines:
            ratio = row.ratio(name)
            more.append((9, _NO if ratio is None else f"{ratio:.2f}x"))
        timings = row.timings["pycomm"]
        both = [cell for placement in (OUT_OF_PLACE, IN_PLACE) for cell in _timing(case, timings.get(placement))]
        return start + _cells(both + more)

    def _overlap_cells(self, row: Row) -> list[tuple[int, str]]:
        card = row.scorecard("pycomm")
        assert card is not None
        times = (card.compute_s, card.comm_s, card.serial_s, card.together_s, card.exposed_s)
        cells = [(14 if at == 0 else 11, _us(seconds * 1e6)) for at, seconds in enumerate(times)]
        for width, name in ((10, "pycomm"), *((12, name) for name in self._baselines)):
            card = row.scorecard(name)
            share = None if card is None else card.overlap
            cells.append((width, _NO if share is None else f"{100 * share:.0f}"))
            cells.append((8, _NO if card is None else f"{card.over_limit:.2f}"))
        return cells

    def footer(self, rows: Sequence[Row]) -> list[str]:
        """After all rows: wrong elements, average bus bandwidths, the algorithms and why, what was refused."""
        if not rows:
            return ["# nothing was measured"]
        wrong = sum(row.wrong for row in rows)
        lines = ["#", f"# Out of bounds values : {wrong} {'OK' if wrong == 0 else 'FAILED'}"]
        widths: dict[str, list[float]] = {}
        for row in rows:
            if row.case.collective not in ("barrier", *OVERLAP):
                for timing in row.timings["pycomm"].values():
                    widths.setdefault(row.case.collective, []).append(row.case.busbw(timing.mean_us / 1e6))
        for name, found in widths.items():
            lines.append(f"# Avg bus bandwidth    : {sum(found) / len(found):.4g} GB/s ({name})")
        return lines + self._choices(rows) + _wrong_lines(rows) + _refusals(rows)

    def _choices(self, rows: Iterable[Row]) -> list[str]:
        """Where the algorithm changes along the sizes: its name, from where, and the reason it was chosen there."""
        lines = []
        for (collective, dtype), group in groupby(rows, lambda row: (row.case.collective, row.case.dtype)):
            last = ""
            for row in group:
                if row.algorithm != last and row.case.pair is None:
                    last = row.algorithm
                    lines.append(
                        f"# {collective} {dtype} from {format_nbytes(row.case.nbytes)}: {row.algorithm}: {row.reason}"
                    )
        return lines


def matrix(rows: Sequence[Row], n_ranks: int) -> list[str]:
    """The pairs of ranks of one size, one row and column for each rank: microseconds of a message, or GB/s."""
    case = rows[0].case
    latency = case.collective == "latency"
    found = {}
    for row in rows:
        native = row.native()
        assert row.case.pair is not None and native is not None
        value = _us(native.p50_us) if latency else f"{row.case.algbw(native.p50_us / 1e6):.2f}"
        found[row.case.pair] = found[row.case.pair[::-1]] = value
    what = "latency, us" if latency else "bandwidth, GB/s"
    lines = ["#", f"# {what}, of {format_nbytes(case.nbytes)} between each two ranks, median"]
    lines.append("#" + _cells([(5, "rank"), *((9, str(rank)) for rank in range(n_ranks))]))
    for a in range(n_ranks):
        lines.append(_cells([(6, str(a)), *((9, found.get((a, b), "-")) for b in range(n_ranks))]))
    return lines


LEGEND = (
    "# time, algbw, busbw and #wrong as nccl-tests defines them: mean time of a call on its slowest rank, 10^9 bytes.",
    "# p50, p95, p99, % roof and ratios are those of the call's native form: in place for all_reduce, reduce and",
    "# broadcast (which out of place are timed with a copy), else out of place. % roof: the least time that memory",
    "# and links allow, by their rates in this run, over p50. inside, between: bytes that one call sends on links",
    "# inside and between hosts, all ranks together. overlap: T_compute, T_comm, T_serial, T, T - T_compute, FLUX's",
    "# E_overlap = 1 - (T - T_compute) / (T_serial - T_compute), and T / max(T_compute, T_comm).",
    "# /gloo 3.00x: gloo's median is 3 times pycomm's.",
)


def _head(units: bool = False) -> str:
    names = ("(B)", "(elements)", "", "", "") if units else ("size", "count", "type", "redop", "root")
    return "#" + _cells(zip((12, 13, 9, 8, 8), names, strict=True))


def _cells(cells: Iterable[tuple[int, str]]) -> str:
    """Each to the right of its width, with a space before what is too long."""
    return "".join(f"{text:>{width}}" if len(text) < width else f" {text}" for width, text in cells)


def _timing(case: Case, timing: Timing | None) -> list[tuple[int, str]]:
    if timing is None:
        return [(9, _NO), (8, _NO), (8, _NO), (7, _NO)]
    seconds = timing.mean_us / 1e6
    wrong = _NO if timing.wrong is None else str(timing.wrong)
    return [(9, _us(timing.mean_us)), (8, _rate(case.algbw(seconds))), (8, _rate(case.busbw(seconds))), (7, wrong)]


def _us(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 10000 else f"{value:.0f}"


def _rate(value: float) -> str:
    return f"{value:.2f}"


def _wrong_lines(rows: Sequence[Row]) -> list[str]:
    return [
        f"# wrong: {row.case.label}: {library}, {placement}: {timing.wrong} elements"
        for row in rows
        for library, placements in row.timings.items()
        for placement, timing in placements.items()
        if timing.wrong
    ]


def _refusals(rows: Sequence[Row]) -> list[str]:
    """One line for each library and reason."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for library, why in row.refused.items():
            said.setdefault((library, why), []).append(f"{row.case.collective} {row.case.dtype}")
    return [
        f"# {library} not measured on {', '.join(dict.fromkeys(what))}: {why}" for (library, why), what in said.items()
    ]
