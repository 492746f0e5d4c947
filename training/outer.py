"""Workers that train alone for some steps and then exchange how far each has come: local SGD, DiLoCo, streaming DiLoCo.

    every `every` steps, of each fragment of the model:
        delta     = mean over workers of (shared - own)         the outer gradient, all_reduced with wire.outer
        shared   <- outer SGD step with delta                   lr, Nesterov momentum; `delay` steps later
        own      <- mixing * own + (1 - mixing) * shared

local_sgd          the mean of the workers' parameters: lr 1, no momentum, one fragment, no delay, no mixing
diloco             lr and momentum, one fragment, no delay, no mixing
streaming_diloco   fragments of layers take turns, and each exchange has `delay` steps of computation to cross

AdamW's moments stay each worker's own. The last step of a run ends with the mean of what was not exchanged in it: a run
leaves one model.

Sources: Stich, Local SGD converges fast, arXiv:1805.09767; McMahan et al., arXiv:1602.05629; Douillard et al., DiLoCo,
arXiv:2311.08105; Douillard et al., Streaming DiLoCo, arXiv:2501.18512 (algorithm 2; strided fragments)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from training.config import Config
from training.exchange import Exchange
from training.mesh import Mesh
from training.optimizer import MOMENTS, PARAMETERS, Optimizer
from training.synchronise import Synchronous

_SHARED = "shared_parameters"
_MOMENTUM = "outer_momentum"
_DELTA = "outer_delta"  # of exchanges under way


class Outer(Synchronous):
    """The three methods. All ranks construct and call it together."""

    def __init__(self, optimizer: Optimizer, mesh: Mesh, config: Config) -> None:
        super().__init__()
        sync = config.sync
        streams = sync.method == "streaming_diloco"
        plain = sync.method == "local_sgd"
        self._optimizer, self._every, self._last = optimizer, sync.every, config.train.steps
        self._lr, self._momentum = (1.0, 0.0) if plain else (sync.outer_lr, sync.outer_momentum)
        self._n_fragments = sync.fragments if streams else 1
        self._delay, self._mixing = (sync.delay, sync.mixing) if streams else (0, 0.0)
        self._own = optimizer.masters
        self._shared = optimizer.add_state(_SHARED)
        for name, shared in self._shared.items():
            shared.copy_(self._own[name])
        self._velocity = optimizer.add_state(_MOMENTUM) if self._momentum else {}
        optimizer.release()
        members: list[list[str]] = [[] for _ in range(self._n_fragments)]
        for name in self._own:
            members[fragment_of(name, self._n_fragments)].append(name)
        feeds_back = config.wire.error_feedback
        self._exchanges = [Exchange(optimizer, mesh, names, config.layout.zero > 0, feeds_back) for names in members]
        self._due: dict[int, int] = {}  # by fragment under way, the step that ends with its outer step
        self._expected: dict[int, int] | None = None
        self.files = {PARAMETERS: _SHARED, **({_MOMENTUM: _MOMENTUM} if self._momentum else {})}
        self.worker_files = {kind: kind for kind in (PARAMETERS, *MOMENTS)}

    @property
    def residuals(self) -> dict[str, Tensor]:
        return {f"outer {name}": lost for each in self._exchanges for name, lost in each.residuals.items()}

    def meets(self, step: int) -> bool:
        return step % self._every == 0 or step == self._last

    def begins(self, step: int) -> list[int]:
        """The fragments whose exchange begins with this step's end: they take turns, evenly spread."""
        n = self._n_fragments
        return [each for each in range(n) if (step - each * self._every // n) % self._every == 0]

    @torch.no_grad()
    def updated(self, step: int) -> None:
        last = step == self._last
        ended = [fragment for fragment, due in self._due.items() if due == step or last]
        for fragment in ended:
            self._outer_step(fragment)
        began = [] if last and self._delay else self.begins(step)
        for fragment in began:
            self._exchanges[fragment].begin(self._difference)
            self._due[fragment] = step + self._delay
        for fragment in began if not self._delay else ():
            self._outer_step(fragment)
        if last:
            self._average([fragment for fragment in range(self._n_fragments) if fragment not in began])
        if ended or began or last:
            self._optimizer.publish()
            self._optimizer.release()

    def _difference(self, name: str, into: Tensor) -> None:
        torch.sub(self._shared[name], self._own[name], out=into)

    def _outer_step(self, fragment: int) -> None:
        del self._due[fragment]
        for name, delta in self._exchanges[fragment].wait().items():
            shared = self._shared[name]
            if self._momentum:
                velocity = self._velocity[name].mul_(self._momentum).add_(delta)
                shared.sub_(delta.add(velocity, alpha=self._momentum), alpha=self._lr)
            else:
                shared.sub_(delta, alpha=self._lr)
            if self._mixing:
                self._own[name].mul_(self._mixing).add_(shared, alpha=1 - self._mixing)
            else:
                self._own[name].copy_(shared)

    def _average(self, fragments: list[int]) -> None:
        for fragment in fragments:
            self._exchanges[fragment].begin(self._difference)
        for fragment in fragments:
            for name, delta in self._exchanges[fragment].wait().items():
                self._own[name].copy_(self._shared[name].sub_(delta))

    @contextmanager
    def shared_parameters(self) -> Iterator[None]:
        """Those of the last outer step of each fragment."""
        own = {name: each.clone() for name, each in self._own.items()}
        self._take(self._shared)
        try:
            yield
        finally:
            self._take(own)

    @torch.no_grad()
    def _take(self, values: dict[str, Tensor]) -> None:
        for name, own in self._own.items():
            own.copy_(values[name])
        self._optimizer.publish()

    # Checkpoints.

    def pack(self) -> dict[str, Any]:
        if self._due:
            self._room()
            for name, value in self._deltas(self._due).items():
                self._delta[name].copy_(value)
        return {"fragments": self._n_fragments, "due": {str(each): due for each, due in self._due.items()}}

    def _deltas(self, fragments: dict[int, int]) -> dict[str, Tensor]:
        return {name: value for each in fragments for name, value in self._exchanges[each].wait().items()}

    def _room(self) -> None:
        self._delta = self._optimizer.add_state(_DELTA)
        self.files[_DELTA] = _DELTA

    def release(self) -> None:
        if self.files.pop(_DELTA, None):
            self._delta = {}
            self._optimizer.drop_state(_DELTA)

    def expect(self, packed: dict[str, Any]) -> None:
        self._due = {}
        if packed.get("fragments") == self._n_fragments and packed["due"] and self._delay:
            self._room()
            self._due = {int(each): due for each, due in packed["due"].items()}

    def unpack(self) -> None:
        for name, value in self._deltas(self._due).items():
            value.copy_(self._delta[name])


def fragment_of(name: str, n_fragments: int) -> int:
    """Of a parameter: layers in turn (strided), the embedding with the first fragment, what follows with the last."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) % n_fragments
    return 0 if name.startswith("embedding") else n_fragments - 1
