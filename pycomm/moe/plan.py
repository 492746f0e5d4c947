"""The plan of one batch, from every rank's topk_idx, which all ranks hold."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pycomm.moe.batch import Batch, Request, Served
from pycomm.moe.indices import by_crossing, tensor
from pycomm.moe.routes import Routes, Stages
from pycomm.moe.tables import ExchangePlan, Leg


def make_plan(request: Request, everyone: Tensor, n_tokens: tuple[int, ...]) -> ExchangePlan:
    """everyone: topk_idx of all ranks one after the other, [sum of n_tokens, K], on the CPU, any type of integers;
    n_tokens by rank.

    Raises InvalidArgument, on all ranks the same, where an expert gets more than max_tokens and drop is off."""
    batch = Batch(request, everyone.numpy(), n_tokens)
    served = Served(request, batch)
    stages = Stages(request.cut, request.n_chunks, request.geometry.n_hosts if request.mode == "host" else batch.world)
    routes = Routes(request.mode, request.layout, stages, batch, served)
    out = routes.route(last=False)
    back = out if request.cut == "tokens" else routes.route(last=True)
    stage = routes.stage_of_slot
    n_local = len(served.expert_counts)
    counts = np.bincount(stage * n_local + served.slot_local, minlength=stages.n * n_local)
    return ExchangePlan(
        owner=request.owner,
        mode=request.mode,
        layout=request.layout,
        n_chunks=stages.n_crossings,
        crossing_of_stage=stages.crossing,
        topk_idx=tensor(batch.idx[batch.begin : batch.end]),
        expert_counts=tensor(served.expert_counts),
        expert_offsets=tensor(served.expert_offsets),
        sizes=tuple(np.diff(served.expert_offsets).tolist()),
        stage_counts=tensor(counts.reshape(stages.n, n_local)),
        stage_experts=stages.experts(n_local),
        dropped=batch.lost,
        n_slots=len(served.slot_token),
        n_out=len(served.slot_of_out),
        slot_of_out=tensor(served.slot_of_out),
        slot_expert=tensor(served.slot_local),
        slot_of_row=tensor(served.slots_of_rows() if request.layout == "rank" else np.empty((0, batch.top_k))),
        slot_weights=tensor(served.slot_weight),
        scalars=_scalars(batch, served),
        home_weights=tensor(batch.home_weight),
        out=out,
        back=back,
        one_host=request.geometry.n_hosts == 1 and len(routes.host_token) == batch.end - batch.begin,
    )


def _scalars(batch: Batch, served: Served) -> Leg:
    zeros = np.zeros_like(batch.home_rank)
    order, sends = by_crossing(zeros, batch.home_rank, 1, batch.world)
    receives = np.bincount(batch.source[served.slot_token], minlength=batch.world)
    return Leg(tensor(batch.home_weight[order]), sends, (tuple(receives.tolist()),))
