"""Models to and from Hugging Face's safetensors: which of our tensors is which of theirs, and config.json.

    ours                               Llama, Mixtral, GLM-4-MoE                GPT-2 (matrices transposed)
    embedding.weight                   model.embed_tokens.weight                transformer.wte.weight
    blocks.0.attention.query.weight    model.layers.0.self_attn.q_proj.weight   transformer.h.0.attn.c_attn.weight:
    blocks.0.attention.key.weight                           ... k_proj          query, key and value in one
    blocks.0.experts.gate [E, F, D]    one tensor for each expert

GLM-4-MoE is DeepSeek-V3's mixture (sigmoid scores, groups, bias, shared experts) on Llama's attention; DeepSeek-V2 and
V3 have Llama's names but for latent attention's. Layers that predict further tokens (V3's) are left out.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.errors import CheckpointError
from training.hugging_face_config import config_json, model_config, model_type
from training.model_config import ModelConfig

_SHARD_BYTES = 5 * 10**9  # as transformers writes them
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Match:
    """Our tensors, joined along their first dimension, are theirs stacked (if several) and transposed (if so said)."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transposed: bool = False

    def export(self, get: Callable[[str], Tensor]) -> dict[str, Tensor]:
        whole = torch.cat([get(name) for name in self.ours]) if len(self.ours) > 1 else get(self.ours[0])
        if self.transposed:
            whole = whole.mT
        parts = whole.unbind(0) if len(self.theirs) > 1 else (whole,)
        return {name: part.contiguous() for name, part in zip(self.theirs, parts, strict=True)}

    def load(self, get: Callable[[str], Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Ours, fp32. Raises CheckpointError for a shape that is not the model's, naming both."""
        parts = [get(name) for name in self.theirs]
        whole = torch.stack(parts) if len(parts) > 1 else parts[0]
        if self.transposed:
            whole = whole.mT
        expected = [sum(shapes[name][0] for name in self.ours), *shapes[self.ours[0]][1:]]
        if list(whole.shape) != expected:
            raise CheckpointError(
                f"{self.theirs[0]} is {list(parts[0].shape)}; config.json makes {' + '.join(self.ours)} {expected} of "
                f"{len(parts)} of them{', transposed' if self.transposed else ''}"
            )
        pieces = whole.float().split([shapes[name][0] for name in self.ours])
        return {name: piece.contiguous() for name, piece in zip(self.ours, pieces, strict=True)}


def matches(config: ModelConfig) -> list[Match]:
    """Every tensor of a model, in the order of its layers. Raises ConfigError where Hugging Face has no such model."""
    kind = model_type(config)
    return list(_gpt2(config) if kind == "gpt2" else _llama(config, kind))


def _llama(config: ModelConfig, kind: str) -> Iterator[Match]:
    def one(ours: str, theirs: str) -> Match:
        return Match((ours + ".weight",), (theirs + ".weight",))

    yield one("embedding", "model.embed_tokens")
    for index in range(config.n_layers):
        block, layer = f"blocks.{index}", f"model.layers.{index}"
        yield one(f"{block}.attention_norm", f"{layer}.input_layernorm")
        for ours, theirs in _attention(config).items():
            yield one(f"{block}.attention.{ours}", f"{layer}.self_attn.{theirs}")
        yield one(f"{block}.feed_forward_norm", f"{layer}.post_attention_layernorm")
        mlp = f"{layer}.block_sparse_moe" if kind == "mixtral" else f"{layer}.mlp"
        experts = config.has_experts(index)
        if experts:
            yield Match((f"{block}.experts.router",), (f"{mlp}.gate.weight",))
            names = {"gate": "w1", "up": "w3", "down": "w2"} if kind == "mixtral" else {}
            for ours in ("gate", "up", "down"):
                theirs = names.get(ours, f"{ours}_proj")
                of_experts = (f"{mlp}.experts.{expert}.{theirs}.weight" for expert in range(config.n_experts))
                yield Match((f"{block}.experts.{ours}",), tuple(of_experts))
        if experts and config.router_bias:
            yield Match((f"{block}.experts.bias",), (f"{mlp}.gate.e_score_correction_bias",))
        if not experts or config.n_shared_experts:
            for ours in ("gate", "up", "down"):
                shared = f"{mlp}.shared_experts" if experts else mlp
                yield one(f"{block}.feed_forward.{ours}", f"{shared}.{ours}_proj")
    yield one("norm", "model.norm")
    if not config.tie_embeddings:
        yield one("head", "lm_head")


def _attention(config: ModelConfig) -> dict[str, str]:
    if not config.latent:
        return {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    query = {"query_up": "q_proj"}
    if config.q_lora_rank:
        query = {"query_down": "q_a_proj", "query_norm": "q_a_layernorm", "query_up": "q_b_proj"}
    both = {"key_value_down": "kv_a_proj_with_mqa", "key_value_norm": "kv_a_layernorm", "key_value_up": "kv_b_proj"}
    return {**query, **both, "out": "o_proj"}


def _gpt2(config: ModelConfig) -> Iterator[Match]:
    def both(ours: str, theirs: str) -> Iterator[Match]:
        for part in ("weight", "bias"):
            yield Match((f"{ours}.{part}",), (f"{theirs}.{part}",), part == "weight" and "_norm" not in ours)

    yield Match(("embedding.weight",), ("transformer.wte.weight",))
    yield Match(("positions.weight",), ("transformer.wpe.weight",))
    for index in range(config.n_layers):
        block, layer = f"blocks.{index}", f"transformer.h.{index}"
        yield from both(f"{block}.attention_norm", f"{layer}.ln_1")
        for part in ("weight", "bias"):
            ours = tuple(f"{block}.attention.{name}.{part}" for name in ("query", "key", "value"))
            yield Match(ours, (f"{layer}.attn.c_attn.{part}",), part == "weight")
        yield from both(f"{block}.attention.out", f"{layer}.attn.c_proj")
        yield from both(f"{block}.feed_forward_norm", f"{layer}.ln_2")
        yield from both(f"{block}.feed_forward.up", f"{layer}.mlp.c_fc")
        yield from both(f"{block}.feed_forward.down", f"{layer}.mlp.c_proj")
    yield Match(("norm.weight",), ("transformer.ln_f.weight",))
    yield Match(("norm.bias",), ("transformer.ln_f.bias",))
    if not config.tie_embeddings:
        yield Match(("head.weight",), ("lm_head.weight",))


def export_model(config: ModelConfig, parameters: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes config.json and the tensors of a checkpoint's parameters.safetensors to a folder that from_pretrained()
    reads; one shard of the tensors is in memory at a time. The router's bias stays fp32.

    Raises ConfigError where Hugging Face has no such model, CheckpointError where the folder cannot be written."""
    description = config_json(config, dtype)
    shards: list[list[Match]] = [[]]
    filled = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with safe_open(parameters, "pt") as file:
            for match in matches(config):
                nbytes = sum(dtype.itemsize * _numel(file, name) for name in match.ours)
                if filled and filled + nbytes > _SHARD_BYTES:
                    shards.append([])
                    filled = 0
                shards[-1].append(match)
                filled += nbytes
            where: dict[str, str] = {}
            for number, shard in enumerate(shards, 1):
                name = (
                    f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
                )
                tensors = {}
                for match in shard:
                    as_dtype = torch.float32 if match.ours[0].endswith("experts.bias") else dtype
                    tensors.update({key: t.to(as_dtype) for key, t in match.export(file.get_tensor).items()})
                save_file(tensors, folder / name, metadata={"format": "pt"})
                where.update(dict.fromkeys(tensors, name))
        if len(shards) > 1:
            (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}, indent=1))
        (folder / "config.json").write_text(json.dumps(description, indent=1) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the model to {folder}: {error}") from error


def _numel(file: Any, name: str) -> int:
    return int(torch.Size(file.get_slice(name).get_shape()).numel())


def read_config(folder: Path) -> ModelConfig:
    """The model that a folder's config.json describes. Raises CheckpointError where it cannot be read, and ConfigError
    for one that the trainer does not have."""
    path = folder / "config.json"
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; give the folder of a Hugging Face model") from error
    return model_config(description, str(path))


def import_model(config: ModelConfig, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Our parameters, fp32, from a folder's safetensors. shapes: of our parameters, by name.

    Raises CheckpointError for a tensor that is missing, of another shape, or none of the model's."""
    with contextlib.ExitStack() as stack:
        try:
            index = folder / _INDEX
            names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else []
            files = [stack.enter_context(safe_open(folder / name, "pt")) for name in names or ["model.safetensors"]]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the tensors in {folder}: {error}") from error
        prefix = "" if model_type(config) != "gpt2" else "transformer."  # GPT-2's own files leave it out
        found: dict[str, Any] = {}
        for file in files:
            for name in file.keys():  # noqa: SIM118, a safetensors file is no dict
                whole = name if name.startswith((prefix, "lm_head.")) else prefix + name
                if not name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):
                    found[whole] = (file, name)
        if config.tie_embeddings:
            found.pop("lm_head.weight", None)  # the embedding's table again
        if model_type(config) == "deepseek_v3":
            further = f"model.layers.{config.n_layers}."  # predicts the token after the next
            found = {name: each for name, each in found.items() if not name.startswith(further)}
        parameters: dict[str, Tensor] = {}
        read: set[str] = set()

        def get(name: str) -> Tensor:
            if name not in found:
                raise CheckpointError(f"{folder} has no tensor {name}, which its config.json calls for")
            read.add(name)
            file, stored = found[name]
            tensor: Tensor = file.get_tensor(stored)
            return tensor

        for match in matches(config):
            parameters.update(match.load(get, shapes))
    if extra := sorted(set(found) - read):
        raise CheckpointError(
            f"{folder} has {len(extra)} tensors that the model does not have: {', '.join(extra[:3])}; it is another "
            "architecture than config.json says"
        )
    return parameters
