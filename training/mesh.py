"""The ranks of a run as a mesh of axes, each a pycomm group, and the time their callers spend waiting.

Tensor parallel ranks are neighbours (they talk in every layer, so they should share a host), expert parallel ranks are
neighbours among the data parallel ones:

    rank = (replica * ep + ep_index) * tp + tp_index           dp_index = replica * ep + ep_index

Each parameter belongs to an axis. Its gradient is summed over the ranks that hold the same values but saw other tokens:

    axis   cut over           gradient summed over
    None   nothing            world: sequence parallelism shows each tp rank another part of the sequence
    "tp"   tensor parallel    dp
    "ep"   expert parallel    expert_replicas: all ranks of equal ep_index
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from training.config import Layout
from training.errors import BY_NAME, ConfigError, TrainingError

if TYPE_CHECKING:
    from pycomm.group import Group, Work
    from pycomm.moe import ExpertParallel

Axis = Literal["tp", "ep"] | None
SLOW_S = 600.0  # a deadline for waits on another rank's disk or on what only rank 0 does


class MeteredGroup:
    """A group whose collectives add the seconds they block their caller to blocked_s; what overlaps is not counted.

    A group of one rank returns at once: its collectives are the identity.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank: int = group.rank
        self.size: int = group.size
        self.blocked_s = 0.0

    @contextmanager
    def _blocking(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.blocked_s += time.perf_counter() - started

    def all_reduce(
        self,
        x: Tensor,
        op: str = "sum",
        *,
        async_op: bool = False,
        wire: str | None = None,
        wire_residual: Tensor | None = None,
    ) -> Any:
        with self._blocking():
            result = self.group.all_reduce(x, op, async_op=async_op, wire=wire, wire_residual=wire_residual)
        return MeteredWork(result, self) if async_op else result

    def all_gather(self, output: Tensor, input: Tensor) -> None:
        with self._blocking():
            self.group.all_gather(output, input)

    def reduce_scatter(self, output: Tensor, input: Tensor, op: str = "sum") -> None:
        with self._blocking():
            self.group.reduce_scatter(output, input, op)

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_counts: Sequence[int] | None = None,
        input_counts: Sequence[int] | None = None,
    ) -> None:
        with self._blocking():
            self.group.all_to_all(output, input, output_counts, input_counts)

    def gather(self, output: Tensor | None, input: Tensor, root: int) -> None:
        with self._blocking():
            self.group.gather(output, input, root)

    def broadcast(self, x: Tensor, root: int, timeout_s: float | None = None) -> None:
        with self._blocking():
            self.group.broadcast(x, root, timeout_s=timeout_s)


class MeteredWork:
    """The Work of an asynchronous collective; wait() counts in its group's blocked_s."""

    def __init__(self, work: Work, group: MeteredGroup) -> None:
        self._work = work
        self._group = group

    def wait(self, timeout_s: float | None = None) -> None:
        with self._group._blocking():
            self._work.wait(timeout_s)


class Mesh:
    """This rank's place in a layout, and its group along each axis. Every rank of the world constructs it together."""

    def __init__(self, world: Group, layout: Layout) -> None:
        if layout.dp * layout.tp != world.size:
            raise ConfigError(f"the layout {layout} has {layout.dp * layout.tp} ranks, the group has {world.size}")
        self.layout = layout
        dp_index, tp_index = divmod(world.rank, layout.tp)
        replica, ep_index = divmod(dp_index, layout.ep)
        self.dp_index = dp_index
        self.world = MeteredGroup(world)
        self._own: list[Group] = []
        self.tp = self._axis("tp", layout.tp, color=dp_index)
        self.dp = self._axis("dp", layout.dp, color=tp_index)
        self.ep = self._axis("ep", layout.ep, color=replica * layout.tp + tp_index)
        self.expert_replicas = self._axis("expert_replicas", world.size // layout.ep, color=ep_index)
        self.exchanges: dict[tuple[int, int, int], ExpertParallel] = {}  # of moe.py: one for all layers that are alike
        self._with_rank_0: dict[Axis, bool] = {
            None: world.rank == 0,
            "tp": dp_index == 0,
            "ep": replica == tp_index == 0,
        }

    def _axis(self, name: str, size: int, color: int) -> MeteredGroup:
        if size == self.world.size:
            return self.world
        group = self.world.group.split(color)
        if group is None or group.size != size:
            raise RuntimeError(f"axis {name} should have {size} ranks, the split gave {group and group.size}")
        self._own.append(group)
        return MeteredGroup(group)

    def shards(self, axis: Axis) -> MeteredGroup | None:
        """The group over which a parameter of this axis is cut; None where each rank holds it whole."""
        return {None: None, "tp": self.tp, "ep": self.ep}[axis]

    def gradients(self, axis: Axis) -> MeteredGroup:
        """The group that holds the same values of a parameter of this axis, and sums its gradient."""
        return {None: self.world, "tp": self.dp, "ep": self.expert_replicas}[axis]

    def with_rank_0(self, axis: Axis) -> bool:
        """Whether this rank's shards(axis) hold rank 0 of the world (as their rank 0)."""
        return self._with_rank_0[axis]

    @property
    def groups(self) -> list[MeteredGroup]:
        """Each distinct group once."""
        distinct = {id(group): group for group in (self.world, self.tp, self.dp, self.ep, self.expert_replicas)}
        return list(distinct.values())

    def blocked_s(self) -> float:
        exchanges = sum(exchange.waits.blocked_s for exchange in self.exchanges.values())
        return exchanges + sum(group.blocked_s for group in self.groups)

    def close(self) -> None:
        """Closes the exchanges and the axes; the world stays its owner's."""
        for exchange in self.exchanges.values():
            exchange.close()
        for group in self._own:
            group.close()


def on_rank_0(world: MeteredGroup, action: Callable[[], Any]) -> Any:
    """Runs action on rank 0 alone and returns its JSON-able result on every rank.

    A TrainingError that it raises is raised on every rank, so that all of them end and none waits for rank 0.
    """
    message = b""
    failure: TrainingError | None = None
    if world.rank == 0:
        try:
            message = json.dumps({"result": action()}).encode()
        except TrainingError as error:
            failure = error
            message = json.dumps({"kind": type(error).__name__, "text": str(error)}).encode()
    length = torch.tensor([len(message)])
    world.broadcast(length, 0, timeout_s=SLOW_S)
    payload = torch.frombuffer(bytearray(message.ljust(int(length), b"\0")), dtype=torch.uint8)
    world.broadcast(payload, 0)
    answer = json.loads(bytes(payload.numpy()))
    if failure is not None:
        raise failure
    if "kind" in answer:
        raise BY_NAME[answer["kind"]](answer["text"])
    return answer["result"]
