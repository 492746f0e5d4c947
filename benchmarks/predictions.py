"""Which all_reduce wins from where on clusters that nobody lent us: predicted, up to 16,384 GPUs (docs/predictions.md).

    python benchmarks/predictions.py            predicts (minutes), writes results/predictions.json, the plots, the page
    python benchmarks/predictions.py --scale    one event-driven run at 100,000 ranks; time it with /usr/bin/time -v

Some schedules have as many transfers as the square of the hosts or ranks. Beyond MOST_HOSTS hosts those that take log2
of the hosts in rounds are extrapolated, one doubling of the hosts adding what the last one added, and ring is left
out."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pycomm.explain import format_nbytes
from pycomm.planners import PLANNERS
from pycomm.predict import predict
from pycomm.simulate import simulate
from pycomm.topology import Link, Nic, Switch, Topology

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "predictions.json"
PAGE = ROOT / "docs" / "predictions.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

SIZES = [1 << power for power in range(10, 31, 2)]
RANKS_PER_HOST = 8
MOST_HOSTS = 64
SMALL = ("hierarchical_tree", "leader", "rack_leader", "tree")  # few transfers on any number of hosts
LOGARITHMIC = ("hierarchical", "halving_doubling")  # extrapolated
LARGE = (*LOGARITHMIC, "ring")


def h100(n_hosts: int) -> Topology:
    nics = tuple(Nic(f"ib{index}", Link(5e-6, 50e9, 1e-6)) for index in range(8))
    return cluster(n_hosts, nics, Link(2e-6, 450e9, 1e-6), 1.1e12)


def h100_one_nic(n_hosts: int) -> Topology:
    return cluster(n_hosts, (Nic("ib0", Link(5e-6, 50e9, 1e-6)),), Link(2e-6, 450e9, 1e-6), 1.1e12)


def ethernet(n_hosts: int) -> Topology:
    return cluster(n_hosts, (Nic("eth0", Link(20e-6, 12.5e9, 2e-6)),), Link(1e-6, 6e9, 2e-7), 8e9)


def wan(n_hosts: int) -> Topology:
    """Sites of 4 hosts on 100 GbE, each behind 1 Gbit/s."""
    flat = ethernet(n_hosts)
    hosts = tuple(replace(host, switch=f"site{index // 4}") for index, host in enumerate(flat.hosts))
    uplinks = tuple(Switch(f"site{site}", Link(20e-3, 125e6, 5e-6)) for site in range((n_hosts + 3) // 4))
    return replace(flat, hosts=hosts, switches=uplinks)


def cluster(n_hosts: int, nics: tuple[Nic, ...], inside: Link, reduce_bytes_per_s: float) -> Topology:
    flat = Topology.emulated([RANKS_PER_HOST] * n_hosts)
    hosts = tuple(replace(host, nics=nics) for host in flat.hosts)
    return Topology(hosts, inside, reduce_bytes_per_s)


CLUSTERS = {
    "h100": ("8×H100 hosts, 8 NICs of 400 Gbit/s each", h100, [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]),
    "h100_one_nic": (
        "8×H100 hosts, one NIC of 400 Gbit/s",
        h100_one_nic,
        [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048],
    ),
    "ethernet": ("hosts of 8 ranks, one NIC of 100 Gbit/s", ethernet, [2, 4, 8, 16, 32, 64, 128]),
    "wan": ("sites of 4 such hosts, 1 Gbit/s and 20 ms between sites", wan, [8, 16, 32, 64]),
}


def measure() -> dict[str, Any]:
    """{cluster: {hosts: {algorithm: [seconds by size]}}}; an algorithm that is extrapolated ends in '*'."""
    found: dict[str, Any] = {}
    for name, (_, build, scales) in CLUSTERS.items():
        found[name] = {}
        for n_hosts in scales:
            topology = build(n_hosts)
            times: dict[str, list[float]] = {}
            for algorithm in SMALL + LARGE if n_hosts <= MOST_HOSTS else SMALL:
                if algorithm == "rack_leader" and not topology.switches:
                    continue
                schedule = PLANNERS["all_reduce"][algorithm](topology, 0)
                times[algorithm] = predict(schedule, topology, SIZES).tolist()
            if n_hosts > MOST_HOSTS:
                times |= {f"{one}*": extrapolated(found[name], one, n_hosts) for one in LOGARITHMIC}
            found[name][str(n_hosts)] = times
            print(name, n_hosts, "hosts", winners(times), flush=True)
    return found


def extrapolated(found: dict[str, Any], algorithm: str, n_hosts: int) -> list[float]:
    def of(hosts: int) -> list[float]:
        times = found[str(hosts)]
        return list(times.get(algorithm) or times[f"{algorithm}*"])

    return [2 * half - quarter for half, quarter in zip(of(n_hosts // 2), of(n_hosts // 4), strict=True)]


def winners(times: dict[str, list[float]]) -> list[tuple[str, int]]:
    """(algorithm, from which size it wins), by size."""
    best = [min(times, key=lambda algorithm: times[algorithm][index]) for index in range(len(SIZES))]
    return [(name, SIZES[i]) for i, name in enumerate(best) if i == 0 or name != best[i - 1]]


def figures(found: dict[str, Any]) -> str:
    """The page's tables."""
    parts = []
    for name, (title, _, _) in CLUSTERS.items():
        lines = [f"**{title}**", "", "| GPUs | hosts | which wins, from which size | 1 KiB | 1 MiB | 1 GiB |"]
        lines.append("|-----:|------:|---|---:|---:|---:|")
        for hosts, times in found[name].items():
            which = ", ".join(
                f"{algorithm} from {format_nbytes(nbytes)}" if nbytes > SIZES[0] else algorithm
                for algorithm, nbytes in winners(times)
            )
            best = [min(column) * 1e3 for column in zip(*times.values(), strict=True)]
            cells = " | ".join(f"{best[SIZES.index(1 << power)]:.3g} ms" for power in (10, 20, 30))
            lines.append(f"| {int(hosts) * RANKS_PER_HOST:,} | {hosts} | {which} | {cells} |")
        parts += [*lines, "", f"![{name}](predictions_{name}.png)", ""]
    return "\n" + "\n".join(parts)


def draw(found: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    for name, (title, _, scales) in CLUSTERS.items():
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axes, n_hosts in zip(figure.subplots(1, 2, sharey=True), (scales[2], scales[-1]), strict=True):
            for algorithm, times in found[name][str(n_hosts)].items():
                axes.loglog(SIZES, [seconds * 1e3 for seconds in times], marker=".", label=algorithm)
            axes.set_title(f"{n_hosts * RANKS_PER_HOST:,} GPUs")
            axes.set_xlabel("bytes")
            axes.legend(fontsize="small")
        figure.axes[0].set_ylabel("all_reduce, ms predicted")
        figure.suptitle(title)
        figure.savefig(ROOT / "docs" / f"predictions_{name}.png", dpi=110)


def at_scale() -> None:
    """100,000 ranks, two and three levels, planned and simulated event by event."""
    flat = Topology.emulated([8] * 12_500, Link(5e-6, 50e9, 1e-6), Link(2e-6, 450e9, 1e-6))
    hosts = tuple(replace(host, switch=f"rack{index // 25}") for index, host in enumerate(flat.hosts))
    racks = replace(flat, hosts=hosts, switches=tuple(Switch(f"rack{i}", Link(1e-5, 400e9)) for i in range(500)))
    for levels, topology, algorithm in (("two", flat, "leader"), ("three", racks, "rack_leader")):
        start = time.perf_counter()
        schedule = PLANNERS["all_reduce"][algorithm](topology, 0)
        planned = time.perf_counter()
        run = simulate(schedule, topology, 1 << 20, same_time=1e-3)
        print(
            f"{topology.n_ranks:,} ranks, {levels} levels, {algorithm}, 1 MiB: {len(schedule.transfers):,} transfers, "
            f"{run.total_s * 1e3:.3f} ms; planned in {planned - start:.1f} s, "
            f"simulated in {time.perf_counter() - planned:.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", action="store_true")
    if parser.parse_args().scale:
        at_scale()
        return
    found = measure()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    draw(found)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + figures(found) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
