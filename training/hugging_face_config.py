"""A ModelConfig as Hugging Face's config.json, and back. What one of them cannot say is refused by name."""

from __future__ import annotations

import math
from typing import Any

import torch

from training.errors import ConfigError
from training.model_config import ModelConfig
from training.rotary import score_scale

_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
_LATENT = ("deepseek_v2", "deepseek_v3")


def model_type(config: ModelConfig) -> str:
    """Hugging Face's name of the architecture. Raises ConfigError where it has none, with what each would need."""
    if config.block == "gpt2":
        if config.head_width * config.n_heads != config.d_model or config.n_kv_heads != config.n_heads:
            raise ConfigError("Hugging Face's GPT-2 has n_kv_heads = n_heads and head_dim = d_model / n_heads")
        return "gpt2"
    if not config.n_experts:
        if config.latent:
            raise ConfigError("Hugging Face's models with latent attention (model.kv_lora_rank) have model.n_experts")
        return "llama"
    differing: dict[str, list[str]] = {}
    for kind, needed in _needed(config).items():
        differing[kind] = [f"{k} = {v!r}" for k, v in needed.items() if getattr(config, k) != v]
        if kind != "mixtral" and not config.n_shared_experts:
            differing[kind].append("n_shared_experts of at least 1")
        if not differing[kind]:
            return kind
    raise ConfigError(
        "Hugging Face has no such mixture of experts: "
        + "; ".join(f"{kind} would need model.{', '.join(keys)}" for kind, keys in differing.items())
    )


def _needed(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The values that each mixture of experts with the model's kind of attention has."""
    limited = config.topk_groups < config.n_expert_groups
    sigmoid = {
        "router": "sigmoid",
        "router_bias": True,
        "moe_every": 1,
        "best_of_group": 2 if limited else config.best_of_group,
    }
    softmax = {"router": "softmax", "router_bias": False, "moe_every": 1}
    if config.latent:
        of_v2 = {"norm_topk_prob": False, "best_of_group": 1 if limited else config.best_of_group}
        return {"deepseek_v2": softmax | of_v2, "deepseek_v3": sigmoid}
    of_mixtral = {
        "norm_topk_prob": True,
        "router_scale": 1.0,
        "n_shared_experts": 0,
        "n_dense_layers": 0,
        "topk_groups": config.n_expert_groups,
    }
    return {"mixtral": softmax | of_mixtral, "glm4_moe": sigmoid}


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
        "rope_scaling": _rope_scaling(config),
        "hidden_act": "silu",
    }
    if kind == "mixtral":
        shared |= {
            "intermediate_size": config.expert_width,
            "num_local_experts": config.n_experts,
            "num_experts_per_tok": config.top_k,
            "router_aux_loss_coef": config.aux_loss_weight,
        }
    if kind in ("glm4_moe", *_LATENT):
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
            "num_nextn_predict_layers": 0,
        }
    if kind == "glm4_moe":
        shared["partial_rotary_factor"] = 1.0
    if kind in _LATENT:
        del shared["head_dim"]  # there it is qk_rope_head_dim
        limited = config.topk_groups < config.n_expert_groups
        of_v2 = "group_limited_greedy" if limited else "greedy"
        shared |= {
            "kv_lora_rank": config.kv_lora_rank,
            "q_lora_rank": config.q_lora_rank or None,
            "qk_nope_head_dim": config.head_width,
            "qk_rope_head_dim": config.qk_rope_head_dim,
            "v_head_dim": config.v_width,
            "rope_interleave": True,
            "scoring_func": config.router,
            "topk_method": of_v2 if kind == "deepseek_v2" else "noaux_tc",
        }
    return shared


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    if config.rope_scaling == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling != "linear":
        scaling["original_max_position_embeddings"] = config.rope_original_len
    if config.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": config.rope_low_freq_factor, "high_freq_factor": config.rope_high_freq_factor}
    if config.rope_scaling == "yarn":
        scaling |= {"beta_slow": config.rope_low_freq_factor, "beta_fast": config.rope_high_freq_factor}
        # Both alike: what one does to cosines and sines the other one undoes, and scores alone are scaled.
        m = config.rope_mscale
        if config.latent and m:
            scaling |= {"mscale": m, "mscale_all_dim": m}
        elif m != 1:
            scaling |= {"attention_factor": score_scale(config) ** 0.5}
    return scaling


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
    refuse_unless("quantization_config", None, None)
    rope = description.get("rope_parameters") or description.get("rope_scaling") or {}
    usual = 0.5 if kind == "glm4_moe" else 1.0
    partial = rope.get("partial_rotary_factor", description.get("partial_rotary_factor", usual))
    if partial != 1:
        raise ConfigError(f"{source}: partial_rotary_factor is {partial}; the trainer's models turn the whole head")
    base = rope.get("rope_theta", description.get("rope_theta", 1e6 if kind == "mixtral" else 1e4))
    d_model, n_heads = get("hidden_size"), get("num_attention_heads")
    head_dim = description.get("head_dim") or d_model // n_heads
    of_attention: dict[str, Any] = {"head_dim": 0 if head_dim * n_heads == d_model else head_dim}
    if kind in _LATENT:
        refuse_unless("rope_interleave", True, True)
        nope, of_value = get("qk_nope_head_dim"), get("v_head_dim")
        of_attention = {
            "head_dim": 0 if nope * n_heads == d_model else nope,
            "v_head_dim": 0 if of_value == nope else of_value,
            "kv_lora_rank": get("kv_lora_rank"),
            "q_lora_rank": description.get("q_lora_rank") or 0,
            "qk_rope_head_dim": get("qk_rope_head_dim"),
        }
    of_experts: dict[str, Any] = {}
    if kind == "mixtral":
        of_experts = {"n_experts": get("num_local_experts"), "top_k": get("num_experts_per_tok")}
        of_experts["aux_loss_weight"] = description.get("router_aux_loss_coef", 0.001)
    elif kind in ("glm4_moe", *_LATENT):
        refuse_unless("moe_layer_freq", 1, 1)
        sigmoid = kind != "deepseek_v2"
        refuse_unless("scoring_func", "sigmoid" if sigmoid else "softmax", "sigmoid" if sigmoid else "softmax")
        n_groups, topk_groups = description.get("n_group") or 1, description.get("topk_group") or 1
        if kind == "deepseek_v2":
            refuse_unless("norm_topk_prob", False, False)
            refuse_unless("topk_method", "greedy", "greedy", "group_limited_greedy")
            if description.get("topk_method", "greedy") == "greedy":
                n_groups = topk_groups = 1
        of_experts = {
            "n_experts": get("n_routed_experts"),
            "top_k": get("num_experts_per_tok"),
            "d_ff_expert": get("moe_intermediate_size"),
            "n_shared_experts": get("n_shared_experts"),
            "n_dense_layers": get("first_k_dense_replace"),
            "norm_topk_prob": description.get("norm_topk_prob", sigmoid),
            "router_scale": float(description.get("routed_scaling_factor", 1.0)),
            "n_expert_groups": n_groups,
            "topk_groups": topk_groups,
            "best_of_group": 1 if not sigmoid and topk_groups < n_groups else 2,
            "router": "sigmoid" if sigmoid else "softmax",
            "router_bias": sigmoid,
            "aux_loss_weight": 0.0 if sigmoid else description.get("aux_loss_alpha", 0.001),
        }
    return ModelConfig(
        vocab_size=get("vocab_size"),
        n_layers=get("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=description.get("num_key_value_heads") or n_heads,
        d_ff=get("intermediate_size"),
        max_seq_len=description.get("max_position_embeddings", 2048),
        norm_eps=description.get("rms_norm_eps", 1e-6),
        tie_embeddings=description.get("tie_word_embeddings", False),
        rope_base=float(base),
        **_scaled_positions(rope, kind, source),
        **of_attention,
        **of_experts,
    )


def _scaled_positions(rope: dict[str, Any], kind: str, source: str) -> dict[str, Any]:
    """ModelConfig's rope_scaling and what belongs to it, of a config.json's rope_parameters."""
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    known = ["default", "linear", "llama3", "yarn"]
    if rope_type not in known:
        raise ConfigError(f"{source}: rope_type is {rope_type!r}; there are {', '.join(known)}")
    if rope_type == "default":
        return {}
    found = {"rope_scaling": rope_type, "rope_factor": float(rope.get("factor", 1.0))}
    if rope_type == "linear":
        return found
    found["rope_original_len"] = int(rope["original_max_position_embeddings"])
    if rope_type == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return found | {"rope_low_freq_factor": low, "rope_high_freq_factor": high}
    if not rope.get("truncate", True):
        raise ConfigError(f"{source}: truncate is false; the trainer's yarn rounds the bounds of its ramp")
    low, high = float(rope.get("beta_slow", 1)), float(rope.get("beta_fast", 32))
    of_scores, of_angles = rope.get("mscale_all_dim") or 0.0, rope.get("mscale") or 0.0
    if kind not in _LATENT:  # there it is angles that are scaled: queries and keys, as if it were scores
        scale, log = rope.get("attention_factor"), 0.1 * math.log(found["rope_factor"])
        if scale is None and of_scores and of_angles:
            scale = (1 + of_angles * log) / (1 + of_scores * log)
        mscale = 1.0 if scale is None else (scale - 1) / log if log else 0.0
        return found | {"rope_low_freq_factor": low, "rope_high_freq_factor": high, "rope_mscale": mscale}
    if rope.get("attention_factor") != 1 and (of_scores != of_angles or not of_scores):
        raise ConfigError(
            f"{source}: mscale is {of_angles}, mscale_all_dim {of_scores}; the trainer's models have them "
            "equal: then scores alone are scaled"
        )
    scaling = {"rope_low_freq_factor": low, "rope_high_freq_factor": high, "rope_mscale": float(of_scores)}
    return found | scaling
