"""What a rank will need at its peak, before anything is allocated: parameters, gradients, optimizer state, activations.

Activations are counted by tensor, as the layers save them; what allocators lose and the libraries' own code is not.
Where a figure depends on the data (rows of an expert) the mean is taken."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from training import schedules
from training.config import Config, Layout, stages_of
from training.errors import ConfigError
from training.sharding import ParamSpec


@dataclass(frozen=True)
class Estimate:
    """Bytes of one pipeline rank's ranks at their peak."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = [
            f"{name} {nbytes / 2**30:.2f} GiB"
            for name, nbytes in (
                ("parameters", self.parameters),
                ("gradients", self.gradients),
                ("optimizer state", self.optimizer),
                ("activations", self.activations),
            )
        ]
        return f"{self.total / 2**30:.2f} GiB ({', '.join(parts)})"


def estimate(config: Config, layout: Layout, specs: dict[str, ParamSpec], pp_index: int) -> Estimate:
    """Of the ranks of a pipeline rank. specs: of the whole model."""
    train, zero = config.train, config.layout.zero
    itemsize = 2 if train.precision == "bf16" else 4
    stages = stages_of(config)
    parameters = gradients = optimizer = 0.0
    largest: dict[str, float] = {}  # a block's parameters, whole
    parts: dict[str, float] = {}  # of which this rank keeps so many
    for name, spec in specs.items():
        if pp_index not in stages.ranks_of(name) or (
            name == "embedding.weight" and pp_index != stages.ranks_of(name)[0] and not config.model.tie_embeddings
        ):
            continue
        numel, copies = _held(spec, layout, config.layout.zero_ranks)
        if zero == 0:
            copies = 1
        block = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""
        largest[block] = largest.get(block, 0.0) + numel
        whole_parameters = zero < 3 or not block
        parameters += numel * itemsize if whole_parameters else 0
        gradients += 4 * numel / (copies if zero >= 2 else 1)
        gradients += 4 * numel / copies if zero == 1 else 0
        separate = itemsize == 2 or zero > 0
        master_in_file = train.offload_optimizer or (train.offload_parameters and itemsize == 4)
        state = 4 * ((0 if master_in_file else separate) + (0 if train.offload_optimizer else 2))
        if zero and itemsize == 2 and not train.offload_parameters:
            state += itemsize  # what a master rounds to
        optimizer += state * numel / copies
        parts[block] = parts.get(block, 0.0) + numel / copies
        optimizer += 4 * numel / copies * _kept_between_workers(config)
    block_numel = max((numel for block, numel in largest.items() if block), default=0.0)
    if zero == 3:
        parameters += 2 * block_numel * itemsize  # one computes, the next one arrives
    if zero >= 2:  # one is filled, and two of the largest may be on their way (pycomm.overlap.prefetch.IN_FLIGHT)
        gradients += 4 * (block_numel + 2 * max(largest.values(), default=0.0))
    if train.offload_optimizer or train.offload_parameters:
        optimizer += 2 * 12 * max(parts.values(), default=0.0)  # one is updated, the next one arrives
    return Estimate(int(parameters), int(gradients), int(optimizer), _activations(config, layout, pp_index))


def _kept_between_workers(config: Config) -> int:
    """fp32 numbers of each parameter that [sync] keeps: what is exchanged and coding's loss; shared, momentum."""
    sync = config.sync
    if sync.method == "synchronous":
        return 0
    exchange = 2 if config.wire.outer != "none" and config.wire.error_feedback else 1
    if sync.method == "stale":
        return exchange * (sync.staleness + 1)
    return exchange + (1 if sync.method == "local_sgd" else 2)


def _held(spec: ParamSpec, layout: Layout, zero_ranks: int) -> tuple[float, int]:
    """Numbers of a parameter that a rank has as the axes cut it, and the ranks that ZeRO cuts those over."""
    data = layout.dp * layout.cp
    if spec.axis == "ep":
        cut, ranks = layout.expert_ranks, data * layout.tp // layout.expert_ranks
    elif spec.axis is None:
        cut, ranks = 1, data * layout.tp
    else:
        cut, ranks = layout.tp, data
    return math.prod(spec.shape) / cut, zero_ranks or ranks


def _activations(config: Config, layout: Layout, pp_index: int) -> int:
    """What all micro-batches that are held at once saved, and the logits of a chunk."""
    model, train = config.model, config.train
    if train.offload_activations:
        saved = 0.0
    else:
        held = schedules.held(config.layout.schedule, layout.pp, train.accumulation, config.layout.chunks)[pp_index]
        stages = stages_of(config)
        placement = stages.placement
        layers = [i for c in range(placement.n_chunks) for i in stages.layers(placement.stage(pp_index, c))]
        saved = held / placement.n_chunks * sum(_block(config, layout, index) for index in layers)
        if train.recompute == "full":
            saved += max(_block(config, layout, index, "none") for index in layers)
    tokens = config.data.seq_len // layout.cp * (train.global_batch // (layout.n_data * train.accumulation))
    chunk = min(train.loss_chunk, tokens)
    logits = 2 * 4 * chunk * model.vocab_size // layout.tp if stages_of(config).placement.last_rank == pp_index else 0
    return int(saved) + logits


def _block(config: Config, layout: Layout, index: int, recompute: str | None = None) -> float:
    """Bytes that one micro-batch's forward of a block saves."""
    model, train = config.model, config.train
    recompute = recompute or train.recompute
    itemsize = 2 if train.precision == "bf16" else 4
    tokens = config.data.seq_len // layout.cp * (train.global_batch // (layout.n_data * train.accumulation))
    narrow = tokens / layout.tp * model.d_model  # numbers of x between layers
    if recompute == "full":
        return narrow * itemsize
    return sum(_saved(config, layout, index, recompute, tokens, narrow)) * itemsize


def _saved(config: Config, layout: Layout, index: int, recompute: str, tokens: int, narrow: float) -> Iterator[float]:
    """Numbers saved by each part of a block."""
    model = config.model
    yield 2 * narrow * (2 if config.train.precision == "bf16" else 1)  # the norms' inputs, in fp32
    yield 2 * tokens * model.d_model  # gathered, of attention and feed-forward
    query, key = model.n_heads * model.head_width / layout.tp, model.n_kv_heads * model.head_width / layout.tp
    yield tokens * (query + 2 * key)
    if recompute == "none":
        yield tokens * (query + key) * (1 if model.block == "llama" else 0)  # rotated
    yield tokens * query  # attention's output
    matrices = 2 if model.block == "gpt2" else 4  # up and gelu(up); gate, silu(gate), up and their product
    if model.has_experts(index):
        rows = tokens / layout.tp * model.top_k
        yield rows * (matrices * model.expert_width + 3 * model.d_model)
        yield tokens / layout.tp * 4 * model.n_experts
        yield tokens * matrices * model.n_shared_experts * model.expert_width / layout.tp
    else:
        yield tokens * matrices * model.d_ff / layout.tp


def require_fit(config: Config, layout: Layout, specs: dict[str, ParamSpec]) -> Estimate:
    """The largest estimate. Raises ConfigError where it is more than train.memory_gib."""
    estimates = [estimate(config, layout, specs, pp_index) for pp_index in range(layout.pp)]
    most = max(estimates, key=lambda each: each.total)
    allowed = config.train.memory_gib
    if allowed and most.total > allowed * 2**30:
        raise ConfigError(
            f"a rank of pipeline stage {estimates.index(most)} needs about {most}, train.memory_gib allows "
            f"{allowed:g}; {_remedy(config, most)}"
        )
    return most


def _remedy(config: Config, most: Estimate) -> str:
    state = most.parameters + most.gradients + most.optimizer
    if most.activations > state:
        if config.train.recompute != "full":
            return "set train.recompute to 'full', or raise train.accumulation, layout.tp or layout.cp"
        return "raise train.accumulation, layout.tp, layout.cp or layout.pp"
    if config.layout.zero < 3:
        return f"set layout.zero to {config.layout.zero + 1} or more, or raise layout.tp or layout.pp"
    if not config.train.offload_optimizer:
        return "raise layout.tp or layout.pp, use more ranks, or set train.offload_optimizer"
    return "raise layout.tp or layout.pp, use more ranks, or set train.offload_parameters"
