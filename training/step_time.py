"""How long a step of a layout will take, from FLOPs, a rate, and the closed form of each collective.

    step = compute + bubble + what each axis exposes

compute  FLOPs of the busiest pipeline rank's part of all micro-batches / the rate; recomputation included
bubble   what schedules.check() leaves that rank idle, with the time of each stage's actions, tp, cp and ep included
tp       all_gather and reduce_scatter of the sequence, less what tp_overlap computes beside them (tensor_time.py)
ep       whole: layers wait for it (an all_to_all of a row an expert)
cp       ring: what a pass takes longer than the attention beside it, and what is made anew of latents; ulysses: whole
pp       by how much check() is later when messages between stages take the time of the link that they cross, one after
         the other on each way
dp       gradients: what does not fit beside the last backward, at least what is filled when that ends (the embedding's
         table, with ZeRO a block), and is not done before the last pipeline rank is; ZeRO 1 and 2 gather parameters
         whole, stage 3 a block at a time beside the one before it

Not counted: the optimizer's update, elementwise work, loading data, axes that share a link at once, a wire."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from training import schedules
from training.config import Config
from training.layout import Layout, stages_of
from training.links import Groups, Links, around_cp, between_stages, groups_of, tied
from training.model_config import ModelConfig
from training.sharding import ParamSpec
from training.stages import Stages
from training.tensor_time import TensorTime

AXES = ("tp", "cp", "ep", "pp", "dp")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; exposed_s by axis, one of each of AXES."""

    compute_s: float
    bubble_s: float
    exposed_s: dict[str, float]

    @property
    def parts(self) -> dict[str, float]:
        """They add up to total_s."""
        return {"compute": self.compute_s, "bubble": self.bubble_s, **self.exposed_s}

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


def step_time(config: Config, layout: Layout, costs: Costs, links: Links, flops_per_s: float) -> StepTime:
    """flops_per_s: that a rank reaches. config: whose layout was resolved to `layout`."""
    stages, m = stages_of(config), config.train.accumulation
    placement = stages.placement
    groups = groups_of(layout)
    tp = TensorTime(config, layout, links, groups["tp"], _tokens(config, layout), flops_per_s)
    per_stage = [
        _stage(config, layout, costs, links, groups, tp, stages, stage, flops_per_s)
        for stage in range(placement.n_stages)
    ]
    of_rank = [
        [per_stage[placement.stage(rank, chunk)] for chunk in range(placement.n_chunks)] for rank in range(layout.pp)
    ]
    busiest = max(range(layout.pp), key=lambda rank: sum(each.total_s for each in of_rank[rank]))
    hops = _hops(config, layout, links, stages)
    still, moving = (_timing(config, layout, tuple(per_stage), placement.n_chunks, each) for each in (0.0, hops))
    exposed = {axis: m * sum(sum(each.blocked[axis]) for each in of_rank[busiest]) for axis in ("tp", "cp", "ep")}
    exposed["pp"] = moving.makespan - still.makespan
    gradients = [
        _data_parallel(config, layout, costs, links, groups, stages, pp_index, actions)
        for pp_index, actions in enumerate(of_rank)
    ]
    exposed["dp"] = max(map(sum, zip(moving.end, gradients, strict=True))) - moving.makespan
    return StepTime(m * sum(each.compute_s for each in of_rank[busiest]), still.idle[busiest], exposed)


def _timing(
    config: Config, layout: Layout, stages: tuple[_Action, ...], n_chunks: int, hop: float | tuple[float, ...]
) -> schedules.Timing:
    forward = tuple(each.forward_s + sum(f for f, _ in each.blocked.values()) for each in stages)
    backward = tuple(each.input_s + sum(b for _, b in each.blocked.values()) for each in stages)
    weights = tuple(each.weight_s for each in stages)
    return _check(
        config.layout.schedule, layout.pp, config.train.accumulation, n_chunks, forward, backward, weights, hop
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
    hop: float | tuple[float, ...],
) -> schedules.Timing:
    return schedules.check(schedules.plan(name, p, m, chunks), f, b, w, hop)


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
    flops_per_s: float,
) -> _Action:
    model, recompute, itemsize = config.model, config.train.recompute, config.train.itemsize
    tokens, layers = _tokens(config, layout), stages.layers(stage)
    per_flop = tokens / layout.tp / flops_per_s
    core = costs.core(config.data.seq_len)
    blocks_s = sum(costs.blocks[index] + core for index in layers) * per_flop
    core_s = len(layers) * core * per_flop
    first, last = stage == 0, stage == stages.placement.n_stages - 1
    head_s = 3 * costs.head * per_flop if last else 0.0  # the fused loss makes its gradients in forward
    again = {"none": 0.0, "selective": core_s, "full": blocks_s}[recompute]
    layers_tp, layers_back_tp = tp.layers(layers)
    gather, scatter = (tp.whole(each, model.d_model) for each in ("all_gather", "reduce_scatter"))
    ends_tp = (scatter if first else 0.0) + (gather if last else 0.0)
    ends_back_tp = (gather if first else 0.0) + (scatter if last else 0.0)
    if last:
        n_chunks = -(-tokens // config.train.loss_chunk)
        chunk = min(tokens, config.train.loss_chunk)
        ends_tp += n_chunks * sum(links.seconds(groups["tp"], "all_reduce", 4 * k * chunk) for k in (1, 2))
    twice = recompute == "full"
    attention_f, attention_b = _context_parallel(config, layout, links, groups, core * per_flop, flops_per_s)
    n_moe, split = sum(model.has_experts(index) for index in layers), layout.experts_over_tp == "split"
    rows = tokens / (1 if split else layout.tp) * model.top_k * model.d_model * itemsize
    exchange = 2 * n_moe * links.seconds(groups["ep"], "all_to_all", rows) if n_moe else 0.0
    return _Action(
        blocks_s + head_s,
        blocks_s + again,
        blocks_s,
        {
            "tp": (layers_tp + ends_tp, layers_back_tp + (layers_tp if twice else 0.0) + ends_back_tp),
            "cp": (len(layers) * attention_f, len(layers) * attention_b),
            "ep": (exchange, exchange * (2 if twice else 1)),
        },
    )


def _context_parallel(
    config: Config, layout: Layout, links: Links, groups: Mapping[str, Groups], core_s: float, flops_per_s: float
) -> tuple[float, float]:
    """What one layer adds to forward, and to backward with what that computes again. core_s: of its attention's
    forward."""
    if layout.cp == 1:
        return 0.0, 0.0
    model, itemsize, n = config.model, config.train.itemsize, layout.cp
    tokens, heads, kv_heads = _tokens(config, layout) / layout.tp, model.n_heads, model.n_kv_heads
    widths = (heads * model.qk_width, kv_heads * model.qk_width, kv_heads * model.v_width, heads * model.v_width)
    numel, make_s = tokens * sum(widths[1:3]), 0.0  # of keys and values, or the latents a rank makes them of in make_s
    latents = model.latent and config.layout.context_latents
    if latents:
        numel = _tokens(config, layout) * (model.kv_lora_rank + model.qk_rope_head_dim)
        make_s = 2 * tokens * model.kv_lora_rank * heads * (model.head_width + model.v_width) / flops_per_s
    if config.layout.context == "ulysses":  # queries, keys and values, and attention's output back
        moved = (widths[0], widths[3]) if latents else widths
        forward = backward = sum(links.seconds(groups["cp"], "all_to_all", tokens * each * itemsize) for each in moved)
        if latents:
            whole = numel * n * itemsize
            forward += links.seconds(groups["cp"], "all_gather", whole)
            backward += links.seconds(groups["cp"], "reduce_scatter", whole)
    else:
        ring = around_cp(layout)
        coming, gradients = links.send_s(ring, numel * itemsize), links.send_s(ring, numel * 4)
        attention = core_s / n
        # Backward makes keys and values twice, and their gradients once; what a rank makes of its own latents in
        # forward and its gradients are the model's FLOPs.
        forward = (n - 1) * max(make_s, coming - attention)
        backward = (n - 1) * max(4 * make_s, coming + gradients - 2 * attention) + 2 * make_s + gradients
    if config.train.recompute == "none":
        return forward, backward
    own_s = make_s if config.train.recompute == "selective" else 0.0  # "full": of the blocks' own FLOPs
    return forward, backward + forward + own_s


def _hops(config: Config, layout: Layout, links: Links, stages: Stages) -> tuple[float, ...]:
    """Of a micro-batch from each stage to the next one, when all ranks of the stage send at once."""
    placement = stages.placement
    nbytes = _tokens(config, layout) / layout.tp * config.model.d_model * config.train.itemsize
    took: dict[tuple[int, int], float] = {}
    ways = [(placement.rank(stage), placement.rank(stage + 1)) for stage in range(placement.n_stages - 1)]
    for here, there in ways:
        if here != there and (here, there) not in took:
            took[here, there] = links.send_s(between_stages(layout, here, there), nbytes)
    return tuple(took.get(way, 0.0) for way in ways)


def _data_parallel(
    config: Config,
    layout: Layout,
    costs: Costs,
    links: Links,
    groups: Mapping[str, Groups],
    stages: Stages,
    pp_index: int,
    actions: list[_Action],
) -> float:
    """What reducing gradients and gathering parameters exposes on a pipeline rank. Sharded over all copies."""
    zero, m, itemsize, placement = (
        config.layout.zero,
        config.train.accumulation,
        config.train.itemsize,
        stages.placement,
    )
    held = [index for c in range(placement.n_chunks) for index in stages.layers(placement.stage(pp_index, c))]
    summed: dict[str | None, Groups] = {None: groups["stage"], "tp": groups["dp"], "ep": groups["expert_replicas"]}
    cut = {None: 1, "tp": layout.tp, "ep": layout.expert_ranks, "tied": layout.tp}
    blocks = _held(costs, held, "")
    others, late = (
        _held(costs, [], names, stages, pp_index)
        for names in ("embedding positions norm head", "embedding positions")  # late: filled when backward ends
    )
    if config.model.tie_embeddings and placement.last_rank != 0:
        summed["tied"] = tied(layout, placement.last_rank)
        for each in (others, late):
            if "tp" in each:
                each["tied"] = each.pop("tp")

    def seconds(collective: str, itemsize: int, numel: Mapping[str | None, float], parts: int = 1) -> float:
        return parts * sum(
            links.seconds(summed[axis], collective, itemsize * n / cut[axis] / parts) for axis, n in numel.items()
        )

    n = len(held)
    forward = sum(each.forward_s for each in actions)
    backward = sum(each.input_s + each.weight_s for each in actions)
    if zero == 0:
        both = {axis: blocks.get(axis, 0.0) + others.get(axis, 0.0) for axis in blocks | others}
        last = dict.fromkeys(blocks, 2.0)  # of the last bucket's time half is latency (pycomm.overlap.buckets)
        return max(
            seconds("all_reduce", 4, late) + 2 * seconds("all_reduce", 4, last),
            seconds("all_reduce", 4, both) - backward,
        )
    of_blocks, of_others = seconds("reduce_scatter", 4, blocks, n), seconds("reduce_scatter", 4, others)
    reduced, last_s = of_blocks + of_others, of_blocks / n + of_others
    gathered = seconds("all_gather", itemsize, others)
    if zero < 3:
        gathered += seconds("all_gather", itemsize, blocks, n)
    beside_last = max(last_s, reduced - backward)
    if zero == 1:
        return beside_last + gathered
    beside = forward + backward
    reduced = (m - 1) * max(0.0, reduced - beside) + beside_last
    if zero == 2:
        return reduced + gathered
    block = seconds("all_gather", itemsize, blocks, n) / n
    ahead = sum(max(0.0, block - each / n) for each in (forward, backward))
    return reduced + gathered + m * (2 * placement.n_chunks * block + max(0, n - placement.n_chunks) * ahead)


def _held(
    costs: Costs, layers: list[int], others: str, stages: Stages | None = None, pp_index: int = 0
) -> dict[str | None, float]:
    """Numbers of parameters by axis, of blocks and of the named others that a pipeline rank has."""
    found: dict[str | None, float] = {}
    names = [str(index) for index in layers]
    if stages is not None:
        tables = [each for each in others.split() if each in costs.numel]
        names += [
            each
            for each in tables
            if pp_index in stages.ranks_of(each)
            and (each != "embedding" or costs.model.tie_embeddings or pp_index == stages.ranks_of(each)[0])
        ]
    for name in names:
        for axis, numel in costs.numel[name].items():
            found[axis] = found.get(axis, 0.0) + numel
    return found
