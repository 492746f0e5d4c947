"""What the benchmarks share: ranks as processes, the machine's description, records, tables."""

from __future__ import annotations

import argparse
import json
import multiprocessing.connection
import os
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from pycomm.bench.record import machine
from pycomm.discover import survey
from pycomm.measure import measure_links, measured_topology
from pycomm.netns import Network

RESULTS = Path(__file__).parent / "results"


def run_ranks(
    body: Callable[..., Any],
    n_ranks: int,
    *args: Any,
    hosts: Sequence[str] | None = None,
    network: Network | None = None,
    timeout_s: float = 600,
) -> list[Any]:
    """What body(store, rank, n_ranks, *args) returned in a process of its own, by rank. hosts: a label per rank; with a
    network, each rank runs in its host's namespace.

    Raises RuntimeError with the traceback of the first rank that failed, or when a rank is not done in timeout_s."""
    # A forkserver imports once, and 32 ranks start in seconds; it cannot move into a network's namespaces.
    context = multiprocessing.get_context("spawn" if network else "forkserver")
    if network is None:
        context.set_forkserver_preload(["torch.distributed", "pycomm"])
    server = serve_store(network)
    ranks: list[tuple[Connection, BaseProcess]] = []
    try:
        for rank in range(n_ranks):
            ours, theirs = context.Pipe(duplex=False)
            host = None if hosts is None else hosts[rank]
            process = context.Process(
                target=_rank_main, args=(theirs, body, server.port, rank, n_ranks, host, network, args), daemon=True
            )
            process.start()
            theirs.close()
            ranks.append((ours, process))
        results: dict[Connection, Any] = {}
        while len(results) < n_ranks:
            ready = multiprocessing.connection.wait([c for c, _ in ranks if c not in results], timeout_s)
            if not ready:
                raise RuntimeError(f"the ranks were not done in {timeout_s:g} s")
            for connection in ready:
                assert isinstance(connection, Connection)
                ok, results[connection] = connection.recv()
                if not ok:
                    raise RuntimeError(f"a rank failed:\n{results[connection]}")
        return [results[connection] for connection, _ in ranks]
    finally:
        for _, process in ranks:
            process.join(10 if sys.exc_info()[0] is None else 0)
            process.kill()
            process.join()


def serve_store(network: Network | None) -> dist.TCPStore:
    """The ranks' store; with a network, on its host a: the threads that serve it are of the thread that made it."""
    made: list[dist.TCPStore] = []

    def serve() -> None:
        address = "127.0.0.1"
        if network is not None:
            network.enter("a")
            address = network.store_address()
        made.append(dist.TCPStore(address, 0, is_master=True, wait_for_workers=False))

    thread = Thread(target=serve)
    thread.start()
    thread.join()
    if not made:
        raise RuntimeError("the ranks' store could not be served; see above")
    return made[0]


def _rank_main(
    connection: Connection,
    body: Callable[..., Any],
    port: int,
    rank: int,
    n_ranks: int,
    host: str | None,
    network: Network | None,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    if host is not None:
        os.environ["PYCOMM_HOST_ID"] = host
    try:
        address = "127.0.0.1"
        if network is not None and host is not None:
            network.enter(host)
            address = network.store_address()
            os.environ["PYCOMM_ADDRESS"] = ",".join(network.addresses(host))
        connection.send((True, body(dist.TCPStore(address, port, is_master=False), rank, n_ranks, *args)))
    except BaseException:  # whatever it was, the parent reports it
        connection.send((False, traceback.format_exc()))


def as_measured(group: Any) -> Any:
    """The group's topology with its links as they are; on every rank the same."""
    found = survey(group)
    return measured_topology(
        found.topology, measure_links(group, found.topology, [machine.boot_id for machine in found.machines])
    )


def environment() -> dict[str, Any]:
    """The machine, the versions and the command of this run."""
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        **machine(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("-dirty" if _git("status", "--porcelain", "-uno") else ""),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def sections_and_dry(doc: str, known: Collection[str]) -> tuple[list[str], bool]:
    """What a script that measures in sections was called with: which of them (all where none is named), and --dry."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--dry", action="store_true", help="print, and leave the record as it is")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(known):
        parser.error(f"no section {', '.join(sorted(unknown))}")
    return options.sections or list(known), options.dry


def write_json(name: str, record: dict[str, Any]) -> Path:
    """Write results/<name>.json, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
    return path


def read_json(name: str) -> dict[str, Any]:
    """What write_json() left there; {} where nothing is."""
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write_figures(page: Path, parts: Sequence[str]) -> None:
    """Replaces what stands between the page's marks."""
    begin, end = "<!-- figures: begin -->\n", "<!-- figures: end -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(before + begin + "\n".join(parts) + end + rest.partition(end)[2])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns also line up in a terminal; the first column to the left, figures to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = [
        "| "
        + " | ".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        + " |"
        for r in (head, *rows)
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def size_name(nbytes: int) -> str:
    for unit, shift in (("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift and nbytes % (1 << shift) == 0:
            return f"{nbytes >> shift} {unit}"
    return f"{nbytes} B"


def microseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
