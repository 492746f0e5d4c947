"""Which experts a token visits, and how the experts' loads are kept even."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.model_config import ModelConfig


@dataclass(frozen=True)
class Routes:
    """experts int64 [..., top_k] and the weight of each, fp32; probabilities fp32 [..., n_experts] sum to 1."""

    experts: Tensor
    weights: Tensor
    probabilities: Tensor


def route(logits: Tensor, config: ModelConfig, bias: Tensor | None) -> Routes:
    """The routes of router logits fp32 [..., n_experts].

    bias [n_experts] joins the choice but not the weights (arXiv:2408.15664). With groups, a token chooses within the
    topk_groups groups whose best_of_group best experts score highest together (two: DeepSeek-V3, arXiv:2412.19437,
    section 2.1.2; one: DeepSeek-V2, arXiv:2405.04434, section 2.2.2), so that no more than so many hosts hear of it."""
    scores = logits.sigmoid() if config.router == "sigmoid" else logits.softmax(-1)
    choice = scores.detach() if bias is None else scores.detach() + bias
    if config.topk_groups < config.n_expert_groups:
        grouped = choice.unflatten(-1, (config.n_expert_groups, -1))
        of_group = grouped.topk(min(config.best_of_group, grouped.shape[-1])).values.sum(-1)
        kept = torch.zeros_like(of_group, dtype=torch.bool).scatter(-1, of_group.topk(config.topk_groups).indices, True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    experts = choice.topk(config.top_k).indices
    weights = scores.gather(-1, experts)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    probabilities = scores / scores.sum(-1, keepdim=True) if config.router == "sigmoid" else scores
    return Routes(experts, weights * config.router_scale, probabilities)


@torch.no_grad()
def rebalance(bias: Tensor, load: Tensor, speed: float) -> None:
    """Moves the bias [n_experts] of experts with less than the mean load up by speed, of those with more down.

    Source: Wang et al., arXiv:2408.15664, algorithm 1."""
    bias.add_((load.mean() - load).sign(), alpha=speed)
