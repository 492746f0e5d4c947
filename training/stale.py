"""Gradients that are applied some steps late, so that their exchange between workers has that long to cross.

    step t    differentiates parameters that have every worker's gradients up to step t - staleness - 1
              begins the exchange of its own gradients
              updates with the mean over workers of step t - staleness, the same on all ranks

So no worker is ever more than `staleness` steps ahead of another, and all have the same bits. The first `staleness`
steps of a run update nothing, and the gradients of its last ones are not applied.

Sources: Ho et al., Stale synchronous parallel, NIPS 2013 (the bound); Li et al., Pipe-SGD, arXiv:1811.03619 (the mean
of a fixed number of steps ago, by all_reduce)."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from training.config import Config
from training.exchange import Exchange
from training.mesh import Mesh
from training.optimizer import Optimizer
from training.synchronise import Synchronous

_MEET_EVERY = 50  # steps


class Stale(Synchronous):
    """All ranks construct and call it together."""

    def __init__(self, optimizer: Optimizer, mesh: Mesh, config: Config) -> None:
        super().__init__()
        self._optimizer, self._staleness = optimizer, config.sync.staleness
        names, zero = list(optimizer.masters), config.layout.zero > 0
        feeds_back = config.wire.error_feedback
        self._slots = [Exchange(optimizer, mesh, names, zero, feeds_back) for _ in range(self._staleness + 1)]
        self._under_way: deque[int] = deque()  # slots, in the order of their steps
        self._state: dict[int, dict[str, Tensor]] = {}

    @property
    def residuals(self) -> dict[str, Tensor]:
        return {f"{i} {name}": lost for i, each in enumerate(self._slots) for name, lost in each.residuals.items()}

    def meets(self, step: int) -> bool:
        return step % _MEET_EVERY == 0  # oftener would make workers wait for each other in the very step

    def reduce(self, step: int) -> bool:
        gradients = self._optimizer.gradients()
        slot = step % len(self._slots)
        self._slots[slot].begin(lambda name, into: into.copy_(gradients[name]))
        self._under_way.append(slot)
        if len(self._under_way) <= self._staleness:
            return False
        for name, mean in self._slots[self._under_way.popleft()].wait().items():
            gradients[name].copy_(mean)
        return True

    # Checkpoints.

    def pack(self) -> dict[str, Any]:
        self._room(self._under_way)
        with torch.no_grad():
            for slot, state in self._state.items():
                for name, mean in self._slots[slot].wait().items():
                    state[name].copy_(mean)
        return {"staleness": self._staleness, "under_way": list(self._under_way)}

    def _room(self, slots: deque[int]) -> None:
        for slot in slots:
            kind = f"gradients_{slot}"
            self._state[slot] = self._optimizer.add_state(kind)
            self.files[kind] = kind

    def release(self) -> None:
        for slot in self._state:
            self._optimizer.drop_state(self.files.pop(f"gradients_{slot}"))
        self._state = {}

    def expect(self, packed: dict[str, Any]) -> None:
        self._under_way.clear()
        if packed.get("staleness") == self._staleness:
            self._under_way.extend(packed["under_way"])
            self._room(self._under_way)

    def unpack(self) -> None:
        for slot, state in self._state.items():
            for name, value in self._slots[slot].values.items():
                value.copy_(state[name])
