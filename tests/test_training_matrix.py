"""Every axis, sharding, schedule and way to save memory gives the loss curve and the weights of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from spawn import run_ranks
from training_matrix import CASES, CHAIN, LATENT_CHAIN, Case, Found, Outcome, run_all

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return run_ranks(run_all, 8, CASES, str(tmp_path_factory.mktemp("runs")), timeout_s=1500)


@pytest.fixture(scope="module")
def outcomes(by_rank: list[Found]) -> dict[str, Outcome]:
    return {name: outcome for found in by_rank for name, outcome in found.outcomes.items()}


def difference(a: Any, b: Any) -> float:
    """|a - b| / |b|."""
    return float(np.linalg.norm(np.subtract(a, b, dtype=np.float64)) / np.linalg.norm(b))


@pytest.mark.timeout(1600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_trains_as_one_process(outcomes: dict[str, Outcome], case: Case) -> None:
    got, expected = outcomes[case.name], outcomes[f"{case.model} on 1: dp"]
    assert max(expected.norms) > 0.5, "nothing was clipped"
    assert expected.losses[-1] < expected.losses[0] - 0.5
    np.testing.assert_allclose(got.losses, expected.losses, rtol=TOLERANCE, atol=0)
    np.testing.assert_allclose(got.norms, expected.norms, rtol=10 * TOLERANCE, atol=0)
    np.testing.assert_allclose(got.held_out, expected.held_out, rtol=TOLERANCE, atol=0)
    assert got.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        if name.endswith("key.bias"):  # its gradient is 0 but for rounding: softmax does not see it
            assert np.abs(got.weights[name]).max() < 1e-3, name
        else:
            assert difference(got.weights[name], weight) <= TOLERANCE, name
    if case.exact:
        same = outcomes[case.exact if "on" in case.exact else f"{case.exact} on 1: dp"]
        assert got.losses == same.losses
        for name, weight in same.weights.items():
            assert np.array_equal(got.weights[name], weight), name


@pytest.mark.timeout(1600)
@pytest.mark.parametrize(("index", "chain", "tolerance"), [(0, CHAIN, TOLERANCE), (1, LATENT_CHAIN, 0.01)])
def test_any_layout_resumes_from_any_other(
    by_rank: list[Found], outcomes: dict[str, Outcome], index: int, chain: list[Case], tolerance: float
) -> None:
    """tolerance: of losses, which bf16 rounds; what is saved and resumed are the fp32 masters and moments, exactly."""
    expected = outcomes[f"{chain[0].model} on 1: dp"].losses
    for found in by_rank:
        losses, wrong = found.chains[index]
        assert len(losses) == 3 * len(chain) and not wrong
        np.testing.assert_allclose(losses, expected[: len(losses)], rtol=tolerance, atol=0)


@pytest.mark.timeout(1600)
def test_workers_do_not_see_which_ranks_are_outermost(by_rank: list[Found]) -> None:
    assert [found.workers for found in by_rank] == [[]] * 8
