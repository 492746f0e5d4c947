"""Ring attention: keys and values, or the latents that they come from (key_values.py), go around the context parallel
ranks; each step attends to one rank's, and the partial results are joined by their log-sum-exp. Backward computes the
probabilities again from the joined one, as flash attention does; the gradients of what goes around go with it and are
whole when they come home.

By context.py's placement a step sees all of what it is given, or is causal over a rank's own rows. So each is one call
of torch's flash kernels (on a CPU, and in 16 bits on a GPU), which make no scores; with document masks, and where there
is no such kernel, products that do. Sources: Liu et al., Ring Attention, arXiv:2310.01889; Brandon et al., striped and
zig-zag placement, arXiv:2311.09431."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.key_values import KeyValues, heads_first
from training.metered import MeteredGroup
from training.positions import positions

_TAG = 1 << 40  # what keys and values are made of, on its way; + 1: its gradients


class _Step:
    """What a rank attends to in one step of the ring: which rows of its queries, which of the source's keys, whether
    causally, and where documents are masked the mask of both, [B, 1, rows, keys]."""

    def __init__(self, group: MeteredGroup, source: int, query: Tensor, documents: Tensor | None) -> None:
        n_rows, where = query.shape[0], query.device
        half = n_rows // 2
        self.rows = slice(half, None) if source > group.rank else slice(None)  # a later one: the late part sees
        self.keys = slice(0, half) if source < group.rank else slice(None)  # an earlier one: its early part is seen
        self.causal = source == group.rank
        self.mask: Tensor | None = None
        if documents is not None:
            seq_len = n_rows * group.size
            at = positions(seq_len, group.size, group.rank, where)[self.rows]
            of = positions(seq_len, group.size, source, where)[self.keys]
            same = (documents[at].T.unsqueeze(-1) == documents[of].T.unsqueeze(-2)).unsqueeze(1)
            self.mask = same & (of <= at.unsqueeze(-1)) if self.causal else same

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """fp32 [B, H, rows, keys]; -inf where nothing is seen."""
        scores = (query @ key.mT).float() * query.shape[-1] ** -0.5
        if self.mask is not None:
            return scores.masked_fill(~self.mask, float("-inf"))
        if self.causal:
            return scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))
        return scores

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, rows, width of value] and fp32 log-sum-exps [B, H, rows] of query [B, H, rows, d], key and value."""
        if self.mask is None and _has_flash(query, value):
            out, lse, *_ = _flash(query, key, _widened(value, key), self.causal)
            return out[..., : value.shape[-1]], lse
        scores = self.scores(query, key)
        lse = scores.logsumexp(-1)
        return (scores - _finite(lse).unsqueeze(-1)).exp().to(value.dtype) @ value, lse

    def gradients(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of query, key and value, from the joined out and lse of these rows and out's gradient."""
        if self.mask is None and _has_flash(query, value):
            wide = [_widened(each, key) for each in (grad, value, out)]
            of_query, of_key, of_value = _flash_backward(wide[0], query, key, *wide[1:], lse, self.causal)
            return of_query, of_key, of_value[..., : value.shape[-1]]
        weights = (self.scores(query, key) - lse.unsqueeze(-1)).exp()
        delta = (grad.float() * out.float()).sum(-1, keepdim=True)
        of_weights = (grad @ value.mT).float()
        of_scores = (weights * (of_weights - delta) * query.shape[-1] ** -0.5).to(query.dtype)
        return of_scores @ key, of_scores.mT @ query, weights.to(grad.dtype).mT @ grad


def _finite(lse: Tensor) -> Tensor:
    """0 for a row that has seen nothing yet."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


# torch's flash kernels, which all of [B, H, S, d] of one width go through.


def _has_flash(query: Tensor, value: Tensor) -> bool:
    width = query.shape[-1]
    if value.shape[-1] > width:
        return False
    return not query.is_cuda or (query.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256)


def _widened(x: Tensor, key: Tensor) -> Tensor:
    missing = key.shape[-1] - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Any:
    if query.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> Any:
    if not query.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, causal
        )
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(grad, query, key, value, out, lse, None, None, query.shape[2], key.shape[2], 0.0, causal),
        *(no_dropout, no_dropout.new_zeros(())),
    )


class _Ring:
    """Tensors that go around: pass_on() begins to send them to the next rank, take() waits for the previous one's."""

    def __init__(self, group: MeteredGroup, tensors: list[Tensor], tag: int) -> None:
        self._group, self._tag = group, tag
        self.tensors = tensors
        self._works: list[Any] = []
        self._arriving: list[Tensor] = []

    def pass_on(self) -> None:
        group, n = self._group, self._group.size
        self._arriving = [torch.empty_like(each) for each in self.tensors]
        self._works = [group.recv(each, (group.rank - 1) % n, self._tag) for each in self._arriving]
        self._works += [group.send(each, (group.rank + 1) % n, self._tag) for each in self.tensors]

    def take(self) -> None:
        for work in self._works:
            work.wait()
        self.tensors = self._arriving


class RingAttention(torch.autograd.Function):
    """Of query [S/cp, B, H, d] and of the keys and values that key_values makes of two tensors, this rank's rows of
    them, and a weight (or None): [S/cp, B, H, d_v]. documents int64 [S, B] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        first: Tensor,
        second: Tensor,
        weight: Tensor | None,
        key_values: KeyValues,
        group: MeteredGroup,
        documents: Tensor | None,
    ) -> Tensor:
        q, out = heads_first(query), None
        lse = torch.full(q.shape[:-1], float("-inf"), device=q.device)
        ring = _Ring(group, [first.contiguous(), second.contiguous()], _TAG)
        for step in range(group.size):
            held = ring.tensors
            if step < group.size - 1:
                ring.pass_on()
            part = _Step(group, (group.rank - step) % group.size, query, documents)
            key, value = key_values.make([each[part.keys] for each in held], weight)
            of_part, lse_of_part = part.attend(q[:, :, part.rows], key, value)
            if out is None:
                out = torch.zeros((*q.shape[:-1], value.shape[-1]), dtype=torch.float32, device=q.device)
            before = lse[:, :, part.rows]
            joined = torch.logaddexp(before, lse_of_part)
            out[:, :, part.rows] *= (before - _finite(joined)).exp().unsqueeze(-1)
            out[:, :, part.rows] += of_part.float() * (lse_of_part - _finite(joined)).exp().unsqueeze(-1)
            lse[:, :, part.rows] = joined
            if step < group.size - 1:
                ring.take()
        assert out is not None
        result = out.to(query.dtype).permute(2, 0, 1, 3)
        ctx.group, ctx.key_values, ctx.documents = group, key_values, documents
        ctx.save_for_backward(query, first, second, weight, result, lse)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, first, second, weight, result, lse = ctx.saved_tensors
        group = ctx.group
        q, out, grad_out = heads_first(query), heads_first(result), heads_first(grad)
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        grad_weight: Tensor | None = None
        ring = _Ring(group, [first.contiguous(), second.contiguous()], _TAG)
        gradients = _Ring(
            group, [torch.zeros(each.shape, dtype=torch.float32, device=q.device) for each in (first, second)], _TAG + 1
        )
        for step in range(group.size):
            held = ring.tensors
            if step < group.size - 1:
                ring.pass_on()
            part = _Step(group, (group.rank - step) % group.size, query, ctx.documents)
            seen = [each[part.keys] for each in held]
            rows, q_rows, out_rows, lse_rows = (each[:, :, part.rows] for each in (grad_out, q, out, lse))
            of_query, *of_made = part.gradients(rows, q_rows, *ctx.key_values.make(seen, weight), out_rows, lse_rows)
            grad_q[:, :, part.rows] += of_query.float()
            of_held, of_weight = ctx.key_values.gradients(seen, weight, of_made)
            if of_weight is not None:
                grad_weight = of_weight.float() if grad_weight is None else grad_weight.add_(of_weight)
            if step:
                gradients.take()
            for total, each in zip(gradients.tensors, of_held, strict=True):
                total[part.keys] += each
            del of_query, of_made, of_held, of_weight, each  # not beside what comes next
            gradients.pass_on()
            if step < group.size - 1:
                ring.take()
        gradients.take()
        of_first, of_second = (each.to(query.dtype) for each in gradients.tensors)
        whole_weight = None if grad_weight is None else grad_weight.to(query.dtype)
        return grad_q.to(query.dtype).permute(2, 0, 1, 3), of_first, of_second, whole_weight, None, None, None
