"""The options of `pycomm bench`, and the work that they ask for."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pycomm.bench.cases import (
    DTYPE_ALIASES,
    DTYPES,
    EVERY,
    OP_ALIASES,
    OPS,
    PAIRS,
    WORDS,
    Case,
    Moe,
    cases,
    chosen,
    ladder,
    unit_nbytes,
)
from pycomm.errors import InvalidArgument
from pycomm.explain import parse_nbytes
from pycomm.launch.seconds import require_seconds

BASELINES: Final = ("gloo", "mpi", "nccl")
_DEFAULT_END: Final = 64 << 20


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="pycomm bench",
        allow_abbrev=False,
        description="What collectives cost here: nccl-tests' columns and options, tails, the algorithm and its reason, "
        "the share of the measured roofline, other libraries in turns. Every result is verified.",
        epilog="Under torchrun, srun, mpiexec or `pycomm launch` it is one rank of their job; alone it starts its own "
        "(--ranks, --hosts). exit code: 0; 1 a regression (--compare); 2 a wrong command line; 3 wrong elements; 130 "
        "Ctrl-C, which keeps what was measured.",
    )
    add = made.add_argument
    add("collective", help=f"one or several, separated by commas: {', '.join([*EVERY, *WORDS])}")
    add("-b", "--minbytes", metavar="SIZE", help="smallest size (default: 8 bytes, or the least that divides)")
    add("-e", "--maxbytes", metavar="SIZE", help="largest size (default: 64M, or -b)")
    add("-f", "--stepfactor", type=int, metavar="F", help="factor between sizes (default 2)")
    add("-i", "--stepbytes", metavar="SIZE", help="step between sizes, instead of -f")
    add("-d", "--dtype", "--datatype", default="float32", help="types, separated by commas, or all (default float32)")
    add("-o", "--op", default="sum", help=f"reductions, separated by commas: {', '.join(OPS)}, or all (default sum)")
    add("-r", "--root", type=int, default=0, help="of broadcast, reduce, gather and scatter (default 0)")
    add("-n", "--iters", type=int, metavar="N", help="timed calls of each library (default: 0.15 s of them)")
    add("-w", "--warmup-iters", type=int, default=5, metavar="N", help="calls before them (default 5)")
    add("-c", "--check", type=int, default=1, metavar="N", help="verified calls; 0: none (default 1)")
    add("--vs", default="", metavar="LIBRARIES", help=f"beside pycomm, where present: {', '.join(BASELINES)}, or all")
    add("--mpiexec", default="", metavar="CMD", help="starts MPI ranks (default: beside --mpi-python, or on the path)")
    add("--mpi-python", default=sys.executable, metavar="PATH", help="interpreter with its mpi4py (default: this)")
    add("--experts", type=int, metavar="E", help="moe: experts over all ranks (default 2 a rank)")
    add("--top-k", type=int, default=2, metavar="K", help="moe: experts of a token (default 2)")
    add("--hidden", type=int, default=512, metavar="H", help="moe: elements of a token (default 512)")
    add("--json", type=Path, metavar="FILE", help="write the whole record")
    add("--csv", type=Path, metavar="FILE", help="write a line for each row, library and placement")
    add("--png", type=Path, metavar="FILE", help="draw times and bandwidths")
    add("--compare", type=Path, metavar="OLD.json", help="exit with 1 where a median has become slower")
    add("--noise", type=float, default=0.1, metavar="X", help="by how much, as a fraction (default 0.1)")
    add("-T", "--timeout", type=float, default=300.0, metavar="S", help="seconds a call may take (default 300)")
    add("--ranks", type=int, metavar="N", help="alone: ranks on this host (default 2)")
    add("--hosts", metavar="H", help="alone: emulated hosts, a count or the ranks of each, such as 3,1")
    add("--ranks-per-host", type=int, metavar="R", help="alone: ranks on each emulated host")
    return made


@dataclass(frozen=True)
class Work:
    """What a command line asks for: rows to print, and the pairs of ranks of the matrices after them."""

    sweep: list[Case]
    matrices: list[list[Case]]
    baselines: list[str]


def work(options: argparse.Namespace, n_ranks: int, first_remote: int | None) -> Work:
    """first_remote: a rank on another host than rank 0. Raises InvalidArgument for what makes no sense."""
    names = list(
        dict.fromkeys(
            name
            for word in options.collective.split(",")
            for name in WORDS.get(word.strip()) or chosen(word, list(EVERY), {}, "collective", ())
        )
    )
    dtypes = chosen(options.dtype, list(DTYPES), DTYPE_ALIASES, "type", list(DTYPES))
    ops = chosen(options.op, OPS, OP_ALIASES, "reduction", OPS[:5])
    baselines = chosen(options.vs, BASELINES, {}, "library", BASELINES) if options.vs else []
    moe = Moe(2 * n_ranks if options.experts is None else options.experts, options.top_k, options.hidden)
    _require_numbers(options)
    sizes = _sizes(options, [unit_nbytes(name, dtype, n_ranks, moe) for name in names for dtype in dtypes])
    pairs = [(0, 1)] if first_remote in (None, 1) else [(0, 1), (0, first_remote)]
    sweep = cases(names, dtypes, ops, sizes, n_ranks, options.root, pairs, moe)
    every_pair = [(a, b) for a in range(n_ranks) for b in range(a + 1, n_ranks)]
    matrices = [
        cases([name], [dtype], ops, [sizes[0] if name == "latency" else sizes[-1]], n_ranks, 0, every_pair, moe)
        for name in names
        if name in PAIRS and n_ranks > 2
        for dtype in dtypes
    ]
    return Work(sweep, matrices, baselines)


def _require_numbers(options: argparse.Namespace) -> None:
    for name, least in (("iters", 1), ("warmup_iters", 0), ("check", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InvalidArgument(f"--{name.replace('_', '-')} is {value}; give {least} or more")
    if not 0 < options.noise < math.inf:
        raise InvalidArgument(f"--noise is {options.noise}; give a number above 0")
    require_seconds("--timeout", options.timeout)


def _sizes(options: argparse.Namespace, units: Sequence[int]) -> list[int]:
    unit = math.lcm(*units)
    begin = parse_nbytes(options.minbytes) if options.minbytes is not None else -(-8 // unit) * unit
    end = parse_nbytes(options.maxbytes) if options.maxbytes is not None else max(_DEFAULT_END, begin)
    step = parse_nbytes(options.stepbytes) if options.stepbytes is not None else None
    return ladder(begin, end, options.stepfactor, step)
