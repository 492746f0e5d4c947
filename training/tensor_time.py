"""What tensor parallelism makes a layer wait for.

Each half of a block is an all_gather, products, and a reduce_scatter, the other way round in backward. Where
layout.tp_overlap splits them, a product runs beside its exchange, and only what the ring takes longer than the product
is waited for: pycomm.overlap.RingTime, as the ranks themselves decide by, with a product that takes no longer in
pieces than whole. "auto" never splits where all tp ranks share a host, whose cores compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from pycomm.overlap import LinkCost, RingTime
from training.config import Config
from training.layout import Layout
from training.links import Groups, Links

_SMALL_NBYTES = 1 << 10  # whose time is taken for a link's latency, as pycomm.overlap does
_PIECES = 2  # of a part with tp_overlap "always" (training/parallel.py)


class TensorTime:
    """Of one micro-batch's layers on the tp ranks of a layout."""

    def __init__(
        self, config: Config, layout: Layout, links: Links, group: Groups, tokens: int, flops_per_s: float
    ) -> None:
        """group: the tp groups. tokens: of the micro-batch, as context parallelism cuts it."""
        self._config, self._layout, self._links, self._group = config, layout, links, group
        self._tokens, self._flops_per_s = tokens, flops_per_s
        self._itemsize = config.train.itemsize
        self._blocks: dict[bool, tuple[float, float]] = {}  # layers() of one block, with experts or without
        hosts = links.topology.host_index[group]
        across = bool((hosts != hosts[:, :1]).any())
        self._overlaps = layout.tp > 1 and (layout.tp_overlap == "always" or (layout.tp_overlap == "auto" and across))

    def whole(self, collective: str, width: float) -> float:
        """Seconds of a collective of so many numbers a token."""
        return self._links.seconds(self._group, collective, self._tokens * width * self._itemsize)

    def layers(self, layers: Iterable[int]) -> tuple[float, float]:
        """Seconds that blocks wait, forward and backward."""
        kinds = Counter(self._config.model.has_experts(index) for index in layers)
        for experts in kinds.keys() - self._blocks.keys():
            self._blocks[experts] = self._block(experts)
        forward, backward = (sum(n * self._blocks[kind][way] for kind, n in kinds.items()) for way in (0, 1))
        return forward, backward

    def _block(self, experts: bool) -> tuple[float, float]:
        model, found = self._config.model, []
        heads, kv_heads = model.n_heads, model.n_kv_heads
        outward = heads * model.v_width
        if not model.latent:
            found.append(self._half((heads + kv_heads) * model.qk_width + kv_heads * model.v_width, outward))
        elif model.q_lora_rank:
            gathered = model.kv_lora_rank + model.qk_rope_head_dim + model.q_lora_rank
            found.append((self.whole("all_gather", gathered), self.whole("reduce_scatter", gathered)))
            found.append((self._beside("reduce_scatter", outward), self._beside("all_gather", outward)))
        else:
            gathered = model.kv_lora_rank + model.qk_rope_head_dim
            found.append((self.whole("all_gather", gathered), self.whole("reduce_scatter", gathered)))
            found.append(self._half(heads * model.qk_width, outward))
        width = model.n_shared_experts * model.expert_width if experts else model.d_ff
        if width:
            found.append(self._half(width * (1 if model.block == "gpt2" else 2), width))
        if (
            experts and self._layout.experts_over_tp == "split"
        ):  # what is routed, an fp32 weight and an int64 expert each
            routes = 12 * model.top_k / self._itemsize
            both = sum(self.whole(each, model.d_model) for each in ("all_gather", "reduce_scatter"))
            found.append((both + self.whole("all_gather", routes), both + self.whole("reduce_scatter", routes / 3)))
        forward, backward = zip(*found, strict=True)
        return sum(forward), sum(backward)

    def _half(self, inward: float, outward: float) -> tuple[float, float]:
        """Forward and backward of a half block: x is multiplied to `inward` numbers a token, `outward` ones to x."""
        return (
            self._beside("all_gather", inward) + self._beside("reduce_scatter", outward),
            self._beside("reduce_scatter", inward) + self._beside("all_gather", outward),
        )

    def _beside(self, collective: str, width: float) -> float:
        """What a collective of x takes beside its product, between d_model and width (whole) numbers a token."""
        d, tp, way = self._config.model.d_model, self._layout.tp, self._layout.tp_overlap
        whole_s = self.whole(collective, d)
        if not self._overlaps:
            return whole_s
        nbytes = self._tokens * d * self._itemsize
        small_s = self._links.seconds(self._group, collective, _SMALL_NBYTES)
        link = LinkCost(small_s, (nbytes - _SMALL_NBYTES) / max(whole_s - small_s, 1e-9), "planned")
        ring = RingTime(tp, self._config.data.seq_len // self._layout.cp, nbytes, link)
        n_pieces = _PIECES if way == "always" else ring.n_pieces
        product_s = 2.0 * d * width * self._tokens / tp / self._flops_per_s
        piece_s = product_s / (tp * n_pieces)
        if way == "auto" and not ring.gains(n_pieces, piece_s, product_s):
            return whole_s
        return ring.split_s(n_pieces, piece_s) - product_s
