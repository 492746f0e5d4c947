"""Memory that the ranks of one host read of each other while rows cross once to each host (through_hosts.py): on the
CPU what they share, on devices what each has mapped of the others', or copies of it where they cannot map it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from pycomm import _C, devices
from pycomm.errors import CollectiveMismatch, GroupClosed, PeerLost, PeerTimeout, PycommError
from pycomm.group import Group

MOST_MEMBERS: Final = 64  # of a host: a kernel reads 128 buffers, two of each
_FIRST_NBYTES: Final = 1 << 20


class HostMemory(ABC):
    """Rows by name. An operation takes what it needs, writes its own, and shares; tells the others of what it writes
    afterwards; and ends: nobody reads any more, so the memory may be written again. All ranks of the host take the same
    steps in the same order."""

    @abstractmethod
    def take(self, name: str, n_rows: Sequence[int], width: int, dtype: torch.dtype) -> Tensor:
        """This rank's [n_rows of it, width], not initialised; n_rows: of each rank of the host."""

    @abstractmethod
    def share(self, *names: str) -> list[Tensor]:
        """Every rank's rows under the first name, which all have written, then under the next, not yet written."""

    @abstractmethod
    def wrote(self, name: str) -> None:
        """Returns once what all have written under the name since is where share() gave it: on a device, in the order
        of its stream."""

    @abstractmethod
    def end(self) -> None: ...


class SharedMemory(HostMemory):
    """Of the CPU."""

    def __init__(self, group: Group, host: Group, members: Sequence[int]) -> None:
        self._group, self._host, self._me = group, host, list(members).index(group.rank)
        self._endpoint_ranks = [group._ranks[rank] for rank in members]
        self._tensors: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[Sequence[int], int, torch.dtype]] = {}

    def take(self, name: str, n_rows: Sequence[int], width: int, dtype: torch.dtype) -> Tensor:
        nbytes = n_rows[self._me] * width * dtype.itemsize
        if name not in self._tensors or self._tensors[name].numel() < nbytes:
            self._tensors.pop(name, None)  # given back before more is taken
            self._tensors[name] = self._group.empty(max(nbytes + nbytes // 8, 4096), dtype=torch.uint8)
        self._shapes[name] = (n_rows, width, dtype)
        return _rows(self._tensors[name], n_rows[self._me], width, dtype)

    def share(self, *names: str) -> list[Tensor]:
        addresses = self._addresses([self._tensors[name].data_ptr() for name in names])
        return [
            self._view(member, int(addresses[member, kind]), n, *self._shapes[name][1:])
            for kind, name in enumerate(names)
            for member, n in enumerate(self._shapes[name][0])
        ]

    def wrote(self, name: str) -> None:
        self._barrier()

    def end(self) -> None:
        self._barrier()

    def _addresses(self, mine: Sequence[int]) -> Tensor:
        """Every rank's, int64 [ranks of the host, len(mine)]; returns once all have entered."""
        own = torch.tensor(mine, dtype=torch.int64)
        gathered = torch.empty(self._host.size, len(mine), dtype=torch.int64)
        if self._host.size == 1:
            return gathered.copy_(own.unsqueeze(0))
        self._host.all_gather(gathered, own)
        return gathered

    def _view(self, member: int, address: int, n: int, width: int, dtype: torch.dtype) -> Tensor:
        nbytes = n * width * dtype.itemsize
        if nbytes == 0:
            return torch.empty(n, width, dtype=dtype)
        found = _C.peer_bytes(self._group._endpoint, self._endpoint_ranks[member], address, nbytes)
        return found.view(dtype).view(n, width)

    def _barrier(self) -> None:
        if self._host.size > 1:
            self._host.barrier()


class MappedMemory(HostMemory):
    """Of a device. What all have come to is an all_reduce of one number on the stream: no host waits, but where a batch
    needs more memory than any before it."""

    def __init__(self, host: Group, number: Tensor, first: _C.SymmetricMemory) -> None:
        self._host, self._number = host, number
        self._memory = {"own": first}
        self._rows: dict[str, list[Tensor]] = {}
        self._ended: Any = None

    def take(self, name: str, n_rows: Sequence[int], width: int, dtype: torch.dtype) -> Tensor:
        nbytes, before = max(n_rows) * width * dtype.itemsize, self._memory.get(name)
        if before is None or before.nbytes < nbytes:
            if before is not None:
                devices.settle(self._number)  # it reads the others' no more
            made = self._host.symmetric_memory(self._number, max(nbytes + nbytes // 8, _FIRST_NBYTES), before)
            if isinstance(made, str):
                raise PycommError(f"no memory of {nbytes:,} bytes that the ranks of a host map: {made}")
            self._memory[name] = made
        devices.follow(self._number, self._ended)  # where the caller's stream is another now
        self._rows[name] = [_rows(self._memory[name].of(member), n, width, dtype) for member, n in enumerate(n_rows)]
        return self._rows[name][self._host.rank]

    def share(self, *names: str) -> list[Tensor]:
        self._meet()
        return [rows for name in names for rows in self._rows[name]]

    def wrote(self, name: str) -> None:
        self._meet()

    def end(self) -> None:
        self._meet()
        self._ended = devices.reached(self._number)

    def _meet(self) -> None:
        self._host.all_reduce(self._number)


class CopiedMemory(HostMemory):
    """Of a device whose host's ranks cannot map each other's: all gather all rows. Or of one rank alone."""

    def __init__(self, host: Group, like: Tensor) -> None:
        self._host, self._like = host, like
        self._taken: dict[str, tuple[Tensor, Tensor, Sequence[int]]] = {}

    def take(self, name: str, n_rows: Sequence[int], width: int, dtype: torch.dtype) -> Tensor:
        mine = self._like.new_empty(n_rows[self._host.rank], width, dtype=dtype)
        every = mine if self._host.size == 1 else mine.new_empty(sum(n_rows), width)
        self._taken[name] = (mine, every, n_rows)
        return mine

    def share(self, *names: str) -> list[Tensor]:
        self.wrote(names[0])
        return [rows for name in names for rows in torch.split(self._taken[name][1], list(self._taken[name][2]))]

    def wrote(self, name: str) -> None:
        mine, every, n_rows = self._taken[name]
        if self._host.size > 1:
            self._host.all_gather(every, mine, n_rows)

    def end(self) -> None:
        pass


def memory_on_device(host: Group, like: Tensor) -> tuple[HostMemory | None, str]:
    """For tensors on like's device; else None and why the host's ranks exchange nothing there. All ranks of the host
    call it, and get the same. Raises what breaks the group."""
    like = like.new_zeros(1, dtype=torch.float32)
    if host.size == 1:
        return CopiedMemory(host, like), ""
    if host.size > MOST_MEMBERS:
        return None, f"a host has {host.size} ranks, of which {MOST_MEMBERS} can read each other's rows"
    try:
        first = host.symmetric_memory(like, _FIRST_NBYTES)
    except (PeerTimeout, PeerLost, CollectiveMismatch, GroupClosed):
        raise
    except PycommError as error:
        return None, str(error)
    if isinstance(first, str):
        return CopiedMemory(host, like), first
    return MappedMemory(host, like, first), ""


def _rows(memory: Tensor, n: int, width: int, dtype: torch.dtype) -> Tensor:
    return memory[: n * width * dtype.itemsize].view(dtype).view(n, width)
