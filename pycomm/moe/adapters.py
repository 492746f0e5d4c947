"""ExpertParallel behind interfaces that code already has: torchtitan's token dispatcher, Megatron-Core's stages, and
torch's differentiable all_to_all_single.

They take and give what those do, so that a model's router and experts stay as they are; nothing of either library is
imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pycomm.errors import InvalidArgument
from pycomm.moe.checks import code_of, require_equal
from pycomm.moe.dispatched import Dispatched
from pycomm.moe.exchange import ExpertParallel
from pycomm.moe.waits import RowsGroup, Waits


def _without_weights(dispatched: Dispatched) -> Dispatched:
    """For a combine() that only adds: the caller has applied the weights."""
    ones = torch.ones_like(dispatched.weights)
    return dataclasses.replace(dispatched, weights=ones, home_weights=torch.ones_like(dispatched.home_weights))


class TorchtitanDispatcher:
    """torchtitan's token dispatcher: dispatch(x, top_scores, selected_experts_indices) and combine(routed_output,
    metadata, x), over an ExpertParallel of layout "expert".

    score_before_experts: rows are multiplied by their scores before the experts instead of after."""

    def __init__(self, ep: ExpertParallel, score_before_experts: bool = False) -> None:
        if ep.layout != "expert":
            raise InvalidArgument(f"torchtitan's dispatcher gives rows by expert; layout is {ep.layout!r}")
        self.ep, self.score_before_experts = ep, score_before_experts

    def dispatch(
        self, x: Tensor, top_scores: Tensor, selected_experts_indices: Tensor
    ) -> tuple[Tensor, Tensor, Dispatched]:
        """(routed_input [n, H], num_tokens_per_expert [local experts] with padding, metadata for combine())"""
        dispatched = self.ep.dispatch(x, selected_experts_indices, top_scores)
        counts = dispatched.expert_offsets.diff()
        if not self.score_before_experts:
            return dispatched.rows, counts, dispatched
        rows = (dispatched.rows.float() * dispatched.weights.unsqueeze(1)).to(x.dtype)
        return rows, counts, _without_weights(dispatched)

    def combine(
        self,
        routed_output: Tensor,
        metadata: Dispatched,
        x: Tensor,
        shared_experts: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """[T, H]; with shared_experts, their output of x is added."""
        y = self.ep.combine(routed_output, metadata)
        return y if shared_experts is None else y + shared_experts(x)


class MegatronDispatcher:
    """Megatron-Core's MoETokenDispatcher, stage by stage:

        hidden, probs = d.dispatch_preprocess(hidden_states, routing_map, probs)     # routing_map bool [T, E]
        hidden, probs = d.token_dispatch(hidden, probs)
        rows, tokens_per_expert, permuted_probs = d.dispatch_postprocess(hidden, probs)
        hidden = d.combine_preprocess(expert_out)              # the experts applied permuted_probs, as they do there
        hidden = d.token_combine(hidden)
        output = d.combine_postprocess(hidden)                 # in hidden_states' shape

    Every token must have equally many experts: capacity is max_tokens with drop=True of the ExpertParallel."""

    def __init__(self, ep: ExpertParallel) -> None:
        if ep.layout != "expert":
            raise InvalidArgument(f"Megatron-Core's dispatcher gives rows by expert; layout is {ep.layout!r}")
        self.ep = ep
        self._shape: torch.Size | None = None
        self._topk_idx: Tensor | None = None
        self._dispatched: Dispatched | None = None

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [.., H], routing_map bool and probs [T, E] to ([T, H], the probs of a token's experts [T, K]).
        Ranks exchange their K and no rows.

        Raises InvalidArgument on all ranks where shapes do not fit or tokens differ in their number of experts."""
        self._shape = hidden_states.shape
        hidden = hidden_states.flatten(0, -2)
        experts, problem, top_k = (len(hidden), self.ep.num_experts), None, 0
        if routing_map.shape != experts or probs.shape != experts:
            problem = (
                f"routing_map is {list(routing_map.shape)} and probs {list(probs.shape)}; both must be {list(experts)}"
            )
        elif len(hidden):
            counts = routing_map.sum(-1)
            top_k = int(counts[0])
            if not bool((counts == top_k).all()):
                token = int((counts != top_k).nonzero()[0])
                problem = f"token 0 has {top_k} experts, token {token} has {int(counts[token])}; give all the same"
        every_k = self.ep.waits.agree("dispatch_preprocess", problem, [top_k])
        if not len(hidden):  # nobody here says how many experts a token has
            top_k = int(every_k.max()) or self.ep.top_k or 1
        self._topk_idx = routing_map.nonzero()[:, 1].view(len(hidden), top_k)
        return hidden, probs.gather(1, self._topk_idx)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """(rows [n, H], their probs [n])"""
        assert self._topk_idx is not None, "dispatch_preprocess() comes first"
        self._dispatched = self.ep.dispatch(hidden_states, self._topk_idx, probs)
        return self._dispatched.rows, self._dispatched.weights

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, tokens_per_expert [local experts] with padding, permuted_probs)"""
        assert self._dispatched is not None, "token_dispatch() comes first"
        return hidden_states, self._dispatched.expert_offsets.diff(), probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """[T, H]: the sums of the experts' outputs, as they are."""
        assert self._dispatched is not None, "token_dispatch() comes first"
        return self.ep.combine(hidden_states, _without_weights(self._dispatched))

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        assert self._shape is not None, "dispatch_preprocess() comes first"
        return hidden_states.view(self._shape)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, receives: list[int], sends: list[int], group: RowsGroup) -> Tensor:
        ctx.receives, ctx.sends, ctx.group = receives, sends, group
        output = rows.new_empty((sum(receives), *rows.shape[1:]))
        group.all_to_all(output, rows.contiguous(), receives, sends)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows = grads[0].new_empty((sum(ctx.sends), *grads[0].shape[1:]))
        ctx.group.all_to_all(rows, grads[0].contiguous(), ctx.sends, ctx.receives)
        return rows, None, None, None


def all_to_all_single(
    rows: Tensor, output_split_sizes: Sequence[int] | None, input_split_sizes: Sequence[int] | None, group: RowsGroup
) -> Tensor:
    """As torch's all_to_all_single_autograd: rows [sum of input_split_sizes, ..] to the ranks of group in order, which
    gives [sum of output_split_sizes, ..]; None: equal parts. Backward goes the other way.

    Raises InvalidArgument, on all ranks before rows move, where the parts are not rows' length, there is not one for
    each rank, a rank is to receive another number than is sent to it, or rows differ in their type or their shape."""
    size = group.size
    even = [len(rows) // size] * size
    receives, sends = list(output_split_sizes or even), list(input_split_sizes or even)
    problem = None
    if len(receives) != size or len(sends) != size or sum(sends) != len(rows) or min(*receives, *sends) < 0:
        problem = (
            f"all_to_all_single: {len(rows)} rows, parts {sends} to and {receives} from {size} ranks; give a part for "
            "each rank, all rows in all"
        )
    needs = torch.is_grad_enabled() and rows.requires_grad
    facts = [int(needs), code_of((rows.dtype, rows.shape[1:])), *([0] * 2 * size if problem else receives + sends)]
    everyone = Waits(group).agree("all_to_all_single", problem, facts)
    require_equal(everyone[:, 1:2], ["all_to_all_single: the rows' type and shape but the first dimension (as a hash)"])
    received, sent = everyone[:, 2 : 2 + size], everyone[:, 2 + size :]
    different = (received != sent.T).nonzero().tolist()
    if different:
        to, source = different[0]
        raise InvalidArgument(
            f"all_to_all_single: rank {to} is to receive {int(received[to, source])} rows from rank {source}, which "
            f"sends it {int(sent[source, to])}"
        )
    if everyone[:, 0].any() and torch.is_grad_enabled() and not needs:
        rows = rows.detach().requires_grad_()  # so that this rank meets the others in backward
    result: Tensor = _AllToAll.apply(rows, receives, sends, group)  # type: ignore[no-untyped-call]
    return result
