"""Parameters that are cut over ranks together: what a user says of them (Cut), and one such flat tensor at work (Unit).

Between uses a flat's storage is empty, so that whatever views it (parameters, tensors that autograd saved) costs
nothing. Sources: Rajbhandari et al., ZeRO, arXiv:1910.02054; hybrid sharding: Zhang et al., MiCS, arXiv:2205.00119."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from pycomm.errors import InvalidArgument
from pycomm.overlap.pool import Pool


class ShardGroup(Protocol):
    """What the sharding needs of a group: pycomm.Group, or anything that wraps one; all_reduce only of copies."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_gather(self, output: Tensor, input: Tensor, **options: Any) -> Any: ...
    def reduce_scatter(self, output: Tensor, input: Tensor, op: str = "sum", **options: Any) -> Any: ...
    def all_reduce(self, x: Tensor, op: str = "sum", **options: Any) -> Any: ...


class ShardMemory(Protocol):
    """Where shards lie, when that is not ordinary memory: files, say."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor: ...
    def prefetch(self, x: Tensor) -> None:
        """x, made by zeros(), will be read soon. Returns at once."""

    def release(self, x: Tensor) -> None:
        """x will not be touched for a while; it keeps its values."""


class InMemory:
    """Ordinary memory, which is always there."""

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def prefetch(self, x: Tensor) -> None:
        pass

    def release(self, x: Tensor) -> None:
        pass


@dataclass(frozen=True, eq=False)
class Cut:
    """Parameters that lie one after another in a flat tensor, padded to a multiple of the ranks; each keeps a part.

    parameters: leaves of one type and device. group: the ranks that the flat is cut over.
    module: gathers them before its forward and backward, and frees them after (ZeRO-3). None: they stay whole (ZeRO-1
    and 2). A module may have several cuts.
    copies: ranks that keep the same part and see other data: gradients are added up over them too (hybrid sharding).
    None: this rank alone.
    reduce: gradients cross in "each" backward, as soon as the cut has all of its own (ZeRO-2 and 3); in the "last" one,
    the first outside no_sync(), and add up before (ZeRO-1); or in "wait"() alone, where ranks run other backwards.
    wire: their precision on the wire, as pycomm.Group.reduce_scatter() knows it; None: whole. What coding loses is not
    fed back."""

    parameters: Sequence[Tensor]
    group: ShardGroup
    module: nn.Module | None = None
    copies: ShardGroup | None = None
    reduce: Literal["each", "last", "wait"] = "each"
    wire: str | None = None

    @property
    def nbytes(self) -> int:
        """Of the flat as the parameters are given."""
        numel = sum(p.numel() for p in self.parameters)
        return (numel + -numel % self.group.size) * self.parameters[0].itemsize

    def check(self, index: int) -> None:
        """Raises InvalidArgument for parameters that cannot share a flat tensor."""
        kinds = {(p.dtype, p.device) for p in self.parameters}
        if len(kinds) != 1:
            what = "no parameters" if not self.parameters else f"parameters of {len(kinds)} types or devices"
            raise InvalidArgument(f"module {index} has {what}; give modules whose parameters are alike")
        if self.reduce not in ("each", "last", "wait"):
            raise InvalidArgument(f"reduce is {self.reduce!r}; give 'each', 'last' or 'wait'")


class _Copying:
    """The gather of a rank that has no others: from where its shard lies, when it is needed."""

    def __init__(self, flat: Tensor, shard: Tensor, pool: Pool) -> None:
        self._flat, self._shard, self._pool = flat, shard, pool

    def wait(self) -> None:
        self._pool.fill(self._flat)
        self._flat.copy_(self._shard)


def _placed(values: Tensor, memory: ShardMemory | None) -> Tensor:
    if memory is None:
        return values.clone()
    placed = memory.zeros(values.shape, values.dtype).copy_(values)
    memory.release(placed)
    return placed


class Unit:
    """A Cut at work. flat: the parameters are views of it. shard: this rank's part, of flat's type. master: the same in
    the type that the parameters came in, and shard itself where that is flat's; its .grad gets the summed gradient."""

    def __init__(
        self,
        cut: Cut,
        dtype: torch.dtype,
        memory: ShardMemory | None,
        master_memory: ShardMemory | None,
        gradient_memory: ShardMemory | None,
        pool: Pool,
    ) -> None:
        """dtype: what the parameters become. memory, master_memory, gradient_memory: of shards, of masters that are not
        shards, and of reduced gradients. pool: of flats and whole gradients."""
        self.cut, self.group, self._pool = cut, cut.group, pool
        self._options = {} if cut.wire is None else {"wire": cut.wire}  # of the reducing collectives
        first = cut.parameters[0]
        numel = sum(p.numel() for p in cut.parameters)
        whole = pool.zeros([numel + -numel % cut.group.size], first.dtype, first.device)
        self.offsets: dict[Tensor, int] = {}
        at = 0
        for parameter in cut.parameters:
            self.offsets[parameter] = at
            whole[at : at + parameter.numel()] = parameter.detach().flatten()
            at += parameter.numel()
        self.flat = whole if dtype == whole.dtype else whole.to(dtype)
        self.low = cut.group.rank * (len(whole) // cut.group.size)  # where master begins in flat
        own = whole[self.low : self.low + len(whole) // cut.group.size]
        same = self.flat.dtype == whole.dtype
        master_memory = memory if same else master_memory
        self.memory, self.master_memory = memory or InMemory(), master_memory or InMemory()
        self._gradient_memory = gradient_memory
        self.master = _placed(own, master_memory)
        self.shard = self.master if same else _placed(own.to(dtype), memory)
        if not same:
            pool.empty(whole)
        for parameter, offset in self.offsets.items():
            parameter.data = self.flat[offset : offset + parameter.numel()].view(parameter.shape)
        self.whole = True
        self._gather: Any = None  # the Work under way
        self.gradient: Tensor | None = None  # like flat, in master's type, while backwards fill it
        self.written: set[Tensor] = set()  # parameters whose gradients a backward that counts brought
        self._reducing: tuple[Any, Tensor, Tensor] | None = None  # Work, whole, part
        self._reduced: Tensor | None = None  # the parts of the backwards since, until add_copies() takes their sum
        self.final = False  # the step's last gradients are among those that are being reduced
        self._adding: tuple[Any, Tensor] | None = None  # Work, the sum over copies
        self._spare: list[Tensor] = []  # memory of gradients that are done with, for the next ones
        if cut.module is not None:
            self.free()

    @property
    def gradient_nbytes(self) -> int:
        """Of the whole gradient."""
        return self.flat.numel() * self.master.itemsize

    # Parameters.

    def start(self) -> None:
        """The parameters are on their way."""
        if self.whole or self._gather is not None:
            return
        self.memory.prefetch(self.shard)
        if self.group.size == 1:
            self._gather = _Copying(self.flat, self.shard, self._pool)
        else:
            self._pool.fill(self.flat)
            self._gather = self.group.all_gather(self.flat, self.shard, async_op=True)

    def finish(self) -> None:
        """The parameters are there, if they were started."""
        if self._gather is not None:
            self._gather.wait()
            self._gather = None
            self.whole = True
            self.memory.release(self.shard)

    def free(self) -> None:
        """The parameters take no memory."""
        if self._gather is not None:
            if self.group.size > 1:
                self._gather.wait()
            self._gather = None
            self.memory.release(self.shard)
        self.whole = False
        self._pool.empty(self.flat)

    @torch.no_grad()
    def publish(self) -> None:
        """shard has master's values; parameters that stay whole are on their way, others free."""
        if self.shard is not self.master:
            self.shard.copy_(self.master)
            self.memory.release(self.shard)
        self.master_memory.release(self.master)
        if self.cut.module is not None:
            self.free()
        else:
            self.whole = False
            self.start()

    # Gradients.

    @torch.no_grad()
    def take(self, parameter: Tensor, counts: bool) -> bool:
        """Adds a parameter's gradient. Whether every parameter has now brought one that counts."""
        assert parameter.grad is not None
        if self.gradient is None:
            self.gradient = self._zeros()
        offset = self.offsets[parameter]
        self.gradient[offset : offset + parameter.numel()] += parameter.grad.flatten()
        parameter.grad = None
        if counts:
            self.written.add(parameter)
        return counts and len(self.written) == len(self.offsets)

    def _zeros(self) -> Tensor:
        return self._pool.zeros(self.flat.shape, self.master.dtype, self.flat.device)

    @property
    def reached(self) -> bool:
        """Whether a gradient was reduced, or is being, since the last deliver()."""
        return any(each is not None for each in (self._reducing, self._reduced, self._adding))

    def reduce(self, op: str) -> None:
        """Begins to reduce what backwards brought (0 where they brought nothing), after what was begun before."""
        self.drain()
        self.written.clear()
        whole, self.gradient = self.gradient, None
        if whole is None:
            whole = self._zeros()
        if self.group.size == 1 and self._gradient_memory is None:
            self._reducing = (None, whole, whole)
            return
        part = self._part(whole.device)
        if self.group.size == 1:
            part.copy_(whole)
            self._pool.empty(whole)
            self._reducing = (None, part, part)
            return
        self._reducing = (self.group.reduce_scatter(part, whole, op, async_op=True, **self._options), whole, part)

    def _part(self, device: torch.device) -> Tensor:
        if self._spare:
            return self._spare.pop()
        if self._gradient_memory is not None:
            return self._gradient_memory.zeros(self.master.shape, self.master.dtype)
        return torch.empty(self.master.shape, dtype=self.master.dtype, device=device)

    def _put_away(self, part: Tensor) -> None:
        if self._gradient_memory is not None:
            self._gradient_memory.release(part)

    def drain(self) -> None:
        """What is being reduced is this rank's, and the whole gradient's memory free."""
        if self._reducing is None:
            return
        work, whole, part = self._reducing
        if work is not None:
            work.wait()
            self._pool.empty(whole)
        if self._reduced is None:
            self._reduced = part
        else:
            self._reduced.add_(part)
            if self._gradient_memory is not None:
                self._put_away(part)
                self._spare.append(part)
        self._put_away(self._reduced)
        self._reducing = None

    def add_copies(self, op: str) -> None:
        """Begins to add up what is reduced over the ranks that keep the same part."""
        self.final = False
        part, self._reduced = self._reduced, None
        if part is None:
            return
        self.deliver()
        copies = self.cut.copies
        work = None
        if copies is not None and copies.size > 1:
            work = copies.all_reduce(part, op, async_op=True, **self._options)
        self._adding = (work, part)

    def clear(self) -> None:
        """master has no gradient; the next one takes the memory of this one, which nobody else may still need."""
        gradient, self.master.grad = self.master.grad, None
        if gradient is None:
            return
        if self.group.size == 1 and self._gradient_memory is None:
            self._pool.empty(gradient)  # a whole one
        else:
            self._spare.append(gradient)

    def deliver(self) -> None:
        """master.grad has the sum that was begun, added to what was there."""
        if self._adding is None:
            return
        work, part = self._adding
        if work is not None:
            work.wait()
        self.master.grad = part if self.master.grad is None else self.master.grad.add_(part)
        self._put_away(self.master.grad)
        self._adding = None
