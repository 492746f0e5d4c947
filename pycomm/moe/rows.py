"""Rows by index, and their form on the wire: on CPU memory in C++ (csrc/cpu/rows.h), on a CUDA device in kernels
(csrc/cuda/moe.h), elsewhere in torch; the same bits. Which it is, is decided here alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from pycomm import _C

_SUMMED: Final = (torch.float32, torch.bfloat16, torch.float16)  # by the kernels
_DEVICES: Final = ("cpu", "cuda") if hasattr(_C, "cuda_info") else ("cpu",)
_FUSED: Final = ("cuda",)  # where a row is coded, decoded or weighed in the pass that moves it
BLOCK: Final = 128  # values of one fp8 scale
_SMALLEST: Final = 2.0**-100  # csrc/core/block_format.h: a block's maximum counts as at least this
_LARGEST: Final = 448.0  # of e4m3


def _native(*tensors: Tensor) -> bool:
    """Whether kernels take these; not where torch traces or fakes its tensors: those have no memory."""
    return all(type(t) is Tensor and t.device.type in _DEVICES and t.is_contiguous() for t in tensors)


def fuses(x: Tensor) -> bool:
    """Whether rows of x's type on its device are coded, decoded and weighed in the pass that moves them."""
    return x.device.type in _FUSED and _native(x) and x.dtype in _SUMMED


def empty_rows(
    memory: _C.RowMemory, like: Tensor, n: int, width: int | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """[n, width] of dtype (like's) on like's device, not initialised; on the CPU in memory that is used again."""
    width, dtype = like.shape[1] if width is None else width, dtype or like.dtype
    if _native(like) and like.device.type == "cpu":
        return memory.empty(n, width, dtype)
    return like.new_empty((n, width), dtype=dtype)


def copy_rows(out: Tensor, sources: Sequence[Tensor], source: Tensor, rows: Tensor, to: Tensor | None = None) -> Tensor:
    """out[to[i]] (without `to`: out[i]) becomes sources[source[i]][rows[i]], or zeros where rows[i] is -1; 2-D."""
    if _native(out, *sources) and (out.device.type == "cpu" or out.shape[1] * out.itemsize % 2 == 0):
        _C.copy_rows(out, sources, source, rows, to)
        return out
    stacked = torch.cat([*sources, sources[0].new_zeros(1, out.shape[1])])
    found = stacked[torch.where(rows < 0, len(stacked) - 1, _starts(sources, source) + rows)]
    if to is None:
        out[: len(rows)] = found
    else:
        out.index_copy_(0, to, found)
    return out


def _starts(sources: Sequence[Tensor], source: Tensor) -> Tensor:
    """Where each of these sources begins among all, one after the other; without a table, which a device would have to
    be sent."""
    begin = torch.zeros_like(source)
    for number, before in enumerate(sources[:-1], 1):
        begin += (source >= number) * len(before)
    return begin


def spread_rows(out: Tensor, rows: Tensor, to: Tensor) -> None:
    """out[to[i]] becomes rows[i]; 2-D."""
    copy_rows(out, [rows.contiguous()], torch.zeros_like(to), torch.arange(len(to), device=to.device), to)


@dataclass(frozen=True)
class Terms:
    """n sums: sum i is of terms offsets[i] .. offsets[i + 1] - 1, and term j is row rows[j] of source source[j].
    All int64; most: the terms of the longest sum."""

    source: Tensor
    rows: Tensor
    offsets: Tensor
    most: int

    @property
    def n(self) -> int:
        return len(self.offsets) - 1


def combine_rows(out: Tensor, sources: Sequence[Tensor], terms: Terms, weights: Tensor | None = None) -> Tensor:
    """out[i] = the sum of weights[j] × term j over sum i's terms in order: from 0, in fp32, the product rounded before
    it is added, the sum rounded once to out's dtype. weights: float32, one a term; without them all are 1."""
    if _native(out, *sources) and out.dtype in _SUMMED and all(each.dtype in _SUMMED for each in sources):
        _C.combine_rows(out, sources, terms.source, terms.rows, terms.offsets, weights)
        return out
    if len(terms.rows) == 0:
        return out.zero_()
    total = torch.zeros(out.shape, device=out.device)
    begin, count = terms.offsets[:-1], terms.offsets.diff()
    stacked = torch.cat(list(sources))
    place = _starts(sources, terms.source) + terms.rows
    for number in range(terms.most):
        has = count > number
        term = begin + torch.where(has, number, 0)
        term = term.clamp(max=max(0, len(place) - 1))
        value = stacked[place[term]].float()
        if weights is not None:
            value = value * weights[term].unsqueeze(1)
        total = total + torch.where(has.unsqueeze(1), value, 0.0)
    return out.copy_(total.to(out.dtype))


def count_slots(bins: Tensor, n_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """How int64 bins [n], of 0 .. n_bins - 1 or beyond, lie in a layout by bin, all int64: positions [n], the place of
    each among those of its bin, in their order, -1 beyond the bins; counts [n_bins]; offsets [n_bins + 1], where each
    bin begins."""
    if _native(bins):
        found = bins.new_empty(len(bins)), bins.new_empty(n_bins), bins.new_empty(n_bins + 1)
        _C.count_slots(*found, bins)
        return found
    known = (bins >= 0) & (bins < n_bins)
    bin_ = torch.where(known, bins, n_bins)
    order = bin_.sort(stable=True).indices
    counts = bin_.new_zeros(n_bins + 1).scatter_add_(0, bin_, torch.ones_like(bin_))
    offsets = counts.cumsum(0) - counts
    rank = torch.arange(len(bins), device=bins.device) - offsets[bin_[order]]
    positions = torch.empty_like(bin_).scatter_(0, order, rank)
    return torch.where(known, positions, -1), counts[:n_bins], offsets


def row_dots(a: Tensor, b: Tensor, b_rows: Tensor | None = None) -> Tensor:
    """float32 [n]: the dot products of a [n, H] with b's rows b_rows, or all; in fp32, in an order that width and type
    fix (csrc/cpu/rows.h), which in torch is torch's."""
    if _native(a, b) and a.dtype == b.dtype and a.dtype in _SUMMED:
        out = torch.empty(len(a), device=a.device)
        _C.row_dots(out, a, None, b, b_rows)
        return out
    of_b = b if b_rows is None else b[b_rows]
    return (a.float() * of_b.float()).sum(-1)


def coded_width(width: int) -> int:
    """Bytes of a row of so many values in fp8: the codes, 128 a block, then a float32 scale for each block."""
    n_blocks = -(-width // BLOCK)
    return n_blocks * (BLOCK + 4)


def encode_fp8(x: Tensor) -> Tensor:
    """x [n, H] as e4m3 codes with a scale per 128 values (csrc/core/block_format.h), uint8 [n, coded_width(H)]."""
    n, width = x.shape
    coded = torch.empty(n, coded_width(width), dtype=torch.uint8, device=x.device)
    if _native(x) and x.dtype in _SUMMED:
        _C.encode_rows(coded, x, "fp8")
        return coded
    blocks = F.pad(x.float(), (0, -width % BLOCK)).view(n, -1, BLOCK)
    found = blocks.abs().amax(-1, keepdim=True)
    finite = found.isfinite()
    largest = found.clamp(min=_SMALLEST)
    most = torch.full_like(largest, _LARGEST)  # a number would be divided as its reciprocal's product
    to_code = torch.where(finite, most / largest, 0.0)
    scale = torch.where(finite, largest / most, torch.nan)
    codes = torch.where(finite, blocks * to_code, 0.0).to(torch.float8_e4m3fn).view(torch.uint8)
    coded[:, : codes[0].numel() if n else 0] = codes.flatten(1)
    coded[:, codes.shape[1] * BLOCK :] = scale.squeeze(-1).contiguous().view(torch.uint8).view(n, -1)
    return coded


def decode_fp8(coded: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """What encode_fp8() was given, within |x|/16 or 1/458,752 of its block's largest value; [n, width] of dtype."""
    n = len(coded)
    if _native(coded) and dtype in _SUMMED:
        out = coded.new_empty((n, width), dtype=dtype)
        _C.decode_rows(out, coded, "fp8")
        return out
    n_blocks = -(-width // BLOCK)
    codes = coded[:, : n_blocks * BLOCK].contiguous().view(torch.float8_e4m3fn).float().view(n, n_blocks, BLOCK)
    scale = coded[:, n_blocks * BLOCK :].contiguous().view(torch.float32).view(n, n_blocks, 1)
    return (codes * scale).view(n, -1)[:, :width].to(dtype)


# In one pass on a device, elsewhere in several.


def pack_coded_rows(buffers: Sequence[Tensor], starts: Tensor, buffer: Tensor, to: Tensor, values: Tensor) -> None:
    """Row i of values [n, H] in fp8 becomes row to[j] of buffers[buffer[j]], for j from starts[i] to starts[i + 1]."""
    if values.device.type == "cuda":
        _C.pack_coded_rows(buffers, starts, buffer, to, values)
        return
    of_place = torch.repeat_interleave(torch.arange(len(values)), starts.diff())
    for number, each in enumerate(buffers):
        here = buffer == number
        each[to[here]] = encode_fp8(values)[of_place[here]]


def expand_coded_rows(
    out: Tensor, sources: Sequence[Tensor], source: Tensor, rows: Tensor, to: Tensor | None
) -> Tensor:
    """copy_rows() of sources in fp8, to values."""
    if out.device.type == "cuda":
        _C.expand_coded_rows(out, sources, source, rows, to)
        return out
    coded = copy_rows(sources[0].new_empty(len(rows), sources[0].shape[1]), sources, source, rows)
    out[slice(None) if to is None else to] = decode_fp8(coded, out.shape[1], out.dtype)
    return out


def weigh_rows(
    out: Tensor,
    dots: Tensor | None,
    sources: Sequence[Tensor],
    source: Tensor,
    rows: Tensor,
    to: Tensor | None,
    places: Tensor | None,
    weights: Tensor,
    b: Tensor,
) -> Tensor:
    """copy_rows() times weights[p], rounded once; and dots[p], where wanted, becomes the row's dot product with b[p]
    (row_dots()). p is places[i], without places i. weights, dots: float32."""
    if fuses(b) and b.device.type == "cuda":
        _C.weigh_rows(out, dots, sources, source, rows, to, places, weights, None if dots is None else b)
        return out
    found = copy_rows(out.new_empty(len(rows), out.shape[1]), sources, source, rows)
    if dots is not None:
        dots_of_rows = torch.where(rows < 0, 0.0, row_dots(found, b, places))
        dots[slice(None) if places is None else places] = dots_of_rows
    factors = weights if places is None else weights[places]
    out[slice(None) if to is None else to] = weighted(found, factors, out.dtype)
    return out


def weighted(rows: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [n, H] × weights [n] as dtype, rounded once; rows are overwritten."""
    if rows.dtype == dtype == weights.dtype:
        return rows.mul_(weights.unsqueeze(1))  # no pages to be had for as much again
    return (rows * weights.unsqueeze(1)).to(dtype)
