"""What pycomm finds out about shaped links, and how well its choice does: python benchmarks/tuned.py [RATE...]

Two hosts of 4 ranks, emulated by network namespaces that tc shapes (default: 200mbit 1gbit); needs root. For each rate:
the measured latency and rate of the hosts' NICs beside what the shaper leaves to TCP's payload (1448 of the 1514 bytes
that tc counts for a full frame), then a tuning table, and for every collective at sizes between those
that the table was measured at: the time of the chosen algorithm over the best candidate's, in calls that take turns.
Which is the best is found first, and its time taken then anew beside the choice's: the least of many noisy times is too
low.
A run replaces its own rates in results/tuned.json."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
from common import environment, markdown_table, read_json, run_ranks, size_name, write_json

from pycomm.netns import emulated_hosts, why_unavailable

HOSTS = ("a",) * 4 + ("b",) * 4
PAYLOAD_SHARE = 1448 / 1514
SIZES = (8 << 10, 128 << 10, 512 << 10, 2 << 20)  # between those that a table is measured at
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
BLOCKS, BLOCK_S = 3, 0.04
LEAST_CALLS = 4  # of a block: a lone one ends before what it sent has crossed the link
CONTENDS = 2  # times the least of a first block's times, up to which a candidate is timed at all


def measure(store: Any, rank: int, n: int) -> dict[str, Any]:
    """One rank: the table's links, and [collective, nbytes, chosen, its seconds, best, its seconds] for each point."""
    import pycomm
    from pycomm.timing import time_algorithms
    from pycomm.tune import tune
    from pycomm.tuner import candidates, choice_table, choose

    with pycomm.init(store, rank, n, timeout_s=60) as group:
        begin = time.perf_counter()
        table = tune(group)
        tuned_s = time.perf_counter() - begin
        points = []
        with group.replan(table.topology, table) as tuned:
            for collective in COLLECTIVES:
                names = list(candidates(tuned.topology, collective))
                choices = choice_table(tuned.topology, collective, table=table)
                for nbytes in SIZES:
                    chosen = choose(choices, nbytes)
                    first = time_algorithms(tuned, collective, nbytes, names, [2] * len(names), 1)
                    calls = {
                        name: max(LEAST_CALLS, round(BLOCK_S / seconds))
                        for name, seconds in zip(names, first, strict=True)
                        if name == chosen or seconds <= CONTENDS * min(first)
                    }
                    seconds = time_algorithms(tuned, collective, nbytes, list(calls), list(calls.values()), BLOCKS)
                    pair = [chosen, list(calls)[int(np.argmin(seconds))]]
                    again = time_algorithms(tuned, collective, nbytes, pair, [calls[name] for name in pair], 2 * BLOCKS)
                    chosen_s, best_s = again if pair[0] != pair[1] else (min(again), min(again))
                    points.append([collective, nbytes, pair[0], chosen_s, pair[1], best_s])
        return {
            "tuned_s": tuned_s,
            "bytes_per_s": [host.nic.bytes_per_s for host in table.topology.hosts],
            "latency_s": [host.nic.latency_s for host in table.topology.hosts],
            "points": points,
        }


def report(rate: str, results: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The result of one rate, for people and for the file."""
    first = results[0]
    left = bits(rate) / 8 * PAYLOAD_SHARE
    rows = [
        [
            f"{collective} {size_name(nbytes)}",
            chosen,
            f"{seconds * 1e3:.2f} ms",
            best,
            f"{seconds / best_s:.2f}",
        ]
        for collective, nbytes, chosen, seconds, best, best_s in first["points"]
    ]
    within = sum(seconds <= 1.05 * best_s for *_, seconds, _, best_s in first["points"])
    measured = ", ".join(f"{found * 8 / 1e6:.1f} Mbit/s ({found / left - 1:+.1%})" for found in first["bytes_per_s"])
    text = (
        f"{rate}: {left * 8 / 1e6:.1f} Mbit/s for payload; measured {measured}; tuned in {first['tuned_s']:.1f} s; "
        f"chosen within 5 % of the best in {within} of {len(rows)} points\n"
        + markdown_table(["collective", "chosen", "time", "best", "over the best"], rows)
    )
    return text, {**first, "payload_bytes_per_s": left, "within_5_percent": within / len(rows)}


def bits(rate: str) -> float:
    """tc's notation: 200mbit, 1gbit."""
    for unit, scale in (("gbit", 1e9), ("mbit", 1e6)):
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * scale
    raise SystemExit(f"rate {rate!r}: write for example 200mbit or 1gbit")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("rates", nargs="*", default=["200mbit", "1gbit"], metavar="RATE")
    rates = parser.parse_args().rates
    if why := why_unavailable():
        print(f"tuned: cannot run here: {why}", file=sys.stderr)
        return 2
    record: dict[str, Any] = read_json("tuned")
    for rate in rates:
        about = environment()
        with emulated_hosts() as network:
            network.shape(rate)
            results = run_ranks(measure, len(HOSTS), hosts=HOSTS, network=network, timeout_s=300)
        text, found = report(rate, results)
        record[rate] = {"environment": about, **found}
        print(f"{text}\nwritten to {write_json('tuned', record)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
