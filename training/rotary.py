"""Rotary positions: which frequencies the pairs of a head turn with, and the turning. Source: arXiv:2104.09864."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.model_config import ModelConfig


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """fp32 [width / 2], radians a position, on the CPU, so that all devices have the same; width: head_dim, or with
    latent attention qk_rope_head_dim.

    rope_scaling "linear" divides all by rope_factor (arXiv:2306.15595). "llama3" divides those that turn fewer than
    rope_low_freq_factor times in rope_original_len, leaves those above rope_high_freq_factor turns, and goes linearly
    from one to the other between (Llama 3.1, arXiv:2407.21783). "yarn" does so linearly in the pair's number
    (arXiv:2309.00071, section 3.2)."""
    width = config.qk_rope_head_dim or config.head_width
    frequencies = config.rope_base ** -(torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)
    if config.rope_scaling == "linear":
        return frequencies / config.rope_factor
    if config.rope_scaling == "llama3":
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        turns = config.rope_original_len * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return frequencies * (kept + (1 - kept) / config.rope_factor)
    if config.rope_scaling == "yarn":
        first, last = (
            width * math.log(config.rope_original_len / (2 * math.pi * turns)) / (2 * math.log(config.rope_base))
            for turns in (config.rope_high_freq_factor, config.rope_low_freq_factor)
        )  # the pairs that turn so often in rope_original_len
        low, high = max(math.floor(first), 0), min(math.ceil(last), width - 1)
        scaled = ((torch.arange(width // 2, device="cpu") - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)
        return frequencies * (1 - scaled + scaled / config.rope_factor)
    return frequencies


def score_scale(config: ModelConfig) -> float:
    """What yarn multiplies attention's scores by, beside 1 / √width (arXiv:2309.00071, section 3.4)."""
    return (0.1 * config.rope_mscale * math.log(config.rope_factor) + 1.0) ** 2


def rotary_angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each fp32 [S, 1, 1, head_dim / 2], of positions int64 [S]."""
    angles = torch.outer(positions.to(frequencies), frequencies)[:, None, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + head_dim/2]) of x [S, B, H, head_dim] by each position's angles, in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rotate() of the pairs (x[2i], x[2i + 1]), as DeepSeek orders them."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).to(x.dtype)
