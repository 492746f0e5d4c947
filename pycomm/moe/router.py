"""What keeps experts evenly loaded while routing: load statistics, a loss, a bias instead, fewer hosts a token."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pycomm.errors import InvalidArgument


class ReducingGroup(Protocol):
    @property
    def size(self) -> int: ...
    def all_reduce(self, x: Tensor, op: str = "sum") -> object: ...


def expert_loads(topk_idx: Tensor, num_experts: int, group: ReducingGroup | None = None) -> Tensor:
    """int64 [num_experts]: slots of each expert in topk_idx [T, K]; with a group those of all its ranks."""
    loads = torch.zeros(num_experts, dtype=torch.int64, device=topk_idx.device)
    loads.scatter_add_(0, topk_idx.flatten(), torch.ones_like(topk_idx.flatten()))
    if group is not None and group.size > 1:
        group.all_reduce(loads)
    return loads


def imbalance(loads: Tensor) -> Tensor:
    """fp32 scalar: the largest load over the mean one; 1 is even. 1 for no load at all."""
    mean = loads.float().mean()
    return torch.where(mean > 0, loads.max() / mean, 1.0)


def balance_loss(probabilities: Tensor, topk_idx: Tensor, group: ReducingGroup | None = None) -> Tensor:
    """fp32 scalar: Σ_e (share of slots that e got × E) × (mean probability of e); 1 where both are even.

    probabilities [T, E], differentiable; topk_idx [T, K]. With a group, shares are those of all its ranks, and the mean
    is this rank's: averaged over ranks of equal T, the loss and its gradient are the global ones.
    Source: Fedus et al., Switch Transformers, JMLR 23(120), 2022, equations 4 to 6, for K experts."""
    num_experts = probabilities.shape[-1]
    loads = expert_loads(topk_idx, num_experts, group).float()
    share = loads / loads.sum().clamp(min=1) * num_experts
    return (share * probabilities.float().sum(0)).sum() / max(1, len(probabilities))


class RouterBias:
    """The bias that evens loads without a loss: added to scores for the choice of experts alone, raised by `rate` for
    experts below the mean load and lowered above, once a step.

    Source: Wang et al., arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, section 2.1.2."""

    def __init__(self, num_experts: int, rate: float = 1e-3) -> None:
        self.rate = rate
        self.bias = torch.zeros(num_experts)

    def update(self, loads: Tensor) -> None:
        """loads [num_experts], of all ranks (expert_loads), so that all ranks keep the same bias."""
        loads = loads.to(self.bias.device, torch.float32)
        self.bias += self.rate * (loads.mean() - loads).sign()


def choose_experts(
    scores: Tensor,
    top_k: int,
    bias: Tensor | None = None,
    host_of_expert: Tensor | None = None,
    max_hosts: int | None = None,
    normalise: bool = True,
) -> tuple[Tensor, Tensor]:
    """(weights [T, K], topk_idx [T, K]) from non-negative scores [T, E], such as softmax or sigmoid gives.

    bias [E]: added for the choice, not in the weights (RouterBias). host_of_expert int64 [E] and max_hosts: a token's
    experts are on at most max_hosts hosts, those whose best ceil(K / max_hosts) experts have the largest sum; so that
    it crosses to no more hosts. normalise: weights add up to 1 for each token.
    Raises InvalidArgument where max_hosts hosts may not have top_k experts. Source of the limit: DeepSeek-V3,
    arXiv:2412.19437, section 2.1.2, node-limited routing."""
    ranked = scores.detach() if bias is None else scores.detach() + bias.to(scores.device)
    if (host_of_expert is None) != (max_hosts is None):
        raise InvalidArgument("choose_experts: give host_of_expert and max_hosts together, or neither")
    if host_of_expert is not None and max_hosts is not None:
        n_hosts = int(host_of_expert.max()) + 1
        counts = torch.bincount(host_of_expert, minlength=n_hosts)
        most = min(max_hosts, n_hosts)
        if max_hosts < 1 or int(counts.sort().values[:most].sum()) < top_k:
            raise InvalidArgument(
                f"choose_experts: {max_hosts} of {n_hosts} hosts may have fewer than {top_k} experts; they have "
                f"{counts.tolist()}; raise max_hosts"
            )
        each = -(-top_k // most)
        of_host = torch.stack(
            [
                ranked[:, host_of_expert == host].topk(min(each, int(counts[host]))).values.sum(-1)
                for host in range(n_hosts)
            ],
            dim=-1,
        )
        chosen = torch.zeros_like(of_host, dtype=torch.bool).scatter_(1, of_host.topk(most).indices, True)
        ranked = ranked.masked_fill(~chosen[:, host_of_expert], -torch.inf)
    topk_idx = ranked.topk(top_k).indices
    weights = scores.gather(-1, topk_idx)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return weights, topk_idx
