"""Context parallelism: every sequence cut over the cp ranks, and attention across the cuts.

The sequence is cut into 2 · cp parts, and rank r has part r and part 2 · cp - 1 - r, in that order ("zig-zag"): an
early and a late one, so that causal attention costs every rank the same in every step of the ring.

    cp = 2, parts 0 1 2 3      rank 0: 0 3      rank 1: 1 2

ring      keys and values go around the ranks; each step attends to one rank's, and the partial results are joined by
          their log-sum-exp (ring_attention.py). Moves 2 · S/cp · kv_width numbers a step, beside the step's products.
ulysses   an all_to_all gives each rank the whole sequence of 1 / cp of its heads, another one takes the result back.
          Source: Jacobs et al., DeepSpeed-Ulysses, arXiv:2309.14509.

Of latent attention latents go around, or are gathered by all, and each rank makes keys and values of them
(attend_latents()), unless layout.context_latents is false.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.key_values import OfHeads, OfLatents
from training.mesh import Mesh
from training.positions import positions
from training.ring_attention import RingAttention


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
    of_heads = OfHeads(query.shape[2] // key.shape[2])
    out: Tensor = RingAttention.apply(query, key, value, None, of_heads, mesh.cp, documents)
    return out


def attend_latents(
    query: Tensor,
    latents: tuple[Tensor, Tensor],
    weight: Tensor,
    widths: tuple[int, int],
    mesh: Mesh,
    kind: str,
    documents: Tensor | None,
) -> Tensor:
    """attend() of several ranks where keys and values come from latents [S/cp, B, r] and turned shared keys
    [S/cp, B, 1, rope], which they exchange instead. weight, widths: as key_values.OfLatents takes them."""
    key_values = OfLatents(widths, mesh.fp8)
    if kind == "ring":
        out: Tensor = RingAttention.apply(query, *latents, weight, key_values, mesh.cp, documents)
        return out
    n_heads = query.shape[2] // mesh.cp.size
    own = weight.unflatten(0, (query.shape[2], -1))[mesh.cp.rank * n_heads :][:n_heads].flatten(0, 1)
    whole = _GatherContext.apply(torch.cat([latents[0], latents[1].flatten(2)], -1), mesh)
    latent, shared = whole.split([each.shape[-1] for each in latents], -1)
    gathered = [_SequenceForHeads.apply(query, mesh), *key_values.of_rows([latent, shared.unsqueeze(2)], own)]
    return _HeadsForSequence.apply(_whole_attention(*gathered, documents), mesh)


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


class _GatherContext(torch.autograd.Function):
    """[S/cp, B, width] of each rank to [S, B, width] in the order of positions; backward adds the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        rows = x.new_empty((x.shape[0] * mesh.cp.size, *x.shape[1:]))
        mesh.cp.all_gather(rows, x.contiguous(), wire=mesh.wire["cp"])
        return torch.empty_like(rows).index_copy_(0, _order(len(rows), mesh.cp.size, x.device), rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        cp = ctx.mesh.cp
        own = grad.new_empty((grad.shape[0] // cp.size, *grad.shape[1:]))
        cp.reduce_scatter(own, grad[_order(len(grad), cp.size, grad.device)], wire=ctx.mesh.wire["cp"])
        return own, None


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
