"""Presets and layouts: what is read, and what is refused with which words. No group is needed for any of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from training_runs import tiny

from training.config import Config, SyncConfig, WireConfig
from training.errors import ConfigError
from training.layout import Layout, resolve_layout
from training.memory import require_fit
from training.model_config import ModelConfig
from training.plan_layout import whole_specs
from training.presets import PRESETS, load_preset

ALL = {path.stem for path in PRESETS.glob("*.toml")}
# Parameters of published shapes: exact, as Hugging Face counts the tensors in the models' safetensors (DeepSeek-V3's
# without routers' biases and the layer that predicts a further token), and as their authors say, and where.
PUBLISHED = {
    "gpt2": (124_439_808, 124e6, "https://huggingface.co/openai-community/gpt2"),
    "llama_1b": (1_235_814_400, 1.23e9, "https://huggingface.co/meta-llama/Llama-3.2-1B"),
    "llama_8b": (8_030_261_248, 8e9, "arXiv:2407.21783"),
    "llama_70b": (70_553_706_496, 70e9, "arXiv:2407.21783"),
    "mixtral_8x7b": (46_702_792_704, 47e9, "arXiv:2401.04088"),
    "deepseek_moe_16b": (16_375_728_128, 16.4e9, "arXiv:2401.06066"),
    "deepseek_v2_lite": (15_706_484_224, 15.7e9, "arXiv:2405.04434, appendix B"),
    "deepseek_v3": (671_026_404_352, 671e9, "arXiv:2412.19437"),
}


@pytest.mark.parametrize("preset", sorted(ALL - PUBLISHED.keys()))
def test_every_small_preset_loads_and_runs_on_1_2_and_4_ranks(preset: str) -> None:
    config = load_preset(preset)
    assert config.name == preset
    for world_size in (1, 2, 4):
        assert resolve_layout(config, world_size).dp == world_size


@pytest.mark.parametrize("preset", sorted(PUBLISHED))
def test_a_published_shape_has_its_published_parameters(preset: str) -> None:
    config = load_preset(preset)
    exact, said, source = PUBLISHED[preset]
    assert config.model.n_parameters == exact
    assert exact == pytest.approx(said, rel=0.01), source


# The ranks that a preset's comment states, and the GB of each one's GPU.
MEANT_FOR = {
    "gpt2": (8, 24),
    "h200_1b": (1, 80),
    "llama_1b": (8, 80),
    "llama_8b": (64, 80),
    "llama_70b": (512, 80),
    "mixtral_8x7b": (64, 80),
    "deepseek_moe_16b": (64, 80),
    "deepseek_v2_lite": (64, 80),
    "deepseek_v3": (2048, 80),
}


@pytest.mark.parametrize("preset", sorted(MEANT_FOR))
def test_a_large_preset_fits_the_gpus_that_its_comment_states(preset: str) -> None:
    config = load_preset(preset)
    n_ranks, size_gb = MEANT_FOR[preset]
    comment = " ".join((PRESETS / f"{preset}.toml").read_text().partition("[model]")[0].replace("#", " ").split())
    stated = "one GPU of about 80 GB" if n_ranks == 1 else f"{n_ranks:,} ranks of {size_gb} GB"
    assert stated in comment
    layout = resolve_layout(config, n_ranks)
    assert layout.n_ranks == n_ranks
    of_cuda = 4 * 10**9  # the context, NCCL, and what the allocator cannot reuse
    require_fit(config, layout, whole_specs(config), 0, size_gb * 10**9 - of_cuda)


def test_every_preset_is_small_or_states_its_ranks() -> None:
    assert ALL - MEANT_FOR.keys() == {"tiny", "default", "laptop", "moe"}


def test_flops_are_those_of_the_formula_and_of_the_active_experts() -> None:
    gpt2 = load_preset("gpt2").model
    looked_up = gpt2.max_seq_len * gpt2.d_model
    assert gpt2.flops_per_token(1024) == 6 * (124_439_808 - looked_up) + 12 * 12 * 768 * 1024
    mixtral = load_preset("mixtral_8x7b").model
    assert mixtral.n_active_parameters == 12_879_925_248  # "12.9B", arXiv:2401.04088


def test_a_preset_fills_what_it_names_and_keeps_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[model]\nn_layers = 7\n[optimizer]\nlr = 1\n")
    config = load_preset(str(file))
    assert (config.name, config.model.n_layers, config.optimizer.lr) == ("mine", 7, 1.0)
    assert dataclasses.replace(config.model, n_layers=ModelConfig().n_layers) == ModelConfig()
    assert config.train == Config().train


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nn_layer = 3\n", "unknown key 'model.n_layer'; the nearest is 'model.n_layers'"),
        ("[modle]\nn_layers = 3\n", "unknown key 'modle'; the nearest is 'model'"),
        ("[model]\nzzz = 3\n", "unknown key 'model.zzz'; there are model.block, model.vocab_size, model.n_layers,"),
        ("[model]\nn_layers = 'three'\n", "'model.n_layers' is a int, got 'three'"),
        ("[model]\nn_layers = 3.5\n", "'model.n_layers' is a int, got 3.5"),
        ("[model]\ntie_embeddings = 1\n", "'model.tie_embeddings' is a bool, got 1"),
        ("[train]\nprecision = 'fp8'\n", "'train.precision' is one of fp32, bf16, got 'fp8'"),
        ("[wire]\ndp = 'int2'\n", "'wire.dp' is one of none, bf16, fp8, int8, int4, got 'int2'"),
        ("[sync]\nmethod = 'dilico'\n", "'sync.method' is one of synchronous, .*, got 'dilico'"),
        ("[data]\nmix = 3\n", r"'data.mix' is a table, got 3"),
        ("[data.mix]\n'a.txt' = 'much'\n", "'data.mix.a.txt' is a float, got 'much'"),
        ("model = 3\n", r"'model' is a table, got 3; write \[model\]"),
        ("[model\n", "is not valid TOML"),
    ],
)
def test_a_wrong_preset_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_preset(str(file))


def test_an_unknown_preset_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="there is no preset 'defualt'; the nearest is 'default'"):
        load_preset("defualt")
    with pytest.raises(ConfigError, match=r"there is no preset 'xyz'; there are deepseek_moe_16b, .*, default,"):
        load_preset("xyz")
    with pytest.raises(ConfigError, match=r"cannot read the preset .*missing.toml: No such file"):
        load_preset("somewhere/missing.toml")


def test_layouts() -> None:
    moe = {"n_experts": 6, "top_k": 2}
    assert resolve_layout(tiny(tp=2), 4) == Layout(dp=2, tp=2, ep=1)
    assert resolve_layout(tiny(ep=2, model=moe), 8) == Layout(dp=8, tp=1, ep=2)
    assert resolve_layout(tiny(ep=0, model=moe), 8) == Layout(dp=8, tp=1, ep=2)
    assert resolve_layout(tiny(ep=0), 2) == Layout(dp=2, tp=1, ep=1)
    timed = tiny(tp=2)
    assert resolve_layout(timed, 2).tp_overlap == "auto"
    same = dataclasses.replace(timed, monitor=dataclasses.replace(timed.monitor, deterministic=True))
    assert resolve_layout(same, 2).tp_overlap == "never"  # what is timed may differ from run to run
    assert str(Layout(dp=4, tp=2, ep=2)) == "dp 4 × tp 2, ep 2 inside dp"


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"tp": 3}, 4, r"layout.tp \(3\) does not divide the ranks \(4\)"),
        ({"tp": 0}, 4, r"layout.tp \(0\) does not divide the ranks \(4\)"),
        ({"tp": 8}, 8, r"layout.tp \(8\) does not divide model.n_heads \(4\)"),
        ({"tp": 2, "data": {"seq_len": 33}}, 2, r"layout.tp \(2\) does not divide data.seq_len \(33\)"),
        ({"tp": 2, "model": {"vocab_size": 257}}, 2, r"layout.tp \(2\) does not divide model.vocab_size \(257\)"),
        ({"tp": 2, "model": {"n_kv_heads": 1}}, 2, r"layout.tp \(2\) does not divide model.n_kv_heads \(1\)"),
        ({"model": {"n_kv_heads": 3}}, 1, r"model.n_kv_heads \(3\) does not divide model.n_heads \(4\)"),
        ({"model": {"d_model": 36}}, 1, r"twice model.n_heads \(8\) does not divide model.d_model \(36\)"),
        ({}, 3, r"3 data parallel ranks × train.accumulation \(3\) does not divide train.global_batch \(8\)"),
        ({"accumulation": 3}, 2, r"\(6\) does not divide train.global_batch \(8\)"),
        ({"eval_sequences": 6}, 4, r"data parallel ranks \(4\) does not divide train.eval_sequences \(6\)"),
        ({"ep": 2}, 2, "layout.ep is 2 but the model has no experts"),
        ({"ep": 4, "model": {"n_experts": 4}}, 2, r"layout.ep \(4\) does not divide data parallel ranks \(2\)"),
        ({"ep": 4, "model": {"n_experts": 6}}, 4, r"layout.ep \(4\) does not divide model.n_experts \(6\)"),
        ({"layout": {"experts_over_tp": "split"}}, 1, "experts_over_tp is 'split' but the model has no experts"),
        (
            {"tp": 2, "model": {"n_experts": 4, "d_ff_expert": 3}, "layout": {"experts_over_tp": "split"}},
            2,
            r"layout.tp \(2\) does not divide the width of an expert \(3\)",
        ),
        (
            {"tp": 2, "ep": 2, "model": {"n_experts": 6}, "layout": {"experts_over_tp": "spread"}},
            4,
            r"layout.ep × layout.tp \(4\) does not divide model.n_experts \(6\)",
        ),
        (
            {"model": {"n_experts": 4}, "layout": {"moe_exchange": "flat", "moe_dedup": "host"}},
            1,
            "moe_dedup is 'host' but layout.moe_exchange is 'flat'",
        ),
        ({"model": {"n_experts": 4, "top_k": 5}}, 1, "top_k is 5: choose 1 to model.n_experts, which is 4"),
        ({"model": {"n_experts": 4, "moe_every": 3}}, 1, r"moe_every \(3\) does not divide model.n_layers \(2\)"),
        (
            {"model": {"n_experts": 4, "n_dense_layers": 2}},
            1,
            r"n_dense_layers \(2\) leaves no block of 2 with experts",
        ),
        ({"model": {"n_experts": 4, "n_expert_groups": 3}}, 1, r"n_expert_groups \(3\) does not divide model.n_exp"),
        (
            {"model": {"n_experts": 4, "topk_groups": 2}},
            1,
            "topk_groups is 2: choose 1 to model.n_expert_groups, which",
        ),
        ({"model": {"n_experts": 4, "n_expert_groups": 4}}, 1, "top_k is 2, but 1 groups of 1 experts hold 1"),
        ({"model": {"n_experts": 4, "block": "gpt2"}}, 1, "model.block 'gpt2' is dense; set model.n_experts to 0"),
        ({"model": {"router_bias": True}}, 1, "model.router_bias need model.n_experts, which is 0"),
        ({"model": {"head_dim": 7}}, 1, "model.head_dim is 7; rotary positions need an even one"),
        ({"model": {"q_lora_rank": 8, "v_head_dim": 8}}, 1, "model.q_lora_rank and model.v_head_dim belong to latent"),
        ({"model": {"kv_lora_rank": -8}}, 1, "model.kv_lora_rank is -8; give a width, or 0"),
        ({"model": {"kv_lora_rank": 8}}, 1, "model.qk_rope_head_dim is 0; latent attention turns an even number"),
        ({"model": {"kv_lora_rank": 8, "qk_rope_head_dim": 3}}, 1, "model.qk_rope_head_dim is 3; latent attention"),
        ({"model": {"kv_lora_rank": 8, "n_kv_heads": 2}}, 1, "model.n_kv_heads is 2, but in latent attention each of"),
        ({"model": {"kv_lora_rank": 8, "block": "gpt2"}}, 1, "model.kv_lora_rank needs rotary positions"),
        (
            {"model": {"rope_mscale": 1.0}},
            1,
            "model.rope_mscale is 1.0, but model.rope_scaling 'none' does not read it",
        ),
        ({"model": {"n_experts": 4, "best_of_group": 0}}, 1, "model.best_of_group is 0; a group's score needs"),
        ({"model": {"rope_scaling": "linear", "rope_factor": 0.5}}, 1, "it needs block 'llama' and a factor of at"),
        ({"model": {"rope_scaling": "llama3", "rope_high_freq_factor": 1.0}}, 1, r"must be above .*low_freq_factor"),
        (
            {"model": {"block": "gpt2", "max_seq_len": 16}},
            1,
            "data.seq_len is 32, the position table has model.max_seq",
        ),
        (
            {"tp": 2, "model": {"n_experts": 4, "n_shared_experts": 1, "d_ff_expert": 3}},
            2,
            r"n_shared_experts × expert",
        ),
        ({"layout": {"pp": 3}}, 4, r"layout.pp \(3\) does not divide the ranks / .* \(4\)"),
        ({"layout": {"pp": 4}}, 4, r"is 4 stages, the model has 2 layers .*: lower layout.pp"),
        ({"layout": {"pp": 2, "stage_layers": "2,1"}}, 2, r"stage_layers is \[2, 1\], .* of 3 layers; give 2 numbers"),
        ({"layout": {"pp": 2, "stage_layers": "x"}}, 2, "stage_layers is 'x'; give numbers of layers, like '3,4,4,3'"),
        ({"layout": {"pp": 2, "chunks": 2}, "model": {"n_layers": 4}}, 2, "set layout.schedule to 'interleaved'"),
        (
            {"layout": {"pp": 2, "schedule": "interleaved"}, "accumulation": 1},
            2,
            r"groups of layout.pp \(2\), which does not divide train.accumulation \(1\)",
        ),
        ({"layout": {"cp": 3}}, 4, r"layout.cp \(3\) does not divide the ranks / layout.tp \(4\)"),
        ({"layout": {"cp": 2}, "data": {"seq_len": 6}}, 2, r"data.seq_len \(6\) is no multiple of 2 × .* \(4\)"),
        (
            {"layout": {"cp": 2, "context": "ulysses"}, "model": {"n_kv_heads": 1}},
            2,
            r"layout.tp × layout.cp \(2\) does not divide model.n_kv_heads \(1\)",
        ),
        ({"layout": {"zero": 4}}, 2, r"layout.zero is 4; give 0 \(no sharding\), 1, 2 or 3"),
        ({"layout": {"zero_ranks": 2}}, 2, "layout.zero_ranks is 2 but layout.zero is 0"),
        ({"layout": {"zero": 1, "zero_ranks": 3}}, 2, r"zero_ranks \(3\) does not divide data × context .* \(2\)"),
        ({"layout": {"zero": 2}, "offload_parameters": True}, 2, "offload_parameters needs layout.zero 3, it is 2"),
        ({"layout": {"zero": 1}, "offload_gradients": True}, 2, "offload_gradients needs layout.zero 2 or 3, it is 1"),
        (
            {"layout": {"zero": 3}, "offload_parameters": True, "device": "cuda"},
            2,
            "train.offload_parameters is for CPUs",
        ),
        (
            {"layout": {"zero": 2}, "offload_gradients": True, "device": "cuda"},
            2,
            "train.offload_gradients is for CPUs",
        ),
        ({"layout": {"zero": 2}, "offload_optimizer": True, "device": "cuda"}, 2, "set layout.zero to 0, or train.off"),
        ({"steps": 0}, 1, "train.steps is 0; it must be at least 1"),
        ({"model": {"n_experts": 4, "n_shared_experts": -1}}, 1, "model.n_shared_experts is -1; give experts, or 0"),
        ({"model": {"n_experts": 4, "d_ff_expert": -4}}, 1, "model.d_ff_expert is -4; give a width, or 0"),
        ({"model": {"head_dim": -8}}, 1, "model.head_dim is -8; give a width, or 0 for model.d_model / model.n_heads"),
        ({"model": {"rope_base": 0.0}}, 1, "model.rope_base is 0.0; give a number above 0, such as 10000.0"),
        (
            {"model": {"rope_scaling": "yarn", "rope_base": 1.0}},
            1,
            "model.rope_base is 1.0, .*'yarn' needs one above 1",
        ),
        ({"model": {"rope_scaling": "yarn", "rope_original_len": 0}}, 1, "model.rope_original_len is 0; it must be at"),
        ({"model": {"rope_low_freq_factor": 0.0}}, 1, "model.rope_low_freq_factor is 0.0; give a number above 0"),
        ({"ep": -1}, 1, "layout.ep is -1; give ranks, or 0 for as many as divide both"),
        ({"seed": 1 << 63}, 1, f"train.seed is {1 << 63}; give 0 to {(1 << 63) - 1}"),
        (
            {"seed": 1 << 40, "data": {"mix": {"a": 1.0}}},
            1,
            f"train.seed .*; give 0 to {(1 << 40) - 1} with data.mix",
        ),
        (
            {"data": {"end_of_document": 256}},
            1,
            r"end_of_document is 256; .* below model.vocab_size \(256\), or -1",
        ),
        ({"data": {"mix": {"a": 1.0, "b": float("inf")}}}, 1, "data.mix gives b the weight inf; give a number above 0"),
        ({"data": {"val_fraction": 1.0}}, 1, "val_fraction is 1.0; it must lie between 0 and 1"),
    ],
)
def test_what_does_not_divide_is_refused(changes: Any, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_layout(tiny(**changes), world_size)


@pytest.mark.parametrize(
    ("table", "key", "value", "fix"),
    [
        ("optimizer", "lr", -1.0, "give a rate above 0"),
        ("optimizer", "lr", float("nan"), "give a rate above 0"),
        ("optimizer", "min_lr_ratio", 1.5, "give 0 to 1"),
        ("optimizer", "warmup_steps", -1, "or 0 for none"),
        ("optimizer", "beta1", 1.0, "below 1"),
        ("optimizer", "beta2", -0.1, "below 1"),
        ("optimizer", "eps", 0.0, "give a number above 0"),
        ("optimizer", "weight_decay", -0.1, "give 0 for none"),
        ("optimizer", "clip_norm", -1.0, "0 for no clipping"),
        ("optimizer", "clip_norm", float("inf"), "0 for no clipping"),
        ("sample", "n_tokens", -1, "give how many tokens"),
        ("sample", "temperature", -0.5, "give 0 for the likeliest"),
        ("sample", "top_k", -1, "or 0 for all"),
        ("train", "memory_gib", -1.0, "or 0 for no limit"),
        ("monitor", "peak_tflops", -1.0, "or 0 to measure"),
        ("monitor", "max_loss_jump", -1.0, "or 0 for never"),
        ("monitor", "profile_first", -1, "or 0 for none"),
        ("monitor", "profile_steps", 0, "give at least 1"),
        ("plan", "gpus", -8, "or 0 for those of the topology"),
        ("plan", "tflops", -1.0, "or 0 to measure"),
        ("plan", "max_cp", 0, "give at least 1"),
        ("plan", "max_pp", 0, "give at least 1"),
        ("plan", "show", 0, "give at least 1"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_the_fix(table: str, key: str, value: float, fix: str) -> None:
    config = tiny()
    config = dataclasses.replace(config, **{table: dataclasses.replace(getattr(config, table), **{key: value})})
    with pytest.raises(ConfigError, match=rf"^{table}\.{key} is {value}; .*{fix}"):
        resolve_layout(config, 1)


def numbers(kind: type) -> list[tuple[str, str]]:
    """(table, key) of each field of this type."""
    tables = {each.name: getattr(Config(), each.name) for each in dataclasses.fields(Config)}
    return [
        (table, each.name)
        for table, values in tables.items()
        if dataclasses.is_dataclass(values)
        for each in dataclasses.fields(values)
        if type(getattr(values, each.name)) is kind
    ]


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        *((table, key, value) for table, key in numbers(float) for value in (float("nan"), float("inf"), -1.0)),
        *((table, key, -7) for table, key in numbers(int)),
    ],
)
def test_every_number_has_its_range(table: str, key: str, value: float) -> None:
    """Of a model with experts, and with workers that read all of [sync]."""
    config = tiny(model={"n_experts": 4}, layout={"zero": 1})
    streaming = SyncConfig(**{**STREAMING, **({"method": "stale"} if key == "staleness" else {})})
    config = dataclasses.replace(config, sync=streaming if table == "sync" else config.sync)
    wrong = dataclasses.replace(config, **{table: dataclasses.replace(getattr(config, table), **{key: value})})
    with pytest.raises(ConfigError, match=rf"{table}\.{key}\b[^;]*{value:g}"):
        resolve_layout(wrong, 2)


def test_a_prompt_of_tokens_that_the_model_does_not_have_is_refused() -> None:
    config = tiny(model={"vocab_size": 300})
    for prompt, accepted in (("0 299", True), ("7 300", False), ("def ", True)):
        asked = dataclasses.replace(config, sample=dataclasses.replace(config.sample, prompt=prompt))
        if accepted:
            resolve_layout(asked, 1)
            continue
        with pytest.raises(ConfigError, match=r"sample\.prompt has the token 300, .* is 300; give tokens of 0 to 299"):
            resolve_layout(asked, 1)
    text = dataclasses.replace(tiny(), sample=dataclasses.replace(config.sample, prompt="in 2025"))
    resolve_layout(text, 1)  # of bytes: text, whose digits are no tokens


def test_a_name_that_leaves_the_folder_of_runs_is_refused() -> None:
    with pytest.raises(ConfigError, match="it must not hold a path"):
        resolve_layout(dataclasses.replace(tiny(), name="../other"), 1)


STALE = {"method": "stale", "workers": 2}
STREAMING = {"method": "streaming_diloco", "workers": 2}


@pytest.mark.parametrize(
    ("changes", "sync", "wire", "message"),
    [
        ({}, {"method": "diloco"}, {}, r"needs sync.workers of at least 2 \(the number of hosts, say\), got 1"),
        ({}, {"workers": 2}, {}, "sync.workers is 2 but sync.method is 'synchronous', .*; choose another method"),
        ({}, {"every": 9}, {}, "sync.every is 9, which sync.method 'synchronous' does not read; .* 'local_sgd' or"),
        ({}, {**STALE, "delay": 3}, {}, "sync.delay is 3, which .* 'stale' does not read; .* to 'streaming_diloco'"),
        ({}, {**STALE, "workers": 3}, {}, r"sync.workers \(3\) does not divide the ranks \(4\)"),
        ({"tp": 4}, STALE, {}, r"layout.tp \(4\) does not divide the ranks \(2\)"),
        (
            {"global_batch": 2},
            STALE,
            {},
            r"2 workers × 2 data parallel ranks .* \(4\) does not divide train.global_batch",
        ),
        ({"eval_sequences": 6}, STALE, {}, r"2 workers × data parallel ranks \(4\) does not divide train.eval_seq"),
        ({}, {**STALE, "staleness": 0}, {}, "sync.staleness is 0; give at least 1"),
        (
            {},
            {**STREAMING, "fragments": 3},
            {},
            r"sync.fragments is 3; give at least 1 and at most 2 \(one for each la",
        ),
        ({}, {**STREAMING, "every": 4, "delay": 4}, {}, r"sync.delay is 4; give at least 0 and at most 3 \(below"),
        ({}, {**STREAMING, "mixing": 1.0}, {}, "sync.mixing is 1.0; it must be at least 0 and below 1"),
        ({}, {**STREAMING, "outer_lr": 0.0}, {}, "sync.outer_lr is 0.0; it must be above 0"),
        (
            {"layout": {"auto": True}},
            STALE,
            {},
            "layout.auto time synchronous steps, not sync.method 'stale'; give",
        ),
        (
            {"model": {"n_experts": 4, "router": "sigmoid", "router_bias": True}},
            STALE,
            {},
            "model.router_bias moves by the load of all ranks .* balance with model.aux_loss_weight",
        ),
        ({}, {}, {"outer": "int8"}, "wire.outer is 'int8' but sync.method is 'synchronous'"),
        ({}, {}, {"pp": "bf16"}, "wire.pp is 'bf16', but activations go between stages as messages"),
        ({"layout": {"cp": 2}}, {}, {"cp": "int8"}, "wire.cp is 'int8', but ring attention .* 'ulysses'"),
        ({}, {}, {"ep": "int4"}, "wire.ep is 'int4'; rows travel to their experts as bf16 or fp8"),
        (
            {"layout": {"zero": 1}},
            {},
            {"dp": "int8"},
            "layout.zero 1 has no error feedback: .* set wire.error_feedback to",
        ),
    ],
)
def test_synchronisation_and_wires_that_make_no_sense_are_refused(
    changes: Any, sync: Any, wire: Any, message: str
) -> None:
    config = dataclasses.replace(tiny(**changes), sync=SyncConfig(**sync), wire=WireConfig(**wire))
    with pytest.raises(ConfigError, match=message):
        resolve_layout(config, 4)
