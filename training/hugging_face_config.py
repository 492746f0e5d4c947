"""A ModelConfig as Hugging Face's config.json, and back. What one of them cannot say is refused by name."""

from __future__ import annotations

from typing import Any

import torch

from training.errors import ConfigError
from training.model_config import ModelConfig

_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}


def model_type(config: ModelConfig) -> str:
    """Hugging Face's name of the architecture. Raises ConfigError where it has none, with what each would need."""
    if config.block == "gpt2":
        if config.head_width * config.n_heads != config.d_model or config.n_kv_heads != config.n_heads:
            raise ConfigError("Hugging Face's GPT-2 has n_kv_heads = n_heads and head_dim = d_model / n_heads")
        return "gpt2"
    if not config.n_experts:
        return "llama"
    differing: dict[str, list[str]] = {}
    for kind, needed in {
        "mixtral": {
            "router": "softmax",
            "norm_topk_prob": True,
            "router_scale": 1.0,
            "router_bias": False,
            "n_shared_experts": 0,
            "n_dense_layers": 0,
            "moe_every": 1,
            "topk_groups": config.n_expert_groups,
        },
        "glm4_moe": {"router": "sigmoid", "router_bias": True, "moe_every": 1},
    }.items():
        differing[kind] = [f"{k} = {v!r}" for k, v in needed.items() if getattr(config, k) != v]
        if kind == "glm4_moe" and not config.n_shared_experts:
            differing[kind].append("n_shared_experts of at least 1")
        if not differing[kind]:
            return kind
    raise ConfigError(
        "Hugging Face has no such mixture of experts: "
        + "; ".join(f"{kind} would need model.{', '.join(keys)}" for kind, keys in differing.items())
    )


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json. Raises ConfigError as model_type()."""
    kind = model_type(config)
    shared = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "gpt2":
        return shared | {
            "n_embd": config.d_model,
            "n_layer": config.n_layers,
            "n_head": config.n_heads,
            "n_inner": config.d_ff,
            "n_positions": config.max_seq_len,
            "layer_norm_epsilon": config.norm_eps,
            "activation_function": "gelu_new",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    scaling: dict[str, Any] | None = None
    if config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        assert scaling is not None
        scaling |= {
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": config.rope_original_len,
        }
    shared |= {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_scaling": scaling,
        "hidden_act": "silu",
    }
    if kind == "mixtral":
        shared |= {
            "intermediate_size": config.expert_width,
            "num_local_experts": config.n_experts,
            "num_experts_per_tok": config.top_k,
            "router_aux_loss_coef": config.aux_loss_weight,
        }
    if kind == "glm4_moe":
        shared |= {
            "moe_intermediate_size": config.expert_width,
            "n_routed_experts": config.n_experts,
            "num_experts_per_tok": config.top_k,
            "n_shared_experts": config.n_shared_experts,
            "first_k_dense_replace": config.n_dense_layers,
            "norm_topk_prob": config.norm_topk_prob,
            "routed_scaling_factor": config.router_scale,
            "n_group": config.n_expert_groups,
            "topk_group": config.topk_groups,
            "partial_rotary_factor": 1.0,
            "num_nextn_predict_layers": 0,
        }
    return shared


def model_config(description: dict[str, Any], source: str) -> ModelConfig:
    """The ModelConfig of a config.json. Raises ConfigError for what the trainer's models do not have."""
    kind = {"mistral": "llama"}.get(description.get("model_type", ""), description.get("model_type"))
    if kind not in _ARCHITECTURES:
        raise ConfigError(f"{source} describes a {kind!r}; there are {', '.join(_ARCHITECTURES)}")

    def refuse_unless(key: str, default: Any, *allowed: Any) -> None:
        value = description.get(key, default)
        if value not in allowed:
            raise ConfigError(f"{source}: {key} is {value!r}; the trainer's models have {allowed[0]!r}")

    def get(key: str) -> Any:
        if key not in description:
            raise ConfigError(f"{source} has no {key!r}")
        return description[key]

    if kind == "gpt2":
        refuse_unless("activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
        refuse_unless("scale_attn_by_inverse_layer_idx", False, False)
        refuse_unless("scale_attn_weights", True, True)
        refuse_unless("add_cross_attention", False, False)
        d_model, n_heads = get("n_embd"), get("n_head")
        return ModelConfig(
            block="gpt2",
            vocab_size=get("vocab_size"),
            n_layers=get("n_layer"),
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_ff=description.get("n_inner") or 4 * d_model,
            max_seq_len=get("n_positions"),
            norm_eps=description.get("layer_norm_epsilon", 1e-5),
            tie_embeddings=description.get("tie_word_embeddings", True),
        )
    refuse_unless("hidden_act", "silu", "silu")
    refuse_unless("attention_bias", False, False)
    refuse_unless("mlp_bias", False, False)
    refuse_unless("use_qk_norm", False, False)
    refuse_unless("sliding_window", None, None)
    rope = description.get("rope_parameters") or description.get("rope_scaling") or {}
    usual = 0.5 if kind == "glm4_moe" else 1.0
    partial = rope.get("partial_rotary_factor", description.get("partial_rotary_factor", usual))
    if partial != 1:
        raise ConfigError(f"{source}: partial_rotary_factor is {partial}; the trainer's models turn the whole head")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "linear", "llama3"):
        raise ConfigError(f"{source}: rope_type is {rope_type!r}; there are default, linear and llama3")
    base = rope.get("rope_theta", description.get("rope_theta", 1e6 if kind == "mixtral" else 1e4))
    d_model, n_heads = get("hidden_size"), get("num_attention_heads")
    head_dim = description.get("head_dim") or d_model // n_heads
    llama3 = rope_type == "llama3"
    of_experts: dict[str, Any] = {}
    if kind == "mixtral":
        of_experts = {"n_experts": get("num_local_experts"), "top_k": get("num_experts_per_tok")}
        of_experts["aux_loss_weight"] = description.get("router_aux_loss_coef", 0.001)
    elif kind == "glm4_moe":
        of_experts = {
            "n_experts": get("n_routed_experts"),
            "top_k": get("num_experts_per_tok"),
            "d_ff_expert": get("moe_intermediate_size"),
            "n_shared_experts": get("n_shared_experts"),
            "n_dense_layers": get("first_k_dense_replace"),
            "norm_topk_prob": description.get("norm_topk_prob", True),
            "router_scale": float(description.get("routed_scaling_factor", 1.0)),
            "n_expert_groups": description.get("n_group", 1),
            "topk_groups": description.get("topk_group", 1),
            "router": "sigmoid",
            "router_bias": True,
            "aux_loss_weight": 0.0,
        }
    return ModelConfig(
        vocab_size=get("vocab_size"),
        n_layers=get("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=description.get("num_key_value_heads") or n_heads,
        head_dim=0 if head_dim * n_heads == d_model else head_dim,
        d_ff=get("intermediate_size"),
        max_seq_len=description.get("max_position_embeddings", 2048),
        norm_eps=description.get("rms_norm_eps", 1e-6),
        tie_embeddings=description.get("tie_word_embeddings", False),
        rope_base=float(base),
        rope_scaling="none" if rope_type == "default" else rope_type,
        rope_factor=float(rope.get("factor", 1.0)),
        rope_low_freq_factor=float(rope["low_freq_factor"]) if llama3 else 1.0,
        rope_high_freq_factor=float(rope["high_freq_factor"]) if llama3 else 4.0,
        rope_original_len=int(rope["original_max_position_embeddings"]) if llama3 else 8192,
        **of_experts,
    )
