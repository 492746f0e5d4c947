"""Compiled blocks give the numbers of those that are not, within rounding."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from spawn import run_ranks
from training_runs import curve, tiny

from training.config import Config
from training.errors import ConfigError
from training.layout import resolve_layout


def both(group: Any, config: Config, compiled: Config) -> tuple[Any, Any, int]:
    """curve() of both, and how many graphs the second one's blocks are."""
    import torch._dynamo

    found = curve(group, config, 3), curve(group, compiled, 3)
    return *found, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("n_ranks", "layout", "n_graphs"), [(1, {}, 1), (2, {"tp": 2, "tp_overlap": "never"}, 2)])
def test_compiled_blocks_train_alike(n_ranks: int, layout: dict[str, Any], n_graphs: int) -> None:
    options: dict[str, Any] = {"layout": layout, "model": {"n_layers": 2}}
    for plain, compiled, found in run_ranks(
        both, n_ranks, tiny(**options), tiny(**options, compile=True), timeout_s=230
    ):
        np.testing.assert_allclose(compiled[0], plain[0], rtol=1e-5)
        np.testing.assert_allclose(compiled[1], plain[1], rtol=1e-4)
        assert found >= n_graphs if n_ranks > 1 else found == n_graphs  # one for blocks alike


@pytest.mark.parametrize(
    ("layout", "train", "message"),
    [
        (
            {"pp": 2, "schedule": "zb_h1"},
            {"compile": True, "accumulation": 2},
            "train.compile with layout.schedule 'zb",
        ),
        ({"zero": 1}, {"cuda_graph": True}, "train.cuda_graph cannot capture a step with layout.zero 1"),
        ({"pp": 2}, {"cuda_graph": True, "accumulation": 2}, "a step with layout.pp 2, whose stages exchange messages"),
    ],
)
def test_what_cannot_be_compiled_or_captured_is_named(
    layout: dict[str, Any], train: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve_layout(tiny(layout=layout, **train), 2)


def graph_on_a_cpu(group: Any) -> str:
    from training.trainer import Trainer

    torch.set_num_threads(1)
    with pytest.raises(ConfigError) as caught:
        Trainer(tiny(cuda_graph=True), group)
    return str(caught.value)


def test_a_graph_needs_a_gpu() -> None:
    assert "train.cuda_graph needs GPUs" in run_ranks(graph_on_a_cpu, 1)[0]
