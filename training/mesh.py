"""The ranks of a run as a mesh of axes, each a pycomm group, and the time their callers spend waiting.

Tensor parallel ranks are neighbours (they talk in every layer, so they should share a host), then context parallel
ones, then the expert parallel ones among the data parallel ranks. What is left of these, copies, and pipeline stages
are farthest apart, for they talk least; which of the two is layout.outermost:

    "pp"    rank = (((stage * replicas + replica) * ep + ep_index) * cp + cp_index) * tp + tp_index
    "dp"    rank = (((replica * pp + stage) * ep + ep_index) * cp + cp_index) * tp + tp_index

    dp = replicas * ep, dp_index = replica * ep + ep_index

Stages send activations, in every micro-batch; copies sum gradients, once a step, beside its last backward. "dp" is for
pipelines that fit a host whose link to others is slow.

Where ranks do not synchronise at every step ([sync]), that is the rank within a worker: the first world / workers ranks
are worker 0, and so on. Every axis stays within a worker; "outer" is between them.

Each parameter belongs to an axis. Its gradient is summed over the ranks that hold the same values but saw other tokens:

    axis     cut over           gradient summed over
    None     nothing            stage: sequence parallelism shows each tp rank another part of the sequence
    "tp"     tensor parallel    data: dp × cp
    "ep"     ep, or ep × tp     expert_replicas: all ranks of the stage that hold the same experts
    "tied"   tensor parallel    tied: dp × cp of the first and of the last stage, which both hold the embedding's table
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from training.config import WireConfig
from training.device import HOST, Device
from training.errors import ConfigError
from training.layout import Layout
from training.metered import MeteredGroup
from training.stages import Placement

if TYPE_CHECKING:
    from pycomm.group import Group
    from pycomm.moe import ExpertParallel
    from pycomm.overlap import MatmulPlan, WeightGradients

Axis = Literal["tp", "ep", "tied"] | None

# Names of groups; "zero" is what ZeRO cuts or copies over where that is no axis, "alone" a group of one rank.
AXES = (
    *("world", "worker", "outer", "tp", "cp", "dp", "ep", "pp", "sequence", "stage", "expert_replicas", "tied"),
    *("zero", "alone"),
)


class _Place(NamedTuple):
    worker: int
    pp: int
    dp: int
    cp: int
    tp: int
    replica: int
    ep: int

    @staticmethod
    def of(rank: int, layout: Layout) -> _Place:
        worker, within = divmod(rank, layout.worker_ranks)
        outer, tp = divmod(within, layout.tp)
        outer, cp = divmod(outer, layout.cp)
        outer, ep = divmod(outer, layout.ep)
        if layout.outermost == "pp":
            pp, replica = divmod(outer, layout.replicas)
        else:
            replica, pp = divmod(outer, layout.pp)
        return _Place(worker, pp, replica * layout.ep + ep, cp, tp, replica, ep)


class Mesh:
    """This rank's place in a layout, and its group along each axis. Every rank of the world constructs it together."""

    def __init__(
        self,
        world: Group,
        layout: Layout,
        placement: Placement | None = None,
        wire: WireConfig | None = None,
        device: Device = HOST,
    ) -> None:
        """placement: of the pipeline's stages; None: one stage a rank. wire: of each axis; None: none. device: this
        rank's."""
        if layout.n_ranks != world.size:
            raise ConfigError(f"the layout {layout} has {layout.n_ranks} ranks, the group has {world.size}")
        self.layout = layout
        self.device = device
        self.placement = placement or Placement(layout.pp)
        self.fp8 = False  # whether linear layers' products are (train.matmul)
        self.weight_gradients: WeightGradients | None = None  # of the forward or backward that runs, where put off
        given = wire or WireConfig()
        self.wire: dict[str, str | None] = {
            axis: None if (each := getattr(given, axis)) == "none" else each
            for axis in ("dp", "outer", "tp", "cp", "ep")
        }
        self.world = MeteredGroup(world, "world", device)
        self._own: list[Group] = []
        self.exchanges: dict[tuple[int, int, int], ExpertParallel] = {}  # of moe.py: one for all layers that are alike
        self.products: dict[tuple[Any, ...], MatmulPlan] = {}  # of parallel.py: how those of a shape run
        self._parts: list[MeteredGroup] = []
        self._by_partition: dict[tuple[Any, ...], MeteredGroup] = {(0,) * world.size: self.world}
        places = [_Place.of(rank, layout) for rank in range(world.size)]
        here = places[world.rank]
        self.worker_index, self.dp_index, self.pp_index = here.worker, here.dp, here.pp
        self.data_index = here.worker * layout.dp + here.dp  # of the parts of a batch
        last = self.placement.last_rank
        self.ties = last != 0  # whether the embedding's table is on two stages
        spread = layout.experts_over_tp == "spread"  # then the expert parallel ranks of all tp ranks are one group
        over_tp = layout.experts_over_tp != "none"
        holders: dict[Axis, list[Any]] = {  # ranks of equal color in a worker hold the same piece of a parameter
            None: [(at.pp,) for at in places],
            "tp": [(at.pp, at.tp) for at in places],
            "ep": [(at.pp, at.ep, at.tp if over_tp else 0) for at in places],
            "tied": [(at.tp,) if at.pp in (0, last) else (-1, *at[1:]) for at in places],
        }
        self.worker = self._axis("worker", [at.worker for at in places])  # the ranks that have one model between them
        self.tp = self._axis("tp", [(at.worker, at.pp, at.dp, at.cp) for at in places])
        self.cp = self._axis("cp", [(at.worker, at.pp, at.dp, at.tp) for at in places])
        self.data = self._axis("dp", _within(places, holders["tp"]))  # data and context parallel ranks
        self.ep = self._axis("ep", [(at.worker, at.pp, at.replica, at.cp, 0 if spread else at.tp) for at in places])
        self.experts = self._axis("ep", [(at.worker, at.pp, at.replica, at.cp, at.tp * (not over_tp)) for at in places])
        self.pp = self._axis("pp", [(at.worker, at.dp, at.cp, at.tp) for at in places])
        self.sequence = self._axis("sequence", [(at.worker, at.pp, at.dp) for at in places])  # of the same sequences
        self.stage = self._axis("stage", _within(places, holders[None]))
        self.expert_replicas = self._axis("expert_replicas", _within(places, holders["ep"]))
        self.tied = self._axis("tied", _within(places, holders["tied"]))
        self.outer = self.world
        self._all_holders: dict[Axis, MeteredGroup] = {}
        if layout.workers > 1:
            self.outer = self._axis("outer", [at[1:] for at in places])  # the ranks of the same place in each worker
            self._all_holders = {axis: self._axis("outer", colors) for axis, colors in holders.items()}
        # On GPUs tp's products go around by Group.exchange().
        for each in (self.cp, self.pp) if device.is_gpu else (self.tp, self.cp, self.pp):
            self._own += each.open_messages()
        self._with_leader: dict[Axis, bool] = {
            None: here.dp == here.cp == here.tp == 0,
            "tp": here.dp == here.cp == 0,
            "tied": here.dp == here.cp == 0,
            "ep": here.replica == here.cp == (0 if over_tp else here.tp) == 0,
        }

    def _axis(self, name: str, colors: Sequence[Any]) -> MeteredGroup:
        """The group of this rank among those of equal colors, by rank; the same group for equal partitions."""
        distinct = list(dict.fromkeys(colors))
        partition = tuple(distinct.index(color) for color in colors)
        if partition not in self._by_partition:
            group = self.world.group.split(partition[self.world.rank])
            assert group is not None
            self._own.append(group)
            self._by_partition[partition] = MeteredGroup(group, name if group.size > 1 else "alone", self.device)
        return self._by_partition[partition]

    def subgroup(self, name: str, parent: MeteredGroup, color: int) -> MeteredGroup:
        """A part of a group: the ranks of parent with equal color. All ranks of parent together."""
        if parent.size == 1:
            return parent
        group = parent.group.split(color)
        assert group is not None
        self._own.append(group)
        made = MeteredGroup(group, name if group.size > 1 else "alone", self.device)
        self._parts.append(made)
        return made

    def shards(self, axis: Axis) -> MeteredGroup | None:
        """The group over which a parameter of this axis is cut; None where each rank holds it whole."""
        return {None: None, "tp": self.tp, "tied": self.tp, "ep": self.experts}[axis]

    def gradients(self, axis: Axis) -> MeteredGroup:
        """The group that holds the same values of a parameter of this axis, and sums its gradient."""
        return {None: self.stage, "tp": self.data, "tied": self.tied, "ep": self.expert_replicas}[axis]

    def all_holders(self, axis: Axis) -> MeteredGroup:
        """The ranks of all workers that hold the same piece of a parameter of this axis, where there are workers."""
        return self._all_holders[axis]

    def with_leader(self, axis: Axis) -> bool:
        """Whether this rank's shards(axis) hold the first rank of its stage (as their rank 0)."""
        return self._with_leader[axis]

    def leader(self, pp_index: int, worker: int = 0) -> int:
        """The first rank of a pipeline rank's ranks of a worker, in the world."""
        each = self.stage.size if self.layout.outermost == "pp" else self.stage.size // self.layout.replicas
        return worker * self.layout.worker_ranks + pp_index * each

    @contextmanager
    def putting_off(self, later: WeightGradients) -> Iterator[None]:
        """Within it, layers put their weight gradients off into later."""
        self.weight_gradients = later
        try:
            yield
        finally:
            self.weight_gradients = None

    @property
    def groups(self) -> list[MeteredGroup]:
        """Each distinct group of this rank once."""
        return [*self._by_partition.values(), *self._parts]

    def blocked_by_axis_s(self) -> dict[str, float]:
        """Seconds blocked until now, by the name of the axis; the same names on every rank."""
        found = dict.fromkeys(AXES, 0.0)
        for group in self.groups:
            found[group.name] += group.blocked_s
        found[self.ep.name] += sum(exchange.waits.blocked_s for exchange in self.exchanges.values())
        return found

    def blocked_s(self) -> float:
        """Seconds blocked until now, in all groups."""
        return sum(self.blocked_by_axis_s().values())

    def close(self) -> None:
        """Closes the exchanges and the axes; the world stays its owner's."""
        for exchange in self.exchanges.values():
            exchange.close()
        for group in self._own:
            group.close()


def _within(places: Sequence[_Place], colors: Sequence[Any]) -> list[Any]:
    return [(at.worker, color) for at, color in zip(places, colors, strict=True)]
