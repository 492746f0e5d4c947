"""`pycomm topo`: a job's topology as a tree and, measured, as matrices; as text and as a picture."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pycomm.agreement import with_switches
from pycomm.discover import Survey, survey
from pycomm.errors import InvalidArgument, PycommError
from pycomm.explain import count_of, format_s
from pycomm.group import init
from pycomm.hosts import Host, Link
from pycomm.launch.started import join_job
from pycomm.measure import Links, Matrix, measure_links, measured_topology, slow_paths
from pycomm.topology import Topology
from pycomm.tune import add_layout, relaunch

LARGEST_MATRIX = 16  # ranks that are shown one by one


@dataclass(frozen=True)
class Node:
    """One line of the tree, and what hangs below it."""

    text: str
    below: list[Node] = field(default_factory=list)

    def lines(self, first: str = "", rest: str = "") -> list[str]:
        found = [first + self.text]
        for node in self.below:
            last = node is self.below[-1]
            found += node.lines(rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))
        return found


def tree(topology: Topology, found: Survey | None = None) -> Node:
    """Switches, hosts, NUMA nodes, NICs, GPUs and ranks. found: what discovery adds to the topology's own figures."""
    root = Node(f"{count_of(topology.n_ranks, 'rank')}, {count_of(len(topology.hosts), 'host')}")
    nodes: dict[str | None, Node] = {None: root}
    for switch in topology.switches:
        nodes[switch.name] = Node(f"switch {switch.name}: uplink {_link(switch.uplink)}")
    for switch in topology.switches:
        nodes[switch.parent].below.append(nodes[switch.name])
    for index, host in enumerate(topology.hosts):
        nodes[host.switch].below.append(_host(host, index, found))
    root.below.append(Node(f"inside hosts: {_link(topology.inside)}; sums at {_bytes(topology.reduce_bytes_per_s)}"))
    return root


def _host(host: Host, index: int, found: Survey | None) -> Node:
    node = Node(f"host {host.name}: {_ranks(host.ranks)}")
    machine = found.machine_of(index) if found else None
    if machine:
        n_cores = sum(len(cores) for _, cores in machine.numa) or len(machine.cores)
        node.below.append(
            Node(
                f"{machine.cpu}, {count_of(n_cores, 'core')}, {count_of(len(machine.numa), 'NUMA node')}, "
                f"{machine.host_name}, boot {machine.boot_id[:8]}, net {machine.network_namespace}, "
                f"ipc {machine.ipc_namespace}"
            )
        )
    for nic in host.nics:
        seen = [one for one in machine.interfaces if one.name == nic.name] if machine else []
        at = f" ({seen[0].driver}, {', '.join(seen[0].addresses)})" if seen else ""
        node.below.append(Node(f"NIC {nic.name}{at}: {_link(nic.link)}"))
    if machine:
        others = [one.name for one in machine.interfaces if one.name not in {nic.name for nic in host.nics}]
        if others:
            node.below.append(Node(f"not used by this job: {', '.join(others)}"))
    for number, ranks in enumerate(host.numa):
        node.below.append(Node(f"NUMA {number}: {_ranks(ranks)}"))
    for gpu in found.gpus[index] if found else ():
        peers = f"P2P with {_list(gpu.peers)}" if gpu.peers else "no P2P"
        node.below.append(Node(f"GPU {gpu.index}: {gpu.name}, {gpu.nvlinks} NVLinks, {peers}"))
    return node


def matrices(topology: Topology, links: Links) -> str:
    """The measured figures as tables: by rank for small groups, by host for all."""
    parts = []
    if topology.n_ranks <= LARGEST_MATRIX:
        ranks = [str(rank) for rank in range(topology.n_ranks)]
        parts.append(_matrix("one way of 8 bytes, us, from rank (row) to rank", ranks, links.latency_s * 1e6))
        parts.append(_matrix("one transfer at a time, Gbit/s", ranks, links.bytes_per_s * 8 / 1e9))
    if len(topology.hosts) > 1:
        hosts = [host.name for host in topology.hosts]
        together = links.host_bytes_per_s * 8 / 1e9
        parts.append(_matrix("hosts, both ways at once, Gbit/s", hosts, together))
    return "\n\n".join(parts)


def draw(path: Path, topology: Topology, links: Links | None) -> None:
    """The tree, and beside it the matrix of rates where measured. Raises PycommError without matplotlib, and where the
    file cannot be written."""
    figure = picture(topology, links)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise PycommError(f"cannot write the picture {path}: {error}") from error


def picture(topology: Topology, links: Links | None) -> Any:
    """What draw() writes, as a matplotlib Figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PycommError(f"--png needs matplotlib ({error}); pip install 'pycomm[bench]'") from error
    boxes = [_nic_lines(host) for host in topology.hosts]
    # What the widest and the highest box of 8 point letters take, so that none covers another.
    column = max(1.6, 0.075 * max(len(line) for lines in boxes for line in lines))
    row = max(0.45, 0.17 * max(map(len, boxes)) + 0.2)
    widths = [column * (topology.above.shape[1] + 3), *([] if links is None else [7.0])]
    figure = Figure(figsize=(sum(widths), max(4.0, row * topology.n_ranks)), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    _draw_tree(axes[0], topology)
    if links is not None:
        by_rank = topology.n_ranks <= LARGEST_MATRIX
        rates = links.bytes_per_s if by_rank else links.host_bytes_per_s
        names = [str(rank) for rank in range(len(rates))] if by_rank else [host.name for host in topology.hosts]
        _draw_matrix(axes[1], names, rates * 8 / 1e9, "rank" if by_rank else "host")
    return figure


def _draw_tree(axes: Any, topology: Topology) -> None:
    """Switches left of what hangs below them, one row for each rank."""
    depth = topology.above.shape[1]
    row_of: dict[int, float] = {}
    row = 0
    for host in topology.hosts_in_order():
        ranks = topology.hosts[host].ranks
        for rank in ranks:
            _box(axes, depth + 1, row, f"rank {rank}")
            row_of[rank] = row
            row += 1
        middle = float(np.mean([row_of[rank] for rank in ranks]))
        for rank in ranks:
            axes.plot([depth, depth + 1], [middle, row_of[rank]], color="0.7", zorder=1)
        _box(axes, depth, middle, "\n".join(_nic_lines(topology.hosts[host])))
    rows = {index: float(np.mean([row_of[r] for r in host.ranks])) for index, host in enumerate(topology.hosts)}
    for index, host_row in rows.items():
        chain = [int(position) for position in topology.above[index] if position >= 0]
        places = [(-1.0, (row - 1) / 2)]
        for level, position in enumerate(chain):
            below = [rows[other] for other in rows if position in topology.above[other]]
            places.append((float(level), float(np.mean(below))))
            switch = topology.switches[position]
            _box(axes, *places[-1], f"{switch.name}\n{_link(switch.uplink)}")
        places.append((float(depth), host_row))
        axes.plot([x for x, _ in places], [y for _, y in places], color="0.7", zorder=1)
    _box(axes, -1, (row - 1) / 2, "core")
    axes.set(xlim=(-1.5, depth + 1.5), ylim=(row - 0.5, -0.5), title=f"{topology.n_ranks} ranks")
    axes.axis("off")


def _nic_lines(host: Host) -> list[str]:
    """What is in a host's box: NICs that are alike in one line, with their rate together, others one by one."""
    if len({nic.link for nic in host.nics}) > 1:
        return [host.name, *(f"{nic.name}: {_link(nic.link)}" for nic in host.nics)]
    return [host.name, f"{'+'.join(nic.name for nic in host.nics)}: {_link(host.nic)}"]


def _box(axes: Any, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox={"boxstyle": "round", "fc": "white", "ec": "0.4"})


def _draw_matrix(axes: Any, names: list[str], values: Matrix, what: str) -> None:
    image = axes.imshow(values, cmap="viridis")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = "black" if image.norm(value) > 0.6 else "white"  # the colour map's upper end is bright
            axes.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=7, color=ink)
    axes.set(xticks=range(len(names)), yticks=range(len(names)), xlabel=f"to {what}", ylabel=f"from {what}")
    axes.set_xticklabels(names)
    axes.set_yticklabels(names)
    axes.set_title("measured, Gbit/s")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)


def _matrix(title: str, names: list[str], values: Matrix) -> str:
    cells = [["", *names]]
    for name, row in zip(names, values, strict=True):
        cells.append([name, *("-" if np.isnan(value) else f"{value:.3g}" for value in row)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _link(link: Link) -> str:
    return f"{_bytes(link.bytes_per_s)}, {format_s(link.latency_s)}"


def _bytes(bytes_per_s: float) -> str:
    bits = bytes_per_s * 8
    return f"{bits / 1e9:.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mbit/s"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'' if len(ranks) == 1 else 's'} {_list(ranks)}"


def _list(ranks: Sequence[int]) -> str:
    """ "0-3, 8"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# The command


def main(argv: Sequence[str]) -> int:
    """`pycomm topo`: returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="pycomm topo",
        description="Hosts, NICs, NUMA nodes, GPUs and ranks of a job; what could not be found out is said.",
        epilog="Under `pycomm launch`, torchrun or srun it shows that job; with --hosts or --ranks it starts its own "
        "ranks; with neither it shows this machine.",
    )
    add_layout(parser)
    parser.add_argument("--topology", type=Path, metavar="FILE", help="show a topology in TOML instead")
    parser.add_argument("--measure", action="store_true", help="measure latency and rate of links, pair by pair")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the topology, measured or not, as TOML")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it (needs matplotlib)")
    options = parser.parse_args(argv)
    starts = (options.ranks, options.hosts, options.ranks_per_host) != (None, None, None)
    if options.topology is not None:
        if starts or options.measure:
            parser.error("--topology describes the ranks already; leave --hosts, --ranks and --measure out")
        topology = Topology.load(options.topology)
        print("\n".join(tree(topology).lines()))
        _write(options, topology, None)
        return 0
    if starts:
        return relaunch("topo", options, _passed_on(options))
    if join_job():
        return _job(options)
    if options.measure:
        raise InvalidArgument(
            "topo --measure needs ranks: give --hosts 2 --ranks-per-host 2, or start it under a launcher"
        )
    found = survey()
    _show(found.topology, found, list(found.unknown))
    _write(options, found.topology, None)
    return 0


def _job(options: argparse.Namespace) -> int:
    """One rank's part; rank 0 speaks."""
    os.environ["PYCOMM_TUNE_FILE"] = ""  # what a table says is not what is found now
    with init() as group:
        found = survey(group)
        topology, unknown, links = with_switches(found.topology, group.topology), list(found.unknown), None
        if options.measure:
            links = measure_links(group, topology, [machine.boot_id for machine in found.machines])
            unknown = [text for text in unknown if "is assumed" not in text] + slow_paths(topology, links)
            topology = measured_topology(topology, links)
        if group.rank == 0:
            _show(topology, found, unknown)
            if links is not None:
                print(f"\n{matrices(topology, links)}")
            _write(options, topology, links)
    return 0


def _show(topology: Topology, found: Survey, unknown: list[str]) -> None:
    print("\n".join(tree(topology, found).lines()))
    if unknown:
        print("\nnot found out:")
        print("\n".join(f"  {text}" for text in unknown))


def _write(options: argparse.Namespace, topology: Topology, links: Links | None) -> None:
    if options.save is not None:
        topology.save(options.save)
        print(f"\nsaved to {options.save}")
    if options.png is not None:
        draw(options.png, topology, links)
        print(f"drawn in {options.png}")


def _passed_on(options: argparse.Namespace) -> list[str]:
    arguments = ["--measure"] if options.measure else []
    for name in ("save", "png"):
        if (path := getattr(options, name)) is not None:
            arguments += [f"--{name}", str(path.absolute())]
    return arguments
