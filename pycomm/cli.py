"""The `pycomm` command: one table of subcommands, each a function from its arguments to an exit code.

A subcommand imports what it needs when it runs, so that `pycomm explain` works with numpy alone and `pycomm launch`
starts in milliseconds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pycomm import __version__
from pycomm.errors import PycommError

if TYPE_CHECKING:
    from pycomm.explain import Explanation


@dataclass(frozen=True)
class Command:
    """help: one line for `pycomm --help`. run: takes the arguments after the name, returns the exit code."""

    help: str
    run: Callable[[Sequence[str]], int]


def _launch(argv: Sequence[str]) -> int:
    from pycomm.launch import command

    return command.main(argv)


def _explain(argv: Sequence[str]) -> int:
    from pycomm import device_choice, explain, launch, table
    from pycomm.launch.started import join_job
    from pycomm.topology import Topology

    parser = argparse.ArgumentParser(
        prog="pycomm explain",
        description="Which schedule a collective of this size would run, why, and what the others would cost.",
        epilog="Under `pycomm launch`, torchrun or srun, without a layout: of that job, with the table that it loads. "
        "Elsewhere, without a layout: 2 hosts of 2 ranks. "
        "Example: pycomm explain all_reduce 64MiB --hosts 2 --ranks-per-host 2",
    )
    parser.add_argument("collective", help="all_reduce, broadcast, all_to_all, ...")
    parser.add_argument("nbytes", help="bytes of the tensor on one rank: 1000000, 64KiB, 1.5GiB, ...")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks, all on one host")
    parser.add_argument("--hosts", metavar="H", help="hosts: a count, or the ranks of each, such as 3,1")
    parser.add_argument("--ranks-per-host", type=int, metavar="R", help="ranks on each host")
    parser.add_argument("--topology", metavar="FILE", help="a topology in TOML, instead of the options above")
    parser.add_argument("--table", metavar="FILE", help="a table of `pycomm tune`: its layout, links and times")
    parser.add_argument(
        "--devices",
        action="store_true",
        help="of tensors on GPUs, which --topology describes: NCCL's whole or in steps",
    )
    parser.add_argument("--png", metavar="FILE", help="draw the choice as a space-time diagram; needs matplotlib")
    options = parser.parse_args(argv)
    layout = (options.ranks, options.hosts, options.ranks_per_host)
    nbytes = explain.parse_nbytes(options.nbytes)
    if options.devices and (options.topology is None or options.png is not None):
        parser.error("--devices needs --topology, with what joins the GPUs, and draws nothing")
    tuned = None
    if layout == (None, None, None) and options.table is None and options.topology is None and join_job():
        return _explain_job(options.collective, nbytes, options.png)
    if options.table is not None:
        if layout != (None, None, None) or options.topology is not None:
            parser.error(
                "--table has the hosts and ranks it was measured on; leave --ranks, --hosts and --topology out"
            )
        tuned = table.load(options.table)
        topology = tuned.topology
    elif options.topology is not None:
        if layout != (None, None, None):
            parser.error("--topology describes the hosts and ranks already; leave --ranks and --hosts out")
        topology = Topology.load(options.topology)
    elif layout == (None, None, None):
        topology = Topology.emulated([2, 2])
    else:
        topology = Topology.emulated(launch.parse_layout(*layout))
    if options.devices:
        print(device_choice.explain_devices(topology, options.collective, nbytes))
        return 0
    found = explain.explain(topology, options.collective, nbytes, table=tuned)
    print(found)
    if options.png is not None:
        _draw(found, options.png)
    return 0


def _explain_job(collective: str, nbytes: int, png: str | None) -> int:
    """One rank's part; rank 0 speaks."""
    from pycomm import init

    with init() as group:
        if group.rank == 0:
            found = group.explanation(collective, nbytes)
            print(group.explain(collective, nbytes))
            if png is not None:
                _draw(found, png)
    return 0


def _draw(found: Explanation, png: str) -> None:
    """The chosen schedule as a space-time diagram."""
    from pycomm import plot
    from pycomm.planners import PLANNERS
    from pycomm.simulate import simulate

    schedule = PLANNERS[found.collective][found.choice](found.topology, 0)
    plot.save_space_time(simulate(schedule, found.topology, found.nbytes), found.topology, png)
    print(f"Its space-time diagram is in {png}.")


def _tune(argv: Sequence[str]) -> int:
    from pycomm import tune

    return tune.main(argv)


def _topo(argv: Sequence[str]) -> int:
    from pycomm import topo

    return topo.main(argv)


def _bench(argv: Sequence[str]) -> int:
    from pycomm.bench import command

    return command.main(argv)


def _info(argv: Sequence[str]) -> int:
    argparse.ArgumentParser(
        prog="pycomm info", description="Versions, the extension, and what this machine offers."
    ).parse_args(argv)
    rows = [
        ("pycomm", __version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("machine", f"{platform.machine()}, Linux {platform.release()}, {len(os.sched_getaffinity(0))} cores"),
        *((name, _distribution_version(name)) for name in ("numpy", "torch")),
    ]
    if importlib.util.find_spec("torch") is None:
        rows.append(("extension", "not loaded: it needs torch; planning and explain work without"))
    else:
        rows += _extension_rows()
    for name, value in rows:
        print(f"{name:<12}{value}")
    return 0


def _extension_rows() -> list[tuple[str, str]]:
    """What the C++ extension says about itself, or why it cannot be loaded."""
    try:
        import torch  # noqa: F401  (the extension links against its libraries)

        from pycomm import _C
        from pycomm.gpus import nccl_wheel
    except ImportError as error:
        return [("extension", f"not loaded: {error}")]
    rows = [("extension", str(_C.__file__))]
    if not hasattr(_C, "cuda_info"):
        return [*rows, ("cuda", "not compiled in")]
    return rows + _cuda_rows(_C.cuda_info(nccl_wheel()))


def _cuda_rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    devices = ", ".join(
        f"{device['name']} (sm_{device['capability'][0]}{device['capability'][1]}, {device['memory_nbytes'] >> 30} GiB)"
        for device in info["devices"]
    )
    runtime = f"runtime {info['runtime_version'] // 1000}.{info['runtime_version'] % 1000 // 10}"
    rows = [("cuda", f"{runtime}, {devices or info['device_problem']}")]
    if info["nccl_problem"]:
        return [*rows, ("nccl", str(info["nccl_problem"]))]
    version = info["nccl_version"]
    rows.append(("nccl", f"{version // 10000}.{version // 100 % 100}.{version % 100} at {info['nccl_path']}"))
    for feature in info["nccl_features"]:
        there = "yes" if feature["present"] else f"no, needs NCCL {feature['since']}"
        rows.append(("", f"{feature['name']:<13}{feature['symbol']:<25}{there:<21}{feature['gives']}"))
    return rows


def _distribution_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


COMMANDS: dict[str, Command] = {
    "launch": Command("start the ranks of a program on this machine, on one or several emulated hosts", _launch),
    "explain": Command("which schedule a collective would run, why, and what the others would cost", _explain),
    "topo": Command("hosts, NICs, NUMA nodes, GPUs and ranks of a job, and what its links do, measured", _topo),
    "tune": Command("measure links and algorithms, and save the table that later jobs choose by", _tune),
    "bench": Command("what collectives cost here, beside other libraries, verified; nccl-tests' columns", _bench),
    "info": Command("versions, the extension, and what this machine offers", _info),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns its exit code; 2 where the command line is wrong, as argparse has it."""
    argv = sys.argv[1:] if argv is None else list(argv)
    width = max(map(len, COMMANDS)) + 2
    parser = argparse.ArgumentParser(
        prog="pycomm",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="pycomm [--version] <command> ...",
        description="Communication for distributed training.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}{command.help}" for name, command in COMMANDS.items())
        + "\n\n`pycomm <command> --help` describes one of them.",
    )
    parser.add_argument("--version", action="version", version=f"pycomm {__version__}")
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS)
    name = parser.parse_args(argv[:1]).command
    if name is None:
        parser.print_help()
        return 2
    try:
        return COMMANDS[name].run(argv[1:])
    except (PycommError, OSError) as error:
        print(f"pycomm {name}: error: {error}", file=sys.stderr)
        return 2
