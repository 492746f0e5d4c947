"""Collectives across emulated hosts, beside Gloo, MPICH and what the link allows: python benchmarks/hosts.py

Hosts are network namespaces whose NICs tc shapes. Needs root. A section is a layout and a rate, such as
"2x4-scattered@1gbit": 2 hosts of 4 ranks, rank after rank on another host. All libraries are up at once, each in
processes of its own, and take turns by lot; every result is verified before it is timed. The time of a call is that of
a block of calls, one after another, over their number, on the slowest rank; of the blocks the median. (Not the slowest
rank's time of each call: ranks of one host may be a call ahead of another's, who then seem to wait in every other call,
and to have nothing to do in the next.) A run replaces its own sections, of these the collectives that it measured, in
results/hosts.json and writes all tables into docs/hosts.md.

The bound is benchmarks/bare.c in the same turns: it moves the bytes that a host must send and receive at least, both
ways at once, between two hosts, and does nothing else. For an all_reduce of S bytes on N hosts that is 2S(N-1)/N."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, read_json, serve_store, size_name, write_json
from hosts_report import plot, table, write_page
from links import compile_bare
from peer_rank import Hosts
from peers import MPICH, PEERS, Library, Running, install, start

from pycomm.netns import Network, emulated_hosts, why_unavailable

KIB, MIB = 1 << 10, 1 << 20
LAYOUTS = {f"{h}x{r}{kind}": (h, r, kind) for h, r in ((2, 2), (2, 4), (4, 2)) for kind in ("", "-scattered")}
SIZES = {
    "200mbit": {
        "all_reduce": (KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB),
        "all_gather": (MIB, 4 * MIB),
        "all_to_all": (MIB,),
    },
    "1gbit": {
        "all_reduce": (KIB, 64 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB),
        "all_gather": (MIB, 16 * MIB),
        "all_to_all": (MIB, 4 * MIB),
    },
}
SECTIONS = [f"{layout}@{rate}" for rate in SIZES for layout in LAYOUTS]
BLOCK_S, N_BLOCKS, MAX_CALLS = 0.1, 5, 50


def placed(hosts: Sequence[str], ranks_per_host: int, kind: str) -> list[str]:
    """The host of each rank."""
    return list(hosts) * ranks_per_host if kind else [host for host in hosts for _ in range(ranks_per_host)]


def mpich(network: Network, ranks: Sequence[str], folder: str) -> Library:
    """MPICH's launcher starts its proxies "by ssh", which here is a script that enters the host's namespace."""
    place = install("mpich")
    script = Path(folder) / "enter"
    of_address = "\n".join(
        f"  {network.addresses(host)[0]}) host={network.namespaces[host]};;" for host in network.hosts
    )
    script.write_text(
        '#!/bin/sh\n[ "$1" = -x ] && shift\ncase "$1" in\n'
        f'{of_address}\n  *) echo "unknown host $1" >&2; exit 1;;\nesac\nshift\nexec ip netns exec $host sh -c "$*"\n'
    )
    script.chmod(0o755)
    each = [network.addresses(host)[0] for host in network.hosts]
    if ranks[0] == ranks[1]:  # so many on one host before the next
        each = [f"{address}:{len(ranks) // len(each)}" for address in each]
    enter = ["ip", "netns", "exec", network.namespaces[network.hosts[0]]]
    launcher = [*enter, f"{place}/bin/mpiexec", "-n", str(len(ranks)), "-hosts", ",".join(each), "-iface", "nic0"]
    launcher += ["-launcher", "ssh", "-launcher-exec", str(script)]
    # Else UCX, which goes by the boot id, takes shared memory across emulated hosts. Inside a host MPICH has its own.
    variables = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "nic0"}
    return Library(MPICH, "mpi", place / "bin/python", launcher, variables)


def ours(network: Network, ranks: Sequence[str], bare: str) -> Library:
    each = []
    for host in ranks:
        variables = {"PYCOMM_HOST_ID": host, "PYCOMM_ADDRESS": ",".join(network.addresses(host)), "PEER_BARE": bare}
        variables |= {f"PEER_ADDRESS_{other}": ",".join(network.addresses(other)) for other in network.hosts}
        each.append((["ip", "netns", "exec", network.namespaces[host]], variables))
    return Library("ours", "hosts", Path(sys.executable), each=each)


def gloo(network: Network, ranks: Sequence[str]) -> Library:
    variables = {"GLOO_SOCKET_IFNAME": "nic0"}
    each = [(["ip", "netns", "exec", network.namespaces[host]], variables) for host in ranks]
    return Library("gloo", "gloo", Path(sys.executable), each=each)


def measure(running: Sequence[Running], collective: str, nbytes: int) -> dict[str, dict[str, Any]]:
    """Per contender: what a call takes in microseconds, in the median block and, sorted, in each."""
    case = (collective, "float32", nbytes)
    turns = [(each, name, inner) for each in running for name, inner in each.contenders.items()]
    if collective == "all_to_all":
        turns = [turn for turn in turns if turn[1] != Hosts.RING]
    for each in running:
        each.ask("prepare", *case, [inner for one, _, inner in turns if one is each])
    n_calls = {}
    for each, name, inner in turns:
        slowest = max(each.ask("calibrate", inner, 5 if nbytes <= MIB else 2)) / 1e9
        n_calls[name] = int(min(max(BLOCK_S / slowest, 1), MAX_CALLS))
    times: dict[str, list[float]] = {name: [] for _, name, _ in turns}
    for block in range(N_BLOCKS):
        # By lot, so that nobody always follows the same one: what a contender leaves to the scheduler meets the next.
        order = np.random.default_rng([block, nbytes]).permutation(len(turns))
        for each, name, inner in (turns[index] for index in order):
            warm_up = 1 + min(3, n_calls[name] // 4)  # the ranks fall into step, and TCP out of its slow start
            ns = each.block(case, name, inner, n_calls[name], warm_up, block == 0)
            times[name].append(float(ns.mean(axis=1).max()))
    for each in running:
        each.ask("release")
    found = {}
    for name, blocks in times.items():
        us = np.sort(blocks) / 1e3
        found[name] = {"median_us": round(float(np.median(us)), 1), "blocks_us": [round(float(t), 1) for t in us]}
    tuned = next(each for each in running if Hosts.CHOICE in each.contenders)
    found[Hosts.CHOICE]["algorithm"] = tuned.ask("algorithm", collective, nbytes)[0]
    return found


def section(name: str, wanted: Sequence[str]) -> list[dict[str, Any]]:
    layout, _, rate = name.partition("@")
    n_hosts, per_host, kind = LAYOUTS[layout]
    hosts = tuple("abcd"[:n_hosts])
    ranks = placed(hosts, per_host, kind)
    entries = []
    with tempfile.TemporaryDirectory() as folder, emulated_hosts(hosts=hosts, store_nic=False) as network:
        network.shape(rate)
        server = serve_store(network)
        libraries = [ours(network, ranks, compile_bare(folder)), gloo(network, ranks), mpich(network, ranks, folder)]
        running = start(len(ranks), libraries, f"{network.store_address()}:{server.port}")
        try:
            for collective in wanted:
                for nbytes in SIZES[rate][collective]:
                    begin = time.perf_counter()
                    contenders = measure(running, collective, nbytes)
                    entries.append({"collective": collective, "nbytes": nbytes, "contenders": contenders})
                    took = time.perf_counter() - begin
                    cells = "  ".join(f"{who} {v['median_us'] / 1e3:.2f}" for who, v in contenders.items())
                    cells += f" (ms)  {contenders[Hosts.CHOICE]['algorithm']}"
                    print(f"{name} {collective} {size_name(nbytes):<8} {took:5.1f} s  {cells}", flush=True)
        finally:
            for each in running:
                each.end()
    return entries


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--collectives", default="all_reduce,all_gather,all_to_all")
    parser.add_argument("--dry", action="store_true", help="print, and leave the record as it is")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}")
    if (why := why_unavailable()) is not None:
        print(f"hosts.py cannot emulate hosts here: {why}", file=sys.stderr)
        return 2
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the store's complaints that addresses have no names
    PEERS.mkdir(parents=True, exist_ok=True)
    record = read_json("hosts")
    measured = options.collectives.split(",")
    for name in options.sections or SECTIONS:
        command = ["python", "benchmarks/hosts.py", name, "--collectives", options.collectives]
        about = environment() | {"command": shlex.join(command)}
        entries = section(name, measured)
        print(f"\n{table(name, entries)}\n", flush=True)
        if not options.dry:
            commit = about.pop("commit")
            kept = [e for e in record.get(name, {"entries": []})["entries"] if e["collective"] not in measured]
            new = [entry | {"commit": commit} for entry in entries]
            order = list(SIZES[name.partition("@")[2]])
            both = sorted(kept + new, key=lambda e: (order.index(e["collective"]), e["nbytes"]))
            record[name] = {"environment": about, "entries": both}
            record = {key: record[key] for key in SECTIONS if key in record}
            write_json("hosts", record)
            write_page(record)
            plot(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
