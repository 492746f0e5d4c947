"""ZeRO: optimizer state, gradients and parameters cut over the ranks that would hold copies of them.

    zero   each rank keeps 1/n of     whole on each rank              gradients cross as
    1      masters, moments           parameters, gradients           one reduce_scatter a step
    2      .. and gradients           parameters                      a reduce_scatter a micro-batch, block by block
    3      .. and parameters          a block while it computes       the same; blocks are gathered one ahead

The unit is the parameters of one block with the same gradient group and decay, one after another in a flat tensor
padded to a multiple of the ranks. Embedding, last norm and head are kept whole in every stage, and a table that two
pipeline stages share is reduced once a step, so that neither waits for the other's backward. Hybrid sharding cuts over
n < all ranks (those of a host, neighbours in the group) and adds gradients up over the others.

A gathered block lies in storage that is emptied when it is not needed, so views of it (parameters, what autograd saved)
cost nothing meanwhile. Sources: Rajbhandari et al., arXiv:1910.02054; Zhao et al., arXiv:2304.11277; hybrid: MiCS,
arXiv:2205.00119."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from training.mesh import Mesh, MeteredGroup
from training.offload import Allocate
from training.recompute import in_backward
from training.replicated import by_gradient_group
from training.sharding import ParamSpec


@dataclass(eq=False)
class _Unit:
    block: str  # its prefix, "" for what is in no block
    group: MeteredGroup  # that the flat is cut over
    copies: MeteredGroup  # that holds the same part
    names: list[str]
    parameters: list[nn.Parameter]
    offsets: list[int]
    decays: bool
    flat: Tensor  # of the model's dtype; the parameters are views of it
    master: Tensor  # fp32 [len(flat) / n], this rank's part; its .grad is the summed gradient
    shard: Tensor  # of the model's dtype: master, or what it rounds to
    eager: bool  # whether each backward's gradients are reduced at once
    freed: bool = False
    gather: Any = None  # the Work under way
    gradient: Tensor | None = None  # fp32, like flat, while micro-batches or a backward fill it
    written: set[int] = field(default_factory=set)  # offsets that this backward filled
    reducing: tuple[Any, Tensor, Tensor] | None = None  # Work, whole, part

    @property
    def range(self) -> tuple[int, int]:
        each = len(self.master)
        return self.group.rank * each, (self.group.rank + 1) * each


class Sharded:
    """With ZeRO stage 1, 2 or 3. Made after the model was initialised."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        specs: Mapping[str, ParamSpec],
        mesh: Mesh,
        dtype: torch.dtype,
        stage: int,
        n_ranks: int,
        allocate: Allocate,
    ) -> None:
        """n_ranks: that a flat is cut over, 0 for all of the gradient's group."""
        self._wire = mesh.wire["dp"]
        self.residuals: dict[str, Tensor] = {}  # a reduce_scatter does not say what coding lost
        self._units: list[_Unit] = []
        self._of: dict[nn.Parameter, tuple[_Unit, int]] = {}
        for group, names in by_gradient_group(parameters, specs, mesh):
            n = n_ranks or group.size
            shards = group if n == group.size else mesh.subgroup("zero", group, group.rank // n)
            copies = mesh.subgroup("zero", group, group.rank % n)
            together: dict[tuple[str, bool], list[str]] = {}
            for name in names:
                block = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""
                together.setdefault((block, specs[name].decays), []).append(name)
            for (block, decays), members in together.items():
                owned = [parameters[name] for name in members]
                eager = stage > 1 and not (mesh.ties and group is mesh.tied)
                self._units.append(_cut(block, decays, members, owned, shards, copies, dtype, allocate, eager))
        self._hooks: list[Any] = []
        for unit in self._units:
            for parameter, offset in zip(unit.parameters, unit.offsets, strict=True):
                self._of[parameter] = (unit, offset)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._take))  # type: ignore[no-untyped-call]
        self._blocks: dict[str, list[_Unit]] = {}
        if stage == 3:
            self._gather_blocks(model)

    # Parameters (stage 3).

    def _gather_blocks(self, model: nn.Module) -> None:
        for unit in self._units:
            if unit.block:
                self._blocks.setdefault(unit.block, []).append(unit)
        order = sorted(self._blocks, key=lambda block: int(block.split(".")[1]))
        modules = dict(model.named_modules())
        for at, block in enumerate(order):
            before, after = order[:at][-1:], order[at + 1 : at + 2]
            hook = _BlockHooks(self, block, before, after)
            self._hooks += [
                modules[block].register_forward_pre_hook(hook.before_forward),
                modules[block].register_forward_hook(hook.after_forward),
            ]
            self.free(block)

    def use(self, block: str, ahead: list[str]) -> None:
        """The block is there; those ahead are on their way."""
        for each in [block, *ahead]:
            for unit in self._blocks[each]:
                if unit.freed and unit.gather is None:
                    unit.flat.untyped_storage().resize_(unit.flat.numel() * unit.flat.itemsize)
                    unit.gather = _begin_gather(unit)
        for unit in self._blocks[block]:
            if unit.gather is not None:
                unit.gather.wait()
                unit.gather = None
                unit.freed = False

    def free(self, block: str) -> None:
        """The block's storage is empty."""
        for unit in self._blocks[block]:
            _free(unit)

    # Gradients.

    def _take(self, parameter: nn.Parameter) -> None:
        if parameter.grad is None:  # put off (WeightGradients): it comes later
            return
        unit, offset = self._of[parameter]
        if unit.gradient is None:
            unit.gradient = torch.zeros(unit.flat.shape, dtype=torch.float32, device=unit.flat.device)
        unit.gradient[offset : offset + parameter.numel()] += parameter.grad.flatten()
        parameter.grad = None
        unit.written.add(offset)
        if unit.eager and len(unit.written) == len(unit.offsets):
            self._reduce(unit)
            if unit.block in self._blocks:
                _free(unit)  # who read it has given its gradient

    def _reduce(self, unit: _Unit) -> None:
        """Begins to reduce what a backward brought, after what the one before it brought."""
        self._drain(unit)
        unit.written.clear()
        whole, unit.gradient = unit.gradient, None
        assert whole is not None
        part = torch.empty_like(unit.master)
        work = None
        if unit.group.size > 1:
            work = unit.group.reduce_scatter(part, whole, async_op=True, wire=self._wire)
        else:
            part.copy_(whole)
        unit.reducing = (work, whole, part)

    def _drain(self, unit: _Unit) -> None:
        if unit.reducing is not None:
            work, _, part = unit.reducing
            if work is not None:
                work.wait()
            assert unit.master.grad is not None
            unit.master.grad += part
            unit.reducing = None

    @contextmanager
    def syncing(self, last: bool) -> Iterator[None]:
        yield

    def backward_done(self) -> None:
        """After a backward and its weight gradients: what it did not fill wholly is reduced too; blocks are freed."""
        for unit in self._units:
            if unit.eager and unit.written:
                self._reduce(unit)
        for block in self._blocks:
            self.free(block)

    def wait(self) -> None:
        self.backward_done()
        for unit in self._units:
            if not unit.eager:
                if unit.gradient is None:
                    unit.gradient = torch.zeros(unit.flat.shape, dtype=torch.float32, device=unit.flat.device)
                self._reduce(unit)
        for unit in self._units:
            self._drain(unit)
        works = []
        for unit in self._units:
            if unit.copies.size > 1:
                assert unit.master.grad is not None
                works.append(unit.copies.all_reduce(unit.master.grad, async_op=True, wire=self._wire))
        for work in works:
            work.wait()

    def updated(self) -> Iterator[tuple[Tensor, bool]]:
        for unit in self._units:
            yield unit.master, unit.decays

    def sums(self) -> Iterator[tuple[Tensor, int]]:
        for unit in self._units:
            assert unit.master.grad is not None
            yield unit.master.grad, unit.copies.size

    def publish(self) -> None:
        """Gives every rank the updated parameters where it keeps them whole."""
        for block in self._blocks:
            self.free(block)  # what was gathered ahead of an evaluation's last block, say
        works = []
        for unit in self._units:
            if unit.shard is not unit.master:
                unit.shard.copy_(unit.master)
            if unit.block not in self._blocks:
                works.append(_begin_gather(unit))
        for work in works:
            work.wait()

    def clear(self) -> None:
        """Gradients of 0, for the next step."""
        for unit in self._units:
            assert unit.master.grad is not None
            unit.master.grad.zero_()

    # What this rank holds, by name.

    @property
    def masters(self) -> dict[str, Tensor]:
        """This rank's part of each parameter that it has a part of, 1-D."""
        return self.held({unit.master: unit.master for unit in self._units})

    def held(self, of: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
        return {name: of[unit.master][part] for unit in self._units for name, part, _ in _parts(unit)}

    def gradients(self) -> dict[str, Tensor]:
        found = {}
        for unit in self._units:
            assert unit.master.grad is not None
            found.update({name: unit.master.grad[part] for name, part, _ in _parts(unit)})
        return found

    def exchanged(self) -> list[tuple[MeteredGroup, str, int]]:
        return [(unit.group, "reduce_scatter", 4 * unit.flat.numel()) for unit in self._units]

    def pieces(self, of: Mapping[Tensor, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for unit in self._units:
            part = of[unit.master]
            whole = part.new_empty(unit.flat.shape)
            if unit.group.size > 1:
                unit.group.all_gather(whole, part)
            else:
                whole.copy_(part)
            for name, parameter, offset in zip(unit.names, unit.parameters, unit.offsets, strict=True):
                yield name, whole[offset : offset + parameter.numel()].view(parameter.shape)

    def put(self, name: str, piece: Tensor, of: Mapping[Tensor, Tensor]) -> None:
        for unit in self._units:
            for each, part, within in _parts(unit):
                if each == name:
                    of[unit.master][part] = piece.flatten()[within]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _BlockHooks:
    """Around a block's forward, and before its backward."""

    def __init__(self, owner: Sharded, block: str, before: list[str], after: list[str]) -> None:
        self._owner, self._block, self._before, self._after = owner, block, before, after

    def before_forward(self, module: nn.Module, args: Any) -> None:
        self._owner.use(self._block, self._before if in_backward() else self._after)

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if in_backward():
            return
        self._owner.free(self._block)
        for each in output:
            if isinstance(each, Tensor) and each.requires_grad:
                each.register_hook(self._before_backward)

    def _before_backward(self, grad: Tensor) -> None:
        self._owner.use(self._block, self._before)


def _free(unit: _Unit) -> None:
    if unit.gather is not None:
        unit.gather.wait()
        unit.gather = None
    unit.flat.untyped_storage().resize_(0)
    unit.freed = True


def _begin_gather(unit: _Unit) -> Any:
    if unit.group.size > 1:
        return unit.group.all_gather(unit.flat, unit.shard, async_op=True)
    unit.flat.copy_(unit.shard)
    return _Done()


class _Done:
    def wait(self) -> None:
        pass


def _cut(
    block: str,
    decays: bool,
    names: list[str],
    parameters: list[nn.Parameter],
    group: MeteredGroup,
    copies: MeteredGroup,
    dtype: torch.dtype,
    allocate: Allocate,
    eager: bool,
) -> _Unit:
    numel = sum(parameter.numel() for parameter in parameters)
    whole = torch.zeros(numel + -numel % group.size, device=parameters[0].device)
    offsets, at = [], 0
    for parameter in parameters:
        whole[at : at + parameter.numel()] = parameter.detach().flatten()
        offsets.append(at)
        at += parameter.numel()
    each = len(whole) // group.size
    master = allocate(torch.Size([each])).copy_(whole[group.rank * each : (group.rank + 1) * each])
    master.grad = torch.zeros_like(master)
    flat = whole.to(dtype)
    for parameter, offset in zip(parameters, offsets, strict=True):
        parameter.data = flat[offset : offset + parameter.numel()].view(parameter.shape)
    shard = master if dtype == torch.float32 else master.to(dtype)
    return _Unit(block, group, copies, names, parameters, offsets, decays, flat, master, shard, eager)


def _parts(unit: _Unit) -> Iterator[tuple[str, slice, slice]]:
    """(name, the part's place in master, its place in the flattened parameter) of what this rank has."""
    low, high = unit.range
    for name, parameter, offset in zip(unit.names, unit.parameters, unit.offsets, strict=True):
        begin, end = max(low, offset), min(high, offset + parameter.numel())
        if begin < end:
            yield name, slice(begin - low, end - low), slice(begin - offset, end - offset)
