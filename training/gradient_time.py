"""What the end of a step takes on a rank: gradients that are still to be reduced, parameters to be gathered, the
update.

Exposed is what does not fit beside the last backward, at least what is filled when that ends (the embedding's table,
with ZeRO a block). ZeRO 1 and 2 gather parameters whole, stage 3 a block at a time beside the one before it; all are
sharded over all copies."""

from __future__ import annotations

from collections.abc import Mapping

from training.config import Config
from training.layout import Layout
from training.links import Groups, Links, tied
from training.stages import Stages

Numel = Mapping[str, Mapping[str | None, float]]  # of each part of a model, by the axis that cuts it


def at_end(
    config: Config,
    layout: Layout,
    numel: Numel,
    links: Links,
    groups: Mapping[str, Groups],
    stages: Stages,
    pp_index: int,
    computing_s: tuple[float, float],
    update_s: float,
) -> tuple[float, float]:
    """Seconds on a pipeline rank: what reducing gradients and gathering parameters exposes, and the update. numel: of
    the whole model (step_time.Costs). computing_s: of a micro-batch, forward and backward. update_s: of a number."""
    zero, m, placement = config.layout.zero, config.train.accumulation, stages.placement
    itemsize = 2 if config.train.precision == "bf16" else 4
    held = [index for c in range(placement.n_chunks) for index in stages.layers(placement.stage(pp_index, c))]
    summed: dict[str | None, Groups] = {None: groups["stage"], "tp": groups["dp"], "ep": groups["expert_replicas"]}
    cut = {None: 1, "tp": layout.tp, "ep": layout.expert_ranks, "tied": layout.tp}
    blocks = _held(config, numel, held, "")
    others, late = (
        _held(config, numel, [], names, stages, pp_index)
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
    forward, backward = computing_s
    both = {axis: blocks.get(axis, 0.0) + others.get(axis, 0.0) for axis in blocks | others}
    update_s *= sum(n / cut[axis] / (summed[axis].shape[1] if zero else 1) for axis, n in both.items())
    if zero == 0:
        last = dict.fromkeys(blocks, 2.0)  # of the last bucket's time half is latency (pycomm.overlap.buckets)
        exposed = max(
            seconds("all_reduce", 4, late) + 2 * seconds("all_reduce", 4, last),
            seconds("all_reduce", 4, both) - backward,
        )
        return exposed, update_s
    of_blocks, of_others = seconds("reduce_scatter", 4, blocks, n), seconds("reduce_scatter", 4, others)
    reduced, last_s = of_blocks + of_others, of_blocks / n + of_others
    gathered = seconds("all_gather", itemsize, others)
    if zero < 3:
        gathered += seconds("all_gather", itemsize, blocks, n)
    beside_last = max(last_s, reduced - backward)
    if zero == 1:
        return beside_last + gathered, update_s
    beside = forward + backward
    reduced = (m - 1) * max(0.0, reduced - beside) + beside_last
    if zero == 2:
        return reduced + gathered, update_s
    block = seconds("all_gather", itemsize, blocks, n) / n
    ahead = sum(max(0.0, block - each / n) for each in (forward, backward))
    exposed = reduced + gathered + m * (2 * placement.n_chunks * block + max(0, n - placement.n_chunks) * ahead)
    return exposed, update_s


def _held(
    config: Config, numel: Numel, layers: list[int], others: str, stages: Stages | None = None, pp_index: int = 0
) -> dict[str | None, float]:
    """Numbers of parameters by axis, of blocks and of the named others that a pipeline rank has."""
    found: dict[str | None, float] = {}
    names = [str(index) for index in layers]
    if stages is not None:
        tables = [each for each in others.split() if each in numel]
        names += [
            each
            for each in tables
            if pp_index in stages.ranks_of(each)
            and (each != "embedding" or config.model.tie_embeddings or pp_index == stages.ranks_of(each)[0])
        ]
    for name in names:
        for axis, n in numel[name].items():
            found[axis] = found.get(axis, 0.0) + n
    return found
