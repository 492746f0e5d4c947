"""How long a step of a layout will take, from FLOPs, rates (rates.py), and the closed form of each collective.

    step = compute + bubble + update + what each axis exposes

compute  FLOPs of the busiest pipeline rank's part of all micro-batches / the rate, and what each of its layers takes
         beside them; recomputation included
bubble   what schedules.check() leaves that rank idle, with the time of each stage's actions, tp, cp and ep included
tp       all_gather and reduce_scatter of the sequence, less what tp_overlap computes beside them (tensor_time.py)
ep       whole: layers wait for it (an all_to_all of a row an expert)
cp       ring: what a pass takes longer than the attention beside it; ulysses: whole
pp       by how much check() is later when messages between stages take their time, one after the other on each way
dp       gradients and parameters (gradient_time.py), less what a rank has time for until the last one is done
update   the norm and AdamW of what the busiest rank updates, and all ranks' meeting for the norm

What layers wait for (tp, ep, ulysses, messages between stages) takes their ranks' meeting too.
Not counted: elementwise work beside the layers', loading data, axes that share a link at once, a wire."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from training import schedules
from training.config import Config
from training.gradient_time import at_end
from training.layout import Layout, stages_of
from training.links import Groups, Links, around_cp, between_stages, groups_of
from training.model_config import ModelConfig
from training.rates import Rates
from training.sharding import ParamSpec
from training.stages import Stages
from training.tensor_time import TensorTime

AXES = ("tp", "cp", "ep", "pp", "dp")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; exposed_s by axis, one of each of AXES."""

    compute_s: float
    bubble_s: float
    update_s: float
    exposed_s: dict[str, float]

    @property
    def parts(self) -> dict[str, float]:
        """They add up to total_s."""
        return {"compute": self.compute_s, "bubble": self.bubble_s, "update": self.update_s, **self.exposed_s}

    @property
    def total_s(self) -> float:
        return sum(self.parts.values())


class Costs:
    """What one token costs each part of a model, and the numbers of its parameters by the axis that cuts them."""

    def __init__(self, model: ModelConfig, specs: Mapping[str, ParamSpec]) -> None:
        """specs: of the whole model."""
        self.model = model
        self.numel: dict[str, dict[str | None, float]] = {}  # of "0", "1", .. (blocks) and of what is in no block
        active: dict[str, float] = {}
        for name, spec in specs.items():
            part = name.split(".")[1] if name.startswith("blocks.") else name.split(".")[0]
            numel = 1.0
            for length in spec.shape:
                numel *= length
            of_part = self.numel.setdefault(part, {})
            of_part[spec.axis] = of_part.get(spec.axis, 0.0) + numel
            share = model.top_k / model.n_experts if spec.axis == "ep" else 1.0
            active[part] = active.get(part, 0.0) + numel * share
        self.blocks = [2.0 * active[str(index)] for index in range(model.n_layers)]  # FLOPs of a token's forward
        self.head = 2.0 * (active["embedding" if model.tie_embeddings else "head"] + active["norm"])

    def core(self, seq_len: int) -> float:
        """FLOPs of a token's forward in attention itself, counted whole as ModelConfig.flops_per_token() does."""
        return 2.0 * self.model.n_heads * (self.model.qk_width + self.model.v_width) * seq_len


@dataclass(frozen=True)
class _Action:
    """Seconds of a stage for one micro-batch: compute, and what blocks it by axis, forward and backward."""

    forward_s: float
    input_s: float
    weight_s: float
    blocked: dict[str, tuple[float, float]]

    @property
    def compute_s(self) -> float:
        return self.forward_s + self.input_s + self.weight_s

    @property
    def total_s(self) -> float:
        return self.compute_s + sum(map(sum, self.blocked.values()))


def step_time(config: Config, layout: Layout, costs: Costs, links: Links, rates: Rates) -> StepTime:
    """rates: of a rank, whose meetings links counts. config: whose layout was resolved to `layout`."""
    stages, m = stages_of(config), config.train.accumulation
    placement = stages.placement
    groups = groups_of(layout)
    tp = TensorTime(config, layout, links, groups["tp"], _tokens(config, layout), rates.flops_per_s)
    per_stage = [
        _stage(config, layout, costs, links, groups, tp, stages, stage, rates) for stage in range(placement.n_stages)
    ]
    of_rank = [
        [per_stage[placement.stage(rank, chunk)] for chunk in range(placement.n_chunks)] for rank in range(layout.pp)
    ]
    busiest = max(range(layout.pp), key=lambda rank: sum(each.total_s for each in of_rank[rank]))
    hops = _hops(config, layout, links, stages)
    still, moving = (_timing(config, layout, tuple(per_stage), placement.n_chunks, each) for each in ((), hops))
    exposed = {axis: m * sum(sum(each.blocked[axis]) for each in of_rank[busiest]) for axis in ("tp", "cp", "ep")}
    exposed["pp"] = moving.makespan - still.makespan
    ends = [
        at_end(config, layout, costs.numel, links, groups, stages, pp_index, _backward(actions), rates.update_s)
        for pp_index, actions in enumerate(of_rank)
    ]
    reduced = [end + gradients for end, (gradients, _) in zip(moving.end, ends, strict=True)]
    updated = [end + update for end, (_, update) in zip(reduced, ends, strict=True)]
    exposed["dp"] = max(reduced) - moving.makespan
    update_s = max(updated) - max(reduced)
    if rates.update_s:
        update_s += links.meeting_s(np.arange(layout.n_ranks).reshape(1, -1))
    return StepTime(m * sum(each.compute_s for each in of_rank[busiest]), still.idle[busiest], update_s, exposed)


def _backward(actions: list[_Action]) -> tuple[float, float]:
    """Seconds that a micro-batch computes on a pipeline rank, forward and backward."""
    return sum(each.forward_s for each in actions), sum(each.input_s + each.weight_s for each in actions)


def _timing(
    config: Config, layout: Layout, stages: tuple[_Action, ...], n_chunks: int, hops: tuple[float, ...]
) -> schedules.Timing:
    forward = tuple(each.forward_s + sum(f for f, _ in each.blocked.values()) for each in stages)
    backward = tuple(each.input_s + sum(b for _, b in each.blocked.values()) for each in stages)
    weights = tuple(each.weight_s for each in stages)
    return _check(
        config.layout.schedule, layout.pp, config.train.accumulation, n_chunks, forward, backward, weights, hops
    )


@functools.lru_cache(maxsize=4096)
def _check(
    name: schedules.Name,
    p: int,
    m: int,
    chunks: int,
    f: tuple[float, ...],
    b: tuple[float, ...],
    w: tuple[float, ...],
    hops: tuple[float, ...],
) -> schedules.Timing:
    return schedules.check(schedules.plan(name, p, m, chunks), f, b, w, hops or 0.0)


def _itemsize(config: Config) -> int:
    return 2 if config.train.precision == "bf16" else 4


def _tokens(config: Config, layout: Layout) -> int:
    """Of a micro-batch, as context parallelism cuts it."""
    train = config.train
    return config.data.seq_len // layout.cp * (train.global_batch // (layout.dp * train.accumulation))


def _stage(
    config: Config,
    layout: Layout,
    costs: Costs,
    links: Links,
    groups: Mapping[str, Groups],
    tp: TensorTime,
    stages: Stages,
    stage: int,
    rates: Rates,
) -> _Action:
    model, recompute, itemsize = config.model, config.train.recompute, _itemsize(config)
    tokens, layers = _tokens(config, layout), stages.layers(stage)
    per_flop = tokens / layout.tp / rates.flops_per_s
    core = costs.core(config.data.seq_len)
    blocks_s = sum(costs.blocks[index] + core for index in layers) * per_flop
    core_s = len(layers) * core * per_flop
    fixed_s = len(layers) * rates.layer_s / 3  # of each of forward, the input's gradient and the weights'
    first, last = stage == 0, stage == stages.placement.n_stages - 1
    head_s = 3 * costs.head * per_flop if last else 0.0  # the fused loss makes its gradients in forward
    made_s, made_back_s = (len(layers) * flops * per_flop for flops in _made_of_latents(config, layout))
    again = {"none": 0.0, "selective": core_s + made_s, "full": blocks_s + fixed_s + made_s}[recompute]
    layers_tp, layers_back_tp = tp.layers(layers)
    gather, scatter = (tp.whole(each, model.d_model) for each in ("all_gather", "reduce_scatter"))
    ends_tp = (scatter if first else 0.0) + (gather if last else 0.0)
    ends_back_tp = (gather if first else 0.0) + (scatter if last else 0.0)
    if last:
        n_chunks = -(-tokens // config.train.loss_chunk)
        chunk = min(tokens, config.train.loss_chunk)
        ends_tp += n_chunks * sum(links.blocking_s(groups["tp"], "all_reduce", 4 * k * chunk) for k in (1, 2))
    twice = recompute == "full"
    attention_f, attention_b = _context_parallel(config, layout, links, groups, core * per_flop)
    attention_again = attention_f if recompute != "none" else 0.0
    n_moe, split = sum(model.has_experts(index) for index in layers), layout.experts_over_tp == "split"
    rows = tokens / (1 if split else layout.tp) * model.top_k * model.d_model * itemsize
    exchange = 2 * n_moe * links.blocking_s(groups["ep"], "all_to_all", rows) if n_moe else 0.0
    return _Action(
        blocks_s + fixed_s + head_s + made_s,
        blocks_s + fixed_s + again + made_back_s,
        blocks_s + fixed_s,
        {
            "tp": (layers_tp + ends_tp, layers_back_tp + (layers_tp if twice else 0.0) + ends_back_tp),
            "cp": (len(layers) * attention_f, len(layers) * (attention_b + attention_again)),
            "ep": (exchange, exchange * (2 if twice else 1)),
        },
    )


def _made_of_latents(config: Config, layout: Layout) -> tuple[float, float]:
    """FLOPs of a token, forward and backward, of the keys and values that ring attention's ranks make of each other's
    latents, of all rows or of half of them, and in backward of their own again."""
    model, ring = config.model, config.layout.context == "ring" and config.layout.context_latents
    if layout.cp == 1 or not (model.latent and ring):
        return 0.0, 0.0
    one = 2.0 * model.kv_lora_rank * model.n_heads * (model.head_width + model.v_width)
    others = 0.75 * (layout.cp - 1) * one
    return others, one + 3 * others


def _context_parallel(
    config: Config, layout: Layout, links: Links, groups: Mapping[str, Groups], core_s: float
) -> tuple[float, float]:
    """What one layer exposes forward and backward. core_s: of its attention's forward."""
    if layout.cp == 1:
        return 0.0, 0.0
    model, itemsize, n = config.model, _itemsize(config), layout.cp
    tokens, heads, kv_heads = _tokens(config, layout) / layout.tp, model.n_heads, model.n_kv_heads
    widths = (heads * model.qk_width, kv_heads * model.qk_width, kv_heads * model.v_width, heads * model.v_width)
    latents = tokens * layout.tp * (model.kv_lora_rank + model.qk_rope_head_dim)  # whole on each tp rank
    exchanges_latents = model.latent and config.layout.context_latents
    if config.layout.context == "ulysses":  # queries, keys and values, and attention's output back
        if exchanges_latents:
            gather, scatter = (
                links.blocking_s(groups["cp"], each, n * latents * itemsize)
                for each in ("all_gather", "reduce_scatter")
            )
            both = sum(links.blocking_s(groups["cp"], "all_to_all", tokens * widths[i] * itemsize) for i in (0, 3))
            return both + gather, both + scatter
        each = sum(links.blocking_s(groups["cp"], "all_to_all", tokens * width * itemsize) for width in widths)
        return each, each
    ring = around_cp(layout)
    passed = latents if exchanges_latents else tokens * sum(widths[1:3])
    coming, gradients = links.send_s(ring, passed * itemsize), links.send_s(ring, passed * 4)
    attention = core_s / n
    forward = (n - 1) * max(0.0, coming - attention)
    return forward, (n - 1) * max(0.0, coming + gradients - 2 * attention) + gradients


def _hops(config: Config, layout: Layout, links: Links, stages: Stages) -> tuple[float, ...]:
    """Of a micro-batch from each stage to the next one, when all ranks of the stage send at once; () without a
    pipeline."""
    if layout.pp == 1:
        return ()
    placement = stages.placement
    nbytes = _tokens(config, layout) / layout.tp * config.model.d_model * _itemsize(config)
    took: dict[tuple[int, int], float] = {}
    ways = [(placement.rank(stage), placement.rank(stage + 1)) for stage in range(placement.n_stages - 1)]
    for here, there in ways:
        if here != there and (here, there) not in took:
            pairs = between_stages(layout, here, there)
            took[here, there] = links.send_s(pairs, nbytes) + links.meeting_s(pairs)
    return tuple(took.get(way, 0.0) for way in ways)
