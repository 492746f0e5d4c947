"""A run as data: what goes into --json and --csv, and what --compare finds between two of them."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pycomm.errors import InvalidArgument

if TYPE_CHECKING:  # it needs torch, which the process that starts the ranks does without
    from pycomm.bench.measure import Row

VERSION: Final = 1
_COMPARED: Final = ("cpu", "cores", "torch")  # of the machine: what makes records hard to compare where it differs
_KEY: Final = ("collective", "dtype", "op", "root", "nbytes", "pair", "moe")
CSV_COLUMNS: Final = (
    "collective", "nbytes", "count", "dtype", "op", "root", "pair", "n_ranks", "library", "placement", "calls",
    "mean_us", "algbw_GBps", "busbw_GBps", "wrong", "p50_us", "p95_us", "p99_us", "algorithm", "reason",
    "roofline_us", "bytes_inside_hosts", "bytes_between_hosts",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """This host and its versions."""
    import numpy
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": [round(x, 2) for x in os.getloadavg()],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
    }


def row_record(row: Row) -> dict[str, Any]:
    """One row; times in microseconds, bandwidths in GB/s of 10^9 bytes."""
    case = row.case
    return {
        "collective": case.collective,
        "dtype": case.dtype,
        "op": case.op if case.kind.reduces else None,
        "root": case.root if case.kind.rooted else None,
        "nbytes": case.nbytes,
        "count": case.count,
        "pair": list(case.pair) if case.pair is not None else None,
        "moe": asdict(case.moe) if case.moe is not None else None,
        "native": case.kind.native,
        "algorithm": row.algorithm,
        "reason": row.reason,
        "bytes_inside_hosts": row.bytes_inside,
        "bytes_between_hosts": row.bytes_between,
        "roofline_us": row.limit_us,
        "refused": row.refused,
        "scorecards": {
            name: asdict(card) | {"exposed_s": card.exposed_s, "overlap": card.overlap, "over_limit": card.over_limit}
            for name in row.timings
            if (card := row.scorecard(name)) is not None
        },
        "timings": {
            library: {
                placement: asdict(timing)
                | {
                    "algbw_GBps": case.algbw(timing.mean_us / 1e6),
                    "busbw_GBps": case.busbw(timing.mean_us / 1e6),
                }
                for placement, timing in placements.items()
            }
            for library, placements in row.timings.items()
        },
    }


def csv_rows(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One for each row, library and placement."""
    for row in record["rows"]:
        for library, placements in row["timings"].items():
            for placement, timing in placements.items():
                every = row | timing | {"n_ranks": record["n_ranks"], "library": library, "placement": placement}
                yield {name: every[name] for name in CSV_COLUMNS}


def write_json(path: Path, record: dict[str, Any]) -> None:
    _write(path, json.dumps(record, indent=1) + "\n")


def write_csv(path: Path, record: dict[str, Any]) -> None:
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(csv_rows(record))
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def load(path: Path) -> dict[str, Any]:
    """A record of --json. Raises InvalidArgument where it is none, of another version, or lacks what is compared."""
    try:
        record = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidArgument(f"cannot read the record {path}: {error}") from error
    if not isinstance(record, dict) or "rows" not in record:
        raise InvalidArgument(f"{path} is no record of pycomm bench; make one with --json")
    if record.get("version") != VERSION:
        raise InvalidArgument(
            f"{path} is a record of version {record.get('version')}, this pycomm writes {VERSION}; measure it again"
        )
    try:
        whole = _is_whole(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(f"{path} is no whole record of pycomm bench ({error!r}); measure it again") from error
    if not whole:
        raise InvalidArgument(f"{path} is no whole record of pycomm bench: times must be above 0; measure it again")
    return record


def _is_whole(record: dict[str, Any]) -> bool:
    """Whether times are such; raises what a missing part raises."""
    _layout(record)
    for name in _COMPARED:
        record["machine"][name]
    medians = []
    for row in record["rows"]:
        _key(row)
        medians += [timing["p50_us"] for timing in row["timings"].get("pycomm", {}).values()]
    return all(median > 0 for median in medians)


def compare(old: dict[str, Any], new: dict[str, Any], noise: float) -> tuple[list[str], list[str]]:
    """(a line for each regression, a line for each difference that makes the records hard to compare): pycomm's median
    is a regression where it is above the old one by more than `noise`, a fraction.

    Raises InvalidArgument where no row stands in both."""
    before = {_key(row): row for row in old["rows"]}
    both = [(before[key], row) for row in new["rows"] if (key := _key(row)) in before]
    if not both or old["host_ids"] != new["host_ids"]:
        raise InvalidArgument(
            f"nothing to compare: the old record has {len(old['rows'])} rows on {_layout(old)}, the new one "
            f"{len(new['rows'])} on {_layout(new)}; give the same collectives, types, sizes, ranks and hosts"
        )
    notes = [
        f"{name} was {old['machine'][name]}, is {new['machine'][name]}"
        for name in _COMPARED
        if old["machine"][name] != new["machine"][name]
    ]
    if missing := len(old["rows"]) - len(both):
        notes.append(f"{missing} of {len(old['rows'])} old rows were not measured again")
    found = []
    for was, row in both:
        for placement, timing in row["timings"].get("pycomm", {}).items():
            earlier = was["timings"].get("pycomm", {}).get(placement)
            if earlier is not None and timing["p50_us"] > earlier["p50_us"] * (1 + noise):
                change = timing["p50_us"] / earlier["p50_us"] - 1
                found.append(
                    f"{_name(row)}, {placement}: {earlier['p50_us']:.1f} -> {timing['p50_us']:.1f} us, {change:+.0%}"
                )
    return found, notes


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row[name] for name in _KEY])


def _name(row: dict[str, Any]) -> str:
    return " ".join(str(row[name]) for name in _KEY[:5] if row[name] is not None) + " B"


def _layout(record: dict[str, Any]) -> str:
    return f"{record['n_ranks']} ranks of {len(set(record['host_ids']))} host(s)"


def full_record(rows: Sequence[Row], about: dict[str, Any]) -> dict[str, Any]:
    return {"version": VERSION} | about | {"rows": [row_record(row) for row in rows]}
