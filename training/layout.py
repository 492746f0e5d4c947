"""The layout of a run's ranks: what a Config asks for, resolved for a world and checked.

Nothing here knows torch or pycomm, so a wrong layout is refused before a process joins a group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from training import checks, ranges, schedules
from training.config import Config
from training.errors import ConfigError
from training.stages import Placement, Stages, assign_layers


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
    experts_over_tp: Literal["none", "spread", "split"] = "none"
    tp_overlap: Literal["auto", "always", "never"] = "auto"
    workers: int = 1
    outermost: Literal["pp", "dp"] = "pp"

    @property
    def replicas(self) -> int:
        """Copies of all that ranks of pp, ep, cp and tp hold between them."""
        return self.dp // self.ep

    @property
    def expert_ranks(self) -> int:
        """Over how many ranks the experts are cut, between them or inside."""
        return self.ep * (1 if self.experts_over_tp == "none" else self.tp)

    def __str__(self) -> str:
        axes = [f"{self.workers} workers"] if self.workers > 1 else []
        axes += [f"dp {self.dp}", f"tp {self.tp}"]
        axes += [f"{name} {n}" for name, n in (("cp", self.cp), ("pp", self.pp)) if n > 1]
        return (
            " × ".join(axes)
            + (f", ep {self.ep} inside dp" if self.ep > 1 else "")
            + ("" if self.experts_over_tp == "none" else f", experts {self.experts_over_tp} over tp")
            + (", dp outermost" if self.outermost == "dp" and self.pp > 1 and self.replicas > 1 else "")
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
    ranges.check(config)
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
        if layout.experts_over_tp == "spread":
            checks.divides("layout.ep × layout.tp", ep * tp, "model.n_experts", model.n_experts)
        if layout.experts_over_tp == "split":
            checks.divides("layout.tp", tp, "the width of an expert", model.expert_width)
    elif layout.experts_over_tp != "none":
        raise ConfigError(
            f"layout.experts_over_tp is {layout.experts_over_tp!r} but the model has no experts; set model.n_experts, "
            "or leave it out"
        )
    stages_of(config)
    schedules.plan(layout.schedule, layout.pp, train.accumulation, layout.chunks)
    # auto times products, so that the last bits may differ from run to run; pieces cross whole, and are neither fp8
    # products nor in graphs.
    whole = config.monitor.deterministic or config.wire.tp != "none" or train.matmul == "fp8" or train.cuda_graph
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
        outermost=layout.outermost,
    )
    checks.zero(config, found)
    if train.device == "cuda":  # with "auto", when ranks know what they have
        checks.offload_on_gpus(config)
    checks.wires(config)
    checks.products(config, found)
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
