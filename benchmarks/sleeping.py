"""A trainer whose layers sleep instead of computing, so that more ranks than cores run as if each had its own.

Everything else is the trainer's own and real: mesh, schedules, buckets, ZeRO, the exchanges of tensor parallelism and
between stages with their sizes, the optimizer, metrics. A part of a layer sleeps as long as it would compute, and gives
zeros. Dense Llama blocks without context parallelism alone: ring attention exchanges within its computation."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.config import Config
from training.layout import Layout
from training.mesh import Mesh
from training.metered import MeteredGroup
from training.model import GPT
from training.parallel import gather_sequence, reduce_scatter_sequence
from training.trainer import Trainer

PARTS = ("embedding", "attention", "feed_forward", "head")


@dataclass(frozen=True)
class Seconds:
    """Of a part for one micro-batch: forward, and backward's gradients of its input and of its weights."""

    forward: float = 0.0
    input: float = 0.0
    weight: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.input + self.weight


class _Sleeper:
    """Takes as long as asked on average: what one call takes too long the next ones make up for."""

    def __init__(self) -> None:
        self._owed = 0.0

    def make(self, seconds: float, *shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Zeros of the shapes, in as many seconds: what a layer makes it makes within its time."""
        begin = time.perf_counter()
        made = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        self._owed += seconds
        left = self._owed - (time.perf_counter() - begin)
        if left > 0:
            time.sleep(left)
        self._owed -= time.perf_counter() - begin
        return made


class _Sleeps(torch.autograd.Function):
    """x to zeros of a shape; backward gives x and the leaves zeros, the leaves later where W is split off."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: Sequence[int], took: Seconds, sleeper: _Sleeper, later: Any, *leaves: Tensor
    ) -> Tensor:
        ctx.x, ctx.took, ctx.sleeper, ctx.later = (x.shape, x.dtype), took, sleeper, later
        ctx.leaves = leaves
        return sleeper.make(took.forward, shape, dtype=x.dtype if x.is_floating_point() else torch.float32)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        took, sleeper, later = ctx.took, ctx.sleeper, ctx.later
        shape, dtype = ctx.x
        given = sleeper.make(took.input, *([shape] if dtype.is_floating_point else []), dtype=dtype)
        grads: Sequence[Tensor | None] = [None] * len(ctx.leaves)
        if later is None:
            grads = sleeper.make(took.weight, *(leaf.shape for leaf in ctx.leaves))
        else:
            for index, leaf in enumerate(ctx.leaves):
                later.put(leaf, lambda leaf=leaf, s=0.0 if index else took.weight: sleeper.make(s, leaf.shape)[0])
        return given[0] if given else None, None, None, None, None, *grads


class _SleepingLoss(torch.autograd.Function):
    """The fused cross-entropy's exchanges, and in forward all its time, as the trainer's makes its gradient there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, took: Seconds, sleeper: _Sleeper, group: MeteredGroup, chunk: int, *leaves: Tensor
    ) -> Tensor:
        ctx.shape, ctx.leaves = x.shape, leaves
        n_tokens = x.shape[0] * x.shape[1]
        for first in range(0, n_tokens, chunk):
            n = min(chunk, n_tokens - first)
            sleeper.make(took.total * n / n_tokens)
            if group.size > 1:
                group.all_reduce(torch.zeros(n), "max")
                group.all_reduce(torch.zeros(2, n))
        return torch.ones(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return torch.zeros(ctx.shape), None, None, None, None, *(torch.zeros(leaf.shape) for leaf in ctx.leaves)


def put_to_sleep(trainer: Trainer, took: Mapping[str, Seconds]) -> None:
    """From here on the trainer's layers sleep. took: by PARTS, of a micro-batch on this rank.

    Raises ValueError for models and layouts that cannot."""
    config, mesh, model = trainer.config.model, trainer.mesh, trainer.model
    if config.block != "llama" or config.n_experts or mesh.layout.cp > 1:
        raise ValueError(f"{trainer.config.name}, {mesh.layout}: dense Llama blocks without cp alone can sleep")
    sleeper = _Sleeper()

    def half(x: Tensor, part: str, leaves: Sequence[nn.Parameter]) -> Tensor:
        whole = gather_sequence(x, mesh)
        y = _Sleeps.apply(whole, whole.shape, took[part], sleeper, mesh.weight_gradients, *leaves)
        return x + reduce_scatter_sequence(y, mesh)

    def block(each: nn.Module) -> Callable[..., Any]:
        attention = [*each.attention_norm.parameters(), *each.attention.parameters()]
        feed_forward = [*each.feed_forward_norm.parameters(), *each.feed_forward.parameters()]

        def forward(x: Tensor, documents: Tensor | None = None) -> tuple[Tensor, None]:
            return half(half(x, "attention", attention), "feed_forward", feed_forward), None

        return forward

    def embedding(tokens: Tensor) -> Tensor:
        assert model.embedding is not None
        shape = (*tokens.shape, config.d_model)
        rows = _Sleeps.apply(tokens, shape, took["embedding"], sleeper, None, model.embedding.weight)
        return reduce_scatter_sequence(rows.to(trainer.dtype), mesh)

    def cross_entropy(x: Tensor, targets: Tensor) -> Tensor:
        holder = model.embedding if model.head is None else model.head
        assert holder is not None and model.norm is not None
        chunk = trainer.config.train.loss_chunk
        leaves = (holder.weight, model.norm.weight)
        return _SleepingLoss.apply(gather_sequence(x, mesh), took["head"], sleeper, mesh.tp, chunk, *leaves)

    for each in model.blocks.values():
        each.forward = block(each)
    if model.embedding is not None:
        model.embedding.forward = embedding
    model.cross_entropy = cross_entropy


def by_flops(config: Config, layout: Layout, flops_per_s: float) -> dict[str, Seconds]:
    """At a rate, with the FLOPs that MFU counts: 2 a parameter and token, and attention's core whole."""
    model, tokens = config.model, _tokens(config, layout)
    query, key = model.n_heads * model.head_width, model.n_kv_heads * model.head_width
    attention = 2.0 * (2 * query + 2 * key) * model.d_model + 4.0 * query * config.data.seq_len
    of_token = {
        "embedding": 0.0,
        "attention": attention,
        "feed_forward": 2.0 * 3 * model.d_ff * model.d_model,
        "head": 2.0 * model.vocab_size * model.d_model,
    }
    each = {part: flops * tokens / layout.tp / flops_per_s for part, flops in of_token.items()}
    return {part: Seconds(s, s, s) for part, s in each.items()}


def _tokens(config: Config, layout: Layout) -> int:
    return config.data.seq_len * (config.train.global_batch // (layout.dp * config.train.accumulation))


def alone(world: Any, config: Config, layout: Layout, n_tries: int = 15) -> dict[str, Seconds]:
    """As long as this process needs for each part with a tp rank's widths, the median of n_tries; world: of one rank.
    Backward is taken as half input's and half weights' gradients."""
    model, tp = config.model, layout.tp
    cut = dataclasses.replace(
        model,
        n_layers=1,
        n_heads=model.n_heads // tp,
        n_kv_heads=model.n_kv_heads // tp,
        head_dim=model.head_width,
        d_ff=model.d_ff // tp,
        vocab_size=model.vocab_size // tp,
    )
    gpt = GPT(cut, Mesh(world, Layout(1, 1, 1)))
    for parameter in gpt.parameters():
        nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(cut.vocab_size, (config.data.seq_len, _tokens(config, layout) // config.data.seq_len))
    x = torch.randn(*tokens.shape, model.d_model)
    block = gpt.blocks["0"]
    rows = x[: len(x) // tp]  # of a norm: each rank has its part of the sequence
    return {
        "embedding": _timed(lambda _: gpt.embed(tokens), x, n_tries),
        "attention": _sum(_timed(block.attention_norm, rows, n_tries), _timed(block.attention, x, n_tries)),
        "feed_forward": _sum(_timed(block.feed_forward_norm, rows, n_tries), _timed(block.feed_forward, x, n_tries)),
        "head": _timed(lambda y: gpt.cross_entropy(y, tokens), x, n_tries),
    }


def _sum(first: Seconds, second: Seconds) -> Seconds:
    return Seconds(first.forward + second.forward, first.input + second.input, first.weight + second.weight)


def _timed(run: Callable[[Tensor], Tensor], x: Tensor, n_tries: int) -> Seconds:
    forward, backward = [], []
    for _ in range(n_tries + 2):  # two that do not count
        each = x.detach().clone().requires_grad_()
        begin = time.perf_counter()
        y = run(each)
        middle = time.perf_counter()
        torch.autograd.backward(y, torch.ones_like(y))
        forward.append(middle - begin)
        backward.append(time.perf_counter() - middle)
    half = statistics.median(backward[2:]) / 2
    return Seconds(statistics.median(forward[2:]), half, half)
