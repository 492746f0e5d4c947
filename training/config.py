"""What a run is: frozen dataclasses, TOML presets that fill them, and the checks that need no tensor.

A preset is a TOML file whose tables are the dataclasses below; what it leaves out keeps the default. Nothing here knows
torch or pycomm, so a wrong configuration is refused before a process joins a group.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from training import checks, schedules
from training.errors import ConfigError
from training.model_config import ModelConfig
from training.stages import Placement, Stages, assign_layers

PRESETS = Path(__file__).parent / "presets"

Wire = Literal["none", "bf16", "fp8", "int8", "int4"]


@dataclass(frozen=True)
class DataConfig:
    path: str = "stdlib"  # text, JSONL or token shards, a file or a folder; "stdlib": Python's own source
    mix: dict[str, float] = field(default_factory=dict)  # instead of path: several, and how often each has its turn
    text_field: str = "text"  # of a JSONL line
    tokenizer: str = "bytes"  # or a tokenizer.json
    end_of_document: int = -1  # a token; -1: the tokenizer's own, and none in token shards
    document_mask: bool = False  # attention does not cross documents
    seq_len: int = 256
    val_fraction: float = 0.05


@dataclass(frozen=True)
class LayoutConfig:
    """Data parallel ranks are what is left: world_size / (tp × cp × pp). docs/trainer.md says what each axis does."""

    tp: int = 1
    tp_overlap: Literal["auto", "always", "never"] = "auto"  # products beside tp's exchanges; auto: where that gains
    cp: int = 1  # context parallel: each rank has 1 / cp of every sequence
    context: Literal["ring", "ulysses"] = "ring"  # keys and values go around, or heads and sequence change places
    pp: int = 1  # pipeline parallel
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zbv"] = "1f1b"  # training/schedules.py
    chunks: int = 1  # interleaved: stages a rank has; zbv has 2
    stage_layers: str = ""  # "3,4,4,3": layers of each stage, in order; "": evenly
    ep: int = 1  # expert parallel ranks, taken from the data parallel ones; 0: as many as divide both
    experts_over_tp: bool = False  # experts are cut over ep × tp ranks; else each tp rank has its ep rank's whole
    zero: int = 0  # 1: optimizer state cut over data parallel ranks; 2: and gradients; 3: and parameters
    zero_ranks: int = 0  # over how many ranks, the rest hold copies (hybrid); 0: all
    # flat: a copy of a token for each of its experts; dedup: for each rank or host; overlapped: experts run meanwhile
    moe_exchange: Literal["flat", "dedup", "overlapped"] = "dedup"
    moe_dedup: Literal["auto", "rank", "host"] = "auto"  # where not flat: copies of a token, one a rank or one a host
    moe_chunks: int = 0  # pieces of a micro-batch's exchange; 0: by the link's rate (docs/moe.md)
    auto: bool = False  # the planner's first choice instead of the axes, schedule, zero and accumulation given


@dataclass(frozen=True)
class PlanConfig:
    """What `plan` searches for; docs/trainer.md says what it counts."""

    gpus: int = 0  # ranks; 0: those of the topology
    topology: str = ""  # the file of the ranks' hosts and links (docs/topology.md)
    tflops: float = 0.0  # that a rank reaches in the layers; 0: monitor.peak_tflops, or else what a layer reaches here
    max_cp: int = 64  # context parallel ranks tried at most
    max_pp: int = 16  # pipeline ranks tried at most
    show: int = 5  # layouts in the table


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 300
    global_batch: int = 16  # sequences a step, over all ranks and micro-batches
    accumulation: int = 1  # micro-batches a step
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: bf16 parameters and activations, fp32 masters and gradients
    bucket_kib: int = 0  # gradients reduced together, at most; 0: as the links ask for (docs/overlap.md)
    eval_every: int = 50
    eval_sequences: int = 64
    recompute: Literal["none", "selective", "full"] = "none"  # activations: attention's own, or all within a block
    offload_optimizer: bool = False  # masters and moments in a mapped file
    offload_parameters: bool = False  # with layout.zero 3, each rank's part of them in a mapped file
    offload_activations: bool = False  # what backward needs in a mapped file
    offload_dir: str = ""  # "": offload in the run's folder
    loss_chunk: int = 1024  # tokens whose logits exist at a time
    memory_gib: float = 0.0  # of a rank; a run that is predicted to need more is refused; 0: not checked
    checkpoint_every: int = 100
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class WireConfig:
    """How each axis's values cross hosts (docs/wire.md); inside a host all stays as it is. "none": as they are."""

    dp: Wire = "none"  # gradients
    outer: Wire = "none"  # between workers ([sync]): differences of parameters, or gradients
    tp: Wire = "none"  # activations and their gradients, gathered and scattered around layers
    cp: Wire = "none"  # attention's heads, with layout.context "ulysses"
    ep: Wire = "none"  # rows to their experts: bf16 or fp8
    pp: Wire = "none"  # refused: messages have no wire
    error_feedback: bool = True  # dp, outer: what coding loses is added to what is sent next


@dataclass(frozen=True)
class SyncConfig:
    """When ranks agree on parameters (docs/synchronise.md). Workers are neighbouring ranks, a host's say, that have one
    model between them; what the other axes exchange stays within a worker."""

    method: Literal["synchronous", "local_sgd", "diloco", "streaming_diloco", "stale"] = "synchronous"
    workers: int = 1
    every: int = 50  # local_sgd, diloco, streaming_diloco: steps between exchanges
    outer_lr: float = 0.7  # diloco, streaming_diloco
    outer_momentum: float = 0.9  # the same; Nesterov's
    fragments: int = 2  # streaming_diloco: parts of the model that take turns
    delay: int = 1  # streaming_diloco: steps that an exchange may take beside computation
    mixing: float = 0.5  # streaming_diloco: the share of a worker's own parameters that it keeps at an exchange
    staleness: int = 1  # stale: steps after which gradients are applied


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
class ExportConfig:
    folder: str = ""  # "": hugging_face in the run's folder
    precision: Literal["fp32", "bf16"] = "bf16"


@dataclass(frozen=True)
class MonitorConfig:
    tensorboard: bool = False  # also to <run>/tensorboard
    wandb: bool = False  # also to Weights & Biases; its own WANDB_ variables say where
    wandb_project: str = "pycomm"
    peak_tflops: float = 0.0  # of one rank, that MFU is a share of; 0: what a matrix product reaches here
    max_loss_jump: float = 3.0  # nats above the median of the last 20 steps at which a run stops; 0: never
    profile_first: int = 0  # the first step that torch's profiler records, on every rank; 0: none
    profile_steps: int = 1
    deterministic: bool = False  # operators that may give other numbers from run to run are refused


@dataclass(frozen=True)
class Config:
    name: str = "default"  # of the run; a run of this name that exists is resumed
    out_dir: str = "runs"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.out_dir) / self.name

    @property
    def offload_dir(self) -> Path:
        return Path(self.train.offload_dir) if self.train.offload_dir else self.run_dir / "offload"


def load_preset(preset: str) -> Config:
    """The Config of a preset by name, or of the TOML file of that path.

    Raises ConfigError for an unknown preset or key (naming the nearest one), bad TOML, or a value of another type.
    """
    path = Path(preset)
    if path.suffix != ".toml":
        path = PRESETS / f"{preset}.toml"
        if not path.is_file():
            known = sorted(file.stem for file in PRESETS.glob("*.toml"))
            raise ConfigError(f"there is no preset {preset!r}; {nearest(preset, known)}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the preset {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    config: Config = _from_table(Config, {"name": path.stem, **table}, str(path), "")
    return config


def to_toml(config: Config) -> str:
    """A preset of the values that are not the defaults."""
    lines: list[str] = []
    tables: list[str] = []
    for key, value in dataclasses.asdict(config).items():
        default = dataclasses.asdict(Config())[key]
        if not isinstance(value, dict):
            lines.append(f"{key} = {_toml(value)}")
        elif changed := {name: each for name, each in value.items() if each != default[name]}:
            tables += ["", f"[{key}]", *(f"{name} = {_toml(each)}" for name, each in changed.items())]
    return "\n".join([*lines, *tables]) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)  # TOML's strings, numbers and booleans are JSON's


def _from_table(kind: type, table: dict[str, Any], source: str, prefix: str) -> Any:
    types = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in types:
            raise ConfigError(f"{source}: unknown key {prefix + key!r}; {nearest(key, list(types), prefix)}")
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
    if typing.get_origin(expected) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{source}: {key!r} is a table, got {value!r}; write [{key}]")
        of_values = typing.get_args(expected)[1]
        return {name: _checked_value(of_values, each, source, f"{key}.{name}") for name, each in value.items()}
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ConfigError(f"{source}: {key!r} is a {expected.__name__}, got {value!r}")
    return value


def nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    """Of the known names the one that was probably meant, in words, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"the nearest is {prefix + close[0]!r}"
    return f"there are {', '.join(prefix + each for each in known)}"


@dataclass(frozen=True)
class Layout:
    """Ranks of each axis: workers * pp * dp * cp * tp is the world size, and ep divides dp, a worker's own."""

    dp: int
    tp: int
    ep: int
    cp: int = 1
    pp: int = 1
    moe_exchange: Literal["flat", "dedup", "overlapped"] = "dedup"
    moe_dedup: Literal["auto", "rank", "host"] = "auto"
    moe_chunks: int = 0
    experts_over_tp: bool = False
    tp_overlap: Literal["auto", "always", "never"] = "auto"
    workers: int = 1

    @property
    def expert_ranks(self) -> int:
        """Over how many ranks the experts are cut."""
        return self.ep * (self.tp if self.experts_over_tp else 1)

    def __str__(self) -> str:
        axes = [f"{self.workers} workers"] if self.workers > 1 else []
        axes += [f"dp {self.dp}", f"tp {self.tp}"]
        axes += [f"{name} {n}" for name, n in (("cp", self.cp), ("pp", self.pp)) if n > 1]
        return (
            " × ".join(axes)
            + (f", ep {self.ep} inside dp" if self.ep > 1 else "")
            + (", experts over tp too" if self.experts_over_tp else "")
        )

    @property
    def worker_ranks(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def n_ranks(self) -> int:
        return self.workers * self.worker_ranks

    @property
    def n_data(self) -> int:
        """Parts that a batch is cut into."""
        return self.workers * self.dp


def resolve_layout(config: Config, world_size: int) -> Layout:
    """The layout of world_size ranks. Raises ConfigError where something does not divide, naming both numbers."""
    model, data, layout, train = config.model, config.data, config.layout, config.train
    checks.ranges(config)
    checks.synchronisation(config, world_size)
    world_size //= config.sync.workers
    checks.divides("layout.tp", layout.tp, "the ranks", world_size)
    checks.divides("layout.cp", layout.cp, "the ranks / layout.tp", world_size // layout.tp)
    checks.divides("layout.pp", layout.pp, "the ranks / (layout.tp × layout.cp)", world_size // (layout.tp * layout.cp))
    tp, cp = layout.tp, layout.cp
    dp = world_size // (tp * cp * layout.pp)
    of_workers = f"{config.sync.workers} workers × " if config.sync.workers > 1 else ""
    for name, width in (
        ("model.n_heads", model.n_heads),
        ("model.n_kv_heads", model.n_kv_heads),
        ("model.d_ff", model.d_ff),
        ("model.n_shared_experts × expert width", model.n_shared_experts * model.expert_width),
        ("model.vocab_size", model.vocab_size),
        ("data.seq_len", data.seq_len),
    ):
        checks.divides("layout.tp", tp, name, width)
    checks.context(config)
    checks.divides(
        f"{of_workers}{dp} data parallel ranks × train.accumulation",
        config.sync.workers * dp * train.accumulation,
        "train.global_batch",
        train.global_batch,
    )
    n_data = config.sync.workers * dp
    checks.divides(f"{of_workers}data parallel ranks", n_data, "train.eval_sequences", train.eval_sequences)
    ep = layout.ep or (math.gcd(dp, model.n_experts) if model.n_experts else 1)
    if ep > 1 and not model.n_experts:
        raise ConfigError(f"layout.ep is {ep} but the model has no experts; set model.n_experts, or layout.ep to 1")
    if model.n_experts:
        checks.divides("layout.ep", ep, "data parallel ranks", dp)
        checks.divides("layout.ep", ep, "model.n_experts", model.n_experts)
        if layout.experts_over_tp:
            checks.divides("layout.ep × layout.tp", ep * tp, "model.n_experts", model.n_experts)
    elif layout.experts_over_tp:
        raise ConfigError(
            "layout.experts_over_tp is set but the model has no experts; set model.n_experts, or unset it"
        )
    stages_of(config)
    schedules.plan(layout.schedule, layout.pp, train.accumulation, layout.chunks)
    # auto times products, so that the last bits may differ from run to run; pieces cross whole.
    whole = config.monitor.deterministic or config.wire.tp != "none"
    tp_overlap = "never" if layout.tp_overlap == "auto" and whole else layout.tp_overlap
    found = Layout(
        dp=dp,
        tp=tp,
        ep=ep,
        cp=cp,
        pp=layout.pp,
        moe_exchange=layout.moe_exchange,
        moe_dedup=layout.moe_dedup,
        moe_chunks=layout.moe_chunks,
        experts_over_tp=layout.experts_over_tp,
        tp_overlap=tp_overlap,
        workers=config.sync.workers,
    )
    checks.zero(config, found)
    checks.wires(config)
    if layout.moe_chunks < 0:
        raise ConfigError(f"layout.moe_chunks is {layout.moe_chunks}; give 1 or more, or 0 for the library's choice")
    if layout.moe_exchange == "flat" and layout.moe_dedup != "auto":
        raise ConfigError(
            f"layout.moe_dedup is {layout.moe_dedup!r} but layout.moe_exchange is 'flat', which sends a copy for each "
            "expert; set moe_exchange to 'dedup' or 'overlapped'"
        )
    return found


def stages_of(config: Config) -> Stages:
    """Which layers each pipeline stage has. Raises ConfigError for what cannot be."""
    layout = config.layout
    try:
        given = [int(each) for each in layout.stage_layers.split(",")] if layout.stage_layers else []
    except ValueError:
        raise ConfigError(
            f"layout.stage_layers is {layout.stage_layers!r}; give numbers of layers, like '3,4,4,3'"
        ) from None
    if layout.pp < 1 or layout.chunks < 1:
        raise ConfigError(f"layout.pp is {layout.pp}, layout.chunks {layout.chunks}; each must be at least 1")
    zbv = layout.schedule == "zbv" and layout.pp > 1
    placement = Placement(layout.pp, 2 if zbv else layout.chunks, zbv)
    return assign_layers(config.model.n_layers, placement, given)
