"""AdamW over fp32 masters, which lie whole on each rank (replicated.py) or cut over ranks (zero.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from training.config import Config, OptimizerConfig
from training.device import DeviceMemory
from training.host_memory import HostMemory
from training.mesh import Mesh
from training.metered import MeteredGroup, on_every_rank
from training.offload import FileMemory
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
    """AdamW over what this rank keeps of a model."""

    def __init__(
        self, model: nn.Module, mesh: Mesh, config: Config, dtype: torch.dtype, fill: Callable[[str], None]
    ) -> None:
        """dtype: what the model computes in; its parameters are converted here, the masters stay fp32. fill:
        initialises the parameter of a name; called here for each, so that with ZeRO few are whole at a time.

        Raises ConfigError where what is offloaded has no room; ranks do not communicate after that."""
        train, layout = config.train, config.layout
        parameters = dict(model.named_parameters())
        self.specs: dict[str, ParamSpec] = specs_of(model)
        self._config, self._device = config.optimizer, mesh.device
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        self.untrained = {name: p.detach() for name, p in parameters.items() if not p.requires_grad}
        offloads = train.offload_optimizer or train.offload_parameters or train.offload_gradients
        self._files: FileMemory | HostMemory | None = None
        if offloads and mesh.device.late:
            self._files = HostMemory(mesh.device)
        elif offloads:
            self._files = on_every_rank(mesh.world, lambda: FileMemory(config.offload_dir))
        state_files = self._files if train.offload_optimizer else None
        self._state_memory = state_memory = state_files or DeviceMemory(mesh.device)
        for name in self.untrained if layout.zero else parameters:
            fill(name)
        self._state: Replicated | Sharded
        if layout.zero:
            parts = self._files if train.offload_parameters or dtype == torch.float32 else None
            gradients = self._files if train.offload_gradients else None
            memories = (parts, state_files, gradients)
            self._state = Sharded(
                model, trained, self.specs, mesh, dtype, layout.zero, layout.zero_ranks, *memories, fill
            )
        else:
            bucket_nbytes = train.bucket_kib * 1024 or None
            self._state = Replicated(
                trained,
                self.specs,
                mesh,
                dtype,
                bucket_nbytes,
                mesh.wire["dp"],
                config.wire.error_feedback,
                state_memory,
            )
        updated = list(self._state.updated())
        # What lies in files is updated tensor by tensor, so that no more than two are in memory.
        bundles = [[each] for each in updated] if offloads else [updated]
        self._updates = [self._adamw(bundle) for bundle in bundles]
        self._moments = {x: state for update in self._updates for x, state in update.state.items()}
        for x, state in self._moments.items():
            state["step"] = torch.zeros((), device=x.device)
            state.update({moment: state_memory.zeros(x.shape, torch.float32) for moment in MOMENTS})
        self.release()

    def _adamw(self, updated: list[tuple[Tensor, bool]]) -> torch.optim.AdamW:
        decayed, others = [x for x, decays in updated if decays], [x for x, decays in updated if not decays]
        found = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self._config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            betas=(self._config.beta1, self._config.beta2),
            eps=self._config.eps,
            fused=True,
            capturable=self._device.is_gpu,
        )
        for x, _ in updated:
            found.state[x] = {}
        return found

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
            self._moments[master][kind] = self._state_memory.zeros(master.shape, torch.float32)
        return self._state.held(self._of(kind))

    def drop_state(self, kind: str) -> None:
        for master, _ in self._state.updated():
            del self._moments[master][kind]

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

    def norm_squared_share(self) -> Tensor:
        """This rank's share of the squared norm of the whole model's gradient: summed over the world, it is that. fp64
        scalar on the device.

        Ranks that hold the same sums take an equal part of them each."""
        shares = []
        for flat, copies in self._state.sums():
            for piece in flat.split(self._device.norm_numel):
                shares.append(torch.linalg.vector_norm(piece, dtype=torch.float64).square() / copies)
            self._put_away(flat)
        return torch.stack([torch.zeros((), dtype=torch.float64, device=self._device.where), *shares]).sum()

    @torch.no_grad()
    def step(self, lr: float | Tensor, grad_norm: Tensor, skip: Tensor | None = None) -> None:
        """One update, after scaling the gradients so that their norm, grad_norm (fp64 scalar), is at most clip_norm.

        lr: fp32 scalar on the device where it is a tensor. skip: the same, 1 where nothing is to be updated, 0 else."""
        self._clip(grad_norm)
        held = [[x for group in update.param_groups for x in group["params"]] for update in self._updates]
        for at, update in enumerate(self._updates):
            for x in held[at + 1] if at + 1 < len(held) else ():
                self._in_files(x, lambda files, each: files.prefetch(each))
            for group in update.param_groups:
                group["lr"] = lr
            update.found_inf = skip  # type: ignore[attr-defined]  # the fused kernel's own way not to update
            update.step()
            for x in held[at]:
                if isinstance(self._state, Replicated):
                    self._state.publish(x)
                self._in_files(x, lambda files, each: files.release(each))
        if isinstance(self._state, Sharded):
            self._state.publish()

    def _clip(self, grad_norm: Tensor) -> None:
        clip = self._config.clip_norm
        flats = [flat for flat, _ in self._state.sums()] if clip > 0 else []
        if self._device.late and flats:
            factor = (clip / grad_norm).clamp(max=1.0).float()  # 1 changes nothing; the host does not know which
            torch._foreach_mul_(flats, factor)
        elif flats and grad_norm > clip:
            for flat in flats:
                flat.mul_(clip / float(grad_norm))
                self._put_away(flat)

    def _put_away(self, gradient: Tensor) -> None:
        if self._files is not None:
            self._files.release(gradient)

    def _in_files(self, x: Tensor, action: Callable[[FileMemory | HostMemory, Tensor], None]) -> None:
        """Does it with a master, its gradient and its moments, as far as they lie in files."""
        if self._files is not None:
            gradient = () if x.grad is None else (x.grad,)
            for each in (x, *gradient, *(self._moments[x][moment] for moment in MOMENTS)):
                action(self._files, each)

    def release(self) -> None:
        """All that lies in files leaves memory: for who has read or written more of it than an update does."""
        if self._files is not None:
            for x, state in self._moments.items():
                for each in (x, *state.values()):
                    self._files.release(each)

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
        self._device.synchronize()  # what is at home on the host may still be on its way there
        yield from self._state.pieces(self._of(kind))
        self.release()
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
        for state in self._moments.values():
            state["step"].fill_(n_steps)

    def _of(self, kind: str) -> dict[Tensor, Tensor]:
        return {x: x if kind == PARAMETERS else self._moments[x][kind] for x, _ in self._state.updated()}

    def close(self) -> None:
        self._state.close()
