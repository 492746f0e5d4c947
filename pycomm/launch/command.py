"""`pycomm launch`: the command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pycomm.errors import PycommError
from pycomm.launch import OUTPUTS, launch, parse_layout
from pycomm.launch.job import say
from pycomm.launch.links import parse_links
from pycomm.launch.seconds import require_seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pycomm launch",
        usage="pycomm launch (--ranks N | --hosts H --ranks-per-host R | --hosts N,N,...) [options] [--] command ...",
        description="Run a command once per rank on this machine, with torchrun's environment variables, and end all "
        "ranks together. `python`, `-m module` and `script.py` run in the interpreter that runs pycomm.",
        epilog="exit code: 0 when every rank ended with 0; else that of the rank that failed first (128 + signal where "
        "a signal ended it), whose traceback is shown before the others'; 128 + signal when the launch itself was "
        "ended; 2 when nothing could be started. Ctrl-C and SIGTERM go to every rank; a second one kills them at once.",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks, all on one host")
    parser.add_argument(
        "--hosts",
        metavar="H",
        help="emulated hosts (TCP between them, no shared memory across): a count, or the ranks of each, such as 3,1",
    )
    parser.add_argument("--ranks-per-host", type=int, metavar="R", help="ranks on each emulated host")
    parser.add_argument(
        "--link",
        action="append",
        metavar="[hostN=]RATE[,RATE...]",
        help="each emulated host gets NICs of these rates (kbit, mbit, gbit), such as 200mbit; again with hostN= for "
        "hosts that differ. Needs root, ip and tc: hosts become network namespaces, which see each other and nothing "
        "else; without these, a warning, and links as fast as memory",
    )
    parser.add_argument(
        "--output",
        choices=OUTPUTS,
        default="prefix",
        help="prefix: `[rank]` before every line (default; a single rank writes as it is). "
        "rank0: rank 0 writes to this terminal itself, so that live progress lines work; the others are prefixed",
    )
    parser.add_argument(
        "--log-dir", type=Path, metavar="DIR", help="write what would be prefixed to DIR/rank<r>.log instead"
    )
    parser.add_argument(
        "--master-port", type=int, default=0, metavar="PORT", help="port of rank 0's store (default: a free one)"
    )
    parser.add_argument(
        "--grace", type=float, default=10.0, metavar="S", help="seconds between asking ranks to end and killing them"
    )
    return parser


def _split(argv: Sequence[str]) -> tuple[list[str], Sequence[str]]:
    """Our own options, and the command: what follows `--`, or begins with -m or a word. Each of ours takes a value, and
    is joined with it, so that argparse does not take -1mbit for an option."""
    own: list[str] = []
    i = 0
    while i < len(argv):
        word = argv[i]
        if word == "--":
            return own, argv[i + 1 :]
        if word == "-m" or not word.startswith("-"):
            break
        alone = "=" in word or word in ("-h", "--help") or i + 1 == len(argv)
        own.append(word if alone else f"{word}={argv[i + 1]}")
        i += 1 if alone else 2
    return own, argv[i:]


def main(argv: Sequence[str]) -> int:
    """`pycomm launch`: returns the exit code."""
    own, command = _split(argv)
    options = _parser().parse_args(own)
    try:
        require_seconds("--grace", options.grace, or_zero=True)
        layout = parse_layout(options.ranks, options.hosts, options.ranks_per_host)
        return launch(
            command,
            layout,
            links=parse_links(options.link, len(layout)) if options.link else None,
            output=options.output,
            log_dir=options.log_dir,
            master_port=options.master_port,
            grace_s=options.grace,
        )
    except BrokenPipeError:  # whoever read our output, such as `head`, has had enough; the ranks have been ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush would complain
        return 128 + signal.SIGPIPE
    except (PycommError, OSError) as error:
        say(f"error: {error}")
        return 2
