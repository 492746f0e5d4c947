"""How a batch is exchanged, which all ranks decide alike: the way, the number of crossings, and the plan itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from pycomm import devices
from pycomm.group import Group
from pycomm.moe.checks import code_of, problem_of_routing, require, require_equal
from pycomm.moe.cost import MODES, Choice, Dedup, DeviceAllToAll, DeviceLinks, Links, estimates, share_reached
from pycomm.moe.form import Wire
from pycomm.moe.placement import Geometry, Placement, Places
from pycomm.moe.plan import Request, make_plan
from pycomm.moe.rows import coded_width
from pycomm.moe.tables import Cut, ExchangePlan, Layout
from pycomm.moe.through_hosts import Reach, ThroughHosts
from pycomm.moe.waits import Waits

FORM: Final = "the rows' width, type and kind of device (width × 16 + a number of these)"
_TYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHUNK_S: Final = 0.02  # of the link between hosts: what is done beside a shorter chunk takes longer than it hides
_MAX_CHUNKS: Final = 8
_STREAM_LOSS: Final = 0.05  # of the link, to latency, that a stream's crossings may lose
# More gain less than products of fewer rows lose (benchmarks/overlap.py, stream); experts' products stay whole.
_MAX_STREAM_CHUNKS: Final[dict[Cut, int]] = {"tokens": 4, "experts": 16}


@dataclass(frozen=True)
class Settings:
    """Of an ExpertParallel, alike on all ranks; what each means stands there."""

    num_experts: int
    hidden: int | None
    top_k: int | None
    max_tokens: int | None
    layout: Layout
    wire: Wire | None
    dedup: Dedup | Literal["auto"]
    chunks: int | Literal["auto"]
    align: int
    drop: bool
    placement: Placement


@dataclass(frozen=True)
class Planned:
    """why: why the plan has as many crossings. slot_weights: float32 [n_slots], where they are known already."""

    plan: ExchangePlan
    why: str
    slot_weights: Tensor | None


class Planning:
    """through_hosts: the transport of "host", where that is possible."""

    def __init__(
        self,
        settings: Settings,
        waits: Waits,
        geometry: Geometry,
        possible: tuple[Dedup, ...],
        through_hosts: ThroughHosts | None,
    ) -> None:
        self._settings, self._waits, self._geometry, self._possible = settings, waits, geometry, possible
        self._through_hosts = through_hosts
        self._reach: Reach | None = None  # of the ranks of every host on devices, once they were asked
        self._why_not = ""
        self._room = 0  # bytes that a rank may tell in one go
        self._codes: dict[tuple[Any, ...], int] = {}
        self._choices: dict[tuple[int, int, int, str], Choice] = {}
        self._of_devices: dict[tuple[Any, ...], tuple[Dedup, int, str]] = {}  # what all ranks have agreed on

    # Choice.

    def choice(self, n_tokens: int, top_k: int | None, itemsize: int, device: str = "cpu") -> Choice:
        """device: the type of the rows' device."""
        of = self._settings
        top_k = top_k or of.top_k or min(2, of.num_experts)
        key = (n_tokens, top_k, itemsize, device)
        if key not in self._choices:
            hidden = of.hidden or 1024
            row_nbytes = coded_width(hidden) if of.wire == "fp8" else hidden * (2 if of.wire else itemsize)
            on_device, possible = None, self._possible
            if device != "cpu":
                on_device = self._device_links(n_tokens * top_k * row_nbytes)
                if self._reach is not None and self._reach < Reach.in_place:
                    possible = tuple(mode for mode in possible if mode != "host")
            self._choices[key] = estimates(
                Links.of(self._waits.group, self._geometry),
                of.num_experts,
                hidden,
                top_k,
                n_tokens,
                row_nbytes,
                min(itemsize, 2) if of.wire else itemsize,
                possible,
                of.dedup,
                on_device,
            )
        return self._choices[key]

    def _device_links(self, nbytes: int) -> DeviceLinks:
        """For up to nbytes that a rank gives."""
        between = DeviceAllToAll(*devices.collective_cost(self._waits.group, "all_to_all", nbytes))
        inside = None
        if self._through_hosts is not None:
            inside = DeviceAllToAll(*devices.collective_cost(self._through_hosts.host, "all_to_all", nbytes))
        return DeviceLinks(between, inside)

    def explain(self, n_tokens: int, top_k: int | None, itemsize: int, device: str = "cpu") -> str:
        of = self._settings
        choice = self.choice(n_tokens, top_k, itemsize, device)
        n_chunks = self._n_chunks(choice, n_tokens) if device == "cpu" else 1
        return (
            f"{of.num_experts} experts, top {top_k or of.top_k or min(2, of.num_experts)}, {self._waits.group.size} "
            f"ranks on {self._geometry.n_hosts} host(s), {n_tokens} tokens a rank, in "
            f"{n_chunks} chunk(s)\n{choice}"
        )

    def _n_chunks(self, choice: Choice, n_tokens: int) -> int:
        if not self._can_overlap():
            return 1
        if self._settings.chunks != "auto":
            return self._settings.chunks
        return max(1, min(_MAX_CHUNKS, int(choice.crossing_s(n_tokens) / _CHUNK_S)))

    def stream_chunks(self, n_tokens: int, top_k: int, itemsize: int, cut: Cut) -> tuple[int, str]:
        """In how many crossings a stream of CPU tensors goes, and why; n_tokens a rank, on average."""
        if not self._can_overlap():
            return 1, "one chunk: nobody to exchange with, or a group that starts nothing without waiting for it"
        if self._geometry.n_hosts == 1:
            return 1, "one chunk: inside one host exchanging is copying, which needs the cores that compute"
        choice = self.choice(n_tokens, top_k, itemsize)
        return _chunks_of(choice.crossing_s(n_tokens), choice.links.between.latency_s, cut, "the link")

    def _device_stream_chunks(self, n_tokens: int, top_k: int, itemsize: int, cut: Cut, mode: Dedup) -> tuple[int, str]:
        """The same of tensors on devices, which exchange beside computing inside hosts as well."""
        group, n_ranks = self._waits.group, self._waits.group.size
        if not self._can_overlap():
            return 1, "one chunk: nobody to exchange with, or a group that starts nothing without waiting for it"
        if mode == "host" and self._geometry.n_hosts == 1:
            return 1, "one chunk: inside one host rows are read where they lie"
        of = self._settings
        parts = self._geometry.n_hosts if mode == "host" else n_ranks
        rows = top_k if mode == "none" else parts * share_reached(of.num_experts, top_k, parts)
        nbytes = int(n_tokens * rows * (of.hidden or 1024) * (1 if of.wire == "fp8" else itemsize))
        latency_s, bytes_per_s, source = devices.collective_cost(group, "all_to_all", nbytes)
        return _chunks_of(nbytes / bytes_per_s, latency_s, cut, f"an all_to_all, {source}")

    def _can_overlap(self) -> bool:
        return isinstance(self._waits.group, Group) and self._waits.group.size > 1

    # The plan.

    def plan(
        self,
        topk_idx: Tensor,
        problem: str | None,
        inputs: tuple[Tensor, ...],
        owner: tuple[Any, ...],
        places: Places,
        cut: Cut = "tokens",
        n_chunks: int | Literal["auto"] | None = None,
    ) -> Planned:
        """inputs: x and the weights, where they are known. n_chunks: of a stream. Waits once for a device, for
        topk_idx; all else is done on the host.

        Raises the problem of any rank on all, that of topk_idx among them, and whatever ranks differ in."""
        of, device, given = self._settings, topk_idx.device, topk_idx
        on_device = devices.on_device(topk_idx)
        topk_idx = topk_idx.cpu()
        problem = problem or problem_of_routing(topk_idx, of.num_experts, of.top_k)
        n_tokens, top_k = topk_idx.shape if topk_idx.dim() == 2 else (0, 0)
        needs = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
        kind = (owner, cut, n_chunks)
        if kind not in self._codes:
            self._codes[kind] = code_of((of, owner[1:], cut, n_chunks))
        code = self._codes[kind]
        facts = [n_tokens, top_k, code, form(inputs[0]) if inputs else 0, int(on_device), int(needs)]
        narrow = torch.uint8 if of.num_experts <= 256 else torch.int16 if of.num_experts <= 1 << 15 else torch.int32
        # What ranks tell each other, as bytes, since not every library moves int16. Inside a host weights come along.
        told = [] if problem else [topk_idx.to(narrow).contiguous().view(torch.uint8).flatten()]
        with_weights = len(inputs) == 2 and self._geometry.n_hosts == 1 and self._can_overlap() and not on_device
        if with_weights and not problem:
            told.insert(0, inputs[1].detach().float().contiguous().view(torch.uint8).flatten())
        mine = torch.cat(told) if told else torch.empty(0, dtype=torch.uint8)
        everyone, gathered = self._waits.agree_and_gather("plan", problem, facts, mine, self._room)
        self._room = gathered.shape[1] // 8 * 9  # for the next batch, a little larger
        require_equal(
            everyone[:, 1:],
            [
                "K, the experts of a token",
                "the ExpertParallel's settings, placement or mask, or a stream's chunks (as a hash)",
                FORM,
                "whether topk_idx is on a device",
                "whether x or topk_weights require a gradient",
            ],
        )
        counts = tuple(everyone[:, 0].tolist())
        weights = None
        at = 0
        if with_weights:
            at = 4 * top_k
            weights = _rows(gathered, counts, 0, at, torch.float32)
        of_all = _rows(gathered, counts, at, narrow.itemsize * top_k, narrow)
        itemsize = inputs[0].dtype.itemsize if inputs else 2
        average = max(1, sum(counts) // len(counts))
        why = "as given"
        if on_device:
            mode, n_chunks, why = self._decided_on_device((average, top_k, itemsize, cut, n_chunks), given)
        else:
            choice = self.choice(average, top_k, itemsize)
            mode = choice.mode
            if n_chunks is None:
                n_chunks = self._n_chunks(choice, average)
            elif n_chunks == "auto":
                n_chunks, why = self.stream_chunks(average, top_k, itemsize, cut)
        request = Request(
            owner, self._geometry, places, mode, of.layout, n_chunks, cut, of.align, of.max_tokens, of.drop
        )
        plan = make_plan(request, topk_idx, of_all, counts).to(device, given)
        slot_weights = None if weights is None else weights.flatten()[plan.slot_weights]
        return Planned(plan, why, slot_weights)

    def _decided_on_device(
        self, batch: tuple[int, int, int, Cut, int | Literal["auto"] | None], like: Tensor
    ) -> tuple[Dedup, int, str]:
        """Way, chunks and why, of batches such as (tokens a rank, K, bytes a value, cut, chunks): rank 0's, since
        figures of links inside a host are each host's own, and of a device's links those known so far."""
        if batch not in self._of_devices:
            mode = self._mode_of_rank_0(*batch[:3])
            if mode == "host" and self._reach is None:
                self._ask_device(like)
                mode = self._mode_of_rank_0(*batch[:3])
            require(mode != "host" or self._reach != Reach.nothing, self._why_not)
            wanted, why = batch[4] or 1, "as given"
            if wanted == "auto":
                wanted, why = self._device_stream_chunks(*batch[:4], mode)
                wanted = int(self._waits.agree("plan", None, [wanted])[0, 0])
            self._of_devices[batch] = (mode, wanted, why)
        return self._of_devices[batch]

    def _mode_of_rank_0(self, n_tokens: int, top_k: int, itemsize: int) -> Dedup:
        mine = MODES.index(self.choice(n_tokens, top_k, itemsize, "cuda").mode)
        return MODES[int(self._waits.agree("plan", None, [mine])[0, 0])]

    def _ask_device(self, like: Tensor) -> None:
        """What the ranks of all hosts can do on like's device."""
        assert self._through_hosts is not None
        reach, why = self._through_hosts.ask_device(like)
        everyone = self._waits.agree("plan", None, [reach])[:, 0]
        self._reach = Reach(int(everyone.min()))
        self._why_not = f"dedup='host' on devices needs collectives inside every host: {why or 'another has none'}"
        self._choices.clear()


def _chunks_of(crossing_s: float, latency_s: float, cut: Cut, link: str) -> tuple[int, str]:
    wanted = int(crossing_s * _STREAM_LOSS / latency_s)
    about = f"{crossing_s * 1e3:.3g} ms of {link}, whose latency is {latency_s * 1e6:.3g} us"
    if wanted < 2:
        return 1, f"one chunk: {about}; cut further it would lose more to latency than it hides"
    return min(wanted, _MAX_STREAM_CHUNKS[cut]), f"chunks that lose {_STREAM_LOSS:.0%} at most to latency: {about}"


def _rows(gathered: Tensor, counts: tuple[int, ...], before: int, nbytes: int, dtype: torch.dtype) -> Tensor:
    """[sum of counts, nbytes / the type's]: of each rank's bytes those of its counts[rank] rows of nbytes, behind as
    many rows of `before` bytes."""
    parts = [each[n * before : n * (before + nbytes)] for each, n in zip(gathered, counts, strict=True)]
    return torch.cat(parts).view(dtype).view(-1, nbytes // dtype.itemsize)


def form(rows: Tensor) -> int:
    """Of rows, in one number, which FORM names: their width, type and kind of device."""
    width = rows.shape[-1] if rows.dim() else 0
    return (width * 8 + (_TYPES.index(rows.dtype) if rows.dtype in _TYPES else 7)) * 2 + devices.on_device(rows)
