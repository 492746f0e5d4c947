"""The trainer's way over a device, on host memory over a fake NCCL whose streams run late: the numbers of a CPU."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_nccl import build
from spawn import run_ranks
from training_matrix import GPT2, MLA, MOE
from training_runs import tiny

import training.trainer
from training import checkpoint
from training.config import Config, SyncConfig
from training.device import HOST, Device, Fetched
from training.errors import ConfigError, DivergenceError
from training.host_memory import HostActivations
from training.metrics import read_metrics
from training.optimizer import PARAMETERS
from training.run import run
from training.trainer import Trainer

N_STEPS = 5
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
    "offload": (2, {}, {"offload_optimizer": True, "offload_activations": True, "precision": "bf16"}, {}),
    "offload, fp32": (1, {}, {"offload_optimizer": True, "offload_activations": True, "recompute": "full"}, {}),
    "zero 1": (2, {"zero": 1}, {"accumulation": 2}, {}),
    "zero 3": (2, {"zero": 3}, {"precision": "bf16"}, {}),
    "ep": (2, {"ep": 2}, {}, MOE),
    "graph": (2, {"tp": 2, "context": "ulysses"}, {"cuda_graph": True, "accumulation": 2}, {}),
    "latent": (2, {"tp": 2, "tp_overlap": "never"}, {"recompute": "selective"}, MLA),
    "latent, ring": (2, {"cp": 2}, {}, MLA),
    "latent, ulysses, offload": (2, {"cp": 2, "context": "ulysses"}, {"offload_activations": True}, MLA),
    "dp and tp": (4, {"tp": 2, "tp_overlap": "never", "zero": 2}, {}, {}),
    "pp and cp": (4, pipe("zb_h1", cp=2), {"accumulation": 4}, GPT2),
    "copies outermost": (4, pipe("1f1b", outermost="dp"), {"accumulation": 4}, {}),
    "hybrid": (4, {"zero": 3, "zero_ranks": 2}, {}, {}),
    "experts over tp": (4, {"tp": 2, "ep": 2, "experts_over_tp": "split", "tp_overlap": "never"}, {}, MOE),
    "streaming diloco": (2, {}, {}, {}),
    "stale": (2, {"zero": 1}, {}, {}),
}
SYNC = {
    "streaming diloco": SyncConfig("streaming_diloco", workers=2, every=2, fragments=2),
    "stale": SyncConfig("stale", workers=2, staleness=1),
}


def config_of(name: str, device: str) -> Config:
    _, layout, train, model = LAYOUTS[name]
    if device == "cpu":
        train = {**train, "cuda_graph": False}
    found = tiny(layout=layout, model=SMALL | model, data={"seq_len": 16}, device=device, bucket_kib=4, **train)
    optimizer = dataclasses.replace(found.optimizer, clip_norm=0.5)
    return dataclasses.replace(found, optimizer=optimizer, sync=SYNC.get(name, found.sync))


def outcome(group: Any, config: Config) -> Any:
    trainer = Trainer(config, group)
    assert trainer.device.late == (config.train.device == "cuda")
    given = []
    for step in range(N_STEPS):
        trainer.submit_step()
        now = trainer.results()
        given += now
        assert [result.step for result in now] == ([step] * (step > 0) if trainer.device.late else [step + 1])
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
    offloads: list[HostActivations] = []

    def with_small_ones(*given: Any) -> HostActivations:
        offloads.append(HostActivations(*given, min_nbytes=256))
        return offloads[-1]

    training.trainer.HostActivations = with_small_ones
    found = {}
    for name, (n_ranks, *_) in LAYOUTS.items():
        part = group if n_ranks == group.size else group.split(group.rank // n_ranks)
        found[name] = [outcome(part, config_of(name, device)) for device in ("cpu", "cuda")]
        if part is not group:
            part.close()
    assert fake.fake_nccl_n_communicators() > 0
    assert offloads and all(each.nbytes > 0 for each in offloads)
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    library = str(build())
    variables = {"PYCOMM_NCCL_LIB": library, "PYCOMM_TEST_DEVICE": library}
    return run_ranks(run_both, 4, environment=variables)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_device_trains_as_a_cpu_bit_for_bit(by_rank: list[dict[str, Any]], name: str) -> None:
    for found in by_rank:
        cpu, device = found[name]
        if name == "graph":  # which takes the learning rate in fp32
            np.testing.assert_allclose(device[0], cpu[0], rtol=1e-5)
            np.testing.assert_allclose(device[1], cpu[1], rtol=1e-5)
        else:
            assert device == cpu
    weights = by_rank[0][name][0][3]  # which rank 0 alone has
    assert set(weights["norm.weight"]) != {1.0}, "nothing was learned"
    assert max(norm for _, _, norm, _ in cpu[0]) > 0.5, "nothing was clipped"


def run_there(group: Any, config: Config) -> None:
    run(config, group)


def test_a_run_leaves_the_same_and_goes_on_elsewhere(tmp_path: Path) -> None:
    """Every step has its line, although a device's come one step later; checkpoints know no device."""
    library = str(build())
    variables = {"PYCOMM_NCCL_LIB": library, "PYCOMM_TEST_DEVICE": library}
    records, samples = {}, {}
    for first, then in (("cpu", "cuda"), ("cuda", "cpu")):
        for device, steps in ((first, 6), (then, 9)):
            config = tiny(tmp_path / first, device=device, steps=steps, eval_every=3, checkpoint_every=4)
            run_ranks(run_there, 2, config, environment=variables)
        records[first] = read_metrics(config.run_dir / "metrics.jsonl")
        samples[first] = (config.run_dir / "sample.txt").read_text()
    assert samples["cpu"] == samples["cuda"]
    for line, other in zip(records["cpu"], records["cuda"], strict=True):
        for key in ("step", "loss", "grad_norm", "lr", "n_tokens", "eval_loss"):
            assert line.get(key) == other.get(key), (line["step"], key)
    assert [line["step"] for line in records["cuda"]] == list(range(1, 10))
    assert [line["step"] for line in records["cuda"] if "eval_loss" in line] == [3, 6, 9]
    assert all(line["step_s"] > 0 for line in records["cuda"])


def diverge(group: Any) -> tuple[str, bool]:
    """What is said of a step whose gradient is not finite, and whether the model is the one before it."""
    trainer = Trainer(tiny(layout={"pp": 2}, model=SMALL, data={"seq_len": 16}, device="cuda"), group)
    trainer.train_step()
    before = [each.clone() for each in trainer.model.parameters()]
    if group.rank == 1:
        trainer.model.blocks["1"].feed_forward.register_full_backward_pre_hook(
            lambda _, grads: tuple(grad * float("nan") for grad in grads)
        )
    trainer.submit_step()
    assert trainer.results() == []
    with pytest.raises(DivergenceError) as caught:
        trainer.submit_step()
    same = all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), before, strict=True))
    trainer.close()
    return str(caught.value), same


def test_a_step_that_is_not_finite_changes_nothing_and_is_named_one_step_later() -> None:
    library = str(build())
    for text, same in run_ranks(diverge, 2, environment={"PYCOMM_NCCL_LIB": library, "PYCOMM_TEST_DEVICE": library}):
        assert text.startswith("step 2: the loss is ") and "the gradient norm nan; " in text
        assert "; first nan in the gradient of blocks.1" in text and "on rank 1" in text
        assert same


@dataclasses.dataclass(frozen=True)
class OnPaper(Device):
    """A device whose tensors have no values: reading one raises, as does mixing them with the host's."""

    def fetch(self, x: torch.Tensor) -> Fetched:
        assert x.device == self.where
        return Fetched(HOST, torch.ones(x.shape, dtype=x.dtype))

    def bring(self, x: torch.Tensor, home: torch.Tensor) -> None:
        assert x.device == self.where and x.shape == home.shape


ON_PAPER: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({}, {}, {}, {}),
    ({}, {"precision": "bf16", "accumulation": 2, "recompute": "full"}, {"tie_embeddings": False}, {}),
    ({"zero": 1}, {"accumulation": 2}, {}, {"document_mask": True}),
    ({"zero": 3}, {"precision": "bf16"}, {}, {}),
    ({}, {"recompute": "selective"}, MLA, {}),
    ({}, {}, GPT2, {}),
    ({}, {"offload_activations": True, "precision": "bf16"}, {}, {}),
    ({}, {"matmul": "fp8", "precision": "bf16"}, {"d_model": 32, "d_ff": 64, "head_dim": 16}, {}),
]


def steps_on_paper(group: Any) -> None:
    training.trainer.choose_device = lambda asked, world: OnPaper(torch.device("meta"), late=True)
    for layout, train, model, data in ON_PAPER:
        config = tiny(layout=layout, model=SMALL | model, data={"seq_len": 16, **data}, **train)
        trainer = Trainer(config, group)
        for _ in range(3):
            trainer.submit_step()
        made = [*trainer.model.parameters(), *trainer.model.buffers(), *trainer.optimizer.masters.values()]
        assert {each.device.type for each in made} == {"meta"}
        with pytest.raises(RuntimeError, match="meta"):
            float(made[0].detach().sum())
        trainer.close()


def test_a_step_reads_nothing_from_its_device_and_mixes_nothing_with_the_host() -> None:
    run_ranks(steps_on_paper, 1)


def refused(group: Any) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        Trainer(tiny(device="cuda"), group)
    trainer = Trainer(tiny(device="auto"), group)
    trainer.close()
    return str(caught.value), str(trainer.device.where)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpus_that_are_not_there_are_named_and_auto_does_without() -> None:
    for text, where in run_ranks(refused, 2):
        assert "train.device is 'cuda', but rank 0 has no GPU of its own" in text
        assert "set train.device to 'cpu'" in text
        assert where == "cpu"
