"""ZeRO on pycomm.overlap.ShardedModules: which parameters are cut together, over which ranks, and what has which name.

    zero   each rank keeps 1/n of     whole on each rank              gradients cross as
    1      masters, moments           parameters, gradients           one reduce_scatter a step
    2      .. and gradients           parameters                      a reduce_scatter a micro-batch, block by block
    3      .. and parameters          a block while it computes       the same; blocks are gathered one ahead

One flat tensor holds the parameters of one block with the same gradient group and decay. Embedding, last norm and head
are kept whole in every stage, and a table that two pipeline stages share is reduced once a step, so that neither waits
for the other's backward. Hybrid sharding cuts over n < all ranks (those of a host, neighbours in the group) and adds
gradients up over the others. Sources: Rajbhandari et al., arXiv:1910.02054; hybrid: MiCS, arXiv:2205.00119."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pycomm.overlap import Cut, ShardedModules, ShardMemory
from training.mesh import Mesh
from training.metered import MeteredGroup
from training.replicated import by_gradient_group
from training.sharding import ParamSpec


@dataclass(frozen=True)
class _Held:
    """Names of a cut's parameters, and what its own Unit does not know."""

    names: list[str]
    decays: bool
    group: MeteredGroup
    n_copies: int


class Sharded:
    """With ZeRO stage 1, 2 or 3. Made before the model is initialised: fill() does that, block by block."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        specs: Mapping[str, ParamSpec],
        mesh: Mesh,
        dtype: torch.dtype,
        stage: int,
        n_ranks: int,
        memory: ShardMemory | None,
        master_memory: ShardMemory | None,
        gradient_memory: ShardMemory | None,
        fill: Callable[[str], None],
    ) -> None:
        """n_ranks: that a flat is cut over, 0 for all of the gradient's group. memory: of parts in dtype;
        master_memory: of fp32 ones, where dtype is another; gradient_memory: of reduced gradients. fill: initialises
        the parameter of a name."""
        self.residuals: dict[str, Tensor] = {}  # a reduce_scatter does not say what coding lost
        modules = dict(model.named_modules()) if stage == 3 else {}
        cuts: list[Cut] = []
        wire = mesh.wire["dp"]
        self._held: list[_Held] = []
        for group, names in by_gradient_group(parameters, specs, mesh):
            n = n_ranks or group.size
            shards = group if n == group.size else mesh.subgroup("zero", group, group.rank // n)
            copies = mesh.subgroup("zero", group, group.rank % n)
            together: dict[tuple[str, bool], list[str]] = {}
            for name in names:
                block = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""
                together.setdefault((block, specs[name].decays), []).append(name)
            for (block, decays), members in together.items():
                tied = mesh.ties and group is mesh.tied
                reduce = "wait" if tied else "last" if stage == 1 else "each"
                module = modules[block] if block and stage == 3 else None
                cuts.append(Cut([parameters[name] for name in members], shards, module, copies, reduce, wire))
                self._held.append(_Held(members, decays, shards, copies.size))
        names_of = {parameter: name for name, parameter in parameters.items()}
        self._sharded = ShardedModules(
            cuts,
            dtype=dtype,
            memory=memory,
            master_memory=master_memory,
            gradient_memory=gradient_memory,
            before_cut=lambda parameter: fill(names_of[parameter]),
        )
        self._each = list(zip(self._held, self._sharded.units, strict=True))

    @contextmanager
    def syncing(self, last: bool) -> Iterator[None]:
        """Around a backward: gradients add up, and with last (from stage 2 on always) are reduced as they come."""
        with nullcontext() if last else self._sharded.no_sync():
            yield
        self._sharded.free()

    def backward_done(self) -> None:
        """After a backward and its weight gradients."""
        self._sharded.end_backward()

    def wait(self) -> None:
        self._sharded.wait()

    def updated(self) -> Iterator[tuple[Tensor, bool]]:
        """Each tensor that the optimizer updates, and whether it decays."""
        for held, unit in self._each:
            yield unit.master, held.decays

    def sums(self) -> Iterator[tuple[Tensor, int]]:
        """This rank's summed gradients as flat tensors, and how many ranks hold the same."""
        for held, unit in self._each:
            assert unit.master.grad is not None
            yield unit.master.grad, held.n_copies

    def publish(self) -> None:
        """Gives every rank the updated parameters where it keeps them whole."""
        self._sharded.publish()

    def clear(self) -> None:
        """No gradients, for the next step."""
        for _, unit in self._each:
            unit.clear()

    def exchanged(self) -> list[tuple[MeteredGroup, str, int]]:
        """(group, collective, bytes) of each exchange of gradients in a step."""
        return [(held.group, "reduce_scatter", unit.gradient_nbytes) for held, unit in self._each]

    # What this rank holds, by name.

    def _parts(self) -> Iterator[tuple[str, Tensor, slice, slice]]:
        """(name, master, the part's place in master, its place in the flattened parameter) of what this rank has."""
        for held, unit in self._each:
            low, high = unit.low, unit.low + len(unit.master)
            for name, (parameter, offset) in zip(held.names, unit.offsets.items(), strict=True):
                begin, end = max(low, offset), min(high, offset + parameter.numel())
                if begin < end:
                    yield name, unit.master, slice(begin - low, end - low), slice(begin - offset, end - offset)

    @property
    def masters(self) -> dict[str, Tensor]:
        """This rank's part of each parameter that it has a part of, 1-D."""
        return self.held({unit.master: unit.master for _, unit in self._each})

    def held(self, of: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
        """What this rank has of each parameter, by name, of a tensor for each that is updated."""
        return {name: of[master][part] for name, master, part, _ in self._parts()}

    def gradients(self) -> dict[str, Tensor]:
        return {name: master.grad[part] for name, master, part, _ in self._parts() if master.grad is not None}

    def pieces(self, of: Mapping[Tensor, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, this rank's piece as the axes cut it) of a tensor for each that is updated."""
        for held, unit in self._each:
            part = of[unit.master]
            whole = part.new_empty(unit.flat.shape)
            if held.group.size > 1:
                held.group.all_gather(whole, part)
            else:
                whole.copy_(part)
            for name, (parameter, offset) in zip(held.names, unit.offsets.items(), strict=True):
                yield name, whole[offset : offset + parameter.numel()].view(parameter.shape)

    def put(self, name: str, piece: Tensor, of: Mapping[Tensor, Tensor]) -> None:
        """The reverse of pieces(), for one parameter."""
        for each, master, part, within in self._parts():
            if each == name:
                of[master][part].copy_(piece.flatten()[within])

    def close(self) -> None:
        self._sharded.close()
