"""What the trainer refuses: each message states the fact, both sides of it, and what to do."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A run that cannot start or go on, for a reason that its user can remove. said_by: the rank that says it for all
    that raise it; None where others may not know of it."""

    said_by: int | None = None


class ConfigError(TrainingError, ValueError):
    """A preset, key or value that does not exist or does not fit the others."""


class DataError(TrainingError):
    """Training data that is missing, empty, too small or not what it says it is."""


class CheckpointError(TrainingError):
    """A checkpoint that is damaged, incomplete, or of another model."""


class DivergenceError(TrainingError):
    """The loss or the gradient is no longer a finite number."""


def common(error: TrainingError, said_by: int = 0) -> TrainingError:
    """The error, as one that several ranks raise with the same words."""
    error.said_by = said_by
    return error


BY_NAME = {kind.__name__: kind for kind in (TrainingError, ConfigError, DataError, CheckpointError, DivergenceError)}
