"""Which libraries of --vs every rank of the job has, and of the others why not."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

from pycomm.bench import libraries, mpi
from pycomm.bench.job import first_word
from pycomm.group import Group


def open_libraries(
    group: Group, control: Group, baselines: Sequence[str], options: argparse.Namespace
) -> tuple[list[libraries.Library], dict[str, str]]:
    """pycomm, and of the baselines those that every rank has; of the others, why not. All ranks together."""
    python, timeout_s = options.mpi_python, options.timeout
    mpiexec = options.mpiexec or mpi.default_mpiexec(python)
    companion = not mpi.started_by_mpi(os.environ)
    refusals: dict[str, Callable[[], str]] = {
        "gloo": lambda: "",
        "nccl": lambda: libraries.nccl_refusal(group),
        "mpi": lambda: mpi.mpi_refusal(group, mpiexec, python, timeout_s) if companion else "",
    }
    openers: dict[str, Callable[[], libraries.Library]] = {
        "gloo": lambda: libraries.open_gloo(group, timeout_s),
        "nccl": lambda: libraries.open_nccl(group, timeout_s),
        "mpi": lambda: mpi.open_mpi(group, timeout_s, mpiexec, python),
    }
    opened: list[libraries.Library] = [libraries.Pycomm(group)]
    unavailable: dict[str, str] = {}
    for name in baselines:
        library: libraries.Library | None = None
        try:
            problem = refusals[name]()
        except Exception as error:  # whatever a foreign library raises, it is not there
            problem = _text(error)
        why = first_word(control, problem)
        if not why:
            try:
                library = openers[name]()
            except Exception as error:
                problem = _text(error)
            why = first_word(control, problem)
        if why:
            unavailable[name] = why
            if library is not None:
                library.close()
        elif library is not None:
            opened.append(library)
    return opened, unavailable


def _text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
