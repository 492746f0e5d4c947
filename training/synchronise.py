"""When ranks agree: at every step (here), by exchanges of parameters (outer.py), or of gradients some steps late
(stale.py). What is the same in all of them, trainer.py and checkpoint.py call through Synchronous."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from training.optimizer import MOMENTS, PARAMETERS


class Synchronous:
    """One worker: gradients are summed over all ranks before each update. The others override what they do otherwise.

    Steps are counted from 1. files: a checkpoint's file to the kind of the optimizer's state in it, alike in every
    worker; worker_files: those of which each worker has its own."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {kind: kind for kind in (PARAMETERS, *MOMENTS)}
        self.worker_files: dict[str, str] = {}

    @property
    def residuals(self) -> dict[str, Tensor]:
        """What coding lost on this rank in exchanges between workers, to be added to the next ones."""
        return {}

    def reduce(self, step: int) -> bool:
        """Between a step's backward and its update: the gradients are those to update with; False for no update."""
        return True

    def updated(self, step: int) -> None:
        """After a step's update."""

    def meets(self, step: int) -> bool:
        """Whether all workers wait for each other in this step: then they agree whether to stop."""
        return True

    @contextmanager
    def shared_parameters(self) -> Iterator[None]:
        """Within it the model is the one that all workers agree on."""
        yield

    # Checkpoints: pack(), files are written, release(); expect(), files are read, unpack().

    def pack(self) -> dict[str, Any]:
        """Puts what is under way into the optimizer's state and files; what else is to be known of it, as JSON."""
        return {}

    def release(self) -> None:
        """Takes away what pack() or expect() added."""

    def expect(self, packed: dict[str, Any]) -> None:
        """Makes room for what pack() added in the run that was saved; of another method it is left out."""

    def unpack(self) -> None:
        """Goes on with what expect() made room for."""
