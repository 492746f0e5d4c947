"""RMSNorm and LayerNorm, whole on every rank."""

from __future__ import annotations

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
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


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
