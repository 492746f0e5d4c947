"""A checkpoint's folder, as one rank writes and reads it: all at once or not, and checked before it is used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from training.config import Config
from training.errors import CheckpointError, DataError
from training.model_config import ModelConfig

_FORMAT = 1
_STATE = "state.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps done, the number of the next training sequence, and updates done."""

    step: int = 0
    position: int = 0
    updates: int = 0  # fewer than steps where gradients are applied late


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run. A folder that has its final name is complete."""
    return max(_complete(run_dir), default=None)


def _complete(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step_*"))


def write(config: Config, files: dict[str, dict[str, Tensor]], progress: Progress) -> None:
    """Writes a checkpoint from whole tensors by file (PARAMETERS, each of MOMENTS) and name, on one rank."""
    writer = Writer(config, progress, {})
    if writer.begin():
        for file, tensors in files.items():
            writer.add(file, tensors)
        writer.finish()


class Writer:
    """A checkpoint in the making, on one rank. Each call raises CheckpointError, after which nothing of it is left."""

    def __init__(self, config: Config, progress: Progress, more: dict[str, Any]) -> None:
        """more: of state.json."""
        self._config = config
        self._state = {"format": _FORMAT, **dataclasses.asdict(progress), **more, "config": dataclasses.asdict(config)}
        self._folder = config.run_dir / "checkpoints"
        self._final = self._folder / f"step_{progress.step:08d}"
        self._temporary = self._folder / f".{self._final.name}"
        self._checksums: dict[str, dict[str, Any]] = {}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self._temporary, ignore_errors=True)
            raise CheckpointError(
                f"cannot write the checkpoint {self._final}: {error}; nothing of it was kept"
            ) from error

    def begin(self) -> bool:
        """False where it is written already."""
        if self._final.exists():
            return False
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(".step_*"):
                shutil.rmtree(leftover)
            self._temporary.mkdir()
        return True

    def add(self, file: str, tensors: dict[str, Tensor]) -> None:
        path = self._temporary / f"{file}.safetensors"
        with self._writing():
            save_file(tensors, path)
            _flush(path)
            self._checksums[path.name] = {"nbytes": path.stat().st_size, "sha256": _sha256(path)}

    def finish(self) -> None:
        """The checkpoint is there, and older ones go."""
        with self._writing():
            (self._temporary / _STATE).write_text(json.dumps({**self._state, "files": self._checksums}, indent=1))
            _flush(self._temporary / _STATE)
            _flush(self._temporary)
            self._temporary.rename(self._final)
            _flush(self._folder)
            for old in _complete(self._config.run_dir)[: -self._config.train.keep_checkpoints]:
                shutil.rmtree(old)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json, after every file was compared with its size and checksum. Raises CheckpointError."""
    state = read_json(folder)
    try:
        for name, expected in state["files"].items():
            nbytes = (folder / name).stat().st_size
            if nbytes != expected["nbytes"]:
                raise CheckpointError(_damaged(folder / name, f"it has {nbytes} bytes instead of {expected['nbytes']}"))
            if _sha256(folder / name) != expected["sha256"]:
                raise CheckpointError(_damaged(folder / name, "its checksum is not the one it was written with"))
    except OSError as error:
        raise CheckpointError(_damaged(folder, f"{error.strerror}: {error.filename}")) from error
    return state


def read_json(folder: Path) -> dict[str, Any]:
    """state.json as it was written. Raises CheckpointError where it is not, or of another format."""
    try:
        state: dict[str, Any] = json.loads((folder / _STATE).read_text())
        if state["format"] != _FORMAT:
            raise CheckpointError(f"{folder} has checkpoint format {state['format']}, this program reads {_FORMAT}")
        for key in ("step", "position", "config", "files"):
            state[key]
    except OSError as error:
        raise CheckpointError(_damaged(folder, f"{error.strerror}: {error.filename}")) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(_damaged(folder / _STATE, f"it is not what was written ({error!r})")) from error
    return state


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged: {why}; delete its checkpoint folder to go on from the one before"


def stored_model(folder: Path, state: dict[str, Any]) -> ModelConfig:
    """The model that a checkpoint holds. Raises CheckpointError where this program's models have other fields."""
    try:
        return ModelConfig(**state["config"]["model"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} describes a model that this program does not know: {error}") from error


def changed_since(folder: Path, config: Config) -> list[str]:
    """What a run's configuration says otherwise than the one a checkpoint was written with, in words."""
    stored, now = read_json(folder)["config"], dataclasses.asdict(config)
    return [
        f"{table}.{key} was {stored[table][key]!r}, is {value!r}"
        for table, values in now.items()
        if isinstance(values, dict) and table in stored
        for key, value in values.items()
        if key in stored[table] and stored[table][key] != value
    ]


def require_same_data(folder: Path, config: Config, fingerprint: int) -> None:
    """Raises DataError where a checkpoint's run read other tokens with the same [data]. fingerprint: those of now."""
    state = read_json(folder)
    told = state["config"].get("data") != dataclasses.asdict(config.data)  # changed_since() says so
    if told or state.get("data", fingerprint) == fingerprint:
        return
    paths = ", ".join(config.data.mix) or config.data.path
    raise DataError(
        f"{paths!r} holds other tokens than when {folder} was written, so the windows from there on would be others: "
        "bring those files back (for 'stdlib': that Python version), or give the new ones another data.path"
    )
