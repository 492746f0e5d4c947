"""Writes the README's figures from results/*.json: python benchmarks/readme.py; a test holds the two equal."""

from __future__ import annotations

import json
from pathlib import Path

from common import RESULTS, size_name
from hosts_report import headline
from peers_report import GLOO, GROUP, MIB, ORDINARY_PEERS, OWN, TORCH, figures_table, table
from peers_report import figures as reached

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"
COLUMNS = (GLOO, *ORDINARY_PEERS, GROUP, OWN, TORCH)
ALL_REDUCE = (8, 1 << 10, 64 << 10, MIB, 16 * MIB, 64 * MIB)
OTHERS = (8, 64 << 10, 16 * MIB)


def figures() -> str:
    """The README's section as markdown."""
    peers = json.loads((RESULTS / "peers.json").read_text())
    link = json.loads((RESULTS / "host_link_bytes.json").read_text())
    about = peers["environment"]
    parts = [
        f"Processes on one host: {about['cpu']}, {about['cores']} cores, torch {about['torch']}. All libraries take "
        "turns in one run and every result is verified (`python benchmarks/peers.py`; it installs the peers into "
        "environments of their own). float32, median time of a call in µs; sendrecv is one way. `pycomm.empty()` is "
        "pycomm on tensors that the ranks share; % of limit is what the memory's copy bandwidth, measured in the same "
        f"run, would allow. Load average before the run {about['load_average_before'][0]}.\n"
    ]
    for n_ranks in sorted({entry["n_ranks"] for entry in peers["results"]}):
        entries = [
            entry
            for entry in peers["results"]
            if entry["n_ranks"] == n_ranks
            and entry["dtype"] == "float32"
            and entry["nbytes"] in ((0,) if entry["collective"] == "barrier" else _sizes(entry["collective"]))
        ]
        parts.append(f"{n_ranks} processes\n\n{table(entries, COLUMNS)}\n")
    parts.append("![all libraries](benchmarks/results/peers.png)\n")
    goals = figures_table(reached(peers["results"]))
    parts.append(f"What was to be reached, over all sizes, types and collectives:\n\n{goals}\n")
    hosts = json.loads((RESULTS / "hosts.json").read_text())
    parts.append(
        "Across hosts, emulated by network namespaces whose NICs tc shapes: all_reduce of 4 MiB, over what plain C "
        "takes to move the bytes that a host must send and receive at least. All take turns in one run "
        "(`python benchmarks/hosts.py`; more sizes and collectives in [docs/hosts.md](docs/hosts.md)).\n\n"
        f"{headline(hosts, 4 * MIB)}\n\n![all_reduce across hosts](docs/hosts.png)\n"
    )
    needed, sent = link["needed_per_host"], link["sent_per_host"]
    most = max(sent["hierarchical"].values())
    parts.append(
        f"Hierarchical all_reduce of {size_name(link['nbytes'])} on 2 emulated hosts × 2 ranks: a host sends {most:,} "
        f"bytes to the other, {most / needed:.4f} of 2S(N−1)/N; the flat ring sends "
        f"{max(sent['ring'].values()) / needed:.2f} times that (`python benchmarks/host_link_bytes.py`).\n"
    )
    return "\n".join(parts)


def _sizes(collective: str) -> tuple[int, ...]:
    return ALL_REDUCE if collective == "all_reduce" else OTHERS


def main() -> None:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + figures() + END + after)


if __name__ == "__main__":
    main()
