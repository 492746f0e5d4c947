"""Keys and values that attention keeps between the tokens of a text, so that each new token is computed alone."""

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
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of query [R, B, H, d], at the positions from n_seen on, to what the layer has kept and to
        key and value [R, B, H_kv, d] of the same positions, which are kept too; like query."""
        if layer not in self._kept:
            shape = (self._capacity, *key.shape[1:])
            self._kept[layer] = key.new_empty(shape), value.new_empty(shape)
        end = self.n_seen + len(key)
        both = []
        for kept, new in zip(self._kept[layer], (key, value), strict=True):
            kept[self.n_seen : end] = new
            both.append(kept[:end].permute(1, 2, 0, 3))
        seen = torch.arange(end) <= torch.arange(self.n_seen, end).unsqueeze(-1)
        grouped = key.shape[2] != query.shape[2]
        y = F.scaled_dot_product_attention(query.permute(1, 2, 0, 3), *both, attn_mask=seen, enable_gqa=grouped)
        return y.permute(2, 0, 1, 3)
