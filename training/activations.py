"""What the layers of a rank save for backward, tensor by tensor, and what a backward has beside that.

With train.matmul "fp8" each product saves codes of its rows, a byte a number, and no longer the rows themselves.

Backward's is the most that the loss, a feed-forward or attention has at a time. Scores of attention and masks of
documents, which grow with the square of the sequence, are counted where a kernel or a product makes them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from training import schedules
from training.config import Config
from training.fp8 import MULTIPLE
from training.layout import Layout, stages_of
from training.sharding import ParamSpec
from training.stages import Stages

_CODING = 5  # bytes for each number of a matrix while its fp8 codes are made: a code, and fp32 on the way


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
    # Of a parameter; of experts, each one's of gate, up and down, and the first of these three put together.
    largest = max(
        held(spec, layout, 0)[0] * (4 if spec.axis == "ep" else 1)
        for name, spec in specs.items()
        if pp_index in stages.ranks_of(name)
    )
    of_weight = largest * itemsize
    if not _keeps_rows(config):
        of_weight = max(of_weight, _CODING * _largest_matrix(specs, layout, stages, pp_index))
    block = max(inside * itemsize, within_attention(config, layout, on_gpu)) + 2 * narrow * itemsize + of_weight
    if stages.placement.last_rank != pp_index:
        return block
    table = model.vocab_size * model.d_model / layout.tp
    logits = 2 * 4 * min(config.train.loss_chunk, tokens) * model.vocab_size / layout.tp
    loss = logits + narrow * itemsize + (4 + 4 + (itemsize if itemsize < 4 else 0)) * table  # its sum, and a chunk's
    return max(block, loss)


def _largest_matrix(specs: dict[str, ParamSpec], layout: Layout, stages: Stages, pp_index: int) -> float:
    """Numbers of a block's weight that one product is of: an expert's own."""
    return max(
        held(spec, layout, 0)[0] / (_experts_here(spec.shape[0], layout) if spec.axis == "ep" else 1)
        for name, spec in specs.items()
        if name.startswith("blocks.") and len(spec.shape) > 1 and pp_index in stages.ranks_of(name)
    )


def of_block(config: Config, layout: Layout, index: int, on_gpu: bool, recompute: str | None = None) -> float:
    """Bytes that one micro-batch's forward of a block saves."""
    model, itemsize = config.model, config.train.itemsize
    recompute = recompute or config.train.recompute
    tokens = _tokens(config, layout)
    narrow = tokens / layout.tp * model.d_model  # numbers of x between layers
    if recompute == "full":
        return narrow * itemsize
    of_attention = (
        _latent_attention(config, layout, recompute, tokens, on_gpu)
        if model.latent
        else _attention(config, layout, recompute, tokens, on_gpu)
    )
    codes = 0 if _keeps_rows(config) else sum(_codes(config, layout, index, recompute, tokens))
    return (
        sum(of_attention) + sum(_beside_attention(config, layout, index, tokens, narrow, on_gpu))
    ) * itemsize + codes


def _keeps_rows(config: Config) -> bool:
    """Whether products save the rows that they are given, not codes of them."""
    return config.train.matmul == "plain"


def _codes(config: Config, layout: Layout, index: int, recompute: str, tokens: int) -> Iterator[float]:
    """Bytes that each fp8 product of a block saves: an e4m3 code for each number of its rows. A weight is there
    anyway."""
    model, tp = config.model, layout.tp
    if model.latent:
        yield tokens / tp * model.d_model * (2 if model.q_lora_rank else 1)  # query_down, key_value_down
        yield tokens * (model.q_lora_rank or model.d_model)  # query_up
        if not _exchanges_latents(config, layout):
            yield tokens * model.kv_lora_rank  # key_value_up
        elif recompute == "none" and not _rings(config, layout):
            yield tokens * layout.cp * model.kv_lora_rank
        yield tokens * model.n_heads / tp * model.v_width  # out
    else:
        yield tokens * (3 * model.d_model + model.n_heads / tp * model.head_width)
    n_first, width = 1 if model.block == "gpt2" else 2, model.d_ff  # of feed-forward: up, or gate and up
    if model.has_experts(index):
        split = layout.experts_over_tp == "split"
        n_experts = _experts_here(model.n_experts, layout)
        rows = tokens / (1 if split else tp) * model.top_k / n_experts
        rows = n_experts * MULTIPLE * math.ceil(rows / MULTIPLE)
        yield rows * (2 * model.d_model + model.expert_width / (tp if split else 1))
        width = model.n_shared_experts * model.expert_width
    if width:
        yield tokens * (n_first * model.d_model + width / tp)


def _experts_here(n_experts: int, layout: Layout) -> float:
    """How many of all experts a rank has, whole or a part of each."""
    return n_experts / (layout.ep if layout.experts_over_tp == "split" else layout.expert_ranks)


def _exchanges_latents(config: Config, layout: Layout) -> bool:
    return config.model.latent and layout.cp > 1 and config.layout.context_latents


def _of_norm(config: Config, on_gpu: bool) -> int:
    """Numbers of the run's dtype that a norm saves for each one of its input: itself, or fp32, which is two bf16."""
    return 2 if config.train.precision == "bf16" and (on_gpu or config.model.block == "gpt2") else 1


def _beside_attention(
    config: Config, layout: Layout, index: int, tokens: int, narrow: float, on_gpu: bool
) -> Iterator[float]:
    """Numbers saved by each other part of a block."""
    model = config.model
    yield 2 * narrow * _of_norm(config, on_gpu)
    yield _keeps_rows(config) * tokens * model.d_model  # gathered, of feed-forward
    coded = 0.0 if _keeps_rows(config) else tokens * _inner_width(config, index) / layout.tp  # what goes to down
    yield _inner(config, layout, index) - coded
    if model.has_experts(index):
        split = layout.experts_over_tp == "split"  # then all tp ranks have the rows of the whole sequence
        n_rows = 3 if _keeps_rows(config) else 2  # what comes to experts, their outputs, and what comes back
        yield tokens / (1 if split else layout.tp) * n_rows * model.top_k * model.d_model
        yield tokens / layout.tp * 4 * model.n_experts


def _attention(config: Config, layout: Layout, recompute: str, tokens: int, on_gpu: bool) -> Iterator[float]:
    model = config.model
    yield _keeps_rows(config) * tokens * model.d_model  # gathered
    query, key = model.n_heads * model.head_width / layout.tp, model.n_kv_heads * model.head_width / layout.tp
    if recompute == "none":
        repeated = on_gpu and config.data.document_mask and not _rings(config, layout)  # context._whole_attention()
        yield tokens * (query + 2 * (query if repeated else key))  # rotated
        yield from _of_cuts(config, layout, tokens * query)
    else:
        yield tokens * (query + 2 * key)
    if _keeps_rows(config) or (recompute == "none" and layout.cp == 1):
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
    if _rings(config, layout):
        return _within_ring(config, layout, on_gpu)
    model, itemsize = config.model, config.train.itemsize
    query = _tokens(config, layout) * model.n_heads / layout.tp * model.qk_width
    gradients = itemsize * 3 * query  # of query, key and value, as many heads of each
    remade = itemsize if config.train.recompute == "selective" else 0
    return gradients + config.data.document_mask * (2 + remade) * _batch(config, layout) * config.data.seq_len**2


def _within_ring(config: Config, layout: Layout, on_gpu: bool) -> float:
    """Of RingAttention: its first step, over all of a rank's own rows, or a later one, of half the queries."""
    model, itemsize, masked = config.model, config.train.itemsize, config.data.document_mask
    tokens, heads, width = _tokens(config, layout), model.n_heads / layout.tp, model.qk_width
    kv_heads = model.n_kv_heads / layout.tp
    query, product, weight = tokens * heads * width, 0.0, 0.0
    if _exchanges_latents(config, layout):
        sent = float(tokens * (model.kv_lora_rank + model.qk_rope_head_dim))
        product = tokens * heads * (model.head_width + model.v_width)  # which keys and values are made of
        made, weight = product + query, heads * (model.head_width + model.v_width) * model.kv_lora_rank
    else:
        sent = tokens * kv_heads * (width + model.v_width)
        made = 2 * query if kv_heads < heads else 0.0  # a head's for each of the queries'
    n_pairs = _batch(config, layout) * (config.data.seq_len / layout.cp) ** 2
    no_kernel = on_gpu and (itemsize == 4 or width % 8 != 0 or width > 256)
    scores = masked or no_kernel or model.v_width > width
    widened = itemsize * query if model.v_width < width else 0.0  # of the output, its gradient and value

    def step(part: float, n_held: int, n_sums: int) -> float:
        """part: of the queries' rows. n_held, n_sums: of what goes around, and of its gradients, that are here."""
        gradients = itemsize * (part + 2) * query
        inside = gradients + (2 * part + 1) * widened
        if scores:  # four fp32 tensors like them, or two, another and the gradients
            each = part * n_pairs * heads
            inside = max(4 * 4 * each, (2 * 4 + itemsize) * each + gradients) + part * n_pairs * 2 * masked
        if product:  # keys and values once more, and the gradient of the product
            after = gradients + itemsize * (made + product) + sent * n_sums * 4
        else:  # fp32 sums over the queries' heads, of keys and of values
            after = gradients + sent * 2 * 4 + (4 * query if itemsize < 4 else 0)
        return sent * n_held * itemsize + max(itemsize * made + inside + sent * n_sums * 4, after)

    return 4 * query + max(step(1, 1, 1), step(0.5, min(layout.cp - 1, 2), 2) + 4 * weight)


def _latent_attention(config: Config, layout: Layout, recompute: str, tokens: int, on_gpu: bool) -> Iterator[float]:
    model, heads = config.model, config.model.n_heads / layout.tp
    latents = model.q_lora_rank + model.kv_lora_rank
    if _keeps_rows(config):
        yield tokens * model.d_model / (layout.tp if model.q_lora_rank else 1)  # x, gathered where queries come from it
    wide = _of_norm(config, on_gpu)
    # A latent that is saved as it is keeps the whole product that it is a part of, the shared key too.
    yield tokens / layout.tp * (latents * wide + (model.qk_rope_head_dim if wide == 1 else 0))
    if _keeps_rows(config) or recompute != "none" or (_exchanges_latents(config, layout) and _rings(config, layout)):
        yield tokens * (latents + model.qk_rope_head_dim)  # gathered
    both = model.head_width + model.v_width
    if _exchanges_latents(config, layout):
        yield from _latents_between_ranks(config, layout, recompute, tokens, heads)
    elif recompute == "none":
        of_output = max(model.qk_width, model.v_width)  # the flash kernel takes and gives equal widths
        if _rings(config, layout):
            of_output = model.v_width  # each step widens a value for itself
        of_value = both if of_output == model.v_width else of_output  # not widened: a part of what it was made with
        yield tokens * heads * (2 * model.qk_width + of_value + of_output)  # query, key, value, output
        if config.data.document_mask:
            yield sum(_of_cuts(config, layout, 0.0))
    else:
        yield tokens * heads * (model.qk_width + both)
    if _keeps_rows(config):
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
    if _keeps_rows(config):
        yield tokens * layout.cp * model.kv_lora_rank  # gathered
    yield tokens * heads * (model.qk_width + 2 * wide)  # keys and values, and the output, of own heads
    if config.data.document_mask:
        yield sum(_of_cuts(config, layout, 0.0))


def _inner(config: Config, layout: Layout, index: int) -> float:
    """Numbers of a feed-forward's inner tensors: up and gelu(up), or gate, silu(gate), up and their product."""
    model = config.model
    return _tokens(config, layout) * (2 if model.block == "gpt2" else 4) * _inner_width(config, index) / layout.tp


def _inner_width(config: Config, index: int) -> int:
    model = config.model
    return (model.top_k + model.n_shared_experts) * model.expert_width if model.has_experts(index) else model.d_ff
