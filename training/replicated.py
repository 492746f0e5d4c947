"""Parameters that every rank of their gradient's group holds whole, with fp32 masters and gradients in buckets.

A master is the parameter itself in fp32, and a separate fp32 copy when the model computes in bf16. Either way its .grad
is, for good, a view of a gradient bucket: nothing is copied between reduction and update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from pycomm.overlap import GradientBuckets, ShardMemory
from training.mesh import Mesh
from training.metered import MeteredGroup
from training.sharding import ParamSpec


class Replicated:
    """Without ZeRO. Made after the model was initialised."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        specs: Mapping[str, ParamSpec],
        mesh: Mesh,
        dtype: torch.dtype,
        bucket_nbytes: int | None,
        wire: str | None,
        error_feedback: bool,
        memory: ShardMemory,
    ) -> None:
        """memory: of masters that are not the parameters themselves."""
        self._parameters = parameters
        self.masters: dict[str, Tensor] = {}
        self._rounded: dict[Tensor, nn.Parameter] = {}  # by master, where the two are different
        self.residuals: dict[str, Tensor] = {}  # what coding lost of each gradient on this rank in the last step
        self._buckets: list[tuple[MeteredGroup, GradientBuckets]] = []
        for name, parameter in parameters.items():
            self.masters[name] = parameter.detach()
            if dtype != torch.float32:
                self.masters[name] = master = memory.zeros(parameter.shape, torch.float32)
                memory.prefetch(master)
                master.copy_(parameter.detach())
                memory.release(master)
                parameter.data = parameter.data.to(dtype)
                self._rounded[master] = parameter
        for group, names in by_gradient_group(parameters, specs, mesh):
            buckets = GradientBuckets(
                [parameters[n] for n in names],
                group,
                bucket_nbytes=bucket_nbytes,
                wire=wire,
                error_feedback=error_feedback,
            )
            self._buckets.append((group, buckets))
            for name in names:
                memory.prefetch(self.masters[name])  # a gradient is taken where its tensor is
                self.masters[name].grad = buckets.gradient(parameters[name])
                memory.release(self.masters[name])
                residual = buckets.residual(parameters[name])
                if residual is not None:
                    self.residuals[name] = residual

    def updated(self) -> Iterator[tuple[Tensor, bool]]:
        """Each tensor that the optimizer updates, and whether it decays."""
        for master in self.masters.values():
            yield master, master.dim() > 1

    @contextmanager
    def syncing(self, last: bool) -> Iterator[None]:
        """Around a backward: gradients add up, and with last are reduced as they become complete."""
        with ExitStack() as stack:
            if not last:
                for _, buckets in self._buckets:
                    stack.enter_context(buckets.no_sync())
            yield

    def backward_done(self) -> None:
        pass

    def wait(self) -> None:
        for _, buckets in self._buckets:
            buckets.wait()

    def sums(self) -> Iterator[tuple[Tensor, int]]:
        """This rank's summed gradients as flat tensors, and how many ranks hold the same."""
        for group, buckets in self._buckets:
            for flat in buckets.flats:
                yield flat, group.size

    def gradients(self) -> dict[str, Tensor]:
        return {name: master.grad for name, master in self.masters.items() if master.grad is not None}

    def exchanged(self) -> list[tuple[MeteredGroup, str, int]]:
        """(group, collective, bytes) of each exchange of gradients in a step."""
        return [(group, "all_reduce", flat.nbytes) for group, buckets in self._buckets for flat in buckets.flats]

    def publish(self, master: Tensor | None = None) -> None:
        """Rounds a master, or all, into the model's parameters, where these are others."""
        for each in self._rounded if master is None else [master]:
            if each in self._rounded:
                self._rounded[each].copy_(each)

    def held(self, of: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
        """What this rank has of each parameter, by name, of a tensor for each that is updated."""
        return {name: of[master] for name, master in self.masters.items()}

    def pieces(self, of: Mapping[Tensor, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, this rank's piece as the axes cut it) of a tensor for each that is updated."""
        for name, master in self.masters.items():
            yield name, of[master]

    def put(self, name: str, piece: Tensor, of: Mapping[Tensor, Tensor]) -> None:
        """The reverse of pieces(), for one parameter."""
        of[self.masters[name]].copy_(piece)

    def close(self) -> None:
        for _, buckets in self._buckets:
            buckets.close()


def by_gradient_group(
    parameters: Mapping[str, nn.Parameter], specs: Mapping[str, ParamSpec], mesh: Mesh
) -> list[tuple[MeteredGroup, list[str]]]:
    """The names by the group that sums their gradient, groups in an order that every rank shares."""
    found: dict[int, tuple[MeteredGroup, list[str]]] = {}
    for name in parameters:
        group = mesh.gradients(specs[name].axis)
        found.setdefault(id(group), (group, []))[1].append(name)
    return sorted(found.values(), key=lambda each: each[0].name)
