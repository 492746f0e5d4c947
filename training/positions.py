"""Which positions of a sequence a context parallel rank has (context.py says why)."""

from __future__ import annotations

import torch
from torch import Tensor


def positions(seq_len: int, n_ranks: int, rank: int, where: torch.device) -> Tensor:
    """int64 [S / n_ranks] there: the positions in the sequence that a context parallel rank has."""
    everything = torch.arange(seq_len, device=where)
    if n_ranks == 1:
        return everything
    parts = everything.view(2 * n_ranks, -1)
    return torch.cat([parts[rank], parts[2 * n_ranks - 1 - rank]])
