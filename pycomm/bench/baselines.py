"""Which libraries of --vs every rank of the job has, and of the others why not."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

import numpy as np

from pycomm.bench import libraries, mpi
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
        "mpi": lambda: mpi.mpi_refusal(group, mpiexec, python) if companion else "",
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
        why = _first_word(control, refusals[name]())
        if not why:
            problem = ""
            try:
                library = openers[name]()
            except Exception as error:  # whatever a foreign library raises, it is not there
                problem = str(error) or type(error).__name__
            why = _first_word(control, problem)
        if why:
            unavailable[name] = why
            if library is not None:
                library.close()
        elif library is not None:
            opened.append(library)
    return opened, unavailable


def _first_word(control: Group, word: str) -> str:
    """What the lowest rank that has something to say says, on every rank; "" where none has."""
    width = 400
    mine = np.frombuffer(word.replace("\n", " ").encode()[:width].ljust(width), np.uint8).copy()
    everyone = np.empty(control.size * width, np.uint8)
    control.all_gather(everyone, mine)
    words = [row.tobytes().decode(errors="replace").strip() for row in everyone.reshape(control.size, width)]
    return next(filter(None, words), "")
