"""Attention of the blocks: of heads with keys and values of their own or in groups, and of one latent a token (MLA)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from training.cache import KeyValueCache
from training.context import attend, attend_latents, positions
from training.mesh import Mesh
from training.model_config import ModelConfig
from training.norms import RMSNorm
from training.parallel import ColumnLinear, Linear, RowLinear, column_linears, gather_sequence, row_linear
from training.recompute import again
from training.rotary import rotary_angles, rotary_frequencies, rotate, rotate_pairs, score_scale
from training.sharding import STD

if TYPE_CHECKING:
    from training.model import Parallel

_LATENT_EPS = 1e-6  # of the latents' norms, whatever norm_eps is: as in DeepSeek's models


class Attention(nn.Module):
    """Causal attention whose heads are cut over tp: [S/tp, B, D] to [S/tp, B, D]."""

    def __init__(self, config: ModelConfig, mesh: Mesh, parallel: Parallel) -> None:
        super().__init__()
        self.parallel = parallel
        self.mesh = mesh
        self.cache: KeyValueCache | None = None
        self.attend = attend  # torch.compile leaves another one out of its graphs
        self.head_dim = config.head_width
        self.score_scale = score_scale(config)
        self.frequencies: Tensor | None
        frequencies = rotary_frequencies(config) if config.block == "llama" else None
        self.register_buffer("frequencies", frequencies, persistent=False)
        width, kv_width = config.n_heads * self.head_dim, config.n_kv_heads * self.head_dim
        bias = config.block == "gpt2"
        self.query = ColumnLinear(config.d_model, width, mesh, STD, bias)
        self.key = ColumnLinear(config.d_model, kv_width, mesh, STD, bias)
        self.value = ColumnLinear(config.d_model, kv_width, mesh, STD, bias)
        self.out = RowLinear(width, config.d_model, mesh, STD / (2 * config.n_layers) ** 0.5, bias)

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """documents: int64 [S, B], whole; None where each sequence is one document."""
        products = column_linears(x, [self.query, self.key, self.value], self.mesh)
        query, key, value = (each.unflatten(-1, (-1, self.head_dim)) for each in products)
        selective = self.parallel.recompute == "selective"
        y = again(self._core, query, key, value, documents, enabled=selective)
        return row_linear(y.flatten(-2), self.out, self.mesh)

    def _core(self, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
        """[S/cp, B, H, head_dim] of this rank's heads: rotation and attention."""
        if self.frequencies is not None:
            cos, sin = _angles(len(query), self.frequencies, self.mesh, self.cache)
            if self.score_scale != 1:
                query = query * self.score_scale
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if self.cache is not None:
            return self.cache.attend(query, *self.cache.keep(self, key, value))
        return self.attend(query, key, value, self.mesh, self.parallel.context, documents)


class LatentAttention(nn.Module):
    """Multi-head latent attention: every head's key and value come from one latent a token, and positions from a turned
    part of the query and one turned key that all heads share: [S/tp, B, D] to [S/tp, B, D].

        x ─ query_down ───── norm ─┐                 ┌─ query_up ────── q [H, head_dim + rope]
        x ─ key_value_down ┬ norm ─┼ gather_sequence ┼─ key_value_up ── k [H, head_dim], v [H, v_head_dim]
                           └───────┘                 └───────────────── k of all heads [rope]

    What makes latents is whole on each tp rank, which runs it for its part of the sequence, so that its gradients are
    summed as a norm's are; only latents are gathered, and heads are cut over tp as everywhere. Without q_lora_rank
    queries come from x. The cache keeps latents and shared keys, nothing of a head.
    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1."""

    def __init__(self, config: ModelConfig, mesh: Mesh, parallel: Parallel) -> None:
        super().__init__()
        self.parallel = parallel
        self.mesh = mesh
        self.cache: KeyValueCache | None = None
        self.attend, self.attend_latents = attend, attend_latents
        self.widths = (config.kv_lora_rank, config.qk_rope_head_dim)
        self.of_query = (config.head_width, config.qk_rope_head_dim)
        self.of_head = (config.head_width, config.v_width)
        self.score_scale = score_scale(config)
        self.frequencies: Tensor
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)
        d, n, q = config.d_model, config.n_heads, config.q_lora_rank
        self.query_down = Linear(d, q, mesh, STD) if q else None
        self.query_norm = RMSNorm(q, _LATENT_EPS, mesh) if q else None
        self.query_up = ColumnLinear(q or d, n * sum(self.of_query), mesh, STD)
        self.key_value_down = Linear(d, sum(self.widths), mesh, STD)
        self.key_value_norm = RMSNorm(config.kv_lora_rank, _LATENT_EPS, mesh)
        self.key_value_up = ColumnLinear(config.kv_lora_rank, n * sum(self.of_head), mesh, STD)
        self.out = RowLinear(n * config.v_width, d, mesh, STD / (2 * config.n_layers) ** 0.5)

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """documents: int64 [S, B], whole; None where each sequence is one document."""
        latent, shared = self.key_value_down(x).split(self.widths, -1)
        latents = [self.key_value_norm(latent), shared]
        if self.query_down is None or self.query_norm is None:
            (query,) = column_linears(x, [self.query_up], self.mesh)
            latent, shared = gather_sequence(torch.cat(latents, -1), self.mesh).split(self.widths, -1)
        else:
            latents.append(self.query_norm(self.query_down(x)))
            gathered = gather_sequence(torch.cat(latents, -1), self.mesh)
            latent, shared, of_query = gathered.split([each.shape[-1] for each in latents], -1)
            query = self.query_up(of_query)
        query, shared = query.unflatten(-1, (-1, sum(self.of_query))), shared.unsqueeze(-2)
        selective = self.parallel.recompute == "selective"
        if self.cache is not None:
            y = self._of_latents(self.cache, query, latent, shared)
        elif self.parallel.context_latents and self.mesh.cp.size > 1:
            y = again(self._latent_core, query, latent, shared, documents, enabled=selective)
        else:
            both = self.key_value_up(latent).unflatten(-1, (-1, sum(self.of_head)))
            y = again(self._core, query, both, shared, documents, enabled=selective)
        return row_linear(y.flatten(-2), self.out, self.mesh)

    def _turned(self, query: Tensor, shared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A query's still and turned parts, scaled, and the turned shared key [S/cp, B, 1, rope]."""
        cos, sin = _angles(len(query), self.frequencies, self.mesh, self.cache)
        if self.score_scale != 1:
            query = query * self.score_scale
        still, turned = query.split(self.of_query, -1)
        return still, rotate_pairs(turned, cos, sin), rotate_pairs(shared, cos, sin)

    def _core(self, query: Tensor, both: Tensor, shared: Tensor, documents: Tensor | None) -> Tensor:
        """[S/cp, B, H, v_head_dim] of this rank's heads: both are keys and values."""
        still, turned, shared = self._turned(query, shared)
        key, value = both.split(self.of_head, -1)
        query = torch.cat([still, turned], -1)
        key = torch.cat([key, shared.expand(-1, -1, key.shape[-2], -1)], -1)
        return self.attend(query, key, value, self.mesh, self.parallel.context, documents)

    def _latent_core(self, query: Tensor, latent: Tensor, shared: Tensor, documents: Tensor | None) -> Tensor:
        """_core() of context parallel ranks, which exchange latents and make keys and values after that."""
        still, turned, shared = self._turned(query, shared)
        query, weight = torch.cat([still, turned], -1), self.key_value_up.weight
        return self.attend_latents(
            query, (latent, shared), weight, self.of_head, self.mesh, self.parallel.context, documents
        )

    def _of_latents(self, cache: KeyValueCache, query: Tensor, latent: Tensor, shared: Tensor) -> Tensor:
        """_core() without keys and values of heads: q · (U c) = (Uᵀ q) · c, so that latents are the one key and value
        of all heads. For a new token that is a small product instead of key_value_up over all before it."""
        still, turned, shared = self._turned(query, shared)
        of_key, of_value = self.key_value_up.weight.unflatten(0, (-1, sum(self.of_head))).split(self.of_head, 1)
        query = torch.cat([torch.einsum("sbhd,hdr->sbhr", still, of_key), turned], -1)
        (seen,) = cache.keep(self, torch.cat([latent.unsqueeze(-2), shared], -1))
        y = cache.attend(query, seen, seen[..., : self.widths[0]], sum(self.of_query) ** -0.5)
        return torch.einsum("sbhr,hdr->sbhd", y, of_value)


def _angles(n_rows: int, frequencies: Tensor, mesh: Mesh, cache: KeyValueCache | None) -> tuple[Tensor, Tensor]:
    """cos and sin of the positions of this context parallel rank's n_rows."""
    at = positions(n_rows * mesh.cp.size, mesh.cp.size, mesh.cp.rank, frequencies.device)
    if cache is not None:
        at += cache.n_seen
    return rotary_angles(at, frequencies)
