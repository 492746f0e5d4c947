"""A mixture of experts: a softmax router, SwiGLU experts spread over the expert parallel ranks, and a balance loss.

Each rank routes the tokens that it holds (its part of the sequence, with tp); pycomm.moe carries them to their experts
and back. Every tp rank holds its expert parallel rank's experts whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pycomm.moe import ExpertParallel
from training.config import ModelConfig
from training.mesh import Mesh
from training.sharding import ParamSpec, ShardedModule


class MixtureOfExperts(ShardedModule):
    """Sends each token of x [S/tp, B, D] to its top_k experts; their outputs weighted by the router add up."""

    def __init__(self, config: ModelConfig, mesh: Mesh, std: float) -> None:
        super().__init__(mesh)
        n, d, f = config.n_experts, config.d_model, config.d_ff
        self.n_experts, self.top_k = n, config.top_k
        if (n, d, self.top_k) not in mesh.exchanges:
            layout = mesh.layout
            mesh.exchanges[n, d, self.top_k] = ExpertParallel(
                mesh.ep.group, n, d, self.top_k, dedup=layout.moe_dedup, chunks=layout.moe_chunks or "auto"
            )
        self.exchange = mesh.exchanges[n, d, self.top_k]
        self.router = self.new_parameter("router", ParamSpec((n, d), std))
        self.gate = self.new_parameter("gate", ParamSpec((n, f, d), std, "ep", 0))
        self.up = self.new_parameter("up", ParamSpec((n, f, d), std, "ep", 0))
        self.down = self.new_parameter("down", ParamSpec((n, d, f), std / (2 * config.n_layers) ** 0.5, "ep", 0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y [S/tp, B, D], and the balance loss: fp32 scalar, this rank's part of the sum over sequences."""
        probabilities = F.linear(x.float(), self.router.float()).softmax(-1)  # fp32: near ties decide the route
        weights, experts = probabilities.topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        balance = self._balance_loss(probabilities, experts)
        dispatched = self.exchange.dispatch(x.flatten(0, 1), experts.flatten(0, 1), weights.flatten(0, 1))
        outputs = [
            F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
            for rows, gate, up, down in zip(
                dispatched.rows.split(dispatched.sizes), self.gate, self.up, self.down, strict=True
            )
        ]
        return self.exchange.combine(torch.cat(outputs), dispatched).view_as(x), balance

    def _balance_loss(self, probabilities: Tensor, experts: Tensor) -> Tensor:
        """Sum over sequences of Σ_e (share of slots that e got × n_experts) × (mean probability of e).

        Taken within each sequence, so it depends neither on micro-batches nor on the layout.
        Source: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20 (with softmax in place of sigmoid).
        """
        seq_len = probabilities.shape[0] * self.mesh.tp.size
        slots = F.one_hot(experts, self.n_experts).sum((0, 2)).float()  # [B, n_experts]
        if self.mesh.tp.size > 1:
            self.mesh.tp.all_reduce(slots)
        share = slots * (self.n_experts / (self.top_k * seq_len))
        return (share * probabilities.sum(0)).sum() / seq_len
