"""Groups that count the time their callers wait, and what only rank 0 does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.errors import BY_NAME, TrainingError

if TYPE_CHECKING:
    from pycomm.explain import Explanation
    from pycomm.group import Group, Work

SLOW_S = 600.0  # a deadline for waits on another rank's disk, on what only rank 0 does, or on a slower worker


class MeteredGroup:
    """A group whose collectives add the seconds they block their caller to blocked_s; what overlaps is not counted.

    A group of one rank returns at once: its collectives are the identity.
    """

    def __init__(self, group: Group, name: str) -> None:
        """name: of the axis."""
        self.group = group
        self.name = name
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
        timeout_s: float | None = None,
        wire: str | None = None,
        wire_residual: Tensor | None = None,
    ) -> Any:
        with self._blocking():
            result = self.group.all_reduce(
                x, op, async_op=async_op, timeout_s=timeout_s, wire=wire, wire_residual=wire_residual
            )
        return MeteredWork(result, self) if async_op else result

    def all_gather(self, output: Tensor, input: Tensor, *, async_op: bool = False, wire: str | None = None) -> Any:
        with self._blocking():
            result = self.group.all_gather(output, input, async_op=async_op, wire=wire)
        return MeteredWork(result, self) if async_op else result

    def reduce_scatter(
        self, output: Tensor, input: Tensor, op: str = "sum", *, async_op: bool = False, wire: str | None = None
    ) -> Any:
        with self._blocking():
            result = self.group.reduce_scatter(output, input, op, async_op=async_op, wire=wire)
        return MeteredWork(result, self) if async_op else result

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_counts: Sequence[int] | None = None,
        input_counts: Sequence[int] | None = None,
        *,
        wire: str | None = None,
    ) -> None:
        with self._blocking():
            self.group.all_to_all(output, input, output_counts, input_counts, wire=wire)

    def explanation(self, op: str, nbytes: int) -> Explanation:
        return self.group.explanation(op, nbytes)

    def send(self, x: Tensor, dst: int, tag: int, *, async_op: bool = True) -> Any:
        """Begins to send; the Work. Without async_op it waits."""
        with self._blocking():
            work = self.group.send(x, dst, tag, async_op=async_op)
        return MeteredWork(work, self) if async_op else work

    def recv(self, x: Tensor, src: int, tag: int, *, async_op: bool = True) -> Any:
        """Begins to receive; the Work. Without async_op it waits."""
        with self._blocking():
            work = self.group.recv(x, src, tag, async_op=async_op)
        return MeteredWork(work, self) if async_op else work

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

    def is_completed(self) -> bool:
        return self._work.is_completed()


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
