"""Parameters that know their whole shape: how each is cut over an axis, initialised, gathered and cut again.

A parameter is initialised whole from a generator seeded by the run's seed and the parameter's name, then cut, so every
layout starts from the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.mesh import Axis, Mesh

STD = 0.02  # of the normal init, GPT-2's


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: shape is the whole one, dim the dimension cut over axis, std of its normal init (None: ones).
    within: the dimension of an expert's width, which tp cuts where experts are split (layout.experts_over_tp)."""

    shape: tuple[int, ...]
    std: float | None
    axis: Axis = None
    dim: int = 0
    within: int = 0

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to gains."""
        return len(self.shape) > 1


class ShardedModule(nn.Module):
    """A module that records the ParamSpec of each parameter that it owns in specs."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.specs: dict[str, ParamSpec] = {}

    def new_parameter(self, name: str, spec: ParamSpec) -> nn.Parameter:
        """An uninitialised parameter of this rank's shape, recorded under name."""
        shape = list(spec.shape)
        for dim, n, _ in _cuts(spec, self.mesh):
            shape[dim] //= n
        self.specs[name] = spec
        return nn.Parameter(torch.empty(shape))


def specs_of(model: nn.Module) -> dict[str, ParamSpec]:
    """The spec of every parameter, by the name that model.named_parameters() gives it."""
    found: dict[str, ParamSpec] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, ShardedModule):
            for name, spec in module.specs.items():
                found[f"{prefix}.{name}" if prefix else name] = spec
    return found


def initialise(model: nn.Module, mesh: Mesh, seed: int) -> None:
    """Fills every parameter: the same whole values for each layout. One whole parameter is in memory at a time."""
    fill = filler(model, mesh, seed)
    for name, _ in model.named_parameters():
        fill(name)


def filler(model: nn.Module, mesh: Mesh, seed: int) -> Callable[[str], None]:
    """initialise() of the parameter of a name. Until then a parameter's memory is reserved, but not touched."""
    specs, parameters = specs_of(model), dict(model.named_parameters())

    @torch.no_grad()
    def fill(name: str) -> None:
        spec, parameter = specs[name], parameters[name]
        if spec.std is None:
            parameter.fill_(1.0)
            return
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        parameter.copy_(shard(torch.randn(spec.shape, generator=generator) * spec.std, spec, mesh))

    return fill


def shard(whole: Tensor, spec: ParamSpec, mesh: Mesh) -> Tensor:
    """This rank's piece of a whole parameter, as a view."""
    for dim, n, index in _cuts(spec, mesh):
        length = whole.shape[dim] // n
        whole = whole.narrow(dim, index * length, length)
    return whole


def _cuts(spec: ParamSpec, mesh: Mesh) -> list[tuple[int, int, int]]:
    """(dimension, number of parts, which of them is this rank's) of each cut; ranks count the last one up first."""
    group = mesh.shards(spec.axis)
    if group is None:
        return []
    if spec.axis == "ep" and mesh.layout.experts_over_tp == "split":
        n = mesh.tp.size
        return [(spec.dim, group.size // n, group.rank // n), (spec.within, n, group.rank % n)]
    return [(spec.dim, group.size, group.rank)]


def gather_to_leader(piece: Tensor, spec: ParamSpec, mesh: Mesh) -> Tensor | None:
    """The whole parameter on the first rank of its pipeline stage (rank 0 of the world without a pipeline), None
    elsewhere. Only the ranks that share pieces with that rank talk."""
    if not mesh.with_leader(spec.axis):
        return None
    group = mesh.shards(spec.axis)
    if group is None or group.size == 1:
        return piece
    pieces = piece.new_empty((group.size, *piece.shape)) if group.rank == 0 else None
    group.gather(None if pieces is None else pieces.flatten(0, 1), piece.contiguous(), 0)
    if pieces is None:
        return None
    joined = list(pieces.unbind(0))
    for dim, n, _ in reversed(_cuts(spec, mesh)):
        joined = [torch.cat(joined[first : first + n], dim) for first in range(0, len(joined), n)]
    return joined[0]
