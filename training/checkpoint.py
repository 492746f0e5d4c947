"""Checkpoints: whole tensors in safetensors files, so that a run resumes in any layout, and appears all at once or not.

    <run>/checkpoints/step_00000200/parameters.safetensors      fp32 masters
                                    exp_avg.safetensors         AdamW's moments
                                    exp_avg_sq.safetensors
                                    state.json                  step, position in the data, config, checksums

Rank 0 writes into a hidden folder, flushes it to the disk and renames it; rank 0 reads and broadcasts, so other hosts
need not see the disk. Training draws no random numbers after the initialisation but the data's order, a function of
seed and position: what is stored is all there is to a bit-equal continuation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.config import Config, stages_of
from training.errors import CheckpointError
from training.mesh import SLOW_S, Mesh, on_rank_0
from training.model import specs_of_whole
from training.model_config import ModelConfig
from training.optimizer import MOMENTS, PARAMETERS, Optimizer
from training.sharding import gather_to_leader, shard

_FORMAT = 1
_STATE = "state.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: updates done, and the number of the next training sequence."""

    step: int = 0
    position: int = 0


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run. A folder that has its final name is complete."""
    return max(_complete(run_dir), default=None)


def find(run_dir: Path, mesh: Mesh) -> Path | None:
    """latest(), as rank 0 sees the disk, on every rank."""

    def look() -> str | None:
        newest = latest(run_dir)
        return None if newest is None else str(newest)

    found = on_rank_0(mesh.world, look)
    return found and Path(found)


def _complete(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step_*"))


def save(config: Config, mesh: Mesh, optimizer: Optimizer, progress: Progress) -> None:
    """Writes a checkpoint of all ranks, together; older ones beyond keep_checkpoints go. Raises CheckpointError."""
    files = {kind: whole_tensors(kind, config, mesh, optimizer) for kind in (PARAMETERS, *MOMENTS)}
    on_rank_0(mesh.world, lambda: write(config, files, progress))


def whole_tensors(kind: str, config: Config, mesh: Mesh, optimizer: Optimizer) -> dict[str, Tensor]:
    """PARAMETERS, or one of MOMENTS, of the whole model by name on rank 0, {} elsewhere. All ranks together."""
    found: dict[str, Tensor] = {}
    own = {}
    for name, piece in optimizer.pieces(kind):
        whole = gather_to_leader(piece, optimizer.specs[name], mesh)
        if whole is not None:
            own[name] = whole.clone(memory_format=torch.contiguous_format)  # of its own memory, not a view
    stages = stages_of(config)
    for tag, (name, spec) in enumerate(specs_of_whole(config.model, mesh).items()):
        owner = mesh.leader(stages.ranks_of(name)[0])
        if mesh.world.rank == 0:
            found[name] = own[name] if owner == 0 else torch.empty(spec.shape)
            if owner:
                mesh.world.recv(found[name], owner, tag).wait(SLOW_S)
        elif mesh.world.rank == owner:
            mesh.world.send(own[name], 0, tag).wait(SLOW_S)
    return found


def write(config: Config, files: dict[str, dict[str, Tensor]], progress: Progress) -> None:
    """Writes a checkpoint from whole tensors by file (PARAMETERS, each of MOMENTS) and name, on one rank."""
    folder = config.run_dir / "checkpoints"
    final = folder / f"step_{progress.step:08d}"
    if final.exists():
        return
    temporary = folder / f".{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step_*"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        checksums = {}
        for kind, tensors in files.items():
            path = temporary / f"{kind}.safetensors"
            save_file(tensors, path)
            _flush(path)
            checksums[path.name] = {"nbytes": path.stat().st_size, "sha256": _sha256(path)}
        state = {
            "format": _FORMAT,
            **dataclasses.asdict(progress),
            "config": dataclasses.asdict(config),
            "files": checksums,
        }
        (temporary / _STATE).write_text(json.dumps(state, indent=1))
        _flush(temporary / _STATE)
        _flush(temporary)
        temporary.rename(final)
        _flush(folder)
        for old in _complete(config.run_dir)[: -config.train.keep_checkpoints]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"cannot write the checkpoint {final}: {error}; nothing of it was kept") from error


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
    state = _read_json(folder)
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


def _read_json(folder: Path) -> dict[str, Any]:
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


def require_same_model(config: Config, mesh: Mesh) -> None:
    """Raises CheckpointError on every rank where the run's newest checkpoint is of another model. It reads state.json
    alone, so that it can stand before anything is allocated."""

    def check() -> None:
        folder = latest(config.run_dir)
        if folder is not None:
            _refuse_another_model(folder, _read_json(folder), config)

    on_rank_0(mesh.world, check)


def _refuse_another_model(folder: Path, state: dict[str, Any], config: Config) -> None:
    stored, wanted = dataclasses.asdict(stored_model(folder, state)), dataclasses.asdict(config.model)
    differing = [
        f"{key} is {stored[key]!r} there and {wanted[key]!r} here"
        for key in sorted(wanted)
        if stored[key] != wanted[key]
    ]
    if differing:
        raise CheckpointError(
            f"{folder} is of another model: {'; '.join(differing)}; choose another name for this run, or that model"
        )


def changed_since(folder: Path, config: Config) -> list[str]:
    """What a run's configuration says otherwise than the one a checkpoint was written with, in words."""
    stored, now = _read_json(folder)["config"], dataclasses.asdict(config)
    return [
        f"{table}.{key} was {stored[table][key]!r}, is {value!r}"
        for table, values in now.items()
        if isinstance(values, dict) and table in stored
        for key, value in values.items()
        if key in stored[table] and stored[table][key] != value
    ]


def load(folder: Path, config: Config, mesh: Mesh, optimizer: Optimizer) -> Progress:
    """Fills parameters and moments from a checkpoint on all ranks, together, and says how far it was.

    Raises CheckpointError on every rank for a damaged checkpoint, or one of another model."""

    def check() -> dict[str, int]:
        state = read_state(folder)
        _refuse_another_model(folder, state, config)
        return {"step": state["step"], "position": state["position"]}

    progress = Progress(**on_rank_0(mesh.world, check))
    for kind in (PARAMETERS, *MOMENTS):
        file = safe_open(folder / f"{kind}.safetensors", "pt") if mesh.world.rank == 0 else None
        for name, whole_spec in specs_of_whole(config.model, mesh).items():
            whole = file.get_tensor(name) if file is not None else torch.empty(whole_spec.shape)
            mesh.world.broadcast(whole, 0)
            if name in optimizer.specs:
                optimizer.put(kind, name, shard(whole, optimizer.specs[name], mesh))
    optimizer.set_steps(progress.step)
    optimizer.publish()
    return progress
