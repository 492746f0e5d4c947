"""ZeRO-3: each module's parameters lie cut over the ranks, are gathered ahead of its use and freed after it.

    sharded = ShardedModules(model.blocks, group)             # before any optimizer is made
    optimizer = torch.optim.AdamW(sharded.shards())
    for batch in batches:
        loss(batch).backward()
        sharded.wait()                                        # every shard's .grad is the gradient summed over ranks
        optimizer.step()
        optimizer.zero_grad()

The first forward learns in which order the modules run. From then on a module that begins to compute starts the gather
of the next `depth` ones, in backward of the ones before it. Gradients are reduce-scattered as soon as a module has all
of its own. Source: Rajbhandari et al., ZeRO, arXiv:1910.02054; Zhao et al., PyTorch FSDP, arXiv:2304.11277.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pycomm.errors import InvalidArgument
from pycomm.overlap.layout import require_alike, require_leaves


class ShardGroup(Protocol):
    """What the sharding needs of a group: pycomm.Group, or anything that wraps one."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_gather(self, output: Tensor, input: Tensor, **options: Any) -> Any: ...
    def reduce_scatter(self, output: Tensor, input: Tensor, op: str = "sum", **options: Any) -> Any: ...


@dataclass(eq=False)
class _Unit:
    """One module. flat: its parameters one after another, padded to a multiple of the ranks; its storage is empty
    while it is not gathered, so that whatever views it (parameters, tensors that autograd saved) costs nothing."""

    index: int
    module: nn.Module
    parameters: list[Tensor]
    flat: Tensor
    shard: nn.Parameter
    gather: Any = None  # the Work under way
    whole: bool = True
    in_backward: bool = False  # a forward that runs now recomputes activations
    missing: int = 0  # gradients of this backward that have not come
    gradient: Tensor | None = None  # like flat, while backward fills it
    reduced: Tensor | None = None  # like shard, while it is being reduced
    reduction: Any = None
    handles: list[Any] = field(default_factory=list)


class ShardedModules:
    """Owns the parameters of some modules; every rank keeps 1/size of each module. Not thread safe.

    A module is gathered as a whole, so give the blocks of a model rather than its layers; parameters of other modules
    are left alone. Between forward and backward nothing may write into a module's parameters, and reading them (to
    initialise or save) goes through whole()."""

    def __init__(self, modules: Sequence[nn.Module], group: ShardGroup, *, depth: int = 1, op: str = "sum") -> None:
        """depth: modules gathered ahead of the one that computes; 0 gathers each when it is needed. op: "sum" or "avg"
        of gradients. Every rank gives equal modules with equal values; rank r keeps the r-th part of each.
        Raises InvalidArgument where modules share parameters, have none, or differ between ranks."""
        if depth < 0:
            raise InvalidArgument(f"depth is {depth}; give 0 (nothing ahead) or more")
        if op not in ("sum", "avg"):
            raise InvalidArgument(f"op is {op!r}; gradients are added up by 'sum' or 'avg'")
        self._group, self._depth, self._op = group, depth, op
        owned: list[list[Tensor]] = [list(module.parameters()) for module in modules]
        for index, parameters in enumerate(owned):
            kinds = {(p.dtype, p.device) for p in parameters}
            if len(kinds) != 1:
                what = "no parameters" if not parameters else f"parameters of {len(kinds)} types or devices"
                raise InvalidArgument(f"module {index} has {what}; give modules whose parameters are alike")
        everything = [p for parameters in owned for p in parameters]
        require_leaves(everything)
        if group.size > 1:
            require_alike(group, everything, f"{len(owned)} modules, op {op}, depth {depth}")
        self._order: list[_Unit] = []  # as forward ran them
        self._learning = True
        self._units = [self._cut(index, m, p) for index, (m, p) in enumerate(zip(modules, owned, strict=True))]
        self._of = {p: unit for unit in self._units for p in unit.parameters}
        for unit in self._units:
            self._hook(unit)

    def shards(self) -> list[nn.Parameter]:
        """This rank's part of each module, 1-D: what an elementwise optimizer updates. Always the same objects."""
        return [unit.shard for unit in self._units]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it, every parameter is there; what is written into them is lost. All ranks together."""
        for unit in self._units:
            self._start(unit)
        for unit in self._units:
            self._finish(unit)
        try:
            yield
        finally:
            for unit in self._units:
                self._free(unit)

    def wait(self) -> None:
        """Returns when every gradient is reduced and in its shard's .grad, added to what was there; to be called once
        after each backward. A parameter that backward did not reach has gradient 0. Raises what collectives raise."""
        for unit in [*reversed(self._order), *(unit for unit in self._units if unit not in self._order)]:
            if unit.missing:  # some parameters were not reached, or all
                self._reduce(unit)
        for unit in self._units:
            self._drain(unit)
            if unit.whole or unit.gather is not None:
                self._finish(unit)
                self._free(unit)
        self._expect()

    def close(self) -> None:
        """Gathers the parameters for good and takes the hooks off."""
        for unit in self._units:
            for handle in unit.handles:
                handle.remove()
            self._start(unit)
        for unit in self._units:
            self._finish(unit)

    def _cut(self, index: int, module: nn.Module, parameters: list[Tensor]) -> _Unit:
        n, size = sum(p.numel() for p in parameters), self._group.size
        flat = torch.zeros(n + -n % size, dtype=parameters[0].dtype, device=parameters[0].device)
        at = 0
        for parameter in parameters:
            view = flat[at : at + parameter.numel()].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            at += parameter.numel()
        each = len(flat) // size
        shard = nn.Parameter(flat[self._group.rank * each : (self._group.rank + 1) * each].clone())
        unit = _Unit(index, module, parameters, flat, shard, missing=len(parameters))
        self._free(unit)
        return unit

    def _hook(self, unit: _Unit) -> None:
        unit.handles = [
            unit.module.register_forward_pre_hook(lambda *_: self._before_forward(unit)),
            unit.module.register_forward_hook(lambda _, __, output: self._after_forward(unit, output)),
            *(p.register_post_accumulate_grad_hook(self._take) for p in unit.parameters),  # type: ignore[no-untyped-call]
        ]

    # Parameters: _start() the gather, _finish() it, _free().

    def _before_forward(self, unit: _Unit) -> None:
        if self._learning and unit not in self._order:
            self._order.append(unit)
        self._use(unit, -1 if unit.in_backward else 1)

    def _after_forward(self, unit: _Unit, output: Any) -> None:
        if unit.in_backward:
            return
        self._free(unit)
        for each in tree_leaves(output):
            if isinstance(each, Tensor) and each.requires_grad:
                each.register_hook(lambda _: self._before_backward(unit))  # type: ignore[no-untyped-call]

    def _before_backward(self, unit: _Unit) -> None:
        self._learning = False
        unit.in_backward = True
        self._use(unit, -1)

    def _use(self, unit: _Unit, direction: int) -> None:
        """The unit is there; the next ones in this direction are on their way."""
        self._start(unit)
        if not self._learning and unit in self._order:
            at = self._order.index(unit)
            for ahead in range(1, self._depth + 1):
                if 0 <= at + direction * ahead < len(self._order):
                    self._start(self._order[at + direction * ahead])
        self._finish(unit)

    def _start(self, unit: _Unit) -> None:
        if unit.whole or unit.gather is not None:
            return
        unit.flat.untyped_storage().resize_(unit.flat.numel() * unit.flat.itemsize)
        if self._group.size == 1:
            unit.flat.copy_(unit.shard.detach())
            unit.whole = True
            return
        unit.gather = self._group.all_gather(unit.flat, unit.shard.detach(), async_op=True)

    def _finish(self, unit: _Unit) -> None:
        if unit.gather is not None:
            unit.gather.wait()
            unit.gather = None
            unit.whole = True

    def _free(self, unit: _Unit) -> None:
        unit.whole = False
        unit.flat.untyped_storage().resize_(0)

    # Gradients.

    def _expect(self) -> None:
        for unit in self._units:
            unit.missing = len(unit.parameters)

    def _take(self, parameter: Tensor) -> None:
        if parameter.grad is None:  # put off (WeightGradients): it comes later
            return
        unit = self._of[parameter]
        if unit.missing == 0:
            raise RuntimeError(
                f"a gradient came for module {unit.index}, whose gradients are being reduced already; call wait() "
                "after each backward"
            )
        if unit.gradient is None:
            unit.gradient = torch.zeros_like(unit.flat)
        at = 0
        for other in unit.parameters:
            if other is parameter:
                break
            at += other.numel()
        unit.gradient[at : at + parameter.numel()].view(parameter.shape).copy_(parameter.grad)
        parameter.grad = None
        unit.missing -= 1
        if unit.missing == 0:
            self._free(unit)
            self._reduce(unit)

    def _reduce(self, unit: _Unit) -> None:
        unit.missing = 0
        unit.in_backward = False
        if unit.gradient is None:
            unit.gradient = torch.zeros(unit.flat.shape, dtype=unit.flat.dtype, device=unit.flat.device)
        if self._group.size == 1:
            unit.reduced = unit.gradient
            return
        unit.reduced = torch.empty_like(unit.shard)
        unit.reduction = self._group.reduce_scatter(unit.reduced, unit.gradient, self._op, async_op=True)

    def _drain(self, unit: _Unit) -> None:
        if unit.reduction is not None:
            unit.reduction.wait()
            unit.reduction = None
        unit.gradient = None
        if unit.reduced is not None:
            unit.shard.grad = unit.reduced if unit.shard.grad is None else unit.shard.grad.add_(unit.reduced)
            unit.reduced = None
