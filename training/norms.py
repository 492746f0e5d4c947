"""RMSNorm and LayerNorm, whole on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.mesh import Mesh
from training.model_config import ModelConfig
from training.sharding import ParamSpec, ShardedModule


class RMSNorm(ShardedModule):
    """x / rms(x) * weight over the last dimension, computed in fp32. Source: arXiv:1910.07467."""

    def __init__(self, width: int, eps: float, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.eps = eps
        self.weight = self.new_parameter("weight", ParamSpec((width,), None))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # where torch has a fused kernel
            return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
        y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return y


class _RMSNorm(torch.autograd.Function):
    """x [.., width] and weight [width] to x's shape and dtype, where torch has no fused kernel: it puts the norm
    together from a dozen operations with a gradient each, and saves x / rms(x) beside x. This makes half as many passes
    over the rows, and saves x and 1 / rms(x) of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.float()
        squares = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()  # 1 / rms(x), of each row
        ctx.save_for_backward(x, weight, scale)
        return (rows * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        width = x.shape[-1]
        rows, grad = (each.float().reshape(-1, width) for each in (x, grad))
        scale, factor = scale.reshape(-1, 1), weight.float()
        product = grad * rows
        grad_weight = torch.mv(product.mT, scale[:, 0]).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        along = torch.mv(product, factor).unsqueeze(-1)  # what of the gradient changes a row's length alone
        grad_x = torch.mul(grad, factor, out=product).mul_(scale)
        grad_x.addcmul_(rows, along.mul_(scale.pow(3)).div_(-width))
        return grad_x.view_as(x).to(x.dtype), grad_weight, None


class LayerNorm(ShardedModule):
    """(x - mean) / std * weight + bias over the last dimension, computed in fp32. Source: arXiv:1607.06450."""

    def __init__(self, width: int, eps: float, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.eps = eps
        self.weight = self.new_parameter("weight", ParamSpec((width,), None))
        self.bias = self.new_parameter("bias", ParamSpec((width,), 0.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def norm(config: ModelConfig, mesh: Mesh) -> RMSNorm | LayerNorm:
    """The norm of a block."""
    kind = LayerNorm if config.block == "gpt2" else RMSNorm
    return kind(config.d_model, config.norm_eps, mesh)
