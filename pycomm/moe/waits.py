"""The collectives of an exchange: every wait is timed, and its error names this rank and the stage that it was in. A
rank that fails takes the others of the exchange along, those that wait for it in its host's group as well."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, Protocol

import torch
from torch import Tensor

from pycomm import devices
from pycomm.errors import InvalidArgument, PycommError
from pycomm.group import Group

Call = Literal["plan", "dispatch", "combine", "dispatch_preprocess", "all_to_all_single"]
_CALLS: Final[tuple[Call, ...]] = ("plan", "dispatch", "combine", "dispatch_preprocess", "all_to_all_single")


class RowsGroup(Protocol):
    """What an exchange needs of a group: pycomm.Group, or anything that wraps one. Deduplication by host, chunks and
    overlap need a pycomm.Group itself."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_counts: Sequence[int] | None = None,
        input_counts: Sequence[int] | None = None,
    ) -> Any: ...
    def all_gather(self, output: Tensor, input: Tensor) -> Any: ...


class Waits:
    """group's collectives for one exchange. host: the group of this host's ranks, where there is one. blocked_s:
    seconds that callers have waited in them."""

    def __init__(self, group: RowsGroup, host: Group | None = None) -> None:
        self.group = group
        self._host = host
        self._last = "its making"  # the stage that this rank entered last
        self.blocked_s = 0.0

    def abandon(self, why: str) -> None:
        """This rank does not go on with an exchange. The others, who would wait for it, raise GroupClosed with `why` at
        once, in whichever of the groups they wait."""
        for group in (self.group, self._host):
            if isinstance(group, Group) and group.size > 1:
                group.revoke(why)

    def abandon_after(self, what: str) -> None:
        """The same where the failure is outside of the exchange: after the last stage that this rank was in."""
        self.abandon(f"moe: rank {self.group.rank} of {self.group.size}, after {self._last}: {what}")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self._last = name
        try:
            yield
        except InvalidArgument:
            raise
        except PycommError as error:
            text = f"moe: rank {self.group.rank} of {self.group.size}, {name}: {error}"
            self.abandon(text)
            raise type(error)(text) from error
        finally:
            self.blocked_s += time.perf_counter() - started

    def all_to_all(
        self, name: str, output: Tensor, rows: Tensor, receives: Sequence[int], sends: Sequence[int]
    ) -> None:
        if self.group.size == 1:
            output.copy_(rows)
            return
        with self.stage(name):
            self.group.all_to_all(output, rows, receives, sends)

    def start_all_to_all(
        self, group: Group, name: str, output: Tensor, rows: Tensor, receives: Sequence[int], sends: Sequence[int]
    ) -> Any:
        """Begun, to be waited for within stage(). Straight from rank to rank, since rows were gathered already; on a
        device as NCCL does it."""
        algorithm = None if devices.on_device(rows) else "pairwise"
        with self.stage(name):
            return group.all_to_all(output, rows, receives, sends, async_op=True, algorithm=algorithm)

    def all_gather(self, name: str, mine: Tensor) -> Tensor:
        """[ranks, *mine.shape]"""
        gathered = mine.new_empty((self.group.size, *mine.shape))
        if self.group.size == 1:
            return gathered.copy_(mine.unsqueeze(0))
        with self.stage(name):
            self.group.all_gather(gathered, mine)
        return gathered

    # What follows is of CPU memory, wherever rows are: the host waits for other hosts, and for no device.

    def agree(self, name: Call, problem: str | None, facts: Sequence[int]) -> Tensor:
        """Every rank's facts, int64 [ranks, facts]. Where any rank has a problem, all raise InvalidArgument with the
        problems of all, by rank."""
        return self.agree_and_gather(name, problem, facts, torch.empty(0, dtype=torch.uint8), 0)[0]

    def agree_and_gather(
        self, name: Call, problem: str | None, facts: Sequence[int], mine: Tensor, room: int
    ) -> tuple[Tensor, Tensor]:
        """The same, and every rank's bytes `mine`, uint8 [ranks, bytes of the longest], in one collective where they
        fit into `room`, which is alike on all ranks, and else in two."""
        text = (problem or "").encode()
        header = torch.tensor([len(text), len(mine), _CALLS.index(name), *facts], dtype=torch.int64).view(torch.uint8)
        message = mine.new_zeros(len(header) + room)
        message[: len(header)] = header
        if len(mine) <= room:
            message[len(header) : len(header) + len(mine)] = mine
        received = self.all_gather(name, message)
        headers = received[:, : len(header)].reshape(-1).view(torch.int64)
        everyone = headers.view(self.group.size, -1)
        self._require_same_call(everyone[:, 2])
        self._raise_problems(name, text, everyone[:, 0])
        longest = int(everyone[:, 1].max())
        if longest > room:
            message = mine.new_zeros(longest)
            message[: len(mine)] = mine
            return everyone[:, 3:], self.all_gather(name, message)
        return everyone[:, 3:], received[:, len(header) :][:, :longest]

    def _require_same_call(self, calls: Tensor) -> None:
        """Raises where a rank left a batch after its dispatch and began another while the others combine."""
        if bool((calls == calls[0]).all()):
            return
        said = ", ".join(f"rank {rank} in {_CALLS[call]}" for rank, call in enumerate(calls.tolist()))
        raise InvalidArgument(f"moe: ranks are in different calls: {said}; all must make the same ones in one order")

    def _raise_problems(self, name: str, text: bytes, lengths: Tensor) -> None:
        longest = int(lengths.max())
        if longest == 0:
            return
        padded = torch.frombuffer(bytearray(text.ljust(longest, b"\0")), dtype=torch.uint8)
        texts = self.all_gather(f"{name}, its errors", padded).numpy()
        said = [(rank, bytes(each).rstrip(b"\0").decode()) for rank, each in enumerate(texts)]
        if self.group.size == 1:
            raise InvalidArgument(said[0][1])
        raise InvalidArgument("; ".join(f"rank {rank}: {each}" for rank, each in said if each))
