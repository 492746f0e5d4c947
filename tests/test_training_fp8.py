"""fp8 products: the quantisation's arithmetic, the products against their own dequantised operands, and training."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_nccl import build
from spawn import run_ranks
from torch import Tensor
from training_runs import tiny

from pycomm.overlap import WeightGradients
from training import fp8
from training.config import Config
from training.errors import ConfigError
from training.layout import resolve_layout
from training.trainer import Trainer


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(
    ("dtype", "largest", "rounding"), [(torch.float8_e4m3fn, 448.0, 2**-4), (torch.float8_e5m2, 57344.0, 2**-3)]
)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 3e30])
def test_a_scale_puts_the_largest_number_at_the_formats_largest(
    dtype: torch.dtype, largest: float, rounding: float, scale: float
) -> None:
    x = random(7, 33, seed=1, scale=1.0) * scale
    codes, factor = fp8.quantise(x, dtype)
    assert float(codes.float().abs().max()) == largest
    back = codes.double() * factor.double()
    normal = codes.float().abs() > 2**-5
    assert float(((back - x.double()).abs() / x.double().abs())[normal].max()) <= rounding
    zeros, factor = fp8.quantise(torch.zeros(3, 4), dtype)
    assert bool((zeros.float() == 0).all()) and bool(factor.isfinite())


def as_coded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What the codes stand for, fp32."""
    codes, scale = fp8.quantise(x, dtype)
    return codes.float() * scale


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def gradients(put_off: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = random(2, 16, 48, seed=2).bfloat16().requires_grad_()
    weight = torch.nn.Parameter(random(32, 48, seed=3, scale=0.02).bfloat16())
    bias = torch.nn.Parameter(random(32, seed=4).bfloat16())
    later = WeightGradients() if put_off else None
    y = fp8.linear(x, weight, bias, later)
    y.backward(random(2, 16, 32, seed=5, scale=1e-4).bfloat16())
    if later is not None:
        assert weight.grad is None
        later.flush()
    assert x.grad is not None and weight.grad is not None and bias.grad is not None
    return y.detach(), x.grad, weight.grad, bias.grad


def test_products_are_those_of_what_the_codes_stand_for() -> None:
    x, weight = random(2, 16, 48, seed=2).bfloat16(), random(32, 48, seed=3, scale=0.02).bfloat16()
    bias, grad = random(32, seed=4).bfloat16(), random(2, 16, 32, seed=5, scale=1e-4).bfloat16()
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    rows, matrix, given = as_coded(x, e4m3), as_coded(weight, e4m3), as_coded(grad, e5m2)
    y, of_x, of_weight, of_bias = gradients(put_off=False)
    assert difference(y, F.linear(rows, matrix) + bias.float()) < 5e-3  # bf16's rounding
    assert difference(of_x, given @ matrix) < 5e-3
    assert difference(of_weight, given.flatten(0, 1).T @ rows.flatten(0, 1)) < 5e-3
    assert difference(of_bias, grad.float().sum((0, 1))) < 5e-3
    assert 1e-3 < difference(y - bias, F.linear(x, weight)) < 0.06  # it is fp8


@pytest.mark.parametrize("n_rows", [0, 1, 15, 17])
def test_rows_may_be_any_number(n_rows: int) -> None:
    x = random(n_rows, 32, seed=6).bfloat16().requires_grad_()
    weight = torch.nn.Parameter(random(16, 32, seed=7, scale=0.02).bfloat16())
    grad = random(n_rows, 16, seed=8).bfloat16()
    y = fp8.linear(x, weight, None)
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None
    assert y.shape == (n_rows, 16) and x.grad.shape == x.shape and weight.grad.shape == weight.shape
    if n_rows == 0:
        assert bool((weight.grad == 0).all())
        return
    rows, given = as_coded(x.detach(), torch.float8_e4m3fn), as_coded(grad, torch.float8_e5m2)
    matrix = as_coded(weight.detach(), torch.float8_e4m3fn)
    assert difference(y.detach(), rows @ matrix.T) < 5e-3
    assert difference(x.grad, given @ matrix) < 5e-3
    assert difference(weight.grad, given.T @ rows) < 5e-3


def test_a_weights_gradient_that_is_put_off_is_the_same() -> None:
    for now, later in zip(gradients(put_off=False), gradients(put_off=True), strict=True):
        assert torch.equal(now, later)


def config_of(device: str = "cuda", **train: Any) -> Config:
    return tiny(**{"precision": "bf16", "device": device, "matmul": "fp8", **train})


def both(group: Any, *configs: Config) -> list[Any]:
    """losses() of each."""
    return [losses(group, config) for config in configs]


def losses(group: Any, config: Config) -> tuple[list[float], set[tuple[int, ...]]]:
    """Of 15 steps, and the shapes of the weights whose products were fp8."""
    torch.set_num_threads(1)
    product, shapes = fp8.linear, set()

    def seen(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        shapes.add(tuple(weight.shape))
        return product(x, weight, *others)

    fp8.linear = seen
    trainer = Trainer(config, group)
    found = [trainer.train_step().loss for _ in range(15)]
    trainer.close()
    fp8.linear = product
    return found, shapes


EXPERTS = {"n_experts": 4, "top_k": 2, "n_shared_experts": 1, "n_dense_layers": 1, "d_ff_expert": 96}
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}


@pytest.mark.parametrize(
    ("model", "layout", "among"),
    [
        ({}, {"tp": 2}, {(32, 32)}),
        (EXPERTS, {"ep": 2, "moe_exchange": "overlapped"}, {(96, 32), (32, 96)}),
        (EXPERTS | LATENT, {"tp": 2, "experts_over_tp": "split"}, {(48, 32), (32, 48)}),
        (LATENT, {"cp": 2}, {(128, 32)}),
        (LATENT, {"cp": 2, "context": "ulysses"}, {(64, 32)}),
    ],
    ids=["dense", "experts", "split experts and latents", "latents in a ring", "latents of all"],
)
def test_a_run_in_fp8_follows_bf16(model: dict[str, Any], layout: dict[str, Any], among: set[tuple[int, ...]]) -> None:
    library = str(build())
    variables = {"PYCOMM_NCCL_LIB": library, "PYCOMM_TEST_DEVICE": library}
    in_fp8, in_bf16 = (config_of(model=model, layout=layout, matmul=each) for each in ("fp8", "plain"))
    (coded, shapes), (plain, none) = run_ranks(both, 2, in_fp8, in_bf16, environment=variables)[0]
    assert among <= shapes and not none
    assert coded != plain and coded[-1] < coded[0] - 0.5
    np.testing.assert_allclose(coded, plain, rtol=0.02)


def refusal(group: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Trainer(config_of("cpu"), group)
    return str(caught.value)


def test_where_there_are_no_fp8_products_it_is_said() -> None:
    assert "train.matmul is 'fp8', which CPUs do not have" in run_ranks(refusal, 1)[0]
    for config, message in (
        (config_of(precision="fp32"), "train.precision is 'fp32'; set it to 'bf16'"),
        (
            dataclasses.replace(config_of(), model=dataclasses.replace(tiny().model, d_ff=72)),
            "model.d_ff / layout.tp is 72",
        ),
        (config_of(model=EXPERTS | {"d_ff_expert": 40}), "the width of an expert on a rank is 40"),
        (config_of(model=LATENT | {"kv_lora_rank": 24}), "model.kv_lora_rank is 24"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            resolve_layout(config, 1)


def test_products_of_gathered_latents_are_of_a_ranks_own_heads() -> None:
    narrow = LATENT | {"n_heads": 8, "n_kv_heads": 8, "head_dim": 4, "v_head_dim": 4}
    for others in ({"context": "ring"}, {"context": "ulysses", "context_latents": False}):
        resolve_layout(config_of(model=narrow, layout={"cp": 8, **others}), 8)
    message = "width of a key and a value / (layout.tp × layout.cp) is 8"
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve_layout(config_of(model=narrow, layout={"cp": 8, "context": "ulysses"}), 8)


def test_a_weight_is_not_saved_again() -> None:
    """Its codes are made anew: what is kept of a product are codes of its rows and two scales."""
    x = random(32, 48, seed=2).bfloat16().requires_grad_()
    weight = torch.nn.Parameter(random(64, 48, seed=3).bfloat16())
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        fp8.linear(x, weight, None)
    own = [each for each in saved if each.untyped_storage()._cdata != weight.untyped_storage()._cdata]
    assert len(saved) == len(own) + 1
    assert sum(each.untyped_storage().nbytes() for each in own) == 32 * 48 + 2 * 4
