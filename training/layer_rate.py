"""The rate that planning a layout counts with: FLOP/s that a rank reaches in the model's own layers.

A product of large matrices is faster than a small model's layers, which also normalise, rotate and attend; the planner
would promise too much with it."""

from __future__ import annotations

import statistics
from typing import cast

import torch
from torch import nn

from training.config import Config
from training.device import HOST, Device, Span, dtype_of
from training.layout import Layout
from training.machine import matmul_flops
from training.mesh import Mesh
from training.model import Block, Parallel

_MOST_FLOPS = 5e10  # of what is timed; larger layers are products that run at the rate of a product
_ENOUGH_FLOPS, _MOST_SEQUENCES = 5e9, 8  # sequences are added up to either: one alone keeps no core busy
_N_TRIES = 5


class Alone:
    """Enough of a Mesh for layers that are not cut, without a group: of one rank along each axis."""

    size = 1
    rank = 0
    pp_index = 0
    ties = False
    weight_gradients = None
    fp8 = False
    layout = Layout(1, 1, 1)

    def shards(self, axis: object) -> None:
        return None

    @property
    def tp(self) -> Alone:
        return self

    cp = sequence = tp


def planning_flops(config: Config, device: Device = HOST) -> float:
    """plan.tflops, or monitor.peak_tflops, or what layer_flops() measures."""
    given = config.plan.tflops or config.monitor.peak_tflops
    return given * 1e12 if given else layer_flops(config, device)


def layer_flops(config: Config, device: Device = HOST, n_tries: int = _N_TRIES) -> float:
    """FLOP/s, counted as MFU does, of forward and backward of one dense layer, the median of n_tries; a product's where
    that would be large, or the layers are experts. All ranks at once see what sharing a machine leaves them."""
    model, seq_len = config.model, config.data.seq_len
    dtype = dtype_of(config.train.precision)
    matrices = model.n_attention_parameters + (2 if model.block == "gpt2" else 3) * model.d_model * model.d_ff
    flops = 6.0 * matrices * seq_len + 6.0 * model.n_heads * (model.qk_width + model.v_width) * seq_len**2
    if flops > _MOST_FLOPS or model.n_experts:
        return matmul_flops(dtype, device)
    n_sequences = int(min(max(_ENOUGH_FLOPS / flops, 1), _MOST_SEQUENCES, config.train.global_batch))
    with device.making():
        block = Block(model, cast(Mesh, Alone()), 0, Parallel()).to(device.where)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    block.to(dtype)
    times = []
    for _ in range(n_tries + 2):  # two that do not count
        x = torch.randn(seq_len, n_sequences, model.d_model, dtype=dtype, device=device.where, requires_grad=True)
        span = Span(device)
        block(x)[0].sum().backward()
        span.stop()
        times.append(span.seconds())
    return n_sequences * flops / statistics.median(times[2:])
