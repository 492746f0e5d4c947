"""The trainer's Llama-shaped model as a user of plain torch would write and train it: DDP, FSDP2 and
torch.distributed.pipelining over Gloo, for benchmarks/trainer.py.

Each contender has step(index) -> loss, the mean cross-entropy of a token over the whole batch, and trains with AdamW
and clipping as the trainer's configuration says. Parameters have the trainer's names, so that weights go over by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from training.config import Config
from training.layout import stages_of
from training.model_config import ModelConfig
from training.optimizer import learning_rate

Batches = Callable[[int], tuple[Tensor, Tensor]]  # tokens and targets int64 [B, S] of a step, of this rank


class Contender(Protocol):
    def step(self, index: int) -> float: ...


class Attention(nn.Module):
    """Causal, with rotary positions: [B, S, D] to [B, S, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, kv_width = config.n_heads * config.head_width, config.n_kv_heads * config.head_width
        self.head_width, self.grouped = config.head_width, config.n_heads != config.n_kv_heads
        self.query = nn.Linear(config.d_model, width, bias=False)
        self.key = nn.Linear(config.d_model, kv_width, bias=False)
        self.value = nn.Linear(config.d_model, kv_width, bias=False)
        self.out = nn.Linear(width, config.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (
            each(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).flatten(-2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, S, d], cos and sin [S, d / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class GPT(nn.Module):
    """Layers first to last - 1 of the model: tokens [B, S] or activations [B, S, D] to activations, or to logits
    [B, S, V] where the last layer is among them. Embedding and head are one table."""

    def __init__(self, config: ModelConfig, seq_len: int, first: int = 0, last: int | None = None) -> None:
        super().__init__()
        last = config.n_layers if last is None else last
        self.begins, self.ends = first == 0, last == config.n_layers
        self.embedding = nn.Embedding(config.vocab_size, config.d_model) if self.begins or self.ends else None
        self.blocks = nn.ModuleDict({str(index): Block(config) for index in range(first, last)})
        self.norm = nn.RMSNorm(config.d_model, config.norm_eps) if self.ends else None
        half = torch.arange(0, config.head_width, 2, dtype=torch.float32) / config.head_width
        angles = torch.outer(torch.arange(seq_len).float(), config.rope_base**-half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.begins:
            assert self.embedding is not None
            x = self.embedding(x)
        for block in self.blocks.values():
            x = block(x, self.cos, self.sin)
        if not self.ends:
            return x
        assert self.embedding is not None and self.norm is not None
        return F.linear(self.norm(x), self.embedding.weight)


def require_plain(config: Config) -> None:
    """Raises ValueError for a model that GPT above is not."""
    model = config.model
    if (model.block, model.rope_scaling, model.n_experts, model.tie_embeddings) != ("llama", "none", 0, True):
        raise ValueError(f"plain_torch.py has dense Llama blocks with one table alone, {config.name!r} is another")
    if config.train.precision != "fp32" or config.data.document_mask:
        raise ValueError("plain_torch.py trains in fp32 and without document masks")


def load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Those of the model's parameters, by name."""
    model.load_state_dict({name: weights[name] for name in model.state_dict()})


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class _Optimizer:
    """AdamW over a model's parameters, with the trainer's schedule, decay and clipping."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        self._config, self._parameters = config, list(model.parameters())
        chosen = config.optimizer
        self._adamw = torch.optim.AdamW(
            [
                {"params": [p for p in self._parameters if p.dim() > 1], "weight_decay": chosen.weight_decay},
                {"params": [p for p in self._parameters if p.dim() == 1], "weight_decay": 0.0},
            ],
            betas=(chosen.beta1, chosen.beta2),
            eps=chosen.eps,
            fused=True,
        )

    def norm(self) -> Tensor:
        """Of this process's gradients; with FSDP2 of the whole model's."""
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None], foreach=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def update(self, index: int, norm: Tensor) -> None:
        """norm: of the whole model's gradients."""
        nn.utils.clip_grads_with_norm_(self._parameters, self._config.optimizer.clip_norm, norm, foreach=True)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate(index, self._config.train.steps, self._config.optimizer)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)


class DataParallel:
    """DistributedDataParallel with the buckets that it has unless told otherwise, or FSDP2: fully_shard() of each
    block, then of the rest."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor], batches: Batches, sharded: bool) -> None:
        self._batches = batches
        model = GPT(config.model, config.data.seq_len)
        load(model, weights)
        self._model: nn.Module = model
        if sharded:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for block in model.blocks.values():
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            self._model = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
        self._optimizer = _Optimizer(self._model, config)

    def step(self, index: int) -> float:
        tokens, targets = self._batches(index)
        loss = cross_entropy(self._model(tokens), targets)
        loss.backward()
        total = loss.detach()
        dist.all_reduce(total)
        self._optimizer.update(index, self._optimizer.norm())
        return float(total) / dist.get_world_size()


class Pipelining:
    """torch.distributed.pipelining's 1F1B, a stage a rank, layers as the trainer places them. First and last stage have
    the table; they sum its gradient after the last micro-batch, as torch leaves to its user."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor], batches: Batches) -> None:
        """config: with layout.pp as many as there are ranks; its accumulation is the number of micro-batches."""
        rank, n_ranks = dist.get_rank(), dist.get_world_size()
        self._batches, self._first, self._last = batches, rank == 0, rank == n_ranks - 1
        layers = stages_of(config).layers(rank)
        model = GPT(config.model, config.data.seq_len, layers.start, layers.stop)
        load(model, weights)
        stage = PipelineStage(model, rank, n_ranks, torch.device("cpu"))
        self._schedule = Schedule1F1B(stage, config.train.accumulation, cross_entropy)
        self._optimizer = _Optimizer(model, config)
        self._table = None if model.embedding is None else model.embedding.weight
        self._ends = dist.new_group([0, n_ranks - 1])

    def step(self, index: int) -> float:
        tokens, targets = self._batches(index)
        losses: list[Tensor] = []
        arguments: tuple[Any, ...] = (tokens,) if self._first else ()
        self._schedule.step(*arguments, target=targets if self._last else None, losses=losses)
        squares = torch.zeros(())
        if self._table is not None:
            assert self._table.grad is not None
            dist.all_reduce(self._table.grad, group=self._ends)
            if self._last:
                squares -= self._table.grad.norm() ** 2  # which the first stage counts
        squares += self._optimizer.norm() ** 2
        both = torch.stack([squares, torch.stack(losses).mean().detach() if losses else torch.zeros(())])
        dist.all_reduce(both)
        self._optimizer.update(index, both[0].sqrt())
        return float(both[1])
