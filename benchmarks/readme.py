"""Writes the README's figures from results/*.json: python benchmarks/readme.py; a test holds the two equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import RESULTS, markdown_table, microseconds, size_name

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"
CONTENDERS = ("Gloo", "pycomm, torch.distributed", "pycomm, Group")


def figures() -> str:
    """The README's section as markdown."""
    gloo = json.loads((RESULTS / "against_gloo.json").read_text())
    link = json.loads((RESULTS / "host_link_bytes.json").read_text())
    about = gloo["environment"]
    parts = [
        f"Median time of a call in µs, float32, processes on one host: {about['cpu']}, {about['cores']} cores, torch "
        f"{about['torch']}; Gloo and pycomm take turns in one run, every result verified (`make benchmark`; load "
        f"average before the run {about['load_average_before'][0]}).\n"
    ]
    for n_ranks in sorted({entry["n_ranks"] for entry in gloo["results"]}):
        entries = [entry for entry in gloo["results"] if entry["n_ranks"] == n_ranks]
        head = [f"{n_ranks} processes", "Gloo", "through torch.distributed", "pycomm's Group", "Gloo / Group"]
        parts.append(markdown_table(head, [_row(entry) for entry in entries]) + "\n")
    parts.append("![all_reduce against Gloo](benchmarks/results/against_gloo.png)\n")
    needed, sent = link["needed_per_host"], link["sent_per_host"]
    most = max(sent["hierarchical"].values())
    parts.append(
        f"Hierarchical all_reduce of {size_name(link['nbytes'])} on 2 emulated hosts × 2 ranks: a host sends {most:,} "
        f"bytes to the other, {most / needed:.4f} of 2S(N−1)/N; the flat ring sends "
        f"{max(sent['ring'].values()) / needed:.2f} times that (`python benchmarks/host_link_bytes.py`).\n"
    )
    return "\n".join(parts)


def _row(entry: dict[str, Any]) -> list[str]:
    what = entry["collective"] + (f" {size_name(entry['nbytes'])}" if entry["nbytes"] else "")
    medians = [float(entry["contenders"][name]["median_us"]) for name in CONTENDERS]
    return [what, *map(microseconds, medians), f"{medians[0] / medians[2]:.1f}"]


def main() -> None:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + figures() + END + after)


if __name__ == "__main__":
    main()
