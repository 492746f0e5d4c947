"""What a record of bench-gpu says (results/<gpu>.json): tables, and its figures beside their bounds.

python benchmarks/gpu_report.py results/nvidia_h200.json"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import markdown_table, size_name

Record = dict[str, Any]
SHARE = 0.85  # of the copy bandwidth of the same run, from SHARE_BYTES on
SHARE_BYTES = 16 << 20  # of bfloat16
SHARED_KERNELS = ("quantise int8", "quantise e4m3", "dequantise-reduce int8", "dequantise-reduce e4m3", "pack")
SMALL_BYTES = 64 << 10
SMALL_S = 8e-6
HOST_S = 5e-6
LARGE_BYTES = 64 << 20
LARGE_SHARE = 0.02
# Of gpu_moe.cc: 7168 values a token in bfloat16, 8 experts each.
MOE_S = {
    "moe expand T=4096": 154e-6,
    "moe combine-reduce T=4096": 154e-6,
    "moe quantise+pack fp8 T=4096": 64e-6,
    "moe expand T=128": 9e-6,
}
MOE_SHARE = 0.8  # of the rate of torch's expand in the same run


@dataclass(frozen=True)
class Figure:
    """A bound and what was measured. reached: None where nothing was."""

    name: str
    bound: str
    measured: str
    reached: bool | None

    def cells(self) -> list[str]:
        verdict = {None: "not measured", True: "reached", False: "MISSED"}[self.reached]
        return [self.name, self.bound, self.measured, verdict]


def share_of_copy(row: Record, kernels: Iterable[Record]) -> float:
    """Bytes per second against those of the copy of about as many bytes."""
    copies = [one for one in kernels if one["kernel"] == "copy"]
    copy = min(copies, key=lambda one: abs(one["nbytes"] - row["nbytes"]))
    return float(row["nbytes"] / row["median_s"] / (copy["nbytes"] / copy["median_s"]))


def figures(record: Record) -> list[Figure]:
    """Of the project's targets on an H200, in their order."""
    return [*_shares(record), *_small(record), *_hierarchical(record), *_graph(record), *_moe(record)]


def _shares(record: Record) -> list[Figure]:
    kernels, found = record.get("kernels", []), []
    for kernel in SHARED_KERNELS:
        rows = [
            row
            for row in kernels
            if row["kernel"] == kernel and row["by"] == "pycomm" and row["numel"] * 2 >= SHARE_BYTES
        ]
        shares = [share_of_copy(row, kernels) for row in rows]
        found.append(
            Figure(
                f"{kernel}, from 16 MiB",
                f">= {SHARE:.0%} of a copy",
                f"{min(shares):.0%} at worst" if shares else "",
                min(shares) >= SHARE if shares else None,
            )
        )
    return found


def _small(record: Record) -> list[Figure]:
    rows, found = record.get("threads", []), []
    times = {(row["what"], row["ranks"], row["nbytes"]): row["median_s"] for row in rows}
    for ranks in (2, 4):
        small = [nbytes for what, n, nbytes in times if what == "one-shot" and n == ranks and nbytes <= SMALL_BYTES]
        worst_s = max((times["one-shot", ranks, nbytes] for nbytes in small), default=None)
        found.append(
            Figure(
                f"one-shot all_reduce, {ranks} threads on one GPU, up to 64 KiB",
                "<= 8 us",
                "" if worst_s is None else f"{worst_s * 1e6:.1f} us at worst",
                None if worst_s is None else worst_s <= SMALL_S,
            )
        )
        beside = [nbytes for nbytes in small if ("nccl", ranks, nbytes) in times]
        slower = [size_name(b) for b in beside if times["one-shot", ranks, b] >= times["nccl", ranks, b]]
        found.append(
            Figure(
                f"the same, {ranks} threads, beside NCCL on that GPU",
                "faster at each size",
                "" if not beside else f"slower at {', '.join(slower)}" if slower else "faster at each",
                not slower if beside else None,
            )
        )
    return found


def _hierarchical(record: Record) -> list[Figure]:
    run = record.get("hierarchical") or {}
    found = [
        Figure(
            "hierarchical all_reduce: same bits on all ranks, the CPU engine's for integers",
            "yes",
            "" if not run else "yes" if run["same_bits"] else "no",
            run["same_bits"] if run else None,
        )
    ]
    for way in ("native", "hierarchical"):
        own_s = run["host_s"][way]["own"] if run else None
        found.append(
            Figure(
                f"{way} all_reduce: on the host, outside NCCL's calls",
                "<= 5 us",
                "" if own_s is None else f"{own_s * 1e6:.1f} us",
                None if own_s is None else own_s <= HOST_S,
            )
        )
    large = [row for row in run.get("sizes", []) if row["nbytes"] == LARGE_BYTES]
    more = large[0]["pycomm_s"] / large[0]["bare_s"] - 1 if large else None
    found.append(
        Figure(
            "hierarchical all_reduce of 64 MiB, over the bare calls",
            "<= 2 %",
            "" if more is None else f"{more:+.1%}",
            None if more is None else more <= LARGE_SHARE,
        )
    )
    return found


def _graph(record: Record) -> list[Figure]:
    run = record.get("graph") or {}
    measured = "" if not run else f"{'yes' if run['same_bits'] else 'no'}, {run['replayed_s'] * 1e6:.0f} us a replay"
    return [Figure("graph of a training step's collectives: same bits", "yes", measured, run.get("same_bits"))]


def _moe(record: Record) -> list[Figure]:
    times = {(row["kernel"], row["by"]): row["median_s"] for row in record.get("kernels", [])}
    found = []
    for kernel, bound_s in MOE_S.items():
        median_s = times.get((kernel, "pycomm"))
        found.append(
            Figure(
                kernel,
                f"<= {bound_s * 1e6:.0f} us",
                "" if median_s is None else f"{median_s * 1e6:.1f} us",
                None if median_s is None else median_s <= bound_s,
            )
        )
    ours_s, torch_s = (times.get(("moe expand T=4096", by)) for by in ("pycomm", "torch"))
    share = None if ours_s is None or torch_s is None else torch_s / ours_s
    found.append(
        Figure(
            "moe expand T=4096, beside torch's index_select",
            f">= {MOE_SHARE:.0%} of its rate",
            "" if share is None else f"{share:.0%}",
            None if share is None else share >= MOE_SHARE,
        )
    )
    return found


def tables(record: Record) -> str:
    """All of a record, for people."""
    parts = [f"{record['gpu']}, {record['n_gpus']} GPU(s), NCCL {record['nccl_version']}"]
    kernels = record.get("kernels", [])
    rows = [
        [
            row["kernel"],
            row["by"],
            size_name(row["numel"] * 2),
            f"{row['median_s'] * 1e6:.1f}",
            f"{row['nbytes'] / 1e6:.1f}",
            f"{row['nbytes'] / row['median_s'] / 1e9:.0f}",
            f"{share_of_copy(row, kernels):.0%}",
        ]
        for row in sorted(kernels, key=lambda row: (row["kernel"], row["numel"], row["by"]))
    ]
    parts.append(markdown_table(["kernel", "by", "bfloat16", "median us", "MB moved", "GB/s", "of a copy"], rows))
    threads: dict[tuple[int, int], dict[str, float]] = {}
    for row in record.get("threads", []):
        threads.setdefault((row["ranks"], row["nbytes"]), {})[row["what"]] = row["median_s"]
    ways = ("one-shot", "two-shot", "nccl")
    rows = [
        [f"{ranks} threads", size_name(nbytes), *(_us(found.get(way)) for way in ways)]
        for (ranks, nbytes), found in sorted(threads.items())
    ]
    if rows:
        parts.append(markdown_table(["all_reduce on one GPU, us", "bytes", *ways], rows))
    rows = [
        [
            f"{row['ranks']} processes",
            size_name(row["nbytes"]),
            "NCCL" if row["nccl_calls"] else "peers",
            _us(row["pycomm_s"]),
            _us(row["nccl_s"]),
            _us(row["host_s"]["pycomm"]),
            _us(row["host_s"]["nccl"]),
        ]
        for row in record.get("processes", [])
    ]
    if rows:
        head = ["all_reduce, us", "bytes", "pycomm by", "pycomm", "torch's nccl", "host: pycomm", "host: nccl"]
        parts.append(markdown_table(head, rows))
    if run := record.get("hierarchical"):
        rows = [[size_name(row["nbytes"]), _us(row["pycomm_s"]), _us(row["bare_s"])] for row in run["sizes"]]
        parts.append(markdown_table(["hierarchical all_reduce, us", "pycomm", "bare calls"], rows))
    for what, why in record.get("not_measured", {}).items():
        parts.append(f"NOT MEASURED: {what}: {why}")
    rows = [figure.cells() for figure in figures(record)]
    parts.append(markdown_table(["figure", "bound", "measured", ""], rows))
    return "\n\n".join(parts)


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        sys.exit("usage: gpu_report.py RECORD.json")
    print(tables(json.loads(Path(arguments[0]).read_text())))


if __name__ == "__main__":
    main(sys.argv[1:])
