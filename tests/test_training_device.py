"""The trainer's way over a device, on host memory over a fake NCCL whose streams run late: the numbers of a CPU."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import pytest
import torch
from fake_nccl import build
from spawn import run_ranks
from training_matrix import GPT2, MLA, MOE
from training_runs import tiny

from training import checkpoint
from training.config import Config
from training.optimizer import PARAMETERS
from training.trainer import Trainer

N_STEPS = 4
SMALL = {"n_layers": 2, "d_model": 16, "d_ff": 24, "n_heads": 4, "n_kv_heads": 2}


def pipe(schedule: str, **more: Any) -> dict[str, Any]:
    return {"pp": 2, "schedule": schedule, **more}


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "dp": (2, {}, {}, {}),
    "bf16, accumulation": (2, {}, {"accumulation": 2, "precision": "bf16"}, {}),
    "tp": (2, {"tp": 2, "tp_overlap": "never"}, {}, {}),
    "tp in pieces": (2, {"tp": 2, "tp_overlap": "always"}, {"recompute": "full"}, {}),
    "ring": (2, {"cp": 2}, {}, {}),
    "ulysses": (2, {"cp": 2, "context": "ulysses"}, {}, {}),
    "1f1b": (2, pipe("1f1b"), {"accumulation": 4}, {}),
    "interleaved": (2, pipe("interleaved", chunks=2), {"accumulation": 4}, {"n_layers": 4}),
    "zbv": (2, pipe("zbv"), {"accumulation": 4}, {"n_layers": 4}),
    "zero 1": (2, {"zero": 1}, {"accumulation": 2}, {}),
    "zero 3": (2, {"zero": 3}, {"precision": "bf16"}, {}),
    "ep": (2, {"ep": 2}, {}, MOE),
    "latent": (2, {"tp": 2, "tp_overlap": "never"}, {"recompute": "selective"}, MLA),
    "dp and tp": (4, {"tp": 2, "tp_overlap": "never", "zero": 2}, {}, {}),
    "pp and cp": (4, pipe("zb_h1", cp=2), {"accumulation": 4}, GPT2),
    "hybrid": (4, {"zero": 3, "zero_ranks": 2}, {}, {}),
}


def config_of(name: str, device: str) -> Config:
    _, layout, train, model = LAYOUTS[name]
    found = tiny(layout=layout, model=SMALL | model, data={"seq_len": 16}, device=device, bucket_kib=4, **train)
    return dataclasses.replace(found, optimizer=dataclasses.replace(found.optimizer, clip_norm=0.5))


def outcome(group: Any, config: Config) -> Any:
    trainer = Trainer(config, group)
    assert trainer.device.late == (config.train.device == "cuda")
    given = []
    for step in range(N_STEPS):
        trainer.submit_step()
        now = trainer.results()
        given += now
        assert [result.step for result in now] == ([step] if trainer.device.late and step else [step + 1][trainer.device.late :])
    given += trainer.results(until_now=True)
    figures = [(result.step, result.loss, result.grad_norm, result.lr) for result in given]
    held_out = trainer.evaluate()
    logits = trainer.next_token_logits([3, 1, 4, 1, 5]).tolist()
    weights = checkpoint.whole_tensors(PARAMETERS, config, trainer.mesh, trainer.optimizer)
    trainer.close()
    return figures, held_out, logits, {name: each.tolist() for name, each in weights.items()}


def run_both(group: Any) -> dict[str, Any]:
    """Of each layout the CPU's outcome and the device's."""
    torch.set_num_threads(1)
    fake = ctypes.CDLL(str(build()))
    fake.fake_device_delay(20)
    found = {}
    for name, (n_ranks, *_) in LAYOUTS.items():
        part = group if n_ranks == group.size else group.split(group.rank // n_ranks)
        found[name] = [outcome(part, config_of(name, device)) for device in ("cpu", "cuda")]
        if part is not group:
            part.close()
    assert fake.fake_nccl_n_communicators() > 0
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    library = str(build())
    variables = {"PYCOMM_NCCL_LIB": library, "PYCOMM_TEST_DEVICE": library}
    return run_ranks(run_both, 4, environment=variables, timeout_s=110)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_device_trains_as_a_cpu_bit_for_bit(by_rank: list[dict[str, Any]], name: str) -> None:
    for found in by_rank:
        cpu, device = found[name]
        assert device == cpu
    assert cpu[0][-1][1] < cpu[0][0][1]
    assert max(norm for _, _, norm, _ in cpu[0]) > 0.5, "nothing was clipped"
