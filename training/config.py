"""What a run is: frozen dataclasses, which presets.py fills and layout.py checks. Nothing here knows torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from training.model_config import ModelConfig

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
    context_latents: bool = True  # of latent attention, latents go instead of heads' keys and values
    pp: int = 1  # pipeline parallel
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zbv"] = "1f1b"  # training/schedules.py
    chunks: int = 1  # interleaved: stages a rank has; zbv has 2
    stage_layers: str = ""  # "3,4,4,3": layers of each stage, in order; "": evenly
    ep: int = 1  # expert parallel ranks, taken from the data parallel ones; 0: as many as divide both
    # none: each tp rank has its ep rank's experts; spread: a part of them, whole; split: a part of each one's width
    experts_over_tp: Literal["none", "spread", "split"] = "none"
    zero: int = 0  # 1: optimizer state cut over data parallel ranks; 2: and gradients; 3: and parameters
    zero_ranks: int = 0  # over how many ranks, the rest hold copies (hybrid); 0: all
    # flat: a copy of a token for each of its experts; dedup: for each rank or host; overlapped: experts run meanwhile
    moe_exchange: Literal["flat", "dedup", "overlapped"] = "dedup"
    moe_dedup: Literal["auto", "rank", "host"] = "auto"  # where not flat: copies of a token, one a rank or one a host
    moe_chunks: int = 0  # pieces of a micro-batch's exchange; 0: by the link's rate (docs/moe.md)
    # Whose ranks are farthest apart: stages, or copies of the pipeline (a host then has whole ones; training/mesh.py)
    outermost: Literal["pp", "dp"] = "pp"
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
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: GPUs where every rank has one
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: bf16 parameters and activations, fp32 masters and gradients
    bucket_kib: int = 0  # gradients reduced together, at most; 0: as the links ask for (docs/overlap.md)
    eval_every: int = 50
    eval_sequences: int = 64
    recompute: Literal["none", "selective", "full"] = "none"  # activations: attention's own, or all within a block
    offload_optimizer: bool = False  # masters and moments in a mapped file
    offload_parameters: bool = False  # with layout.zero 3, each rank's part of blocks in a mapped file
    offload_gradients: bool = False  # with layout.zero 2 or 3, each rank's part of summed gradients in a mapped file
    offload_activations: bool = False  # what backward needs in a mapped file
    offload_dir: str = ""  # "": offload in the run's folder
    matmul: Literal["plain", "fp8"] = "plain"  # products of linear layers: as train.precision says, or fp8 on GPUs
    compile: bool = False  # blocks by torch.compile
    cuda_graph: bool = False  # a step as one graph, on GPUs
    loss_chunk: int = 1024  # tokens whose logits exist at a time
    memory_gib: float = 0.0  # of a rank; a run that is predicted to need more is refused; 0: not checked
    checkpoint_every: int = 100
    keep_checkpoints: int = 2

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter or an activation."""
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True)
class WireConfig:
    """How each axis's values cross hosts (docs/wire.md); inside a host all stays as it is. "none": as they are."""

    dp: Wire = "none"  # gradients
    outer: Wire = "none"  # between workers ([sync]): differences of parameters, or gradients
    tp: Wire = "none"  # activations and their gradients, gathered and scattered around layers
    cp: Wire = "none"  # attention's heads, and latents, with layout.context "ulysses"
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
