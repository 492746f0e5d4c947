"""Ring attention over context parallel ranks is attention over the whole sequence, on flash kernels and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spawn import run_ranks
from torch import Tensor

from training import ring_attention
from training.config import WireConfig
from training.context import attend, attend_latents, own_part
from training.key_values import OfLatents
from training.layout import Layout
from training.mesh import Mesh

S, B, HEADS, KEY_HEADS, WIDTH = 48, 2, 4, 2, 16


def made(dtype: torch.dtype, value_width: int) -> list[Tensor]:
    """Query, key, value and the gradient of attention's output."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((HEADS, WIDTH), (KEY_HEADS, WIDTH), (KEY_HEADS, value_width), (HEADS, value_width))
    return [torch.randn(S, B, *shape, generator=generator).to(dtype) for shape in shapes]


def errors(group: Any, flash: bool, masked: bool, value_width: int, dtype: torch.dtype) -> list[float]:
    """Largest differences of output and gradients from those of one rank with the whole sequence in fp64."""
    torch.set_num_threads(1)
    used = []
    kernel = ring_attention._flash
    ring_attention._flash = lambda *given: used.append(1) or kernel(*given)
    if not flash:
        ring_attention._has_flash = lambda query, value: False
    mesh, alone = Mesh(group, Layout(1, 1, 1, cp=group.size)), Mesh(group.split(group.rank), Layout(1, 1, 1))
    *inputs, grad = made(dtype, value_width)
    documents = (torch.arange(S) // 13).unsqueeze(1).expand(S, B).contiguous() if masked else None
    parts = [own_part(x, mesh).clone().requires_grad_() for x in inputs]
    y = attend(*parts, mesh, "ring", documents)
    y.backward(own_part(grad, mesh))
    whole = [x.double().requires_grad_() for x in inputs]
    expected = attend(*whole, alone, "ring", documents)
    expected.backward(grad.double())
    pairs = [(y, expected), *((part.grad, x.grad) for part, x in zip(parts, whole, strict=True))]
    assert bool(used) == (flash and not masked)
    alone.world.group.close()
    mesh.close()
    return [float((got.double() - own_part(want, mesh)).abs().max()) for got, want in pairs]


@pytest.mark.parametrize(
    ("n_ranks", "flash", "masked", "value_width", "dtype", "allowed"),
    [
        (2, True, False, WIDTH, torch.float32, 1e-5),
        (4, True, False, 10, torch.float32, 1e-5),
        (4, False, False, 10, torch.float32, 1e-5),
        (2, True, True, WIDTH, torch.float32, 1e-5),
        (2, True, False, WIDTH, torch.bfloat16, 0.1),
    ],
)
def test_a_ring_attends_as_one_rank(
    n_ranks: int, flash: bool, masked: bool, value_width: int, dtype: torch.dtype, allowed: float
) -> None:
    for found in run_ranks(errors, n_ranks, flash, masked, value_width, dtype):
        assert max(found) < allowed, found


RANK, ROPE, PARTS = 6, 4, (8, 10)  # of a latent, of the shared key, and what a head has of key and value


def seeing_wires(name: str, run: Any, wires: list[tuple[str, str | None]]) -> Any:
    """run, which notes the wire that it is given."""

    def seen(*tensors: Tensor, wire: str | None = None) -> None:
        wires.append((name, wire))
        run(*tensors, wire=wire)

    return seen


def errors_of_latents(group: Any, kind: str, masked: bool, dtype: torch.dtype) -> tuple[list[float], list[int]]:
    """As errors(), with the weight's gradient last, summed over the ranks; and the numbers of each tensor sent in
    forward, or gathered."""
    torch.set_num_threads(1)
    wire = WireConfig(cp="fp8" if kind == "ulysses" else "none")  # which codes nothing inside a host
    mesh = Mesh(group, Layout(1, 1, 1, cp=group.size), wire=wire)
    alone = Mesh(group.split(group.rank), Layout(1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    shapes = ((S, B, HEADS, PARTS[0] + ROPE), (S, B, RANK), (S, B, 1, ROPE), (HEADS * sum(PARTS), RANK))
    *tokens, weight = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    grad = torch.randn(S, B, HEADS, PARTS[1], generator=generator).to(dtype)
    documents = (torch.arange(S) // 13).unsqueeze(1).expand(S, B).contiguous() if masked else None
    sent: list[int] = []
    send, gather = mesh.cp.send, mesh.cp.all_gather
    mesh.cp.send = lambda x, *others: sent.append(x.numel()) or send(x, *others)
    mesh.cp.all_gather = lambda output, x, **others: sent.append(x.numel()) or gather(output, x, **others)
    wires: list[tuple[str, str | None]] = []
    for name in ("all_gather", "reduce_scatter", "all_to_all"):
        setattr(mesh.cp, name, seeing_wires(name, getattr(mesh.cp, name), wires))
    query, latent, shared = (own_part(x, mesh).clone().requires_grad_() for x in tokens)
    own_weight = weight.clone().requires_grad_()
    y = attend_latents(query, (latent, shared), own_weight, PARTS, mesh, kind, documents)
    in_forward = list(sent)
    y.backward(own_part(grad, mesh))
    there_and_back = [("all_gather", "fp8"), *[("all_to_all", "fp8")] * 4, ("reduce_scatter", "fp8")]
    assert sorted(wires) == (sorted(there_and_back) if kind == "ulysses" else [])
    wide = [x.double().requires_grad_() for x in (*tokens, weight)]
    key_value = OfLatents(PARTS, False).of_rows(wide[1:3], wide[3])
    expected = attend(wide[0], *key_value, alone, kind, documents)
    expected.backward(grad.double())
    assert own_weight.grad is not None
    mesh.cp.all_reduce(own_weight.grad)
    found = [(y, own_part(expected, mesh)), (own_weight.grad, wide[3].grad)]
    found += [(x.grad, own_part(want.grad, mesh)) for x, want in zip((query, latent, shared), wide, strict=False)]
    alone.world.group.close()
    mesh.close()
    return [float((got.double() - want).abs().max()) for got, want in found], in_forward


@pytest.mark.parametrize(
    ("n_ranks", "kind", "masked", "dtype", "allowed"),
    [
        (4, "ring", False, torch.float32, 1e-4),
        (2, "ring", True, torch.float32, 1e-4),
        (4, "ulysses", False, torch.float32, 1e-4),
        (2, "ulysses", True, torch.float32, 1e-4),
        (2, "ring", False, torch.bfloat16, 1.0),
    ],
)
def test_ranks_that_exchange_latents_attend_as_one_rank(
    n_ranks: int, kind: str, masked: bool, dtype: torch.dtype, allowed: float
) -> None:
    rows = S // n_ranks * B
    sent = [rows * RANK, rows * ROPE] * (n_ranks - 1) if kind == "ring" else [rows * (RANK + ROPE)]
    for found, numbers in run_ranks(errors_of_latents, n_ranks, kind, masked, dtype):
        assert max(found) < allowed, found
        assert numbers == sent
