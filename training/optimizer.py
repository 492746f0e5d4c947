"""AdamW over fp32 masters, which lie whole on each rank (replicated.py) or cut over ranks (zero.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from training.config import Config, OptimizerConfig
from training.mesh import Mesh, MeteredGroup
from training.offload import in_file, in_memory
from training.replicated import Replicated
from training.sharding import ParamSpec, specs_of
from training.zero import Sharded

PARAMETERS = "parameters"
MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, n_steps: int, config: OptimizerConfig) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then a cosine from lr down to lr * min_lr_ratio at n_steps."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, n_steps - config.warmup_steps))
    lowest = config.lr * config.min_lr_ratio
    return lowest + (config.lr - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Optimizer:
    """AdamW over what this rank keeps of a model. Made after the model was initialised."""

    def __init__(self, model: nn.Module, mesh: Mesh, config: Config, dtype: torch.dtype) -> None:
        """dtype: what the model computes in; its parameters are converted here, the masters stay fp32."""
        train, layout = config.train, config.layout
        parameters = dict(model.named_parameters())
        self.specs: dict[str, ParamSpec] = specs_of(model)
        self._config = config.optimizer
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self.untrained = {name: p.detach() for name, p in parameters.items() if not p.requires_grad}
        self._allocate = allocate = in_file(config.offload_dir) if train.offload_optimizer else in_memory
        self._state: Replicated | Sharded
        if layout.zero:
            self._state = Sharded(model, trained, self.specs, mesh, dtype, layout.zero, layout.zero_ranks, allocate)
        else:
            bucket_nbytes = train.bucket_kib * 1024 or None
            self._state = Replicated(
                trained, self.specs, mesh, dtype, bucket_nbytes, mesh.wire["dp"], config.wire.error_feedback, allocate
            )
        updated = list(self._state.updated())
        self._adamw = torch.optim.AdamW(
            [
                {"params": [x for x, decays in updated if decays], "weight_decay": self._config.weight_decay},
                {"params": [x for x, decays in updated if not decays], "weight_decay": 0.0},
            ],
            betas=(self._config.beta1, self._config.beta2),
            eps=self._config.eps,
            fused=True,
        )
        for master, _ in updated:
            state = self._adamw.state[master]
            state["step"] = torch.tensor(0.0)
            state.update({moment: allocate(master.shape) for moment in MOMENTS})

    @property
    def masters(self) -> dict[str, Tensor]:
        """What this rank keeps of each parameter in fp32: all of its piece, or with ZeRO a part of it, 1-D."""
        return {**self._state.masters, **self.untrained}

    def gradients(self) -> dict[str, Tensor]:
        """The summed gradient of masters, after wait()."""
        return self._state.gradients()

    def add_state(self, kind: str) -> dict[str, Tensor]:
        """One more number for each that is updated, 0 at first, which pieces() and put() know by this kind; what this
        rank has of each, as masters."""
        for master, _ in self._state.updated():
            self._adamw.state[master][kind] = self._allocate(master.shape)
        return self._state.held(self._of(kind))

    def drop_state(self, kind: str) -> None:
        for master, _ in self._state.updated():
            del self._adamw.state[master][kind]

    @property
    def residuals(self) -> dict[str, Tensor]:
        """What coding lost of gradients on this rank in the last step, by name; {} without a wire or error feedback."""
        return self._state.residuals

    def syncing(self, last: bool) -> AbstractContextManager[None]:
        """Around a backward: its gradients add up; with last, the step's last ones, they are reduced as they come."""
        return self._state.syncing(last)

    def no_sync(self) -> AbstractContextManager[None]:
        """Within it, backward adds gradients up without reducing them."""
        return self._state.syncing(False)

    def backward_done(self) -> None:
        """To be called after each backward and its weight gradients."""
        self._state.backward_done()

    def wait(self) -> None:
        """Returns when every gradient is summed over its group."""
        self._state.wait()

    def exchanged(self) -> list[tuple[MeteredGroup, str, int]]:
        """(group, collective, bytes) of each exchange of gradients in a step."""
        return self._state.exchanged()

    def norm_squared_share(self) -> float:
        """This rank's share of the squared norm of the whole model's gradient: summed over the world, it is that.

        Ranks that hold the same sums take an equal part of them each."""
        return sum(
            float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2 / copies
            for flat, copies in self._state.sums()
        )

    @torch.no_grad()
    def step(self, lr: float, grad_norm: float) -> None:
        """One update, after scaling the gradients so that their norm, grad_norm, becomes at most clip_norm."""
        clip = self._config.clip_norm
        if clip > 0 and grad_norm > clip:
            for flat, _ in self._state.sums():
                flat.mul_(clip / grad_norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.publish()

    def begin(self) -> None:
        """To be called before a step's first backward."""
        if isinstance(self._state, Sharded):
            self._state.clear()

    @torch.no_grad()
    def publish(self) -> None:
        """Gives the model the masters' values."""
        self._state.publish()

    def pieces(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(name, piece) of every parameter on this rank as the axes cut it: its master for PARAMETERS, or one of
        MOMENTS. Ranks that share pieces together; with ZeRO one unit is whole at a time."""
        yield from self._state.pieces(self._of(kind))
        for name, parameter in self.untrained.items():
            yield name, parameter if kind == PARAMETERS else torch.zeros_like(parameter)

    @torch.no_grad()
    def put(self, kind: str, name: str, piece: Tensor) -> None:
        """The reverse of pieces(), for one parameter; publish() when all are put."""
        if name in self.untrained:
            if kind == PARAMETERS:
                self.untrained[name].copy_(piece)
        else:
            self._state.put(name, piece, self._of(kind))

    def set_steps(self, n_steps: int) -> None:
        """The moments are those after so many updates."""
        for state in self._adamw.state.values():
            state["step"].fill_(n_steps)

    def _of(self, kind: str) -> dict[Tensor, Tensor]:
        return {x: x if kind == PARAMETERS else self._adamw.state[x][kind] for x, _ in self._state.updated()}

    def close(self) -> None:
        self._state.close()
