"""Every layout gives the loss curve of one process: same seed, same global batch, fp32, 20 steps."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from spawn import run_ranks
from training_runs import curve, tiny

from training.config import Config, LayoutConfig, WireConfig

N_STEPS = 20
TOLERANCE = 1e-5  # relative; measured: at most 3e-7
MOE = {"n_experts": 4, "top_k": 2}
# Everything at once: grouped-query attention, a head of its own, dense blocks between those with experts.
MIXED = {"n_experts": 4, "top_k": 2, "moe_every": 2, "n_kv_heads": 2, "tie_embeddings": False}
# DeepSeek-V3's mixture: a bias keeps the loads even, groups, shared experts, a dense block first.
DEEPSEEK = {
    "n_experts": 4, "top_k": 2, "n_dense_layers": 1, "n_shared_experts": 1, "router": "sigmoid", "router_bias": True,
    "router_bias_speed": 0.05, "n_expert_groups": 2, "topk_groups": 2, "router_scale": 2.0, "d_ff_expert": 32,
}  # fmt: skip
GPT2 = {"block": "gpt2", "max_seq_len": 40}
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_len": 16, "head_dim": 16}


@pytest.fixture(scope="module")
def single_process() -> Any:
    """curve() of one process, computed once for each model."""
    known: dict[str, Any] = {}

    def of(model: dict[str, Any]) -> Any:
        key = str(model)
        if key not in known:
            known[key] = run_ranks(curve, 1, tiny(model=model), N_STEPS)[0]
        return known[key]

    return of


def assert_same_curve(config: Config, n_ranks: int, expected: Any, hosts: list[str] | None = None) -> None:
    results = run_ranks(curve, n_ranks, config, N_STEPS, hosts=hosts)
    assert all(result == results[0] for result in results), "ranks disagree about the global loss"
    losses, norms, held_out = results[0]
    np.testing.assert_allclose(losses, expected[0], rtol=TOLERANCE, atol=0)
    np.testing.assert_allclose(
        norms, expected[1], rtol=10 * TOLERANCE, atol=0
    )  # Adam hides a wrong scale, norms do not
    np.testing.assert_allclose(held_out, expected[2], rtol=TOLERANCE, atol=0)
    assert losses[-1] < losses[0] - 0.5


def test_data_parallel_on_two_hosts(single_process: Any) -> None:
    assert_same_curve(tiny(), 4, single_process({}), hosts=["a", "a", "b", "b"])


def test_tensor_parallel(single_process: Any) -> None:
    assert_same_curve(tiny(tp=4), 4, single_process({}))


def test_data_and_tensor_parallel(single_process: Any) -> None:
    assert_same_curve(tiny(tp=2), 4, single_process({}))


def test_expert_parallel(single_process: Any) -> None:
    assert_same_curve(tiny(ep=4, model=MOE), 4, single_process(MOE))


def curves_of_every_exchange(group: Any) -> list[Any]:
    """Of the same run with tokens sent once an expert, once a rank, once a host, in pieces, and beside the experts."""
    config = tiny(ep=4, model={**MOE, "n_experts": 8})  # two experts a rank, so that there are two pieces of them
    ways = [
        {"moe_exchange": "flat"},
        {"moe_dedup": "rank", "moe_chunks": 1},
        {"moe_dedup": "host", "moe_chunks": 3},
        {"moe_exchange": "overlapped", "moe_dedup": "rank", "moe_chunks": 2},
        {"moe_exchange": "overlapped", "moe_dedup": "host", "moe_chunks": 2},
    ]
    layouts = [dataclasses.replace(config.layout, **way) for way in ways]
    return [curve(group, dataclasses.replace(config, layout=layout), 6) for layout in layouts]


def test_every_exchange_gives_the_same_curve_bit_for_bit() -> None:
    results = run_ranks(curves_of_every_exchange, 4, hosts=["a", "a", "b", "b"])
    assert all(found == results[0][0] for result in results for found in result)


def test_accumulation(single_process: Any) -> None:
    assert_same_curve(tiny(accumulation=4), 1, single_process({}))


def test_all_axes_and_accumulation(single_process: Any) -> None:
    config = tiny(tp=2, ep=2, accumulation=2, model=MIXED)
    assert_same_curve(config, 4, single_process(MIXED), hosts=["a", "a", "b", "b"])


@pytest.mark.parametrize(("model", "ep"), [(DEEPSEEK, 2), (GPT2, 1), (LLAMA3, 1)], ids=["deepseek", "gpt2", "llama3"])
def test_other_models_on_two_axes(single_process: Any, model: dict[str, Any], ep: int) -> None:
    assert_same_curve(tiny(tp=2, ep=ep, model=model), 4, single_process(model))


def test_masked_documents(single_process: Any, tmp_path: Path) -> None:
    """Short documents, attention inside each; tensor parallel ranks mask alike."""
    source = argparse.__file__
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in Path(source).read_text().splitlines()))
    config = tiny(data={"path": str(file), "document_mask": True})
    expected = run_ranks(curve, 1, config, N_STEPS)[0]
    assert_same_curve(dataclasses.replace(config, layout=LayoutConfig(tp=2)), 4, expected)
    unmasked = run_ranks(curve, 1, tiny(data={"path": str(file)}), 1)[0]
    assert abs(unmasked[0][0] - expected[0][0]) > 1e-4  # the mask is there


def test_bf16_follows_fp32(single_process: Any) -> None:
    losses, _, held_out = run_ranks(curve, 2, tiny(tp=2, precision="bf16"), N_STEPS)[0]
    np.testing.assert_allclose(losses, single_process({})[0], rtol=2e-3)
    assert held_out == pytest.approx(single_process({})[2], rel=2e-3)


LONG = 200
LONG_LAYOUTS: list[dict[str, Any]] = [{}, {"layout": {"zero": 3}}, {"layout": {"pp": 2}, "accumulation": 2}]


def long_curves(group: Any, runs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    return [curve(group, tiny(steps=LONG, precision=precision, **asked), LONG) for precision, asked in runs]


def test_bf16_stays_within_its_bound_over_200_steps() -> None:
    """docs/trainer.md states it; measured: at most 1.8e-3 in a step, 2.5e-4 in the mean, 3.5e-4 held out."""
    fp32, alone = run_ranks(long_curves, 1, [("fp32", {}), ("bf16", {})])[0]
    results = run_ranks(long_curves, 2, [("bf16", asked) for asked in LONG_LAYOUTS])
    assert results[0] == results[1], "ranks disagree"
    for found in (alone, *results[0]):
        assert found[0] != fp32[0]  # it was bf16
        for expected in (fp32, alone):
            apart = np.abs(np.array(found[0]) / np.array(expected[0]) - 1)
            assert apart.max() < 5e-3 and apart.mean() < 5e-4
            assert found[2] == pytest.approx(expected[2], rel=1e-3)
    assert fp32[0][-1] < fp32[0][0] - 2  # it learned, so that there was something to lose
    data_parallel, zero_3, _ = results[0]
    assert data_parallel[0] == zero_3[0]  # the same sums, cut over ranks


@pytest.mark.parametrize("wire", ["bf16", "fp8", "int8"])
def test_a_wire_follows_fp32(single_process: Any, wire: str) -> None:
    config = dataclasses.replace(tiny(), wire=WireConfig(dp=wire))
    results = run_ranks(curve, 4, config, N_STEPS, hosts=["a", "a", "b", "b"])
    assert all(result == results[0] for result in results), "ranks disagree"
    losses, _, held_out = results[0]
    np.testing.assert_allclose(losses, single_process({})[0], rtol=5e-3)
    assert losses != single_process({})[0]  # it was coded
    assert held_out == pytest.approx(single_process({})[2], rel=5e-3)
