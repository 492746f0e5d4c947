"""Groups that count the time their callers wait, and what succeeds or fails on all ranks together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from training.device import HOST, Device, Waits
from training.errors import BY_NAME, TrainingError, common

if TYPE_CHECKING:
    from pycomm.explain import Explanation
    from pycomm.group import Group, Work

_T = TypeVar("_T")
SLOW_S = 600.0  # a deadline for waits on another rank's disk, on what only rank 0 does, or on a slower worker


class MeteredGroup:
    """A group whose collectives add the seconds they block their caller to blocked_s; what overlaps is not counted.

    A group of one rank returns at once: its collectives are the identity.
    """

    def __init__(self, group: Group, name: str, device: Device = HOST) -> None:
        """name: of the axis. device: of the tensors, beside the host's."""
        self.group = group
        self.name = name
        self.rank: int = group.rank
        self.size: int = group.size
        self._array = device.array
        self._device = device
        self._waits = Waits(device)
        self._messages: tuple[Group, ...] = ()

    @property
    def blocked_s(self) -> float:
        """Until now; on a GPU of what it has come past."""
        return self._waits.until_now_s()

    def _blocking(self) -> AbstractContextManager[None]:
        return self._waits.counting()

    def leave_out_of_graphs(self) -> None:
        """torch.compile ends a graph before each collective from now on, and begins another one after it."""
        for name in ("all_reduce", "all_gather", "reduce_scatter", "send", "recv"):
            setattr(self, name, torch.compiler.disable(getattr(self, name)))

    def open_messages(self) -> Sequence[Group]:
        """To be called before send() and recv() of a device's tensors, on all ranks together; the groups that were made
        for it, which are the caller's to close.

        A device's messages have no tags and come in the order of one queue for each two ranks of a group. So each
        direction gets a group of its own, where receives are posted in the order of the sends; and neighbours around
        the ring meet here, in an order that no rank waits in for ever. Others must not exchange messages."""
        if not self._device.late or self.size == 1 or self._messages:
            return ()
        self._messages = tuple(made for _ in range(2) if (made := self.group.new_group(range(self.size))) is not None)
        for low, high in sorted({tuple(sorted((i, (i + 1) % self.size))) for i in range(self.size)}):
            for upwards in (False, True):
                src, dst = (low, high) if upwards else (high, low)
                token = torch.zeros(1, device=self._device.where)
                if self.rank == src:
                    self.send(token, dst, 0, async_op=False)
                elif self.rank == dst:
                    self.recv(token, src, 0, async_op=False)
        return self._messages

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
        if self.size == 1 and not async_op:
            return x
        with self._blocking():
            result = self.group.all_reduce(
                self._array(x),
                op,
                async_op=async_op,
                timeout_s=timeout_s,
                wire=wire,
                wire_residual=None if wire_residual is None else self._array(wire_residual),
            )
        return MeteredWork(result, self) if async_op else x

    def all_gather(
        self,
        output: Tensor,
        input: Tensor,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
        wire: str | None = None,
    ) -> Any:
        if self.size == 1 and not async_op:
            return output.copy_(input.view(output.shape))
        with self._blocking():
            result = self.group.all_gather(
                self._array(output), self._array(input), async_op=async_op, timeout_s=timeout_s, wire=wire
            )
        return MeteredWork(result, self) if async_op else output

    def reduce_scatter(
        self, output: Tensor, input: Tensor, op: str = "sum", *, async_op: bool = False, wire: str | None = None
    ) -> Any:
        with self._blocking():
            result = self.group.reduce_scatter(
                self._array(output), self._array(input), op, async_op=async_op, wire=wire
            )
        return MeteredWork(result, self) if async_op else output

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
            self.group.all_to_all(self._array(output), self._array(input), output_counts, input_counts, wire=wire)

    def explanation(self, op: str, nbytes: int) -> Explanation:
        return self.group.explanation(op, nbytes)

    def send(self, x: Tensor, dst: int, tag: int, *, async_op: bool = True) -> Any:
        """Begins to send; the Work. Without async_op it waits. On a device the order counts, and no tag."""
        with self._blocking():
            if self._messages:
                work = self._messages[dst > self.rank].send(self._array(x), dst, async_op=async_op)
            else:
                work = self.group.send(x, dst, tag, async_op=async_op)
        return MeteredWork(work, self) if async_op else work

    def recv(self, x: Tensor, src: int, tag: int, *, async_op: bool = True) -> Any:
        """Begins to receive; the Work. Without async_op it waits. On a device the order counts, and no tag."""
        with self._blocking():
            if self._messages:
                work = self._messages[self.rank > src].recv(self._array(x), src, async_op=async_op)
            else:
                work = self.group.recv(x, src, tag, async_op=async_op)
        return MeteredWork(work, self) if async_op else work

    def gather(self, output: Tensor | None, input: Tensor, root: int) -> None:
        with self._blocking():
            self.group.gather(None if output is None else self._array(output), self._array(input), root)

    def broadcast(self, x: Tensor, root: int, timeout_s: float | None = None) -> None:
        if self.size == 1:
            return
        with self._blocking():
            self.group.broadcast(self._array(x), root, timeout_s=timeout_s)


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
    if world.rank == 0:
        try:
            message = json.dumps({"result": action()}).encode()
        except TrainingError as error:
            message = _packed(error)
    answer = _given(world, 0, message)
    if "kind" in answer:
        raise _unpacked(answer)
    return answer["result"]


def on_every_rank(world: MeteredGroup, action: Callable[[], _T]) -> _T:
    """action's result, once it has succeeded on all ranks; where it may fail on some, it must not communicate after.

    A TrainingError that it raises on some of them is raised on every rank: that of the first of these, which is named
    unless all of them failed."""
    result: list[_T] = []
    message = b""
    try:
        result.append(action())
    except TrainingError as error:
        message = _packed(error)
    lengths = torch.empty(world.size, dtype=torch.int64)
    world.all_gather(lengths, torch.tensor([len(message)]), timeout_s=SLOW_S)
    failed = lengths.nonzero().flatten().tolist()
    if failed:
        answer = _given(world, failed[0], message)
        who = f"rank {failed[0]}: " if len(failed) < world.size else ""
        raise _unpacked({**answer, "text": who + answer["text"]})
    return result[0]


def _packed(error: TrainingError) -> bytes:
    return json.dumps({"kind": type(error).__name__, "text": str(error)}).encode()


def _unpacked(answer: dict[str, str]) -> TrainingError:
    return common(BY_NAME[answer["kind"]](answer["text"]))


def _given(world: MeteredGroup, root: int, message: bytes) -> Any:
    """What root's message says in JSON, on every rank."""
    length = torch.tensor([len(message)])
    world.broadcast(length, root, timeout_s=SLOW_S)
    payload = torch.frombuffer(bytearray(message.ljust(int(length), b"\0")[: int(length)]), dtype=torch.uint8)
    world.broadcast(payload, root)
    return json.loads(bytes(payload.numpy()))
