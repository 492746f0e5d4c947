"""`pycomm tune`: measures a job's links and what each algorithm costs on them, and saves a tuning table.

The model goes first: with measured links it predicts every candidate, and what it expects to lose by far is not
measured. The rest run once, short ones three times, and those that come close to the quickest again, in blocks that
take turns, so that a disturbance meets all alike; a block's time is the slowest rank's, a candidate's the median of its
blocks."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from pycomm import launch
from pycomm.agreement import engine_version, table_folder, with_switches
from pycomm.device_choice import Points, measured_table
from pycomm.discover import survey
from pycomm.errors import InvalidArgument
from pycomm.explain import format_nbytes, format_s
from pycomm.group import Group, init
from pycomm.launch.seconds import require_seconds
from pycomm.launch.started import join_job
from pycomm.measure import measure_links, measured_topology
from pycomm.planners import PLANNERS
from pycomm.table import Times, TuningTable
from pycomm.timing import BLOCKS, rounded, slowest, time_algorithms
from pycomm.topology import Topology
from pycomm.tune_devices import DEVICE_SIZES, Device, own_device, tune_devices
from pycomm.tuner import LARGE, Choices, Costs, choice_table, costs, steadiest

SIZES: Final = tuple(1 << power for power in range(10, 25, 2))
BUDGET_S: Final = 15.0  # with the links of 8 ranks below 30 s
CONTENDS: Final = (3.0, 1.5, 1.2)  # times the best's expected cost, up to which a candidate is measured: the most for
# which there is time
_LIKELY = 1.25  # the same of predictions: what was never measured is expected to be as far off as the worst (tuner.py)
_FINAL = 1.5  # times the quickest's cost in the first round, up to which one may be measured well
_FINALISTS = ((4, 5), (3, 5), (2, 5), (2, BLOCKS))  # how many are, as time allows, and in how many blocks of each
_FIRST_S = 0.1  # what the first round of one size may take with BLOCKS calls of each, not one
_SHORT_FINALISTS, _SHORT_BLOCKS = 6, 9  # where a block takes no longer than _BLOCK_S: short calls vary most
_BLOCK_S = 2.5e-3  # what a block of calls is to take
_LARGE_BLOCK_S = 1e-2  # the same from LARGE: it takes some calls until flows fall out of step
_LEAST_CALLS = 4  # of a block: a lone one ends before what it sent has crossed the link
_LARGEST_SHARE = 0.2  # of the budget, for one collective at one size

Samples = dict[tuple[str, str], dict[int, float]]


class _Rounds(NamedTuple):
    """What is measured of one collective at one size."""

    names: list[str]  # in the first round
    calls: int  # of each in a block of it
    blocks: int
    finalists: int  # as many are measured well, at most
    final_blocks: int


def tune(group: Group, budget_s: float = BUDGET_S, device: Device | None = None) -> TuningTable:
    """Measures links and algorithms. Every rank of the job calls it on a group of all of them; all get the same table.
    Switches and their uplinks are those of the group's topology, as given; NICs and links inside hosts are measured.

    budget_s: seconds for the algorithms, about; sizes that would take too long are left to the model. On one host every
    collective takes the engine's native path, so links alone are measured. device: this rank's GPU, whose
    collectives are then measured as well, for as long again (tune_devices.py).
    Raises InvalidArgument for a group of one rank, which has nothing to measure, and as tune_devices()."""
    if group.size < 2:
        raise InvalidArgument("tune: one rank has no links; start it on at least 2 ranks, such as --hosts 2,2")
    found = survey(group)
    topology = with_switches(found.topology, group.topology)
    links = measure_links(group, topology, [machine.boot_id for machine in found.machines], all_pairs=False)
    topology = measured_topology(topology, links)
    samples: Samples = {}
    if len(topology.hosts) > 1:
        with group.replan(topology, name="tune") as trial:
            _measure(trial, found.hardware(), budget_s, samples)
    device_times = tune_devices(group, device, budget_s) if device is not None else ()
    return dataclasses.replace(_table(topology, found.hardware(), samples), device_times=device_times)


def tune_in_background(group: Group, path: str | Path | None = None) -> concurrent.futures.Future[TuningTable]:
    """tune() in a thread while the program goes on, on links that the program uses too; the table is for later jobs.

    Every rank of the job calls it. path: where rank 0 saves the table (default: the folder that init() searches).
    The result, or the error, comes with the future."""
    everyone = list(range(group.size))
    own = group.new_group(everyone, name="tune-in-background")
    assert own is not None
    threads = concurrent.futures.ThreadPoolExecutor(1, "pycomm-tune")

    def run() -> TuningTable:
        with own:
            table = tune(own)
            if own.rank == 0:
                table.save(path or table_folder() / table.file_name())
            own.barrier()
        return table

    future = threads.submit(run)
    threads.shutdown(wait=False)
    return future


def _table(topology: Topology, hardware: tuple[str, ...], samples: Samples) -> TuningTable:
    times = tuple(Times(*name, tuple(sorted(points.items()))) for name, points in sorted(samples.items()))
    return TuningTable(engine_version(), hardware, topology, times)


def _measure(group: Group, hardware: tuple[str, ...], budget_s: float, samples: Samples) -> None:
    """Fills samples, all ranks alike: what is decided from times is decided from times that all have agreed on."""
    begin, spent = time.perf_counter(), 0.0
    for nbytes in SIZES:
        for collective in PLANNERS:
            size = rounded(nbytes, group.size)
            cost = costs(group.topology, collective, (size,), table=_table(group.topology, hardware, samples))
            rounds = _rounds(cost, min(_LARGEST_SHARE * budget_s, budget_s - spent))
            if rounds is None:
                continue
            names, n_calls, n_first_blocks, n_final, n_blocks = rounds
            first = time_algorithms(group, collective, size, names, [n_calls] * len(names), n_first_blocks)
            seconds = dict(zip(names, first, strict=True))
            final = [name for name in sorted(names, key=seconds.__getitem__) if seconds[name] <= _FINAL * min(first)]
            sure = cost.algorithms[int(cost.expected_s[:, 0].argmin())]  # one bad first time does not rule it out
            if size >= LARGE:  # it may win a tie
                sure = cost.algorithms[steadiest(cost, [cost.algorithms.index(name) for name in final], 0)[0]]
            if _LEAST_CALLS * min(first) <= _BLOCK_S:
                n_final, n_blocks = _SHORT_FINALISTS, _SHORT_BLOCKS
            final = [sure, *(name for name in final if name != sure)][:n_final]
            block_s = _LARGE_BLOCK_S if size >= LARGE else _BLOCK_S
            calls = [max(_LEAST_CALLS, round(block_s / seconds[name])) for name in final]
            well = dict(zip(final, time_algorithms(group, collective, size, final, calls, n_blocks), strict=True))
            for name in names:  # whoever lost the first round does not win the second by it
                samples.setdefault((collective, name), {})[size] = well.get(name, max(seconds[name], *well.values()))
            spent = slowest(group, time.perf_counter() - begin)


def _rounds(cost: Costs, have_s: float) -> _Rounds | None:
    """What to measure in have_s: of the widest circle for which there is time, None where that is no two."""
    expected, predicted = cost.expected_s[:, 0], cost.predicted_s[:, 0]
    for limit in CONTENDS:
        likely = predicted <= min(limit, _LIKELY) * predicted.min()
        contends = (expected <= limit * expected.min()) | likely
        one_each = float(expected[contends].sum())
        # A lone call ends before what it sent has crossed the link, and the sooner, the less its ranks wait for.
        n_calls, n_blocks = (1, BLOCKS) if BLOCKS * one_each <= _FIRST_S else (2, 1)
        left_s = have_s - (1 + n_calls * n_blocks) * one_each
        best = np.cumsum(np.sort(expected[contends]))
        fitting = [(n, k) for n, k in _FINALISTS if best[min(n, len(best)) - 1] * (1 + k * _LEAST_CALLS) <= left_s]
        if contends.sum() > 1 and fitting:
            names = [name for name, yes in zip(cost.algorithms, contends, strict=True) if yes]
            return _Rounds(names, n_calls, n_blocks, *fitting[0])
    return None


# The command


def report(table: TuningTable) -> str:
    """Link figures, and what each collective takes by size, for people."""
    lines = []
    for host in table.topology.hosts:
        link = host.nic
        names = "+".join(nic.name for nic in host.nics)
        lines.append(f"host {host.name}, {names}: {_link(link.bytes_per_s, link.latency_s)}")
    for switch in table.topology.switches:
        uplink = switch.uplink
        lines.append(f"switch {switch.name}: uplink {_link(uplink.bytes_per_s, uplink.latency_s)}, as given")
    inside = table.topology.inside
    lines.append(f"inside hosts: {_link(inside.bytes_per_s, inside.latency_s)}")
    if len(table.topology.hosts) == 1:
        return "\n".join(
            [*lines, "one host: every collective takes the engine's native path, there is nothing to choose"]
        )
    for collective in PLANNERS:
        choices = choice_table(table.topology, collective, table=table)
        lines.append(_choices(collective, choices, table.points(collective), len(SIZES)))
    if table.device_times:
        lines.append("on devices:")
    for collective in dict.fromkeys(times.collective for times in table.device_times):
        points = table.device_points(collective)
        lines.append(_choices(collective, measured_table(points), points, len(DEVICE_SIZES)))
    return "\n".join(lines)


def _choices(collective: str, choices: Choices, points: Points, n_sizes: int) -> str:
    said, beyond = [], ""
    for limit, name in choices:
        said.append(f"{name}{beyond}" if limit is None else f"{name} to {format_nbytes(limit)}")
        beyond = " above"
    n_measured = len({nbytes for sizes in points.values() for nbytes, _ in sizes})
    return f"{collective:<15}{', '.join(said)} ({n_measured} of {n_sizes} sizes measured)"


def _link(bytes_per_s: float, latency_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:.3g} Gbit/s, {format_s(latency_s)}"


def add_layout(parser: argparse.ArgumentParser) -> None:
    """The options that have a command start its own ranks."""
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks, all on one host")
    parser.add_argument("--hosts", metavar="H", help="start emulated hosts: a count, or the ranks of each: 3,1")
    parser.add_argument("--ranks-per-host", type=int, metavar="R", help="ranks on each emulated host")


def relaunch(command: str, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs `pycomm <command> <arguments>` as the ranks that add_layout()'s options describe."""
    if join_job():
        raise InvalidArgument("this is a rank of a job already; leave --ranks and --hosts out")
    layout = launch.parse_layout(options.ranks, options.hosts, options.ranks_per_host)
    return launch.launch(["-m", "pycomm", command, *arguments], layout, output="rank0")


def main(argv: Sequence[str]) -> int:
    """`pycomm tune`: returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="pycomm tune",
        description="Measure links and algorithms, and save a table that later jobs of this layout load.",
        epilog="Under `pycomm launch`, torchrun or srun it measures that job; with --hosts or --ranks it starts "
        "its own ranks. Tables stand in PYCOMM_TUNE_DIR, else XDG_CACHE_HOME/pycomm, else ~/.cache/pycomm; "
        "PYCOMM_TUNE_FILE names one.",
    )
    add_layout(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to save the table (default: that folder)")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, metavar="S", help="seconds for algorithms (%(default)g)"
    )
    parser.add_argument(
        "--devices", action="store_true", help="measure collectives on GPUs as well, one to a rank, for as long again"
    )
    options = parser.parse_args(argv)
    require_seconds("--budget", options.budget)
    if (options.ranks, options.hosts, options.ranks_per_host) != (None, None, None):
        arguments = ["--budget", str(options.budget), *(["--devices"] if options.devices else [])]
        if options.output is not None:
            arguments += ["--output", str(options.output.absolute())]
        return relaunch("tune", options, arguments)
    if not join_job():
        parser.error("no ranks to measure: give --hosts 2 --ranks-per-host 4, or start it under a launcher")
    os.environ["PYCOMM_TUNE_FILE"] = ""  # an older table has no say, and no warning is due
    begin = time.perf_counter()
    with init() as group:
        table = tune(group, options.budget, own_device() if options.devices else None)
        if group.rank == 0:
            path = options.output or table_folder() / table.file_name()
            table.save(path)
            print(report(table))
            print(f"measured in {time.perf_counter() - begin:.1f} s; saved to {path}")
    return 0
