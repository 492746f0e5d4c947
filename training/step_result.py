"""What is known of a step, and how a rank measures its part of it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from training.bubble import Bubble
from training.data import Batch
from training.device import Fetched, Span
from training.machine import peak_memory_bytes
from training.mesh import AXES, Mesh


@dataclass(frozen=True)
class StepResult:
    """One step. Loss and norm are of the whole batch and model, times and bytes are summed over all ranks; with several
    workers ([sync]), those are the batch, model and ranks of this rank's worker. On a device all times but step_s, and
    bytes, are those of two steps before."""

    step: int  # updates done, this one included
    loss: float  # mean cross-entropy of a token, before the update
    grad_norm: float  # before clipping
    lr: float
    step_s: float  # of this rank
    n_tokens: int  # of all workers
    blocked_s: float  # in which a rank did nothing but wait for other ranks
    blocked_by_axis_s: dict[str, float]  # the same, of each of the mesh's groups
    bubble_s: float  # which the pipeline's schedule leaves idle (training/bubble.py)
    exposed_by_axis_s: dict[str, float]  # what is left of blocked_by_axis_s without the bubble
    busy_s: float  # in which an engine had communication to do
    bytes_inside_hosts: int
    bytes_between_hosts: int
    peak_memory_bytes: int  # of the rank that had most
    slowest_rank: int  # whose own work took longest: the others waited for it
    slowest_excess_s: float  # by how much longer than the median rank's
    stopping: bool  # whether some rank was asked to stop, and all know of it

    def share(self, seconds: float, n_ranks: int) -> float:
        """Of the time of the worker's n_ranks, 0 to 1; seconds: summed over them."""
        return seconds / (self.step_s * n_ranks)

    @property
    def exposed_s(self) -> float:
        """In which a rank waited for communication: blocked_s less the bubble."""
        return sum(self.exposed_by_axis_s.values())


@dataclass(frozen=True)
class Submitted:
    """A step that a rank has handed to its device. shares: fp64 [ranks, 3 + n], of each rank its part of the loss, of
    the norm's square, whether it was asked to stop, Measuring.own(), and Pipeline.action_s()."""

    step: int
    lr: float
    n_tokens: int  # of this rank's worker
    n_workers: int
    batches: list[Batch]
    span: Span
    shares: Fetched
    bubble: Bubble

    @property
    def loss(self) -> float:
        return float(self.shares.value()[:, 0].sum())

    @property
    def grad_norm(self) -> float:
        return float(self.shares.value()[:, 1].sum().sqrt())

    def result(self, stopping: bool) -> StepResult:
        """What came of it, once it is over."""
        ranks = self.shares.value()
        action_s = ranks[:, 8 + len(AXES) :]
        loss, _, _, own_s, _, busy_s, inside, between, *more = ranks.sum(0).tolist()
        blocked_by_axis_s = {name: s for name, s in zip(AXES, more, strict=False) if s > 0}
        bubble_s = self.bubble.seconds(action_s, own_s)
        return StepResult(
            step=self.step,
            loss=loss,
            grad_norm=self.grad_norm,
            lr=self.lr,
            step_s=self.span.seconds(),
            n_tokens=self.n_tokens * self.n_workers,
            blocked_s=sum(blocked_by_axis_s.values()),
            blocked_by_axis_s=blocked_by_axis_s,
            bubble_s=bubble_s,
            exposed_by_axis_s=self.bubble.exposed_s(blocked_by_axis_s, bubble_s),
            busy_s=busy_s,
            bytes_inside_hosts=round(inside),
            bytes_between_hosts=round(between),
            peak_memory_bytes=int(ranks[:, 4].max()),
            slowest_rank=int(ranks[:, 3].argmax()),
            slowest_excess_s=float(ranks[:, 3].max() - ranks[:, 3].median()),
            stopping=stopping,
        )


class Measuring:
    """This rank's times and bytes: of each step before it meets the others, on a device of the last one that is over,
    since those of the present one are not known yet."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._began: float = 0.0
        self._counted: list[float] | None = None
        self._last_s = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()
        self._counted = self._counted or self._counters()

    def ended(self, step_s: float) -> None:
        """A step of a device took so long."""
        self._last_s = step_s

    def own(self) -> list[float]:
        """[seconds of own work, most bytes of memory, engines' busy seconds, bytes inside and between hosts, and for
        each of AXES seconds blocked]."""
        counters, late = self._counters(), self._mesh.device.late
        assert self._counted is not None
        passed = [now - then for now, then in zip(counters, self._counted, strict=True)]
        self._counted = counters if late else None
        took_s = self._last_s if late else time.perf_counter() - self._began
        return [took_s - sum(passed[3:]), float(peak_memory_bytes(self._mesh.device)), *passed]

    def pause(self) -> None:
        """What comes now is no step."""
        self._counted = None

    def _counters(self) -> list[float]:
        """Seconds busy, bytes sent inside hosts and between them, and seconds blocked in each group, until now."""
        stats = [group.group.stats() for group in self._mesh.groups]
        return [
            sum(each.busy_s for each in stats),
            float(sum(each.bytes_inside_hosts for each in stats)),
            float(sum(each.bytes_between_hosts for each in stats)),
            *self._mesh.blocked_by_axis_s().values(),
        ]
