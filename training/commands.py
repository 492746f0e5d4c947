"""What is done with a run beside training it: evaluate, sample, export, import, inspect, and prepare its data."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from training import checkpoint_files
from training.checkpoint_files import Progress
from training.config import Config, LayoutConfig, SyncConfig, WireConfig
from training.data import open_tokenizer, train_bpe, write_token_shard
from training.data.streams import read_documents
from training.data.tokens import as_text
from training.device import dtype_of
from training.errors import CheckpointError, ConfigError, DataError, common
from training.generate import sample_text
from training.hugging_face import export_model, import_model
from training.layout import resolve_layout
from training.machine import share_cores
from training.mesh import Mesh
from training.model import GPT
from training.optimizer import MOMENTS, PARAMETERS
from training.presets import to_toml
from training.sharding import specs_of
from training.trainer import Trainer

if TYPE_CHECKING:
    from pycomm.group import Group

_SHARD_TOKENS = 1 << 28  # of prepare()'s shards: half a GiB of uint16


def _trained(config: Config, world: Group) -> Trainer:
    """The trainer at the run's newest checkpoint. Raises CheckpointError where the run has none."""
    trainer = Trainer(config, world)
    if trainer.resume():
        return trainer
    trainer.close()
    raise common(CheckpointError(_no_checkpoint(config)))


def _no_checkpoint(config: Config) -> str:
    return f"{config.run_dir} has no checkpoint; train it with: pycomm-train run {config.name}"


def evaluate(config: Config, world: Group) -> None:
    """Prints the held-out loss of the run's newest checkpoint."""
    share_cores(world)
    with contextlib.closing(_trained(config, world)) as trainer:
        loss = trainer.evaluate()
        step = trainer.progress.step
    if world.rank == 0:
        print(
            f"{config.name} at step {step}: held-out loss {loss:.4f} nats a token, perplexity {math.exp(loss):.2f}, "
            f"over {config.train.eval_sequences} sequences of {config.data.seq_len} tokens"
        )


def sample(config: Config, world: Group) -> None:
    """Prints text of the run's newest checkpoint."""
    share_cores(world)
    with contextlib.closing(_trained(config, world)) as trainer:
        text = sample_text(trainer, config.sample)
    if world.rank == 0:
        print(text)


def _alone(world: Group, command: str) -> None:
    if world.size > 1:
        raise common(
            ConfigError(f"{command} is the work of one process; there are {world.size} ranks: start it without them")
        )


def export(config: Config, world: Group) -> None:
    """Writes the newest checkpoint as a Hugging Face model, with its tokenizer."""
    _alone(world, "export")
    newest = checkpoint_files.latest(config.run_dir)
    if newest is None:
        raise CheckpointError(_no_checkpoint(config))
    model = checkpoint_files.stored_model(newest, checkpoint_files.read_state(newest))
    folder = Path(config.export.folder) if config.export.folder else config.run_dir / "hugging_face"
    dtype = dtype_of(config.export.precision)
    export_model(model, newest / f"{PARAMETERS}.safetensors", folder, dtype)
    if config.data.tokenizer != "bytes":
        shutil.copyfile(config.data.tokenizer, folder / "tokenizer.json")
    print(f"{newest} is in {folder}: config.json and {config.export.precision} safetensors")


def import_(config: Config, world: Group, folder: Path) -> None:
    """Makes a run whose checkpoint of step 0 has the parameters of a Hugging Face model; config.model is that model."""
    _alone(world, "import")
    if checkpoint_files.latest(config.run_dir) is not None:
        raise ConfigError(f"{config.run_dir} has a checkpoint already; choose another --name")
    alone = dataclasses.replace(config, layout=LayoutConfig(), sync=SyncConfig(), wire=WireConfig())
    mesh = Mesh(world, resolve_layout(alone, 1))
    with torch.device("meta"):
        specs = specs_of(GPT(config.model, mesh))
    parameters = import_model(config.model, folder, {name: spec.shape for name, spec in specs.items()})
    mesh.close()
    zeros = {moment: {name: torch.zeros_like(each) for name, each in parameters.items()} for moment in MOMENTS}
    checkpoint_files.write(config, {PARAMETERS: parameters, **zeros}, Progress())
    tokenizer = folder / "tokenizer.json"
    if tokenizer.exists() and config.data.tokenizer == "bytes":
        shutil.copyfile(tokenizer, config.run_dir / tokenizer.name)
        data = dataclasses.replace(config.data, tokenizer=str(config.run_dir / tokenizer.name))
        config = dataclasses.replace(config, data=data)
    preset = config.run_dir / f"{config.name}.toml"
    preset.write_text(to_toml(config))
    print(f"{folder}, {config.model.n_parameters:,} parameters, is in {config.run_dir}")
    print(f"Go on from it with: pycomm-train run {preset}")


def inspect(path: Path) -> None:
    """Prints what a checkpoint, or the newest of a run's folder, holds, after its checksums were compared."""
    folder = path if (path / "state.json").exists() else checkpoint_files.latest(path)
    if folder is None:
        raise CheckpointError(f"there is no checkpoint at {path}; give a run's folder or one of its checkpoints")
    state = checkpoint_files.read_state(folder)
    model = checkpoint_files.stored_model(folder, state)
    table = Table("parameter", "shape", "rms", "largest")
    n_bad = 0
    with safe_open(folder / f"{PARAMETERS}.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name).float()
            n_bad += int((~tensor.isfinite()).sum())
            rms, largest = float(tensor.square().mean().sqrt()), float(tensor.abs().max())
            table.add_row(name, " × ".join(map(str, tensor.shape)), f"{rms:.3g}", f"{largest:.3g}")
    console = Console(highlight=False)
    console.print(table)
    nbytes = sum(each["nbytes"] for each in state["files"].values())
    console.print(
        f"{folder}: step {state['step']}, sequence {state['position']:,}; {model.n_parameters:,} parameters, "
        f"{nbytes / 2**20:.1f} MiB in {len(state['files'])} files, every checksum right; "
        + (f"{n_bad} values are not finite" if n_bad else "every value is finite"),
        soft_wrap=True,
    )
    changed = {k: v for k, v in dataclasses.asdict(model).items() if v != getattr(type(model)(), k)}
    console.print("model: " + (", ".join(f"{key} {value}" for key, value in changed.items()) or "the default"))


def prepare(config: Config, folder: Path) -> None:
    """Tokenises config.data's text into shards in a folder; trains the vocabulary first where its file is not there."""
    data = config.data
    if data.tokenizer == "bytes":
        raise ConfigError("prepare needs --data.tokenizer: the tokenizer.json to read, or to train and write")
    try:
        documents = [each for path in data.mix or {data.path: 1.0} for each in read_documents(path, data.text_field)]
        if not Path(data.tokenizer).exists():
            train_bpe((as_text(*each) for each in documents), config.model.vocab_size, Path(data.tokenizer))
            print(f"{data.tokenizer}: a vocabulary of {config.model.vocab_size} was trained")
        tokenizer = open_tokenizer(data.tokenizer, data.end_of_document)
        n_tokens = _write_shards(tokenizer.encode(documents), tokenizer.separator, folder)
    except OSError as error:
        raise DataError(f"cannot read or write {error.filename}: {error.strerror or error}") from error
    separator = f"--data.end-of-document {tokenizer.separator[0]} " if tokenizer.separator else ""
    print(
        f"{folder}: {n_tokens:,} tokens of {len(documents):,} documents; train with --data.path {folder} {separator}"
        f"--data.tokenizer {data.tokenizer} --model.vocab-size {tokenizer.vocab_size}"
    )


def _write_shards(encoded: Sequence[Any], separator: Sequence[int], folder: Path) -> int:
    """Writes documents, each with the separator after it, whole ones to a shard; the number of tokens."""
    if not encoded:
        raise DataError("there is no text to tokenise at data.path")
    folder.mkdir(parents=True, exist_ok=True)
    pieces: list[Any] = []
    total = filled = number = 0
    for index, tokens in enumerate(encoded):
        pieces += [tokens, np.array(separator, dtype=tokens.dtype)]
        filled += len(tokens) + len(separator)
        if filled >= _SHARD_TOKENS or index == len(encoded) - 1:
            write_token_shard(folder / f"{number:05d}.bin", np.concatenate(pieces))
            total, filled, number, pieces = total + filled, 0, number + 1, []
    return total
