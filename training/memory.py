"""What a rank will need at its peak, before anything is allocated.

Parameters, gradients and optimizer state are counted by tensor, as the trainer makes them; activations, and what a
backward makes on its way, by activations.py. Shared memory is what pycomm's groups use of it. What Python and the
libraries take was measured (machine.process_nbytes()), and what malloc() holds beside tensors is a share of them that
was measured too (_UNUSED). Where a figure depends on the data (rows of an expert) the mean is taken."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from training import activations
from training.activations import held
from training.config import Config
from training.errors import ConfigError
from training.layout import Layout, stages_of
from training.sharding import ParamSpec

# Of tensors in host memory: pages between them that malloc() cannot give to others, and the libraries' buffers. Bytes,
# and the share of what is counted, that layouts of benchmarks/training_memory.py had (docs/training_figures.md).
_UNUSED = (24 << 20, 0.06)


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
    unused: int  # what malloc() holds beside all this

    @property
    def tensors(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.backward

    @property
    def total(self) -> int:
        return self.tensors + self.communication + self.process + self.unused

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
                ("unused", self.unused),
            )
            if nbytes
        ]
        return f"{self.total / 2**30:.2f} GiB ({', '.join(parts)})"


def estimate(
    config: Config,
    layout: Layout,
    specs: dict[str, ParamSpec],
    pp_index: int,
    process_nbytes: int = 0,
    on_gpu: bool = False,
) -> Estimate:
    """Of the ranks of a pipeline rank. specs: of the whole model. process_nbytes: machine.process_nbytes() where the
    ranks are processes like this one, 0 where nothing is known of them: then of tensors alone. on_gpu: whether tensors
    are on GPUs, whose attention kernels are others."""
    train, zero = config.train, config.layout.zero
    itemsize = train.itemsize
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
        numel, copies = held(spec, layout, config.layout.zero_ranks)
        if zero == 0:
            copies = 1
        block = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""
        largest[block] = largest.get(block, 0.0) + numel
        whole_parameters = zero < 3 or not block
        parameters += numel * itemsize if whole_parameters else 0
        gradients += 0 if train.offload_gradients else 4 * numel / copies
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
    saved = activations.saved(config, layout, pp_index, on_gpu)
    backward = activations.backward(config, layout, specs, pp_index, on_gpu)
    if train.offload_optimizer or train.offload_parameters or train.offload_gradients:
        # One is updated, the next one arrives, once all of backward is gone.
        update = 2 * (16 if train.offload_gradients else 12) * max(parts.values(), default=0.0)
        optimizer += max(0.0, update - saved - backward)
    found = Estimate(
        int(parameters),
        int(gradients),
        int(optimizer),
        int(saved),
        int(backward),
        _shared(layout),
        process_nbytes,
        0,
    )
    if on_gpu or not process_nbytes:
        return found
    least, share = _UNUSED
    return dataclasses.replace(found, unused=int(least + share * found.tensors))


def _kept_between_workers(config: Config) -> int:
    """fp32 numbers of each parameter that [sync] keeps: what is exchanged and coding's loss; shared, momentum."""
    sync = config.sync
    if sync.method == "synchronous":
        return 0
    exchange = 2 if config.wire.outer != "none" and config.wire.error_feedback else 1
    if sync.method == "stale":
        return exchange * (sync.staleness + 1)
    return exchange + (1 if sync.method == "local_sgd" else 2)


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


def require_fit(
    config: Config,
    layout: Layout,
    specs: dict[str, ParamSpec],
    process_nbytes: int = 0,
    gpu_nbytes: int | None = None,
) -> Estimate:
    """The largest estimate(). gpu_nbytes: what a rank's GPU has free; None for ranks on CPUs.

    Raises ConfigError where it is more than train.memory_gib, or without that than the GPU has."""
    on_gpu = gpu_nbytes is not None or config.train.device == "cuda"
    estimates = [estimate(config, layout, specs, pp_index, process_nbytes, on_gpu) for pp_index in range(layout.pp)]
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
