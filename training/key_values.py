"""What context parallel ranks exchange of keys and values, and how a rank makes them of it.

OfHeads     keys and values themselves, of each head or of a group of heads
OfLatents   latents and the turned key that all heads share (attention.LatentAttention): kv_lora_rank +
            qk_rope_head_dim numbers a token instead of heads × (width of a key + of a value); each rank makes keys
            and values of them, for its own heads, and in backward again
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from training import fp8


class KeyValues(Protocol):
    """held: the two tensors that are exchanged, or the same rows [S, ..] of both."""

    def make(self, held: Sequence[Tensor], weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Key [B, H, S, d] and value [B, H, S, d_v]."""

    def gradients(
        self, held: Sequence[Tensor], weight: Tensor | None, of_made: Sequence[Tensor]
    ) -> tuple[Iterable[Tensor], Tensor | None]:
        """Of held, one at a time, and of weight, from those of key and value."""


class OfHeads:
    """held: key [S, B, H / repeats, d] and value [S, B, H / repeats, d_v]; there is no weight."""

    def __init__(self, repeats: int) -> None:
        self._repeats = repeats

    def make(self, held: Sequence[Tensor], weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        key, value = (heads_first(each, self._repeats) for each in held)
        return key, value

    def gradients(
        self, held: Sequence[Tensor], weight: Tensor | None, of_made: Sequence[Tensor]
    ) -> tuple[Iterable[Tensor], None]:
        """A head of keys has the sum over the queries' heads that share it, fp32."""
        summed = (each.float().unflatten(1, (-1, self._repeats)).sum(2) for each in of_made)
        return (each.permute(2, 0, 1, 3) for each in summed), None


class OfLatents:
    """held: latents [S, B, kv_lora_rank] and shared keys, turned, [S, B, 1, qk_rope_head_dim]. weight: key_value_up's,
    [heads × (head_dim + v_head_dim), kv_lora_rank]."""

    def __init__(self, widths: tuple[int, int], use_fp8: bool) -> None:
        """widths: head_dim and v_head_dim. use_fp8: of the product (training/fp8.py)."""
        self._widths, self._product = widths, fp8.linear if use_fp8 else F.linear

    def of_rows(self, held: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
        """Key [S, B, H, head_dim + qk_rope_head_dim] and value [S, B, H, v_head_dim]."""
        latent, shared = held
        both = self._product(latent, weight, None).unflatten(-1, (-1, sum(self._widths)))
        key, value = both.split(self._widths, -1)
        return torch.cat([key, shared.expand(-1, -1, key.shape[-2], -1)], -1), value

    def make(self, held: Sequence[Tensor], weight: Tensor | None) -> tuple[Tensor, Tensor]:
        assert weight is not None
        key, value = self.of_rows(held, weight)
        return heads_first(key), heads_first(value)

    def gradients(
        self, held: Sequence[Tensor], weight: Tensor | None, of_made: Sequence[Tensor]
    ) -> tuple[Iterable[Tensor], Tensor]:
        assert weight is not None
        leaves = [each.detach().requires_grad_() for each in (*held, weight)]
        with torch.enable_grad():
            made = self.make(leaves[:2], leaves[2])
        of_latent, of_shared, of_weight = torch.autograd.grad(made, leaves, list(of_made))
        return [of_latent.float(), of_shared.float()], of_weight


def heads_first(x: Tensor, repeats: int = 1) -> Tensor:
    """[S, B, H, d] to [B, H * repeats, S, d]."""
    x = x.permute(1, 2, 0, 3)
    return x if repeats == 1 else x.repeat_interleave(repeats, 1)
