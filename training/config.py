"""What a run is: frozen dataclasses, TOML presets that fill them, and the checks that need no tensor.

A preset is a TOML file whose tables are the dataclasses below; what it leaves out keeps the default. Nothing here knows
torch or pycomm, so a wrong configuration is refused before a process joins a group.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from training.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class ModelConfig:
    """The GPT. Widths are whole; a layout cuts them."""

    vocab_size: int = 256  # bytes
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    n_kv_heads: int = 4  # fewer than n_heads: grouped-query attention
    d_ff: int = 384  # of one expert too
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    n_experts: int = 0  # 0: every block is dense
    top_k: int = 2
    moe_every: int = 1  # every n-th block is a mixture of experts, counted from the last of each n
    aux_loss_weight: float = 0.01


@dataclass(frozen=True)
class DataConfig:
    path: str = "stdlib"  # a text file, a folder of text, .bin or .npy token shards; "stdlib": Python's own source
    seq_len: int = 256
    val_fraction: float = 0.05


@dataclass(frozen=True)
class LayoutConfig:
    """Data parallel ranks are what is left: world_size / tp."""

    tp: int = 1
    ep: int = 1  # expert parallel ranks, taken from the data parallel ones; 0: as many as divide both
    moe_dedup: Literal["auto", "none", "rank", "host"] = "auto"  # copies of a token: one an expert, a rank, a host
    moe_chunks: int = 0  # pieces of a micro-batch's exchange; 0: by the link's rate (docs/moe.md)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 300
    global_batch: int = 16  # sequences a step, over all ranks and micro-batches
    accumulation: int = 1  # micro-batches a step
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: bf16 parameters and activations, fp32 masters and gradients
    bucket_kib: int = 1024  # gradients reduced together
    wire: Literal["none", "bf16", "fp8", "int8", "int4"] = "none"  # how gradients cross hosts (docs/wire.md)
    error_feedback: bool = True  # with a wire: what it loses is added to the next step's gradients
    eval_every: int = 50
    eval_sequences: int = 64
    checkpoint_every: int = 100
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 2e-3
    min_lr_ratio: float = 0.1  # of lr, where the cosine ends
    warmup_steps: int = 20
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; gains are not decayed
    clip_norm: float = 1.0  # of the gradient of the whole model; 0: no clipping


@dataclass(frozen=True)
class SampleConfig:
    prompt: str = "def "
    n_tokens: int = 200
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 40  # 0: all tokens
    seed: int = 0


@dataclass(frozen=True)
class Config:
    name: str = "default"  # of the run; a run of this name that exists is resumed
    out_dir: str = "runs"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.out_dir) / self.name


def load_preset(preset: str) -> Config:
    """The Config of a preset by name, or of the TOML file of that path.

    Raises ConfigError for an unknown preset or key (naming the nearest one), bad TOML, or a value of another type.
    """
    path = Path(preset)
    if path.suffix != ".toml":
        path = PRESETS / f"{preset}.toml"
        if not path.is_file():
            known = sorted(file.stem for file in PRESETS.glob("*.toml"))
            raise ConfigError(f"there is no preset {preset!r}; {_nearest(preset, known)}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the preset {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    config: Config = _from_table(Config, {"name": path.stem, **table}, str(path), "")
    return config


def _from_table(kind: type, table: dict[str, Any], source: str, prefix: str) -> Any:
    types = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in types:
            raise ConfigError(f"{source}: unknown key {prefix + key!r}; {_nearest(key, list(types), prefix)}")
        values[key] = _checked_value(types[key], value, source, prefix + key)
    return kind(**values)


def _checked_value(expected: Any, value: Any, source: str, key: str) -> Any:
    if dataclasses.is_dataclass(expected):
        if not isinstance(value, dict):
            raise ConfigError(f"{source}: {key!r} is a table, got {value!r}; write [{key}]")
        return _from_table(typing.cast(type, expected), value, source, key + ".")
    if typing.get_origin(expected) is Literal:
        if value not in typing.get_args(expected):
            raise ConfigError(f"{source}: {key!r} is one of {', '.join(typing.get_args(expected))}, got {value!r}")
        return value
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ConfigError(f"{source}: {key!r} is a {expected.__name__}, got {value!r}")
    return value


def _nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"the nearest is {prefix + close[0]!r}"
    return f"there are {', '.join(prefix + each for each in known)}"


@dataclass(frozen=True)
class Layout:
    """Ranks of each axis: dp * tp is the world size, and ep divides dp."""

    dp: int
    tp: int
    ep: int
    moe_dedup: Literal["auto", "none", "rank", "host"] = "auto"
    moe_chunks: int = 0

    def __str__(self) -> str:
        return f"dp {self.dp} × tp {self.tp}" + (f", ep {self.ep} inside dp" if self.ep > 1 else "")


def resolve_layout(config: Config, world_size: int) -> Layout:
    """The layout of world_size ranks. Raises ConfigError where something does not divide, naming both numbers."""
    model, data, layout, train = config.model, config.data, config.layout, config.train
    _check_ranges(config)
    _divides("layout.tp", layout.tp, "the ranks", world_size)
    dp, tp = world_size // layout.tp, layout.tp
    for name, width in (
        ("model.n_heads", model.n_heads),
        ("model.n_kv_heads", model.n_kv_heads),
        ("model.d_ff", model.d_ff),
        ("model.vocab_size", model.vocab_size),
        ("data.seq_len", data.seq_len),
    ):
        _divides("layout.tp", tp, name, width)
    _divides("model.n_kv_heads", model.n_kv_heads, "model.n_heads", model.n_heads)
    _divides("twice model.n_heads", 2 * model.n_heads, "model.d_model", model.d_model)
    _divides(
        f"{dp} data parallel ranks × train.accumulation",
        dp * train.accumulation,
        "train.global_batch",
        train.global_batch,
    )
    _divides("data parallel ranks", dp, "train.eval_sequences", train.eval_sequences)
    ep = layout.ep or (math.gcd(dp, model.n_experts) if model.n_experts else 1)
    if ep > 1 and not model.n_experts:
        raise ConfigError(f"layout.ep is {ep} but the model has no experts; set model.n_experts, or layout.ep to 1")
    if model.n_experts:
        _divides("layout.ep", ep, "data parallel ranks", dp)
        _divides("layout.ep", ep, "model.n_experts", model.n_experts)
        _divides("model.moe_every", model.moe_every, "model.n_layers", model.n_layers)
        if not 1 <= model.top_k <= model.n_experts:
            raise ConfigError(f"model.top_k is {model.top_k}: choose 1 to model.n_experts, which is {model.n_experts}")
    if layout.moe_chunks < 0:
        raise ConfigError(f"layout.moe_chunks is {layout.moe_chunks}; give 1 or more, or 0 for the library's choice")
    return Layout(dp, tp, ep, layout.moe_dedup, layout.moe_chunks)


def _divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if divisor < 1 or value % divisor:
        raise ConfigError(f"{divisor_name} ({divisor}) does not divide {name} ({value}); change one of them")


def _check_ranges(config: Config) -> None:
    model, data, train = config.model, config.data, config.train
    for name, value in (
        ("model.vocab_size", model.vocab_size),
        ("model.n_layers", model.n_layers),
        ("model.d_model", model.d_model),
        ("model.n_heads", model.n_heads),
        ("model.n_kv_heads", model.n_kv_heads),
        ("model.d_ff", model.d_ff),
        ("data.seq_len", data.seq_len),
        ("train.steps", train.steps),
        ("train.global_batch", train.global_batch),
        ("train.accumulation", train.accumulation),
        ("train.bucket_kib", train.bucket_kib),
        ("train.eval_every", train.eval_every),
        ("train.eval_sequences", train.eval_sequences),
        ("train.checkpoint_every", train.checkpoint_every),
        ("train.keep_checkpoints", train.keep_checkpoints),
    ):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if not 0.0 < data.val_fraction < 1.0:
        raise ConfigError(f"data.val_fraction is {data.val_fraction}; it must lie between 0 and 1")
    if not config.name or Path(config.name).name != config.name:
        raise ConfigError(f"name is {config.name!r}; it names a folder in out_dir, so it must not hold a path")
