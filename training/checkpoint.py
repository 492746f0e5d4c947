"""Checkpoints: whole tensors in safetensors files, so that a run resumes in any layout, and appears all at once or not.

    <run>/checkpoints/step_00000200/parameters.safetensors      fp32 masters
                                    exp_avg.safetensors         AdamW's moments
                                    exp_avg_sq.safetensors
                                    state.json                  step, position in the data and its checksum, last
                                                                losses, config, checksums
and, of runs with [sync] or wires,  worker_00001_….safetensors  what each worker has of its own (outer.py)
                                    outer_….safetensors         the outer optimizer's, and exchanges under way
                                    rank_00003_residuals.…      what coding lost and is yet to be sent

Rank 0 writes into a hidden folder, flushes it to the disk and renames it; rank 0 reads and broadcasts, so other hosts
need not see the disk. Training draws no random numbers after the initialisation but the data's order, a function of
seed and position: what is stored is all there is to a bit-equal continuation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from training.checkpoint_files import Progress, Writer, latest, read_json, read_state, stored_model
from training.config import Config
from training.errors import CheckpointError
from training.layout import stages_of
from training.mesh import Mesh
from training.metered import SLOW_S, on_rank_0
from training.model import specs_of_whole
from training.optimizer import Optimizer
from training.sharding import gather_to_leader, shard
from training.synchronise import Synchronous


def find(run_dir: Path, mesh: Mesh) -> Path | None:
    """latest(), as rank 0 sees the disk, on every rank."""

    def look() -> str | None:
        newest = latest(run_dir)
        return None if newest is None else str(newest)

    found = on_rank_0(mesh.world, look)
    return found and Path(found)


def save(
    config: Config,
    mesh: Mesh,
    optimizer: Optimizer,
    sync: Synchronous,
    progress: Progress,
    data: int,
    recent_losses: Collection[float],
) -> None:
    """Writes a checkpoint of all ranks, together; older ones beyond keep_checkpoints go. data: the corpus's
    fingerprint(). recent_losses: this worker's last ones. Raises CheckpointError."""
    more = {
        "workers": mesh.layout.workers,
        "ranks": _ranks(config, mesh),
        "data": data,
        "recent_losses": _of_workers(mesh, recent_losses),
        "sync": sync.pack(),
    }
    writer = Writer(config, progress, more)
    try:
        if not on_rank_0(mesh.world, writer.begin):
            return
        for file, kind in sync.files.items():
            _add(writer, mesh, file, whole_tensors(kind, config, mesh, optimizer))
        for file, kind in sync.worker_files.items():
            for worker in range(mesh.layout.workers):
                _add(writer, mesh, _of_worker(file, worker), whole_tensors(kind, config, mesh, optimizer, worker))
        own = _residuals(optimizer, sync)
        for rank, numel in enumerate(_every_length(mesh, own)):
            if numel:
                flat = _to_rank_0(mesh, rank, torch.cat([each.flatten() for each in own]).cpu() if own else None, numel)
                _add(writer, mesh, _of_rank(rank), {} if flat is None else {"residuals": flat})
        on_rank_0(mesh.world, writer.finish)
    finally:
        sync.release()


def _of_worker(file: str, worker: int) -> str:
    return f"worker_{worker:05d}_{file}"


def _of_rank(rank: int) -> str:
    return f"rank_{rank:05d}_residuals"


def _add(writer: Writer, mesh: Mesh, file: str, tensors: dict[str, Tensor]) -> None:
    on_rank_0(mesh.world, lambda: writer.add(file, tensors))


def _ranks(config: Config, mesh: Mesh) -> dict[str, Any]:
    """What must be equal for a rank's residuals to be those of the rank of the same number."""
    tables = {name: dataclasses.asdict(getattr(config, name)) for name in ("layout", "wire", "sync")}
    return {"world_size": mesh.world.size, **tables}


def _residuals(optimizer: Optimizer, sync: Synchronous) -> list[Tensor]:
    """What coding lost on this rank and is yet to be sent, in an order that depends on _ranks() alone."""
    return [*optimizer.residuals.values(), *sync.residuals.values()]


def _every_length(mesh: Mesh, tensors: list[Tensor]) -> list[int]:
    lengths = torch.empty(mesh.world.size, dtype=torch.int64)
    mesh.world.all_gather(lengths, torch.tensor([sum(each.numel() for each in tensors)]), timeout_s=SLOW_S)
    return [int(each) for each in lengths]


def _of_workers(mesh: Mesh, losses: Collection[float]) -> list[list[float]]:
    """The losses of each worker, of which there are as many in each."""
    rows = torch.empty(mesh.world.size, len(losses), dtype=torch.float64)
    mesh.world.all_gather(rows, torch.tensor([list(losses)], dtype=torch.float64), timeout_s=SLOW_S)
    return [rows[mesh.leader(0, worker)].tolist() for worker in range(mesh.layout.workers)]


def _to_rank_0(mesh: Mesh, rank: int, flat: Tensor | None, numel: int) -> Tensor | None:
    """flat of a rank on rank 0, None elsewhere."""
    if mesh.world.rank == rank and rank:
        assert flat is not None
        mesh.world.group.send(flat, 0, rank, timeout_s=SLOW_S)
    if mesh.world.rank:
        return None
    if rank:
        flat = torch.empty(numel)
        mesh.world.group.recv(flat, rank, rank, timeout_s=SLOW_S)
    return flat


def whole_tensors(kind: str, config: Config, mesh: Mesh, optimizer: Optimizer, worker: int = 0) -> dict[str, Tensor]:
    """PARAMETERS, or another kind of the optimizer's state, of a worker's whole model by name on rank 0, {} elsewhere.
    All ranks together."""
    found: dict[str, Tensor] = {}
    own = {}
    for name, piece in optimizer.pieces(kind) if mesh.worker_index == worker else ():
        whole = gather_to_leader(piece, optimizer.specs[name], mesh)
        if whole is not None:
            # Of its own memory, not a view.
            own[name] = whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
    stages = stages_of(config)
    for tag, (name, spec) in enumerate(specs_of_whole(config.model, mesh).items()):
        owner = mesh.leader(stages.ranks_of(name)[0], worker)
        if mesh.world.rank == 0:
            found[name] = own[name] if owner == 0 else torch.empty(spec.shape)
            if owner:
                mesh.world.group.recv(found[name], owner, tag, timeout_s=SLOW_S)
        elif mesh.world.rank == owner:
            mesh.world.group.send(own[name], 0, tag, timeout_s=SLOW_S)
    return found


def require_same_model(config: Config, mesh: Mesh) -> None:
    """Raises CheckpointError on every rank where the run's newest checkpoint is of another model. It reads state.json
    alone, so that it can stand before anything is allocated."""

    def check() -> None:
        folder = latest(config.run_dir)
        if folder is not None:
            _refuse_another_model(folder, read_json(folder), config)

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


def load(
    folder: Path, config: Config, mesh: Mesh, optimizer: Optimizer, sync: Synchronous
) -> tuple[Progress, list[float]]:
    """Fills parameters, moments and what [sync] and wires keep from a checkpoint on all ranks, together; how far it
    was, and this worker's last losses then.

    A run of other workers: each goes on from worker (its own number modulo theirs). What the run saved did not have is
    left as it is; residuals of other ranks or settings, and exchanges under way of another method, are lost.
    Raises CheckpointError on every rank for a damaged checkpoint, or one of another model."""

    def check() -> dict[str, Any]:
        state = read_state(folder)
        _refuse_another_model(folder, state, config)
        known = ("step", "position", "updates", "workers", "ranks", "recent_losses", "sync")
        return {"files": list(state["files"]), **{key: state[key] for key in known if key in state}}

    state = on_rank_0(mesh.world, check)
    available = set(state["files"])
    sync.expect(state.get("sync", {}))
    try:
        for file, kind in sync.files.items():
            _read(folder, _first(available, file, _of_worker(file, 0)), kind, config, mesh, optimizer)
        for file, kind in sync.worker_files.items():
            for worker in range(mesh.layout.workers):
                source = _first(available, _of_worker(file, worker % state.get("workers", 1)), file)
                _read(folder, source, kind, config, mesh, optimizer, worker)
        sync.unpack()
    finally:
        sync.release()
    if state.get("ranks") == _ranks(config, mesh):
        _read_residuals(folder, available, mesh, _residuals(optimizer, sync))
    n_updates = state.get("updates", state["step"])
    optimizer.set_steps(n_updates)
    optimizer.publish()
    losses = state.get("recent_losses", [[]])  # checkpoints of before have none
    return Progress(state["step"], state["position"], n_updates), losses[mesh.worker_index % len(losses)]


def _first(available: set[str], *files: str) -> str | None:
    """The first of the files that a checkpoint has."""
    return next((name for file in files if (name := f"{file}.safetensors") in available), None)


def _read(
    folder: Path,
    file_name: str | None,
    kind: str,
    config: Config,
    mesh: Mesh,
    optimizer: Optimizer,
    worker: int | None = None,
) -> None:
    """A kind of the optimizer's state from a file that rank 0 sees; None leaves it. worker: the one that takes it, None
    for every one."""
    if file_name is None:
        return
    file = safe_open(folder / file_name, "pt") if mesh.world.rank == 0 else None
    for name, whole_spec in specs_of_whole(config.model, mesh).items():
        whole = file.get_tensor(name) if file is not None else torch.empty(whole_spec.shape)
        mesh.world.broadcast(whole, 0, timeout_s=SLOW_S)
        if name in optimizer.specs and worker in (None, mesh.worker_index):
            optimizer.put(kind, name, shard(whole, optimizer.specs[name], mesh))


def _read_residuals(folder: Path, available: set[str], mesh: Mesh, own: list[Tensor]) -> None:
    for rank, numel in enumerate(_every_length(mesh, own)):
        name = _first(available, _of_rank(rank))
        if name is None or not numel:
            continue
        flat = torch.empty(numel)
        if mesh.world.rank == 0:
            flat = safe_open(folder / name, "pt").get_tensor("residuals")
            if rank:
                mesh.world.group.send(flat, rank, rank, timeout_s=SLOW_S)
        elif mesh.world.rank == rank:
            mesh.world.group.recv(flat, 0, rank, timeout_s=SLOW_S)
        if mesh.world.rank == rank:
            with torch.no_grad():
                for each, lost in zip(own, flat.split([each.numel() for each in own]), strict=True):
                    each.copy_(lost.view(each.shape))
