"""Context parallelism: every sequence cut over the cp ranks, and attention across the cuts.

The sequence is cut into 2 · cp parts, and rank r has part r and part 2 · cp - 1 - r, in that order ("zig-zag"): an
early and a late one, so that causal attention costs every rank the same in every step of the ring.

    cp = 2, parts 0 1 2 3      rank 0: 0 3      rank 1: 1 2

ring      keys and values go around the ranks; each step attends to one rank's, and the partial results are joined by
          their log-sum-exp. Moves 2 · S/cp · kv_width numbers a step, hidden behind the step's products.
          Sources: Liu et al., Ring Attention, arXiv:2310.01889; zig-zag: Brandon et al., arXiv:2311.09431.
ulysses   an all_to_all gives each rank the whole sequence of 1 / cp of its heads, another one takes the result back.
          Source: Jacobs et al., DeepSpeed-Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.mesh import Mesh
from training.metered import MeteredGroup

_TAG = 1 << 40  # keys and values on their way; + 1: their gradients


def positions(seq_len: int, n_ranks: int, rank: int, where: torch.device) -> Tensor:
    """int64 [S / n_ranks] there: the positions in the sequence that a context parallel rank has."""
    everything = torch.arange(seq_len, device=where)
    if n_ranks == 1:
        return everything
    parts = everything.view(2 * n_ranks, -1)
    return torch.cat([parts[rank], parts[2 * n_ranks - 1 - rank]])


def own_part(x: Tensor, mesh: Mesh) -> Tensor:
    """This context parallel rank's rows of x [S, ..]."""
    return x if mesh.cp.size == 1 else x[positions(x.shape[0], mesh.cp.size, mesh.cp.rank, x.device)]


def attend(query: Tensor, key: Tensor, value: Tensor, mesh: Mesh, kind: str, documents: Tensor | None) -> Tensor:
    """Causal attention of query [S/cp, B, H, d] to key [S/cp, B, H_kv, d] and value [S/cp, B, H_kv, d_v]:
    [S/cp, B, H, d_v]. documents int64 [S, B], whole: attention stays within tokens of equal ones."""
    if mesh.cp.size == 1:
        return _whole_attention(query, key, value, documents)
    if kind == "ulysses":
        gathered = [_SequenceForHeads.apply(each, mesh) for each in (query, key, value)]
        return _HeadsForSequence.apply(_whole_attention(*gathered, documents), mesh)
    repeats = query.shape[2] // key.shape[2]
    out: Tensor = _RingAttention.apply(query, key, value, mesh.cp, repeats, documents)
    return out


def document_mask(documents: Tensor) -> Tensor:
    """bool [B, 1, S, S] from the document of each token, int64 [S, B]: true where a query sees a key, which is of its
    own document and not after it."""
    of_batch = documents.T
    same = of_batch.unsqueeze(-1) == of_batch.unsqueeze(-2)
    return same.tril().unsqueeze(1)


def _whole_attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
    mask = None if documents is None else document_mask(documents)
    width = value.shape[-1]
    if width < key.shape[-1]:  # torch's flash kernel needs equal widths; without it scores [B, H, S, S] exist
        value = F.pad(value, (0, key.shape[-1] - width))
    query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))  # [B, H, S, d]
    grouped = key.shape[1] != query.shape[1]
    if grouped and mask is not None and query.is_cuda:  # of the kernels that take a mask none groups heads
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
        grouped = False
    y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=grouped)
    return y.permute(2, 0, 1, 3)[..., :width]


def _order(seq_len: int, n_ranks: int, where: torch.device) -> Tensor:
    """The position of each row of the ranks' parts one after another."""
    return torch.cat([positions(seq_len, n_ranks, rank, where) for rank in range(n_ranks)])


def _to_heads(x: Tensor, mesh: Mesh) -> Tensor:
    """[S/cp, B, H, d] to [S, B, H/cp, d], in the order of positions."""
    n = mesh.cp.size
    sent = x.unflatten(2, (n, -1)).permute(2, 0, 1, 3, 4).contiguous()  # [cp, S/cp, B, H/cp, d]
    received = torch.empty_like(sent)
    mesh.cp.all_to_all(received.flatten(0, 1), sent.flatten(0, 1), wire=mesh.wire["cp"])
    rows = received.flatten(0, 1)
    return torch.empty_like(rows).index_copy_(0, _order(rows.shape[0], n, x.device), rows)


def _to_sequence(x: Tensor, mesh: Mesh) -> Tensor:
    """The reverse: [S, B, H/cp, d] to [S/cp, B, H, d]."""
    n = mesh.cp.size
    sent = x[_order(x.shape[0], n, x.device)]
    received = torch.empty_like(sent)
    mesh.cp.all_to_all(received, sent, wire=mesh.wire["cp"])
    return received.unflatten(0, (n, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3).contiguous()


class _SequenceForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return _to_heads(x, mesh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_sequence(grad, ctx.mesh), None


class _HeadsForSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return _to_sequence(x, mesh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_heads(grad, ctx.mesh), None


class _Step:
    """What a rank attends to in one step of the ring: which rows of its queries, which of the source's keys, and the
    mask, [B or 1, 1, rows, keys] or None where all are seen."""

    def __init__(self, group: MeteredGroup, source: int, query: Tensor, documents: Tensor | None) -> None:
        n_rows, where = query.shape[0], query.device
        half = n_rows // 2
        self.rows = slice(half, None) if source > group.rank else slice(None)  # a later one: the late part sees
        self.keys = slice(0, half) if source < group.rank else slice(None)  # an earlier one: its early part is seen
        seq_len = n_rows * group.size
        at = positions(seq_len, group.size, group.rank, where)[self.rows]
        of = positions(seq_len, group.size, source, where)[self.keys]
        self.mask: Tensor | None = None
        if source == group.rank:
            self.mask = (of <= at.unsqueeze(-1))[None, None]
        if documents is not None:
            same = documents[at].T.unsqueeze(-1) == documents[of].T.unsqueeze(-2)
            self.mask = same.unsqueeze(1) if self.mask is None else self.mask & same.unsqueeze(1)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """fp32 [B, H, rows, keys] of query [B, H, S/cp, d] and key; -inf where nothing is seen."""
        scores = (query[:, :, self.rows] @ key[:, :, self.keys].mT).float() * query.shape[-1] ** -0.5
        return scores if self.mask is None else scores.masked_fill(~self.mask, float("-inf"))


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


def _heads_first(x: Tensor, repeats: int = 1) -> Tensor:
    """[S, B, H, d] to [B, H * repeats, S, d]."""
    x = x.permute(1, 2, 0, 3)
    return x if repeats == 1 else x.repeat_interleave(repeats, 1)


class _RingAttention(torch.autograd.Function):
    """Backward computes the probabilities again from the saved log-sum-exp, as flash attention does; the gradients of
    keys and values go around with them and are whole when they come home."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        group: MeteredGroup,
        repeats: int,
        documents: Tensor | None,
    ) -> Tensor:
        q = _heads_first(query)
        out = torch.zeros((*q.shape[:-1], value.shape[-1]), dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:-1], float("-inf"), device=q.device)
        ring = _Ring(group, [key.contiguous(), value.contiguous()], _TAG)
        for step in range(group.size):
            held = ring.tensors
            if step < group.size - 1:
                ring.pass_on()
            part = _Step(group, (group.rank - step) % group.size, query, documents)
            k, v = (_heads_first(each, repeats) for each in held)
            scores = part.scores(q, k)
            joined = torch.logaddexp(lse[:, :, part.rows], scores.logsumexp(-1))
            finite = joined.masked_fill(joined == float("-inf"), 0.0)  # a row that has seen nothing yet
            weights = (scores - finite.unsqueeze(-1)).exp()
            out[:, :, part.rows] *= (lse[:, :, part.rows] - finite).exp().unsqueeze(-1)
            out[:, :, part.rows] += (weights.to(v.dtype) @ v[:, :, part.keys]).float()
            lse[:, :, part.rows] = joined
            if step < group.size - 1:
                ring.take()
        result = out.to(query.dtype).permute(2, 0, 1, 3)
        ctx.group, ctx.repeats, ctx.documents = group, repeats, documents
        ctx.save_for_backward(query, key, value, result, lse)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, result, lse = ctx.saved_tensors
        group, repeats = ctx.group, ctx.repeats
        q, grad_out = _heads_first(query), _heads_first(grad)
        scale = query.shape[-1] ** -0.5
        delta = (grad_out.float() * _heads_first(result).float()).sum(-1, keepdim=True)
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        ring = _Ring(group, [key.contiguous(), value.contiguous()], _TAG)
        gradients = _Ring(
            group, [torch.zeros(each.shape, dtype=torch.float32, device=q.device) for each in (key, value)], _TAG + 1
        )
        for step in range(group.size):
            held = ring.tensors
            if step < group.size - 1:
                ring.pass_on()
            part = _Step(group, (group.rank - step) % group.size, query, ctx.documents)
            k, v = (_heads_first(each, repeats) for each in held)
            weights = (part.scores(q, k) - lse[:, :, part.rows].unsqueeze(-1)).exp()
            rows = grad_out[:, :, part.rows]
            of_value = weights.to(rows.dtype).mT @ rows
            of_weights = (rows @ v[:, :, part.keys].mT).float()
            of_scores = (weights * (of_weights - delta[:, :, part.rows]) * scale).to(q.dtype)
            grad_q[:, :, part.rows] += (of_scores @ k[:, :, part.keys]).float()
            of_key = of_scores.mT @ q[:, :, part.rows]
            if step:
                gradients.take()
            for total, each in zip(gradients.tensors, (of_key, of_value), strict=True):
                summed = each.float().unflatten(1, (-1, repeats)).sum(2)  # over the queries that share a key's head
                total[part.keys] += summed.permute(2, 0, 1, 3)
            gradients.pass_on()
            if step < group.size - 1:
                ring.take()
        gradients.take()
        grad_key, grad_value = (each.to(query.dtype) for each in gradients.tensors)
        return grad_q.to(query.dtype).permute(2, 0, 1, 3), grad_key, grad_value, None, None, None
