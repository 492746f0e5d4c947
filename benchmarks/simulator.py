"""The simulator held against measured runs: predicted over measured, on two emulated hosts (netns.py).

    python benchmarks/simulator.py --rate 1gbit --ranks-per-host 2  one set-up; adds it to results/simulator.json

Needs root. A set-up first measures its own links: round trips of 8 bytes and one-way sends of 16 MiB inside a host and
between hosts, and numpy's addition for the reduction. The topology of these figures is what the simulator gets; nothing
is fitted to the collectives. The ranks then take turns through the algorithms and sizes; the median of the slowest
rank's times counts."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch.distributed as dist
from common import RESULTS, environment, markdown_table, run_ranks, size_name
from netns import HOSTS, emulated_hosts

import pycomm
from pycomm.planners import PLANNERS
from pycomm.simulate import simulate
from pycomm.topology import Host, Link, Nic, Topology

ALGORITHMS = ("ring", "hierarchical", "halving_doubling", "leader")
SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
SECONDS = 0.3  # of each algorithm and size
LARGE = 16 << 20
ROUND_TRIPS = 200


def round_trip_s(group: pycomm.Group, peer: int, nbytes: int, repeats: int) -> float:
    """Median time of a message to rank `peer` and back, on rank 0; the peer answers; 0 on others."""
    x = np.zeros(nbytes, np.uint8)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        if group.rank == 0:
            group.send(x, peer)
            group.recv(x, peer)
        elif group.rank == peer:
            group.recv(x, 0)
            group.send(x, 0)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def link(group: pycomm.Group, peer: int) -> Link:
    """From half a round trip of 8 bytes and of LARGE; the message's cost to its ranks is counted as latency."""
    small = round_trip_s(group, peer, 8, ROUND_TRIPS) / 2
    group.barrier()
    large = round_trip_s(group, peer, LARGE, 5) / 2
    group.barrier()
    return Link(small, LARGE / max(large - small, 1e-9)) if group.rank == 0 else Link(0.0, 1.0)


def measure(store: dist.Store, rank: int, n_ranks: int, host: list[str]) -> dict[str, Any]:
    """Rank 0's figures: links and {algorithm: {nbytes: seconds}}."""
    with pycomm.init(store, rank, n_ranks, host_id=host[rank]) as group:
        inside, between = link(group, 1), link(group, host.index(HOSTS[1]))
        found: dict[str, dict[int, float]] = {}
        for algorithm in ALGORITHMS:
            found[algorithm] = {}
            for nbytes in SIZES:
                x = np.ones(nbytes // 4, np.float32)
                spent, times = 0.0, []
                worst = np.zeros(1)
                while spent < SECONDS or len(times) < 5:
                    group.barrier()
                    start = time.perf_counter()
                    group.all_reduce(x, op="max", algorithm=algorithm)
                    worst[0] = time.perf_counter() - start
                    group.all_reduce(worst, op="max")
                    times.append(float(worst[0]))
                    spent += times[-1]
                found[algorithm][nbytes] = statistics.median(times[1:])
        return {"inside": inside, "between": between, "reduce_bytes_per_s": reduce_rate(), "measured": found}


def reduce_rate() -> float:
    a, b = np.ones((2, 1 << 16), np.float32)
    start = time.perf_counter()
    for _ in range(200):
        np.maximum(a, b, out=a)
    return 200 * a.nbytes / (time.perf_counter() - start)


def set_up(rate: str, ranks_per_host: int) -> dict[str, Any]:
    hosts = [host for host in HOSTS for _ in range(ranks_per_host)]
    with emulated_hosts() as network:
        network.shape(rate)
        found = run_ranks(measure, len(hosts), hosts, hosts=hosts, network=network)[0]
    ranks = [tuple(r for r, host in enumerate(hosts) if host == name) for name in HOSTS]
    nics = (Nic("nic0", found["between"]),)
    topology = Topology(
        tuple(Host(name, own, nics) for name, own in zip(HOSTS, ranks, strict=True)),
        found["inside"],
        found["reduce_bytes_per_s"],
    )
    rows = {}
    for algorithm, times in found["measured"].items():
        schedule = PLANNERS["all_reduce"][algorithm](topology, 0)
        rows[algorithm] = {
            str(nbytes): {"measured_s": seconds, "predicted_s": simulate(schedule, topology, nbytes).total_s}
            for nbytes, seconds in times.items()
        }
    return {
        "rate": rate,
        "hosts": 2,
        "ranks_per_host": ranks_per_host,
        "topology": topology.to_toml(),
        "all_reduce": rows,
        "environment": environment(),
    }


def table(found: dict[str, Any]) -> str:
    """Predicted over measured, of every set-up."""
    rows = []
    for name, one in found.items():
        for algorithm, times in one["all_reduce"].items():
            ratios = [times[str(nbytes)]["predicted_s"] / times[str(nbytes)]["measured_s"] for nbytes in SIZES]
            rows.append([name, algorithm, *(f"{ratio:.2f}" for ratio in ratios)])
    return markdown_table(["set-up", "algorithm", *map(size_name, SIZES)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="1gbit", help="tc's notation: 100mbit, 200mbit, 1gbit, 2gbit")
    parser.add_argument("--ranks-per-host", type=int, default=2)
    options = parser.parse_args()
    path = RESULTS / "simulator.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found[f"2×{options.ranks_per_host}, {options.rate}"] = set_up(options.rate, options.ranks_per_host)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
