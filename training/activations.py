"""What the layers of a rank save for backward, tensor by tensor, and what a backward has beside that.

Backward's is the most that the loss, a feed-forward or attention has at a time. Scores of attention and masks of
documents, which grow with the square of the sequence, are counted where a kernel or a product makes them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from training import schedules
from training.config import Config
from training.layout import Layout, stages_of
from training.sharding import ParamSpec


def held(spec: ParamSpec, layout: Layout, zero_ranks: int) -> tuple[float, int]:
    """Numbers of a parameter that a rank has as the axes cut it, and the ranks that ZeRO cuts those over."""
    data = layout.dp * layout.cp
    if spec.axis == "ep":
        cut, ranks = layout.expert_ranks, data * layout.tp // layout.expert_ranks
    elif spec.axis is None:
        cut, ranks = 1, data * layout.tp
    else:
        cut, ranks = layout.tp, data
    return math.prod(spec.shape) / cut, zero_ranks or ranks


def _layers(config: Config, pp_index: int) -> list[int]:
    """The layers of a pipeline rank."""
    stages = stages_of(config)
    placement = stages.placement
    return [i for c in range(placement.n_chunks) for i in stages.layers(placement.stage(pp_index, c))]


def _batch(config: Config, layout: Layout) -> int:
    """Sequences of a micro-batch."""
    return config.train.global_batch // (layout.n_data * config.train.accumulation)


def _tokens(config: Config, layout: Layout) -> int:
    """Of a micro-batch on a context parallel rank."""
    return config.data.seq_len // layout.cp * _batch(config, layout)


def saved(config: Config, layout: Layout, pp_index: int, on_gpu: bool) -> float:
    """Bytes that all micro-batches that are held at once saved."""
    train, layers = config.train, _layers(config, pp_index)
    if train.offload_activations:
        return 0.0
    at_once = schedules.held(config.layout.schedule, layout.pp, train.accumulation, config.layout.chunks)[pp_index]
    of_blocks = sum(of_block(config, layout, index, on_gpu) for index in layers)
    total = at_once / stages_of(config).placement.n_chunks * of_blocks
    if train.recompute == "full":
        total += max(of_block(config, layout, index, on_gpu, "none") for index in layers)
    return total


def backward(config: Config, layout: Layout, specs: dict[str, ParamSpec], pp_index: int, on_gpu: bool) -> float:
    """Bytes of the loss, or of the gradients within a block and the largest one of a parameter before it joins the
    others."""
    model, tokens, itemsize = config.model, _tokens(config, layout), config.train.itemsize
    narrow = tokens * model.d_model
    inside = max(_inner(config, layout, index) for index in _layers(config, pp_index))
    stages = stages_of(config)
    largest = max(
        held(spec, layout, 0)[0] for name, spec in specs.items() if pp_index in stages.ranks_of(name)
    )  # of a parameter
    block = max(inside * itemsize, within_attention(config, layout, on_gpu)) + (2 * narrow + largest) * itemsize
    if stages.placement.last_rank != pp_index:
        return block
    table = model.vocab_size * model.d_model / layout.tp
    logits = 2 * 4 * min(config.train.loss_chunk, tokens) * model.vocab_size / layout.tp
    loss = logits + narrow * itemsize + (4 + 4 + (itemsize if itemsize < 4 else 0)) * table  # its sum, and a chunk's
    return max(block, loss)


def of_block(config: Config, layout: Layout, index: int, on_gpu: bool, recompute: str | None = None) -> float:
    """Bytes that one micro-batch's forward of a block saves."""
    model, itemsize = config.model, config.train.itemsize
    recompute = recompute or config.train.recompute
    tokens = _tokens(config, layout)
    narrow = tokens / layout.tp * model.d_model  # numbers of x between layers
    if recompute == "full":
        return narrow * itemsize
    of_attention = (
        _latent_attention(config, layout, recompute, tokens)
        if model.latent
        else _attention(config, layout, recompute, tokens, on_gpu)
    )
    return (sum(of_attention) + sum(_beside_attention(config, layout, index, tokens, narrow))) * itemsize


def _beside_attention(config: Config, layout: Layout, index: int, tokens: int, narrow: float) -> Iterator[float]:
    """Numbers saved by each other part of a block."""
    model = config.model
    of_norm = 1 if model.block == "gpt2" else 2  # RMSNorm keeps x and x / rms(x)
    yield 2 * of_norm * narrow * (2 if config.train.precision == "bf16" else 1)  # in fp32
    yield tokens * model.d_model  # gathered, of feed-forward
    yield _inner(config, layout, index)
    if model.has_experts(index):
        split = layout.experts_over_tp == "split"  # then all tp ranks have the rows of the whole sequence
        yield tokens / (1 if split else layout.tp) * 3 * model.top_k * model.d_model
        yield tokens / layout.tp * 4 * model.n_experts


def _attention(config: Config, layout: Layout, recompute: str, tokens: int, on_gpu: bool) -> Iterator[float]:
    model = config.model
    yield tokens * model.d_model  # gathered
    query, key = model.n_heads * model.head_width / layout.tp, model.n_kv_heads * model.head_width / layout.tp
    if recompute == "none":
        repeated = on_gpu and config.data.document_mask and not _rings(config, layout)  # context._whole_attention()
        yield tokens * (query + 2 * (query if repeated else key))  # rotated
        yield from _of_cuts(config, layout, tokens * query)
    else:
        yield tokens * (query + 2 * key)
    yield tokens * query  # attention's output


def _rings(config: Config, layout: Layout) -> bool:
    return layout.cp > 1 and config.layout.context == "ring"


def _of_cuts(config: Config, layout: Layout, output: float) -> Iterator[float]:
    """Numbers that attention itself saves beside its operands: its output where context parallel ranks make another of
    it, and a mask of the operands' type where it is one call over the whole sequence."""
    if layout.cp > 1:
        yield output
    if config.data.document_mask and not _rings(config, layout):
        yield _batch(config, layout) * config.data.seq_len**2


def within_attention(config: Config, layout: Layout, on_gpu: bool) -> float:
    """Bytes that attention has at most while its backward runs, beside what was saved."""
    model, itemsize, batch = config.model, config.train.itemsize, _batch(config, layout)
    tokens, heads = _tokens(config, layout), model.n_heads / layout.tp
    width = model.qk_width if model.latent else model.head_width
    query = tokens * heads * width
    gradients = itemsize * 3 * query  # of query, key and value, as many heads of each
    if not _rings(config, layout):
        remade = itemsize if config.train.recompute == "selective" else 0
        return gradients + (config.data.document_mask * (2 + remade) * batch * config.data.seq_len**2)
    kv_heads = heads if model.latent else model.n_kv_heads / layout.tp
    around = 4 * query + 2 * tokens * kv_heads * width * (2 * itemsize + 2 * 4)  # keys, values, sums on their way
    repeated = itemsize * 2 * query if kv_heads < heads else 0
    n_pairs = batch * (config.data.seq_len / layout.cp) ** 2
    no_kernel = on_gpu and (itemsize == 4 or width % 8 != 0 or width > 256)
    if not (config.data.document_mask or no_kernel or (model.latent and model.v_width > width)):
        return around + repeated + gradients
    return around + repeated + n_pairs * (4 * 4 * heads + 2 * config.data.document_mask)  # RingAttention's products


def _latent_attention(config: Config, layout: Layout, recompute: str, tokens: int) -> Iterator[float]:
    model, heads = config.model, config.model.n_heads / layout.tp
    latents = model.q_lora_rank + model.kv_lora_rank
    yield tokens * model.d_model / (layout.tp if model.q_lora_rank else 1)  # x, gathered where queries come from it
    yield 2 * tokens / layout.tp * latents * (2 if config.train.precision == "bf16" else 1)  # their norms' own, in fp32
    yield tokens * (latents + model.qk_rope_head_dim)  # gathered
    both = model.head_width + model.v_width
    if layout.cp > 1 and config.layout.context_latents:
        yield from _latents_between_ranks(config, layout, recompute, tokens, heads)
    elif recompute == "none":
        wide = max(model.qk_width, model.v_width)  # of a value too, as the flash kernel takes it
        if _rings(config, layout):
            wide = model.v_width  # each step widens it for itself
        yield tokens * heads * (2 * model.qk_width + 2 * wide)  # query, key, value, output
        if config.data.document_mask:
            yield sum(_of_cuts(config, layout, 0.0))
    else:
        yield tokens * heads * (model.qk_width + both)
    yield tokens * heads * model.v_width  # attention's output


def _latents_between_ranks(
    config: Config, layout: Layout, recompute: str, tokens: int, heads: float
) -> Iterator[float]:
    """Numbers saved between latents and attention's output where context parallel ranks exchange latents."""
    model = config.model
    yield tokens * heads * model.qk_width  # query
    if recompute != "none":
        return
    yield tokens * model.qk_rope_head_dim  # the shared key, turned
    if _rings(config, layout):
        yield tokens * heads * model.v_width  # attention's output; keys and values are made again
        return
    wide = max(model.qk_width, model.v_width)
    yield tokens * layout.cp * model.kv_lora_rank  # gathered, and of it keys and values, and the output, of own heads
    yield tokens * heads * (model.qk_width + 2 * wide)
    if config.data.document_mask:
        yield sum(_of_cuts(config, layout, 0.0))


def _inner(config: Config, layout: Layout, index: int) -> float:
    """Numbers of a feed-forward's inner tensors: up and gelu(up), or gate, silu(gate), up and their product."""
    model = config.model
    width = float(model.d_ff)
    if model.has_experts(index):
        width = model.top_k * model.expert_width + model.n_shared_experts * model.expert_width
    return _tokens(config, layout) * (2 if model.block == "gpt2" else 4) * width / layout.tp
