"""AdamW over fp32 master parameters whose gradients arrive in buckets, reduced while backward runs.

A master is the parameter itself in fp32, and a separate fp32 copy when the model computes in bf16. Either way its .grad
is, for good, a view of a gradient bucket: nothing is copied between reduction and update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from pycomm.overlap import GradientBuckets
from training.config import OptimizerConfig
from training.mesh import Mesh, MeteredGroup
from training.sharding import ParamSpec, specs_of

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, n_steps: int, config: OptimizerConfig) -> float:
    """The rate of step 0, 1, ...: linear warm-up, then a cosine from lr down to lr * min_lr_ratio at n_steps."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, n_steps - config.warmup_steps))
    lowest = config.lr * config.min_lr_ratio
    return lowest + (config.lr - lowest) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Optimizer:
    """Owns the masters, their moments and the gradient buckets of a model. Made after the model was initialised."""

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        config: OptimizerConfig,
        dtype: torch.dtype,
        bucket_nbytes: int | None,
        wire: str | None = None,
        error_feedback: bool = True,
    ) -> None:
        """dtype: what the model computes in; its parameters are converted here, the masters stay fp32. bucket_nbytes,
        wire, error_feedback: of pycomm.overlap.GradientBuckets."""
        self._parameters = dict(model.named_parameters())
        self.specs: dict[str, ParamSpec] = specs_of(model)
        self.masters: dict[str, Tensor] = {name: p.detach() for name, p in self._parameters.items()}
        self._config = config
        self._buckets: list[tuple[MeteredGroup, GradientBuckets]] = []
        trained = [name for name, parameter in self._parameters.items() if parameter.requires_grad]
        for name in trained:
            self._parameters[name].data = self._parameters[name].data.to(dtype)
        by_group: dict[int, tuple[MeteredGroup, list[str]]] = {}
        for name in trained:
            group = mesh.gradients(self.specs[name].axis)
            by_group.setdefault(id(group), (group, []))[1].append(name)
        for group, names in by_group.values():
            buckets = GradientBuckets(
                [self._parameters[n] for n in names],
                group,
                bucket_nbytes=bucket_nbytes,
                wire=wire,
                error_feedback=error_feedback,
            )
            self._buckets.append((group, buckets))
            for name in names:
                self.masters[name].grad = buckets.gradient(self._parameters[name])
        decayed = [self.masters[name] for name in trained if self.specs[name].decays]
        others = [self.masters[name] for name in trained if not self.specs[name].decays]
        self._adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, backward adds gradients up without reducing them."""
        with ExitStack() as stack:
            for _, buckets in self._buckets:
                stack.enter_context(buckets.no_sync())
            yield

    def wait(self) -> None:
        """Returns when every gradient is summed over its group."""
        for _, buckets in self._buckets:
            buckets.wait()

    def bucket_sizes(self) -> list[tuple[MeteredGroup, int]]:
        """Each bucket's group and bytes."""
        return [(group, flat.nbytes) for group, buckets in self._buckets for flat in buckets.flats]

    def norm_squared_share(self) -> float:
        """This rank's share of the squared norm of the whole model's gradient: summed over the world, it is that.

        Every rank of a bucket's group holds the same sums, so each takes 1/size of them."""
        return sum(
            float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2 / group.size
            for group, buckets in self._buckets
            for flat in buckets.flats
        )

    @torch.no_grad()
    def step(self, lr: float, grad_norm: float) -> None:
        """One update, after scaling the gradients so that their norm, grad_norm, becomes at most clip_norm."""
        clip = self._config.clip_norm
        if clip > 0 and grad_norm > clip:
            for _, buckets in self._buckets:
                for flat in buckets.flats:
                    flat.mul_(clip / grad_norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the masters into the model's parameters, where these are others."""
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.float32:
                parameter.copy_(self.masters[name])

    def moments(self, name: str, n_steps: int) -> dict[str, Tensor]:
        """The running means of a parameter by MOMENTS' names, made if there are none, as after n_steps updates."""
        master = self.masters[name]
        state = self._adamw.state[master]
        if not state:
            state["step"] = torch.tensor(0.0)
            state.update({moment: torch.zeros_like(master) for moment in MOMENTS})
        state["step"].fill_(n_steps)
        return {moment: state[moment] for moment in MOMENTS}

    def close(self) -> None:
        for _, buckets in self._buckets:
            buckets.close()
