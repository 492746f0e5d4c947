"""Models against `transformers`, the oracle: exports give their logits there, and what it saves gives them here."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from spawn import run_ranks
from training_runs import tiny

from training import checkpoint_files
from training.commands import import_
from training.config import Config
from training.data import Batch
from training.errors import CheckpointError, ConfigError
from training.hugging_face import export_model, import_model, matches, read_config
from training.hugging_face_config import config_json, model_config
from training.layer_rate import Alone
from training.layout import Layout
from training.mesh import Mesh
from training.model import GPT
from training.model_config import ModelConfig
from training.sharding import initialise, shard, specs_of
from training.trainer import Trainer

SMALL = {"vocab_size": 64, "n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "max_seq_len": 96}
DEEPSEEK = {
    "n_experts": 8, "top_k": 3, "d_ff_expert": 16, "n_dense_layers": 1, "n_shared_experts": 2, "router": "sigmoid",
    "router_bias": True, "router_scale": 1.8, "n_expert_groups": 4, "topk_groups": 2, "tie_embeddings": False,
}  # fmt: skip
LATENT = {
    "n_kv_heads": 4, "kv_lora_rank": 12, "qk_rope_head_dim": 6, "head_dim": 10, "v_head_dim": 8, "rope_base": 500.0,
    "norm_eps": 1e-5, "rope_factor": 3.0,
}  # fmt: skip
YARN = {
    **LATENT, "rope_scaling": "yarn", "rope_original_len": 24, "rope_high_freq_factor": 8.0, "rope_mscale": 0.8,
}  # fmt: skip
V2 = {
    "n_experts": 8, "top_k": 3, "d_ff_expert": 16, "n_dense_layers": 1, "n_shared_experts": 2, "norm_topk_prob": False,
    "router_scale": 1.8, "tie_embeddings": False,
}  # fmt: skip
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_len": 32, "rope_base": 5000.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama, tied": {"head_dim": 16, "rope_scaling": "linear", "rope_factor": 2.0},
    "llama 3.1": {"tie_embeddings": False, **LLAMA3},
    "llama, yarn": {
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_original_len": 24,
        "rope_high_freq_factor": 16.0,
        "rope_mscale": 1.0,
    },
    "mixtral": {"n_experts": 4, "top_k": 2, "tie_embeddings": False},
    "glm4_moe": DEEPSEEK,
    "glm4_moe, weights as they are": {**DEEPSEEK, "norm_topk_prob": False, "n_expert_groups": 1, "topk_groups": 1},
    "deepseek_v3": {**DEEPSEEK, **YARN, "q_lora_rank": 14},
    "deepseek_v2": {
        **V2,
        **LATENT,
        "rope_scaling": "linear",
        "q_lora_rank": 14,
        "n_expert_groups": 4,
        "topk_groups": 2,
        "best_of_group": 1,
    },
    "deepseek_v2, lite": {**V2, **YARN, "v_head_dim": 0, "rope_mscale": 0.0},
    "mixtral, yarn": {
        "n_experts": 4,
        "top_k": 2,
        "tie_embeddings": False,
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_original_len": 24,
        "rope_mscale": 0.0,
        "rope_high_freq_factor": 16.0,
    },
    "gpt2": {"block": "gpt2", "n_kv_heads": 4},
}
TOKENS = torch.randint(0, 64, (80, 2), generator=torch.Generator().manual_seed(1))  # [S, B]


def model_of(name: str) -> ModelConfig:
    return ModelConfig(**{**SMALL, **MODELS[name]})


def write_exports(group: Any, folder: Path) -> dict[str, Any]:
    """Initialises each model, exports it, imports what was exported; its logits by name."""
    results = {}
    for name in MODELS:
        config = model_of(name)
        mesh = Mesh(group, Layout(1, 1, 1))
        model = GPT(config, mesh)
        initialise(model, mesh, 0)
        specs = specs_of(model)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == config.n_parameters, name
        with torch.no_grad():
            for key, parameter in model.named_parameters():  # also what begins as zeros or ones
                generator = torch.Generator().manual_seed(len(key))
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            logits, _ = model(TOKENS)
        save_file(
            {key: p.detach().contiguous() for key, p in model.named_parameters()}, folder / "parameters.safetensors"
        )
        export_model(config, folder / "parameters.safetensors", folder / name, torch.float32)
        back = import_model(read_config(folder / name), folder / name, {k: spec.shape for k, spec in specs.items()})
        assert all(torch.equal(back[key], p) for key, p in model.named_parameters()), name
        results[name] = logits.numpy()
    return results


def logits_of_imports(group: Any, folder: Path) -> dict[str, Any]:
    """The logits of each model that transformers saved, on tp ranks."""
    results = {}
    for name in MODELS:
        mesh = Mesh(group, Layout(1, group.size, 1))
        model = GPT(read_config(folder / name / "saved"), mesh)
        specs = specs_of(model)
        parameters = import_model(model.config, folder / name / "saved", {k: spec.shape for k, spec in specs.items()})
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(shard(parameters[key], specs[key], mesh))
            logits, _ = model(TOKENS)
        results[name] = torch.stack([model.whole_logits(each) for each in logits]).numpy()
        mesh.close()
    return results


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("exports")
    return folder, run_ranks(write_exports, 1, folder)[0]


def test_logits_are_those_of_transformers_in_both_directions(exported: Any) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported
    from transformers import AutoModelForCausalLM

    folder, ours = exported
    theirs = {}
    for name in MODELS:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder / name, output_loading_info=True, dtype=torch.float32
        )
        assert not any(report.values()), (name, report)  # no tensor missing, left over or of another shape
        with torch.no_grad():
            theirs[name] = model(TOKENS.T).logits.transpose(0, 1)
        torch.testing.assert_close(torch.from_numpy(ours[name]), theirs[name], rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
            theirs[name] = model(TOKENS.T).logits.transpose(0, 1)
        model.save_pretrained(folder / name / "saved")
    for results in run_ranks(logits_of_imports, 2, folder):
        for name, logits in results.items():
            torch.testing.assert_close(torch.from_numpy(logits), theirs[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_config_json_says_the_same_model(name: str) -> None:
    config = model_of(name)
    read = model_config(json.loads(json.dumps(config_json(config, torch.float32))), "config.json")
    assert dataclasses.replace(read, aux_loss_weight=config.aux_loss_weight) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_experts": 4, "n_shared_experts": 1}, "mixtral would need model.n_shared_experts = 0; glm4_moe would need"),
        (
            {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "n_kv_heads": 4},
            r"models with latent attention .* have model.n_exp",
        ),
        (
            {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "n_kv_heads": 4, "n_experts": 4, "router": "sigmoid"},
            "deepseek_v2 would need model.router = 'softmax', .*; deepseek_v3 would need model.router_bias = True",
        ),
        ({"n_experts": 4, "moe_every": 2}, "mixtral would need model.moe_every = 1"),
        ({"block": "gpt2"}, "Hugging Face's GPT-2 has n_kv_heads = n_heads"),
    ],
)
def test_a_model_that_hugging_face_does_not_have_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        matches(ModelConfig(**{**SMALL, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "bert"},
            "describes a 'bert'; there are gpt2, llama, mixtral, glm4_moe, deepseek_v2, deepseek_v3",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; the trainer's models have 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "rope_type is 'longrope'; there are default, linear",
        ),
        ({"hidden_size": None}, "has no 'hidden_size'"),
    ],
)
def test_an_architecture_that_the_trainer_does_not_have_is_refused(changes: Any, message: str) -> None:
    description = {**config_json(model_of("llama 3.1"), torch.float32), **changes}
    with pytest.raises(ConfigError, match=message):
        model_config({key: value for key, value in description.items() if value is not None}, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
        ({"rope_interleave": False}, "rope_interleave is False; the trainer's models have True"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; the trainer's models have 'sigmoid'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 8, "mscale": 1.0}},
            "mscale is",
        ),
    ],
)
def test_a_deepseek_that_the_trainer_does_not_have_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config({**config_json(model_of("deepseek_v3"), torch.float32), **changes}, "config.json")


def test_a_layer_that_predicts_further_is_left_out(exported: Any, tmp_path: Path) -> None:
    folder, _ = exported
    tensors = load_file(folder / "deepseek_v3" / "model.safetensors")
    further = {"model.layers.2.eh_proj.weight": torch.zeros(32, 64), "model.layers.2.enorm.weight": torch.zeros(32)}
    save_file(tensors | further, tmp_path / "model.safetensors")
    config = read_config(folder / "deepseek_v3")
    with torch.device("meta"):
        shapes = {key: spec.shape for key, spec in specs_of(GPT(config, cast(Mesh, Alone()))).items()}
    assert import_model(config, tmp_path, shapes).keys() == shapes.keys()


def test_bad_tensors_are_named(exported: Any, tmp_path: Path) -> None:
    folder, _ = exported
    source, config = folder / "mixtral", model_of("mixtral")
    tensors = load_file(source / "model.safetensors")
    shapes = {"embedding.weight": (64, 32)}
    first = "model.embed_tokens.weight"
    for changed, message in (
        ({key: t for key, t in tensors.items() if key != first}, f"has no tensor {first}, which its config.json"),
        (tensors | {first: torch.zeros(63, 32)}, r"embed_tokens.weight is \[63, 32\]; config.json makes .* \[64, 32\]"),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            import_model(config, tmp_path, shapes)
    with pytest.raises(CheckpointError, match=r"cannot read the tensors in .*nowhere"):
        import_model(config, tmp_path / "nowhere", shapes)


def train_from_import(group: Any, config: Config, folder: Path) -> tuple[float, float, int]:
    """Imports a model as a run, resumes it; the loss of its batch before and after training, and the step."""
    import_(config, group, folder)
    trainer = Trainer(config, group)
    assert trainer.resume() and trainer.progress == checkpoint_files.Progress()
    assert isinstance(trainer.corpus.batch([0]), Batch)
    losses = [trainer.train_step().loss for _ in range(8)]
    trainer.save()
    trainer.close()
    return losses[0], losses[-1], trainer.progress.step


def test_an_imported_model_trains_on(exported: Any, tmp_path: Path) -> None:
    folder, _ = exported
    data = tmp_path / "data.npy"
    np.save(data, np.arange(8000) % 13)
    config = dataclasses.replace(tiny(tmp_path, data={"path": str(data)}), model=read_config(folder / "glm4_moe"))
    first, last, step = run_ranks(train_from_import, 1, config, folder / "glm4_moe")[0]
    assert last < first - 0.5 and step == 8
    assert (config.run_dir / "tiny.toml").exists()
