"""ZeRO: parameters, gradients and what an optimizer keeps lie cut over the ranks; modules are gathered ahead of use.

    sharded = ShardedModules(model.blocks, group)             # before any optimizer is made
    optimizer = torch.optim.AdamW(sharded.shards())
    for batch in batches:
        loss(batch).backward()
        sharded.wait()                                        # every shard's .grad is the gradient summed over ranks
        optimizer.step()
        sharded.publish()                                     # what is used next has the new values
        optimizer.zero_grad()

The first step learns in which order the modules run (trace.py). From then on a module that begins to compute starts the
gather of the next `depth` ones. Gradients are reduce-scattered as soon as a module has all of its own. A Cut says more
of each module: which parameters share a flat tensor, ZeRO's lower stages, and hybrid sharding. Shards may lie in a file
(ShardMemory): a gather then reads it, and it is told one module earlier. Source: Rajbhandari et al., ZeRO,
arXiv:1910.02054, and ZeRO-Infinity, arXiv:2104.07857; Zhao et al., PyTorch FSDP, arXiv:2304.11277.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pycomm import devices
from pycomm.errors import InvalidArgument
from pycomm.overlap.cut import Cut, ShardGroup, ShardMemory, Unit
from pycomm.overlap.layout import require_alike, require_leaves
from pycomm.overlap.pool import Pool
from pycomm.overlap.trace import Phase, Trace

IN_FLIGHT = 1  # of the largest flat: whole gradients that are being reduced while the next one is filled, in bytes


def in_backward() -> bool:
    """Whether the code that asks runs inside a backward: a forward then runs a second time, to recompute."""
    return torch._C._current_graph_task_id() != -1


class ShardedModules:
    """Owns the parameters of some modules; every rank keeps 1/size of each. Not thread safe.

    A module is gathered as a whole, so give the blocks of a model rather than its layers; parameters of other modules
    are left alone. Between forward and backward nothing may write into a module's parameters, and reading them (to
    initialise or save) goes through whole(). All ranks run the same modules in one order, forward and backward."""

    def __init__(
        self,
        modules: Sequence[nn.Module | Cut],
        group: ShardGroup | None = None,
        *,
        depth: int = 1,
        op: str = "sum",
        dtype: torch.dtype | None = None,
        memory: ShardMemory | None = None,
        master_memory: ShardMemory | None = None,
        gradient_memory: ShardMemory | None = None,
        before_cut: Callable[[Tensor], object] | None = None,
    ) -> None:
        """modules: each is cut over group as Cut(its parameters, group, module) says, or a Cut of your own. Every rank
        of a Cut's group gives equal ones with equal values, in one order; rank r keeps the r-th part of each.

        depth: modules gathered ahead of the one that computes; 0 gathers each when it is needed. op: "sum" or "avg" of
        gradients. dtype: what the parameters become (bf16, say), while shards(), the optimizer's, keep the type that
        they had, in which gradients add up too; None: that type.
        memory: where shards lie (None: ordinary memory; of CPU tensors alone); master_memory: where shards() lie if
        they are of another type; gradient_memory: where their reduced gradients lie, which are released as soon as they
        are there.
        before_cut: called with each parameter just before it is cut: one that fills it there has no more than one Cut
        whole at a time.
        Raises InvalidArgument where modules share parameters, have none, or differ between ranks."""
        if depth < 0:
            raise InvalidArgument(f"depth is {depth}; give 0 (nothing ahead) or more")
        if op not in ("sum", "avg"):
            raise InvalidArgument(f"op is {op!r}; gradients are added up by 'sum' or 'avg'")
        cuts = [_cut(each, group) for each in modules]
        for index, cut in enumerate(cuts):
            cut.check(index)
        everything = [p for cut in cuts for p in cut.parameters]
        require_leaves(everything)
        if (memory or master_memory or gradient_memory) is not None and everything and devices.on_device(everything[0]):
            raise InvalidArgument(
                f"memory= is of the host, and the parameters are on {everything[0].device}, where their shards have to "
                "lie; leave it out"
            )
        self._depth, self._op = depth, op
        self._require_alike(cuts, f"op {op}, depth {depth}, type {dtype}")
        self._units: list[Unit] = []
        # As many as are whole at a time: flats, gradients on their way, and the one that is filled.
        pool = Pool((depth + 1 + IN_FLIGHT + 1) * max((cut.nbytes for cut in cuts), default=0))
        for cut in cuts:
            for parameter in cut.parameters if before_cut is not None else ():
                before_cut(parameter)  # type: ignore[misc]
            of_flat = dtype or cut.parameters[0].dtype
            self._units.append(Unit(cut, of_flat, memory, master_memory, gradient_memory, pool))
        self._of = {p: unit for unit in self._units for p in unit.offsets}
        self._modules: dict[nn.Module, list[Unit]] = {}
        for unit in self._units:
            if unit.cut.module is not None:
                self._modules.setdefault(unit.cut.module, []).append(unit)
        self._trace: Trace[nn.Module] = Trace()
        self._counts = True
        self._in_flight: list[Unit] = []
        self._most_in_flight = IN_FLIGHT * max((unit.gradient_nbytes for unit in self._units), default=0)
        self._handles: list[Any] = []
        for module in self._modules:
            self._handles.append(module.register_forward_pre_hook(lambda m, _: self._before_forward(m)))
            self._handles.append(module.register_forward_hook(lambda m, _, output: self._after_forward(m, output)))
        for p in self._of:
            self._handles.append(p.register_post_accumulate_grad_hook(self._take))  # type: ignore[no-untyped-call]

    @staticmethod
    def _require_alike(cuts: list[Cut], settings: str) -> None:
        groups = {id(cut.group): cut.group for cut in cuts}
        for key, group in groups.items():
            if group.size > 1:
                mine = [cut for cut in cuts if id(cut.group) == key]
                parameters = [p for cut in mine for p in cut.parameters]
                require_alike(group, parameters, f"{len(mine)} modules, {settings}")

    @property
    def units(self) -> Sequence[Unit]:
        """What lies where, in the order of modules."""
        return self._units

    def shards(self) -> list[Tensor]:
        """This rank's part of each module, 1-D: what an elementwise optimizer updates. Always the same objects."""
        return [unit.master for unit in self._units]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it, every parameter is there; what is written into them is lost. All ranks together."""
        self.gather()
        try:
            yield
        finally:
            self._free_all()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, backward only adds up the gradients of cuts that reduce in the last one; those that reduce in each
        do so here as well, since keeping them whole is what they avoid."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before

    def end_backward(self) -> None:
        """To be called after each backward where several come before wait(): reduces what was brought of a cut that has
        not all of its gradients, and frees what is not used next."""
        for unit in self._units:
            if unit.cut.reduce == "each" and unit.written:
                self._reduce(unit)
        self.free()

    def free(self) -> None:
        """Frees the modules that are not used next. Nothing computes with them now."""
        for module, units in self._modules.items():
            if not self._is_next(module):
                for unit in units:
                    unit.free()

    def _is_next(self, module: nn.Module) -> bool:
        return module in self._trace.upcoming(max(1, self._depth))

    def wait(self) -> None:
        """Returns when every gradient is reduced and in its shard's .grad, added to what was there; to be called after
        the backwards of a step. A parameter that they did not reach has gradient 0. Raises what collectives raise."""
        self.end_backward()
        for unit in self._units:
            if unit.gradient is not None or not unit.reached:
                self._reduce(unit)
        for unit in self._units:
            unit.drain()
        self._in_flight.clear()
        for unit in self._units:
            unit.add_copies(self._op)
        for unit in self._units:
            unit.deliver()
        self._free_all()
        self._trace.restart()

    def publish(self) -> None:
        """Gives the parameters the shards' values: to be called after each update. All ranks together."""
        for unit in self._units:
            unit.publish()
        for unit in self._units:
            unit.finish()

    def gather(self) -> None:
        """Every parameter is there: to save it, or to go on without sharding. All ranks together."""
        for unit in self._units:
            unit.start()
        for unit in self._units:
            unit.finish()

    def close(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _free_all(self) -> None:
        for units in self._modules.values():
            for unit in units:
                unit.free()

    # Parameters.

    def _before_forward(self, module: nn.Module) -> None:
        self._use(module, "backward" if in_backward() else "forward")

    def _after_forward(self, module: nn.Module, output: Any) -> None:
        if in_backward():
            return
        if not (torch.is_grad_enabled() and self._is_next(module)):
            for unit in self._modules[module]:
                unit.free()
        for each in tree_leaves(output):
            if isinstance(each, Tensor) and each.requires_grad:
                each.register_hook(lambda _: self._use(module, "backward"))  # type: ignore[no-untyped-call]

    def _use(self, module: nn.Module, phase: Phase) -> None:
        """The module is there; the next ones are on their way, and one more is told to its memory."""
        for unit in self._modules[module]:
            unit.start()
        if phase == "forward" and not torch.is_grad_enabled():
            ahead = self._trace.after_forward(module, self._depth + 1)
        else:
            ahead = self._trace.use(module, phase, self._depth + 1)
        for at, other in enumerate(ahead):
            for unit in self._modules[other]:
                if at < self._depth:
                    unit.start()
                else:
                    unit.memory.prefetch(unit.shard)
        for unit in self._modules[module]:
            unit.finish()

    # Gradients.

    def _take(self, parameter: Tensor) -> None:
        if parameter.grad is None:  # put off (WeightGradients): it comes later
            return
        unit = self._of[parameter]
        counts = unit.cut.reduce == "each" or (unit.cut.reduce == "last" and self._counts)
        if unit.take(parameter, counts):
            unit.final = self._counts
            self._reduce(unit)
            module = unit.cut.module
            if module is not None and not self._is_next(module):
                unit.free()  # who read it has given its gradient

    def _reduce(self, unit: Unit) -> None:
        unit.reduce(self._op)
        if unit in self._in_flight:
            self._in_flight.remove(unit)
        self._in_flight.append(unit)
        while sum(each.gradient_nbytes for each in self._in_flight) > self._most_in_flight:
            oldest = self._in_flight.pop(0)
            oldest.drain()
            if oldest.final:
                oldest.add_copies(self._op)


def _cut(module: nn.Module | Cut, group: ShardGroup | None) -> Cut:
    if isinstance(module, Cut):
        return module
    if group is None:
        raise InvalidArgument("modules are cut over a group: give one, or a Cut of each")
    return Cut(list(module.parameters()), group, module)
