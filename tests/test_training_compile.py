"""Compiled blocks give the numbers of those that are not, within rounding."""

from __future__ import annotations

import functools
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

LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8}


def both(group: Any, config: Config, compiled: Config, backend: str) -> tuple[Any, Any, int]:
    """curve() of both, and how many graphs the second one's blocks are."""
    import torch._dynamo

    torch.compile = functools.partial(torch.compile, backend=backend)  # type: ignore[assignment]
    found = curve(group, config, 3), curve(group, compiled, 3)
    return *found, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("n_ranks", "layout", "model", "backend"),
    [
        (1, {"zero": 3}, {}, "inductor"),
        (2, {"tp": 2, "tp_overlap": "never"}, {}, "aot_eager"),
        (2, {"cp": 2}, LATENT, "aot_eager"),
    ],
)
def test_compiled_blocks_train_alike(n_ranks: int, layout: dict[str, Any], model: dict[str, Any], backend: str) -> None:
    """Where ranks exchange the graphs are what is tested, not the code that is made of them, which takes long."""
    plain, compiled = tiny(layout=layout, model=model), tiny(layout=layout, model=model, compile=True)
    for expected, got, n_graphs in run_ranks(both, n_ranks, plain, compiled, backend):
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(got[1], expected[1], rtol=1e-4)
        assert n_graphs > 1 if n_ranks > 1 else n_graphs == 1  # one for blocks alike


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
