"""What a rank will need at its peak, before anything is allocated.

Parameters, gradients, optimizer state and activations are counted by tensor, as the trainer makes them and the layers
save them; what backward makes on its way is the most that one block or the loss has at a time. Shared memory is what
pycomm's groups use of it. What Python and the libraries take was measured (machine.process_nbytes()). What malloc()
cannot reuse is not counted. Where a figure depends on the data (rows of an expert) the mean is taken."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from training import schedules
from training.config import Config
from training.errors import ConfigError
from training.layout import Layout, stages_of
from training.sharding import ParamSpec


@dataclass(frozen=True)
class Estimate:
    """Bytes of one pipeline rank's ranks at their peak."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int  # what forward saves
    backward: int  # what the loss, or a block's backward, has beside that
    communication: int  # shared memory of groups
    process: int  # Python and libraries

    @property
    def total(self) -> int:
        counted = self.parameters + self.gradients + self.optimizer + self.activations + self.backward
        return counted + self.communication + self.process

    def __str__(self) -> str:
        parts = [
            f"{name} {nbytes / 2**30:.2f} GiB"
            for name, nbytes in (
                ("parameters", self.parameters),
                ("gradients", self.gradients),
                ("optimizer state", self.optimizer),
                ("activations", self.activations),
                ("backward", self.backward),
                ("communication", self.communication),
                ("process", self.process),
            )
            if nbytes
        ]
        return f"{self.total / 2**30:.2f} GiB ({', '.join(parts)})"


def estimate(
    config: Config, layout: Layout, specs: dict[str, ParamSpec], pp_index: int, process_nbytes: int = 0
) -> Estimate:
    """Of the ranks of a pipeline rank. specs: of the whole model. process_nbytes: machine.process_nbytes() where the
    ranks are processes like this one, 0 where nothing is known of them."""
    train, zero = config.train, config.layout.zero
    itemsize = 2 if train.precision == "bf16" else 4
    stages = stages_of(config)
    as_they_come = zero >= 2 or (zero == 1 and train.accumulation == 1)  # whole gradients are reduced, and gone
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
        gradients += 4 * numel / copies
        gradients += 4 * numel if zero and not as_they_come else 0
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
    if as_they_come:  # one is filled, the one before is on its way (pycomm.overlap.prefetch.IN_FLIGHT)
        gradients += 4 * (block_numel + max(largest.values(), default=0.0))
    if train.offload_optimizer or train.offload_parameters:
        optimizer += 2 * 12 * max(parts.values(), default=0.0)  # one is updated, the next one arrives
    return Estimate(
        int(parameters),
        int(gradients),
        int(optimizer),
        int(_activations(config, layout, pp_index)),
        int(_backward(config, layout, specs, pp_index)),
        _shared(layout),
        process_nbytes,
    )


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


def _layers(config: Config, pp_index: int) -> list[int]:
    """The layers of a pipeline rank."""
    stages = stages_of(config)
    placement = stages.placement
    return [i for c in range(placement.n_chunks) for i in stages.layers(placement.stage(pp_index, c))]


def _tokens(config: Config, layout: Layout) -> int:
    """Of a micro-batch on a context parallel rank."""
    return config.data.seq_len // layout.cp * (config.train.global_batch // (layout.n_data * config.train.accumulation))


def _activations(config: Config, layout: Layout, pp_index: int) -> float:
    """What all micro-batches that are held at once saved."""
    train, layers = config.train, _layers(config, pp_index)
    if train.offload_activations:
        return 0.0
    held = schedules.held(config.layout.schedule, layout.pp, train.accumulation, config.layout.chunks)[pp_index]
    saved = held / stages_of(config).placement.n_chunks * sum(_block(config, layout, index) for index in layers)
    if train.recompute == "full":
        saved += max(_block(config, layout, index, "none") for index in layers)
    return saved


def _backward(config: Config, layout: Layout, specs: dict[str, ParamSpec], pp_index: int) -> float:
    """The loss, or the gradients within a block and the largest one of a parameter before it joins the others."""
    model, tokens = config.model, _tokens(config, layout)
    itemsize = 2 if config.train.precision == "bf16" else 4
    narrow = tokens * model.d_model
    inside = max(_inner(config, layout, index) for index in _layers(config, pp_index)) + 2 * narrow
    stages = stages_of(config)
    largest = max(
        _held(spec, layout, 0)[0] for name, spec in specs.items() if pp_index in stages.ranks_of(name)
    )  # of a parameter
    block = (inside + largest) * itemsize
    if stages.placement.last_rank != pp_index:
        return block
    table = model.vocab_size * model.d_model / layout.tp
    logits = 2 * 4 * min(config.train.loss_chunk, tokens) * model.vocab_size / layout.tp
    loss = logits + narrow * itemsize + (4 + 4 + (itemsize if itemsize < 4 else 0)) * table  # its sum, and a chunk's
    return max(block, loss)


def _shared(layout: Layout) -> int:
    """Of the groups along the axes that have ranks, as if each were on one host: blocks of large collectives, and slots
    of small ones, of all its ranks (csrc/cpu/segment.h). Rings are hardly used where messages are large."""
    sizes = {layout.n_ranks, *(n for n in (layout.tp, layout.cp, layout.dp * layout.cp, layout.pp) if n > 1)}
    return sum(shared_nbytes(n) for n in sizes if n > 1)


def shared_nbytes(n_ranks: int) -> int:
    """Stages and large slots of a host's n_ranks, as Segment in csrc/cpu/segment.h has them."""
    stage = min(max(2**23 // n_ranks, 2**18), 2**21) // 2**16 * 2**16
    n_slots = min(max(2**23 // n_ranks // 2**14, 2), 128)
    return n_ranks * (stage + (1 << n_slots.bit_length() - 1) * 2**14)


def _block(config: Config, layout: Layout, index: int, recompute: str | None = None) -> float:
    """Bytes that one micro-batch's forward of a block saves."""
    model, train = config.model, config.train
    recompute = recompute or train.recompute
    itemsize = 2 if train.precision == "bf16" else 4
    tokens = _tokens(config, layout)
    narrow = tokens / layout.tp * model.d_model  # numbers of x between layers
    if recompute == "full":
        return narrow * itemsize
    return sum(_saved(config, layout, index, recompute, tokens, narrow)) * itemsize


def _saved(config: Config, layout: Layout, index: int, recompute: str, tokens: int, narrow: float) -> Iterator[float]:
    """Numbers saved by each part of a block."""
    model = config.model
    of_norm = 1 if model.block == "gpt2" else 2  # RMSNorm keeps x and x / rms(x)
    yield 2 * of_norm * narrow * (2 if config.train.precision == "bf16" else 1)  # in fp32
    yield tokens * model.d_model  # gathered, of feed-forward
    yield from (
        _latent_attention(config, layout, recompute, tokens) if model.latent else _attention(config, layout, tokens)
    )
    yield _inner(config, layout, index)
    if model.has_experts(index):
        split = layout.experts_over_tp == "split"  # then all tp ranks have the rows of the whole sequence
        yield tokens / (1 if split else layout.tp) * 3 * model.top_k * model.d_model
        yield tokens / layout.tp * 4 * model.n_experts


def _attention(config: Config, layout: Layout, tokens: int) -> Iterator[float]:
    model = config.model
    yield tokens * model.d_model  # gathered
    query, key = model.n_heads * model.head_width / layout.tp, model.n_kv_heads * model.head_width / layout.tp
    yield tokens * (query + 2 * key)  # rotated, or with selective recomputation before that
    yield tokens * query  # attention's output


def _latent_attention(config: Config, layout: Layout, recompute: str, tokens: int) -> Iterator[float]:
    model, heads = config.model, config.model.n_heads / layout.tp
    latents = model.q_lora_rank + model.kv_lora_rank
    yield tokens * model.d_model / (layout.tp if model.q_lora_rank else 1)  # x, gathered where queries come from it
    yield 2 * tokens / layout.tp * latents * (2 if config.train.precision == "bf16" else 1)  # their norms' own, in fp32
    yield tokens * (latents + model.qk_rope_head_dim)  # gathered
    both = model.head_width + model.v_width
    if recompute == "none":
        wide = max(model.qk_width, model.v_width)  # of a value too, as the flash kernel takes it
        yield tokens * heads * (2 * model.qk_width + 2 * wide)  # query, key, value, output
    else:
        yield tokens * heads * (model.qk_width + both)
    yield tokens * heads * model.v_width  # attention's output


def _inner(config: Config, layout: Layout, index: int) -> float:
    """Numbers of a feed-forward's inner tensors: up and gelu(up), or gate, silu(gate), up and their product."""
    model = config.model
    width = float(model.d_ff)
    if model.has_experts(index):
        width = model.top_k * model.expert_width + model.n_shared_experts * model.expert_width
    return _tokens(config, layout) * (2 if model.block == "gpt2" else 4) * width / layout.tp


def require_fit(
    config: Config,
    layout: Layout,
    specs: dict[str, ParamSpec],
    process_nbytes: int = 0,
    gpu_nbytes: int | None = None,
) -> Estimate:
    """The largest estimate(). gpu_nbytes: what a rank's GPU has free; None for ranks on CPUs.

    Raises ConfigError where it is more than train.memory_gib, or without that than the GPU has."""
    estimates = [estimate(config, layout, specs, pp_index, process_nbytes) for pp_index in range(layout.pp)]
    if gpu_nbytes is not None:
        estimates = [dataclasses.replace(each, communication=0) for each in estimates]  # it is in host memory
    most = max(estimates, key=lambda each: each.total)
    allowed = config.train.memory_gib
    if allowed and most.total > allowed * 2**30:
        limit = f"train.memory_gib allows {allowed:g}"
    elif not allowed and gpu_nbytes is not None and most.total > gpu_nbytes:
        limit = f"the GPU has {gpu_nbytes / 2**30:.2f} GiB free"
    else:
        return most
    raise ConfigError(
        f"a rank of pipeline stage {estimates.index(most)} needs about {most}, {limit}; {_remedy(config, most)}"
    )


def _remedy(config: Config, most: Estimate) -> str:
    state = most.parameters + most.gradients + most.optimizer
    if most.activations + most.backward > state:
        if config.train.recompute != "full":
            return "set train.recompute to 'full', or raise train.accumulation, layout.tp or layout.cp"
        return "raise train.accumulation, layout.tp, layout.cp or layout.pp"
    if config.layout.zero < 3:
        return f"set layout.zero to {config.layout.zero + 1} or more, or raise layout.tp or layout.pp"
    if not config.train.offload_optimizer:
        return "raise layout.tp or layout.pp, use more ranks, or set train.offload_optimizer"
    return "raise layout.tp or layout.pp, use more ranks, or set train.offload_parameters"
