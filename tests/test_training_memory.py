"""The memory estimate against what ranks hold, tensor by tensor, and the refusal of a run that does not fit."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from spawn import run_ranks
from torch import Tensor
from training_runs import tiny

from training import memory
from training.errors import ConfigError
from training.model import specs_of_whole
from training.optimizer import MOMENTS, PARAMETERS
from training.trainer import Trainer

MODEL = {"n_layers": 4, "d_model": 64, "d_ff": 160}
LAYOUTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"zero": 1}, {}),
    ({"zero": 2}, {"precision": "bf16"}),
    ({"zero": 3}, {"precision": "bf16"}),
    ({"tp": 2}, {"recompute": "selective"}),
    ({"pp": 2}, {"accumulation": 4}),
    ({"cp": 2}, {"recompute": "full"}),
]


def nbytes(tensors: Any, seen: set[int]) -> int:
    """Of the distinct storages that are not in seen, which they join."""
    total = 0
    for each in tensors:
        storage = each.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total


def measured(trainer: Trainer) -> tuple[int, int, int]:
    """Bytes of parameters, of optimizer state, and of what one forward of a block saves at most."""
    seen: set[int] = set()
    parameters = nbytes(trainer.model.parameters(), seen)
    state = trainer.optimizer._adamw.state
    masters = list(trainer.optimizer._of(PARAMETERS).values())
    rounded = [unit.shard for unit in getattr(trainer.optimizer._state, "_units", [])]
    optimizer = nbytes([*masters, *rounded, *(state[x][m] for x in masters for m in MOMENTS)], seen)
    saved: list[Tensor] = []

    rows = trainer.config.data.seq_len // trainer.mesh.sequence.size
    x = torch.zeros(rows, trainer._micro_batch_size, trainer.config.model.d_model, dtype=trainer.dtype)
    kept = {p.untyped_storage()._cdata for p in trainer.model.parameters()}

    def pack(each: Tensor) -> Tensor:
        saved.append(each)
        return each

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        trainer.model.run_blocks(0, x.requires_grad_(), None)
    return parameters, optimizer, nbytes(saved, kept) // len(trainer.model.chunks[0])


def run(group: Any) -> list[Any]:
    torch.set_num_threads(1)
    found = []
    for layout, train in LAYOUTS:
        config = tiny(layout=layout, model=MODEL, bucket_kib=16, **train)
        trainer = Trainer(config, group)
        trainer.train_step()
        gc.collect()
        specs = specs_of_whole(config.model, trainer.mesh)
        predicted = memory.estimate(config, trainer.mesh.layout, specs, trainer.mesh.pp_index)
        block = memory._block(config, trainer.mesh.layout, 0)
        found.append((predicted, block, measured(trainer)))
        trainer.close()
    return found


def test_the_estimate_counts_what_ranks_hold() -> None:
    for rank, found in enumerate(run_ranks(run, 4)):
        for (layout, train), (predicted, block, (parameters, optimizer, saved)) in zip(LAYOUTS, found, strict=True):
            what = f"rank {rank}, {layout} {train}"
            if layout.get("zero") != 3:  # else blocks are empty between steps
                assert predicted.parameters == pytest.approx(parameters, rel=0.02), what
            assert predicted.optimizer == pytest.approx(optimizer, rel=0.02), what
            tolerance = 0.15 if train.get("precision") == "bf16" else 0.10  # measured: 10 % below in bf16
            assert block == pytest.approx(saved, rel=tolerance), what


def refusal(group: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Trainer(tiny(layout={"pp": 2}, memory_gib=1e-5), group)
    return str(caught.value)


def test_a_run_that_does_not_fit_is_refused_with_what_to_change() -> None:
    for message in run_ranks(refusal, 2):
        assert "a rank of pipeline stage " in message and "train.memory_gib allows 1e-05; " in message
        assert "set train.recompute to 'full'" in message or "set layout.zero to 1" in message
