"""What attention keeps between the tokens of a text, keys and values or the latents of both, so that each new token is
computed alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KeyValueCache:
    """Of one text and all attention layers of a rank. The positions before n_seen are kept; who ran a forward of more
    tokens raises it."""

    def __init__(self, capacity: int) -> None:
        """capacity: positions that a forward may reach, its padding included."""
        self.n_seen = 0
        self._capacity = capacity
        self._kept: dict[nn.Module, list[Tensor]] = {}

    def keep(self, layer: nn.Module, *new: Tensor) -> list[Tensor]:
        """Keeps what a layer has for the positions from n_seen on, each [R, B, ...]; all that it has until there."""
        if layer not in self._kept:
            self._kept[layer] = [each.new_empty((self._capacity, *each.shape[1:])) for each in new]
        end = self.n_seen + len(new[0])
        for kept, each in zip(self._kept[layer], new, strict=True):
            kept[self.n_seen : end] = each
        return [kept[:end] for kept in self._kept[layer]]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
        """Causal attention of query [R, B, H, d], at the positions from n_seen on, to all keys [S, B, H_kv, d] and
        values until there; [R, B, H, d of value]. scale: of scores; None: 1 / √d."""
        at = torch.arange(len(key), device=key.device)
        seen = at <= at[self.n_seen :].unsqueeze(-1)
        grouped = key.shape[2] != query.shape[2]
        q, k, v = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped, scale=scale)
        return y.permute(2, 0, 1, 3)
