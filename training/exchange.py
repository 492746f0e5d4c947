"""An exchange between workers: the mean over them of a set of tensors, under way while its ranks compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from training.mesh import Mesh
from training.metered import SLOW_S, MeteredGroup
from training.optimizer import Optimizer


class Exchange:
    """Of some of this rank's parameters. All ranks make it, and begin it, together; one is under way at a time."""

    def __init__(self, optimizer: Optimizer, mesh: Mesh, names: list[str], zero: bool, error_feedback: bool) -> None:
        """names: of optimizer.masters. zero: whether ranks of a worker have parts of parameters, not copies."""
        self._wire = mesh.wire["outer"]
        self.values: dict[str, Tensor] = {}  # fp32, like the masters: given to begin(), the means after wait()
        self.residuals: dict[str, Tensor] = {}  # what coding lost on this rank, to be added in the next exchange
        self._works: list[Any] = []
        self._flats: list[tuple[MeteredGroup, Tensor, Tensor | None]] = []
        masters, of_group = optimizer.masters, dict[int, tuple[MeteredGroup, list[str]]]()
        for name in names:
            # Where a worker's ranks hold copies, all of them take part: the bytes cross hosts once.
            group = mesh.outer if zero else mesh.all_holders(optimizer.specs[name].axis)
            of_group.setdefault(id(group), (group, []))[1].append(name)
        for group, members in of_group.values():
            shapes = {name: masters[name].shape for name in members}
            flat = torch.zeros(sum(shape.numel() for shape in shapes.values()), device=masters[members[0]].device)
            residual = torch.zeros_like(flat) if self._wire is not None and error_feedback else None
            self._flats.append((group, flat, residual))
            self.values.update(_views(flat, shapes))
            if residual is not None:
                self.residuals.update(_views(residual, shapes))

    def begin(self, fill: Callable[[str, Tensor], object]) -> None:
        """fill: writes this worker's value of a name into a tensor."""
        for name, value in self.values.items():
            fill(name, value)
        for group, flat, residual in self._flats:
            if residual is not None:
                flat.add_(residual)
            work = group.all_reduce(
                flat, async_op=True, timeout_s=SLOW_S, wire=self._wire, wire_residual=residual
            )  # the slowest worker may be some steps behind
            self._works.append(work)

    def wait(self) -> dict[str, Tensor]:
        """values, when they are the means over the workers: the same bits on all ranks that hold the same."""
        if self._works:
            for work, (group, flat, _) in zip(self._works, self._flats, strict=True):
                work.wait()
                flat.div_(group.size)
            self._works.clear()
        return self.values


def _views(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
