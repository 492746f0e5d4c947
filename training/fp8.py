"""Matrix products in fp8: activations and weights as e4m3, gradients as e5m2, each tensor with one scale.

    y  = x Wᵀ        e4m3 × e4m3
    dx = dy W        e5m2 × e4m3
    dW = dyᵀ x       e5m2 × e4m3

A scale puts the tensor's largest magnitude at the largest number of its format; it is found anew each time, on the
device. Sums are fp32, results bf16. A product keeps the codes of its rows for backward, and of a weight, whose memory
is there anyway, the scale: its codes are made again. Source: Micikevicius et al., FP8 Formats for Deep Learning,
arXiv:2209.05433."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from pycomm.overlap import WeightGradients
from training.device import Device
from training.errors import ConfigError

MULTIPLE: Final = 16  # of which every size of a product must be one
_CAPABILITY: Final = (8, 9)


def require_fp8(device: Device) -> None:
    """Raises ConfigError where the device has no fp8 products."""
    if not device.late:
        raise ConfigError("train.matmul is 'fp8', which CPUs do not have; set train.matmul to 'plain'")
    if device.is_gpu and (capability := torch.cuda.get_device_capability(device.where)) < _CAPABILITY:
        raise ConfigError(
            f"train.matmul is 'fp8', which GPUs have from compute capability 8.9 on; {device.where} is "
            f"{torch.cuda.get_device_name(device.where)}, {capability[0]}.{capability[1]}: set train.matmul to 'plain'"
        )


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..] in an fp8 dtype, and the fp32 scalar that its numbers are multiplied by to be x's."""
    scale = x.abs().amax().float().clamp(min=1e-30) / torch.finfo(dtype).max
    return coded(x, scale, dtype), scale


def coded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale in an fp8 dtype; scale as quantise() finds it."""
    largest = torch.finfo(dtype).max
    return x.to(torch.float32, copy=True).div_(scale).clamp_(-largest, largest).to(dtype)


def _padded(rows: Tensor) -> Tensor:
    """rows [M, K] and zeros up to a multiple of MULTIPLE: a weight's gradient is a product over rows. Zeros change
    neither a scale nor a sum."""
    missing = -len(rows) % MULTIPLE
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, fast: bool) -> Tensor:
    """bf16 [M, N] of a [M, K] and b [N, K], both fp8 and contiguous. fast: sums in fewer bits, enough for a forward."""
    return torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, later: WeightGradients | None, leaf: Tensor) -> Tensor:
        rows, of_rows = quantise(_padded(x.flatten(0, -2)), torch.float8_e4m3fn)
        matrix, of_matrix = quantise(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(rows, of_rows, weight, of_matrix)
        ctx.later, ctx.leaf = later, leaf
        return _product(rows, matrix, of_rows, of_matrix, True)[: x.shape[:-1].numel()].unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, of_rows, weight, of_matrix = ctx.saved_tensors
        given, of_given = quantise(_padded(grad.flatten(0, -2)), torch.float8_e5m2)
        of_x = None
        if ctx.needs_input_grad[0]:
            columns = coded(weight, of_matrix, torch.float8_e4m3fn).t().contiguous()
            of_x = _product(given, columns, of_given, of_matrix, False)
            del columns  # not beside the weight's gradient
            of_x = of_x[: grad.shape[:-1].numel()].unflatten(0, grad.shape[:-1])

        def of_weight() -> Tensor:
            return _product(given.t().contiguous(), rows.t().contiguous(), of_given, of_rows, False)

        if ctx.later is None:
            return of_x, of_weight() if ctx.needs_input_grad[1] else None, None, None
        if ctx.leaf.requires_grad:
            ctx.later.put(ctx.leaf, of_weight)
        return of_x, None, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, later: WeightGradients | None = None) -> Tensor:
    """F.linear of bf16 x [.., K] and weight [N, K], whose products are fp8; bias [N] is added in bf16. later: puts the
    weight's gradient off; the weight must be a leaf then. K and N are multiples of 16."""
    if x.numel() == 0:  # an expert without a token: no scale to find
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight if later is None else weight.detach(), later, weight)
    return y if bias is None else y + bias
