"""`pycomm bench`: the command line, on a rank of a job or alone, where it starts its own ranks."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pycomm.bench.job import Interrupt, first_word
from pycomm.bench.options import Work, parser, work
from pycomm.bench.plot import plot, require_matplotlib
from pycomm.errors import InvalidArgument, PycommError
from pycomm.launch.started import join_job

if TYPE_CHECKING:
    from pycomm.bench.cases import Case
    from pycomm.bench.measure import Row, Session
    from pycomm.bench.progress import Progress

RECORD: Final = "PYCOMM_BENCH_RECORD"  # where ranks that this command started leave their record for it to compare
_GRACE_S: Final = 60.0  # from Ctrl-C until ranks that this command started are killed: a block may take long
REGRESSION, REFUSED, WRONG = 1, 2, 3  # exit codes


def main(argv: Sequence[str]) -> int:
    """`pycomm bench`: returns the exit code. Raises PycommError for what the command line or the job lacks."""
    options = parser().parse_args(argv)
    if join_job():
        if (options.ranks, options.hosts, options.ranks_per_host) != (None, None, None):
            raise InvalidArgument("a launcher has started the ranks already; leave --ranks and --hosts out")
        return _rank(options, argv)
    return _alone(options, argv)


def _alone(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Starts the ranks, as `pycomm launch` does, and compares what they measured."""
    from pycomm import launch
    from pycomm.bench.record import load

    old = _prepared(options)
    layout = (options.ranks, options.hosts, options.ranks_per_host)
    ranks_per_host = launch.parse_layout(*(layout if layout != (None, None, None) else (2, None, None)))
    all_places = launch.places(ranks_per_host)
    first_remote = ranks_per_host[0] if len(ranks_per_host) > 1 else None
    work(options, len(all_places), first_remote)  # what is wrong is said once, before any rank starts
    command = ["-m", "pycomm", "bench", *_without_layout(argv)]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        os.environ[RECORD] = str(record)
        try:
            code = launch.launch(command, ranks_per_host, output="rank0", grace_s=_GRACE_S)
        finally:
            del os.environ[RECORD]
        if old is not None and record.exists():
            return _compared(old, load(record), options.noise, code)
    return code


def _prepared(options: argparse.Namespace) -> dict[str, Any] | None:
    """The record of --compare, if any, before anything is measured, by the one process that uses it and writes files.

    Raises InvalidArgument where it cannot be read, or where what is measured could not be written."""
    from pycomm.bench.record import load

    if options.png is not None:
        require_matplotlib()
    for path in filter(None, (options.json, options.csv, options.png)):
        if not path.absolute().parent.is_dir():
            raise InvalidArgument(f"the folder of {path} does not exist; make it first")
    return load(options.compare) if options.compare is not None else None


def _without_layout(argv: Sequence[str]) -> list[str]:
    """The arguments for the ranks: what says how many of them there are is left out."""
    layout = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--ranks", "--hosts", "--ranks-per-host"):
        layout.add_argument(name)
    return layout.parse_known_args(argv)[1]


def _compared(old: dict[str, Any], new: dict[str, Any], noise: float, code: int) -> int:
    """Prints what became slower; the exit code, which is `code` where that is not 0.

    Raises InvalidArgument where it is 0 and no row can be compared."""
    from pycomm.bench.record import compare

    try:
        regressions, notes = compare(old, new, noise)
    except InvalidArgument as error:
        if code == 0:
            raise
        print(f"# compare: {error}", flush=True)
        return code
    for note in notes:
        print(f"# compare: {note}")
    for line in regressions:
        print(f"# regression: {line}")
    print(f"# compare: {len(regressions)} regression(s) beyond {noise:.0%}", flush=True)
    return code or (REGRESSION if regressions else 0)


def _rank(options: argparse.Namespace, argv: Sequence[str]) -> int:
    try:
        import torch
    except ImportError as error:
        raise PycommError(f"a rank of pycomm bench needs torch, which {sys.executable} has not ({error})") from error

    import pycomm
    from pycomm.bench.baselines import open_libraries
    from pycomm.bench.measure import Effort, Session
    from pycomm.bench.record import machine
    from pycomm.bench.roofline import measure_links

    about: dict[str, Any] = {"command": ["pycomm", "bench", *argv], "machine": machine()}
    torch.set_num_threads(1)
    with Interrupt() as interrupt, pycomm.init(timeout_s=options.timeout) as group:
        remote = [rank for rank in range(group.size) if group.host_ids[rank] != group.host_ids[0]]
        asked = work(options, group.size, remote[0] if remote else None)
        control = group.new_group(range(group.size), name="control")
        assert control is not None
        old, problem = None, ""
        if group.rank == 0 and RECORD not in os.environ:
            try:
                old = _prepared(options)
            except InvalidArgument as error:
                problem = str(error)
        if problem := first_word(control, problem):
            raise InvalidArgument(problem)
        libraries, unavailable = open_libraries(group, control, asked.baselines, options)
        try:
            effort = Effort(options.iters, options.warmup_iters, options.check)
            session = Session(group, control, libraries, effort, measure_links(control), interrupt)
            rows = run(session, asked, unavailable)
            code = interrupt.exit_code if session.stopped else WRONG if any(row.wrong for row in rows) else 0
            if group.rank == 0:
                try:
                    code = _finish(options, session, rows, about | {"unavailable": unavailable}, old, code)
                except (PycommError, OSError, ValueError) as error:  # the others wait for the code
                    print(f"pycomm bench: error: {error}", file=sys.stderr, flush=True)
                    code = code or REFUSED
            code = int(session.agree(code)[0])
        finally:
            for library in libraries:
                library.close()
            if torch.distributed.is_initialized():  # Gloo's threads, or one of them may abort the process as it ends
                torch.distributed.destroy_process_group()
    return interrupt.exit_code if interrupt() else code


def run(session: Session, asked: Work, unavailable: dict[str, str]) -> list[Row]:
    """Measures everything, printing on rank 0 as it comes, until it is done or stopped."""
    from pycomm.bench.progress import Progress
    from pycomm.bench.report import LEGEND, Table, matrix

    group = session.group
    baselines = [library.name for library in session.libraries[1:]]
    table = Table(baselines)
    progress = Progress(len(asked.sweep) + sum(map(len, asked.matrices)), group.rank == 0)
    rows: list[Row] = []
    try:
        progress.print(*_preface(session, baselines, unavailable), *LEGEND)
        heading: list[str] = []
        for case in asked.sweep:
            if session.stopped:
                break
            if (new := table.heading(case)) != heading:
                progress.print(*new)
                heading = new
            row = _measured(session, case, progress)
            if row is not None:
                rows.append(row)
                progress.print(table.row(row))
        for pairs in asked.matrices:
            found = [row for case in pairs if (row := _measured(session, case, progress)) is not None]
            if found:
                progress.print(*matrix(found, group.size))
            swept = {row.case for row in rows}
            rows += [row for row in found if row.case not in swept]
        if session.stopped:
            progress.print("#", "# interrupted: what follows is of the rows above")
        progress.print(*table.footer(rows))
    finally:
        progress.close()
    return rows


def _measured(session: Session, case: Case, progress: Progress) -> Row | None:
    """The case's row; None once the run is stopped."""
    if session.stopped:
        return None
    progress.begin(case.label)
    return session.measure(case)


def _preface(session: Session, baselines: Sequence[str], unavailable: dict[str, str]) -> list[str]:
    group = session.group
    hosts = ", ".join(f"{host.name}: {len(host.ranks)}" for host in group.topology.hosts[:8])
    lines = [f"# pycomm bench: {group.size} ranks on {len(group.topology.hosts)} host(s) ({hosts})"]
    if session.link_bytes_per_s is not None:
        rates = ", ".join(f"{rate / 1e9:.3g}" for rate in session.link_bytes_per_s[:8])
        lines.append(f"# links between hosts, plain sockets, into each host: {rates} GB/s")
    for library in session.libraries[1:]:
        version = getattr(library, "version", "")
        lines.append(f"# beside it: {library.name}{f' ({version})' if version else ''}")
    lines += [f"# {name} not available: {why}" for name, why in unavailable.items()]
    return lines


def _finish(
    options: argparse.Namespace,
    session: Session,
    rows: Sequence[Row],
    about: dict[str, Any],
    old: dict[str, Any] | None,
    code: int,
) -> int:
    """Writes the files, also of what was interrupted, and compares; the exit code, `code` where that is not 0."""
    from pycomm import __version__
    from pycomm.bench.record import full_record, write_csv, write_json

    rates = session.link_bytes_per_s
    about = about | {
        "pycomm": __version__,
        "n_ranks": session.group.size,
        "host_ids": list(session.group.host_ids),
        "link_bytes_per_s": None if rates is None else [float(rate) for rate in rates],
        "interrupted": session.stopped,
    }
    record = full_record(rows, about)
    outputs = [(options.json, write_json), (options.csv, write_csv)]
    if os.environ.get(RECORD):
        outputs.append((Path(os.environ[RECORD]), write_json))
    for path, write in outputs:
        if path is not None:
            write(path, record)
    if options.png is not None and rows:
        plot(record, options.png)
    for path in filter(None, (options.json, options.csv, options.png)):
        print(f"# written: {path}", flush=True)
    return _compared(old, record, options.noise, code) if old is not None else code
