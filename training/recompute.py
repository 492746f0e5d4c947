"""Activation checkpointing: what forward does not keep, backward computes again.

    none        everything is kept
    selective   attention's own activations (rotated queries and keys, scores where they exist) are computed again:
                most of the memory that grows with the sequence, little of the time
    full        only each block's input is kept; backward runs the block's forward again, a third more time

Source: Korthikanti et al., arXiv:2205.05198, sections 4 and 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from pycomm.overlap import in_backward

__all__ = ["again", "in_backward"]


def again(run: Callable[..., Any], *args: Any, enabled: bool) -> Any:
    """run(*args); with enabled, backward runs it again instead of keeping what it saved."""
    if not enabled or not torch.is_grad_enabled():
        return run(*args)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)  # nothing here draws numbers
