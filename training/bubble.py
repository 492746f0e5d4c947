"""How long a pipeline's ranks idle in a step because of its schedule, which no faster communication would change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from training import schedules
from training.mesh import Mesh
from training.schedules import Schedule


@dataclass(frozen=True)
class Bubble:
    """Of one schedule. axes: the groups in which a rank waits while it idles: first for other stages' messages, then,
    when its own actions are done, where it meets the other stages. copies: of the pipeline, which stand outermost."""

    schedule: Schedule
    axes: tuple[str, ...]
    copies: int = 1

    @staticmethod
    def of(schedule: Schedule, mesh: Mesh) -> Bubble:
        """On this rank's mesh."""
        copies = mesh.layout.replicas if mesh.layout.outermost == "dp" else 1
        return Bubble(schedule, (mesh.pp.name, mesh.tied.name, mesh.worker.name), copies)

    def seconds(self, action_s: Tensor, own_s: float) -> float:
        """What schedules.check() finds idle, summed over the ranks.

        action_s: of each rank Pipeline.action_s(), fp64 [ranks, 3 * n_chunks], of each copy the ranks of a stage
        together; 0 where nothing is measured: then F, B and W count as equal, and as long as own_s, the ranks' own work
        together."""
        placement, n = self.schedule.placement, self.schedule.n_micro_batches
        if placement.n_ranks == 1:
            return 0.0
        if not action_s.any():
            timing = schedules.check(self.schedule)
            busy = sum(timing.makespan - each for each in timing.idle)
            return max(0.0, own_s) * sum(timing.idle) / busy
        of_copies = action_s.view(self.copies, placement.n_ranks, -1, placement.n_chunks, 3)
        of_stage = of_copies.transpose(0, 1).flatten(1, 2)
        of_rank = of_stage.mean(1) / n
        at = [(placement.rank(stage), stage // placement.n_ranks) for stage in range(placement.n_stages)]
        f, b, w = ([float(of_rank[rank, chunk, kind]) for rank, chunk in at] for kind in range(3))
        return of_stage.shape[1] * sum(schedules.check(self.schedule, f, b, w).idle)

    def exposed_s(self, blocked_s: Mapping[str, float], bubble_s: float) -> dict[str, float]:
        """What is left of the seconds blocked by axis without the bubble, which is taken off self.axes first, in their
        order, and off the others from the longest on."""
        left, exposed = bubble_s, dict(blocked_s)
        waiting = [axis for axis in self.axes if axis in blocked_s]
        others = sorted((axis for axis in blocked_s if axis not in waiting), key=lambda axis: -blocked_s[axis])
        for axis in dict.fromkeys(waiting + others):
            taken = min(left, exposed[axis])
            exposed[axis] -= taken
            left -= taken
        return {axis: s for axis, s in exposed.items() if s > 0}
