"""A mixture of experts: a router, SwiGLU experts spread over the expert parallel ranks, and two ways to balance them.

Each rank routes the tokens that it holds (its part of the sequence, with tp); pycomm.moe carries them to their experts
and back. What tp ranks hold is layout.experts_over_tp:

    none     their expert parallel rank's experts, whole: each runs them for its tokens
    spread   a part of those, whole: the exchange is over ep × tp ranks, which have other experts and other tokens
    split    a part of each one's width: tokens and routes are gathered over tp, each rank sends all of them through its
             part, and the outputs, partial sums, are reduce-scattered (Megatron's expert tensor parallelism)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycomm.moe import ExpertParallel
from training import fp8
from training.mesh import Mesh
from training.model_config import ModelConfig
from training.parallel import gather_sequence, reduce_scatter_sequence
from training.recompute import in_backward
from training.router import rebalance, route
from training.sharding import ParamSpec, ShardedModule


def _outputs(
    rows: Tensor, sizes: Sequence[int], experts: Sequence[tuple[Tensor, Tensor, Tensor]], use_fp8: bool
) -> Tensor:
    """SwiGLU of each expert's (gate, up, down) over its rows, which come one expert after the other."""
    product = fp8.linear if use_fp8 else F.linear
    parts = [
        product(F.silu(product(part, gate, None)) * product(part, up, None), down, None)
        for part, (gate, up, down) in zip(rows.split(list(sizes)), experts, strict=True)
    ]
    return torch.cat(parts) if parts else rows


class MixtureOfExperts(ShardedModule):
    """Sends each token of x [S/tp, B, D] to its top_k experts; their outputs weighted by the router add up."""

    def __init__(self, config: ModelConfig, mesh: Mesh, std: float) -> None:
        super().__init__(mesh)
        n, d, f = config.n_experts, config.d_model, config.expert_width
        self.config = config
        self.exchanged = self._through_experts  # torch.compile leaves another one out of its graphs
        self.router = self.new_parameter("router", ParamSpec((n, d), std))
        self.gate = self.new_parameter("gate", ParamSpec((n, f, d), std, "ep", 0, within=1))
        self.up = self.new_parameter("up", ParamSpec((n, f, d), std, "ep", 0, within=1))
        of_down = std / (2 * config.n_layers) ** 0.5
        self.down = self.new_parameter("down", ParamSpec((n, d, f), of_down, "ep", 0, within=2))
        self.bias: nn.Parameter | None = None
        if config.router_bias:
            self.bias = self.new_parameter("bias", ParamSpec((n,), 0.0))
            self.bias.requires_grad_(False)
        self.load: Tensor  # slots that this rank's tokens took of each expert, since balance_routers()
        self.register_buffer("load", torch.zeros(n), persistent=False)

    @property
    def exchange(self) -> ExpertParallel:
        """One for all layers that are alike; made by the first to run, on all expert parallel ranks together."""
        key = (self.config.n_experts, self.config.d_model, self.config.top_k)
        if key not in self.mesh.exchanges:
            layout = self.mesh.layout
            dedup: Literal["auto", "none", "rank", "host"] = (
                "none" if layout.moe_exchange == "flat" else layout.moe_dedup
            )
            self.mesh.exchanges[key] = ExpertParallel(
                self.mesh.ep.group,
                *key,
                dedup=dedup,
                chunks=layout.moe_chunks or "auto",
                wire=self.mesh.wire["ep"],  # type: ignore[arg-type]  # checks.py lets no other pass
            )
        return self.mesh.exchanges[key]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y [S/tp, B, D], and the balance loss: fp32 scalar, this rank's part of the sum over sequences."""
        routes = route(F.linear(x.float(), self.router.float()), self.config, self.bias)  # fp32: near ties decide
        slots = F.one_hot(routes.experts, self.config.n_experts).sum((0, 2)).float()  # [B, n_experts]
        if torch.is_grad_enabled() and not in_backward():
            self.load += slots.sum(0)
        balance = self._balance_loss(routes.probabilities, slots)
        experts, weights, split = routes.experts, routes.weights, self.mesh.layout.experts_over_tp == "split"
        if split:
            x = gather_sequence(x, self.mesh)
            experts, weights = (gather_sequence(each, self.mesh, coded=False) for each in (experts, weights))
        y = self.exchanged(x.flatten(0, 1), experts.flatten(0, 1), weights.flatten(0, 1)).view_as(x)
        return reduce_scatter_sequence(y, self.mesh) if split else y, balance

    def _through_experts(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, D], experts and weights [tokens, top_k] to the weighted sums of the experts' outputs."""
        matrices = list(zip(self.gate, self.up, self.down, strict=True))
        layout, exchange = self.mesh.layout, self.exchange
        if layout.moe_exchange != "overlapped":
            dispatched = exchange.dispatch(x, experts, weights)
            return exchange.combine(_outputs(dispatched.rows, dispatched.sizes, matrices, self.mesh.fp8), dispatched)
        stream = exchange.stream(x, experts, weights, n_chunks=layout.moe_chunks or "auto", cut="experts")
        for chunk in stream:
            of_chunk = matrices[chunk.experts.start : chunk.experts.stop]
            chunk.output = _outputs(chunk.rows, chunk.sizes, of_chunk, self.mesh.fp8)
        return stream.output

    def _balance_loss(self, probabilities: Tensor, slots: Tensor) -> Tensor:
        """Sum over sequences of Σ_e (share of slots that e got × n_experts) × (mean probability of e).

        Taken within each sequence, so it depends neither on micro-batches nor on the layout.
        Source: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20.
        """
        ranks = self.mesh.sequence  # which have the other parts of these sequences
        seq_len = probabilities.shape[0] * ranks.size
        if ranks.size > 1:
            ranks.all_reduce(slots)
        share = slots * (self.config.n_experts / (self.config.top_k * seq_len))
        return (share * probabilities.sum(0)).sum() / seq_len


def balance_routers(model: nn.Module, mesh: Mesh) -> None:
    """Moves the router biases of a model by the loads since the last call, all ranks together; one small all_reduce."""
    experts = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if not any(each.bias is not None for each in experts):
        return
    loads = torch.stack([each.load for each in experts])
    mesh.gradients(None).all_reduce(loads)
    for each, load in zip(experts, loads, strict=True):
        if each.bias is not None:
            rebalance(each.bias, load, each.config.router_bias_speed)
        each.load.zero_()
