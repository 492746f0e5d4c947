"""Workers that do not agree at every step, held against a plain loop over the workers in one process; their
checkpoints, bit for bit; and what each axis's wire sends. One set of four ranks on two emulated hosts runs it all."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from spawn import run_ranks
from torch import Tensor
from training_runs import tiny

from training import checkpoint, checkpoint_files
from training.config import Config, LayoutConfig, SyncConfig, WireConfig
from training.optimizer import PARAMETERS, learning_rate
from training.pipeline import Scales
from training.trainer import Trainer

N_STEPS = 8
MOE = {"n_experts": 4, "top_k": 2}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}


@dataclasses.dataclass(frozen=True)
class Case:
    n_ranks: int
    sync: dict[str, Any]
    layout: dict[str, Any] = dataclasses.field(default_factory=dict)
    wire: dict[str, Any] = dataclasses.field(default_factory=dict)
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)

    def config(self, out_dir: str, name: str) -> Config:
        config = tiny(out_dir, layout=self.layout, model=self.model, steps=N_STEPS, **self.train)
        # A large eps keeps Adam from making whole steps of rounding; see training_matrix.py.
        optimizer = dataclasses.replace(config.optimizer, eps=1e-4, clip_norm=0.5)
        sync, wire = SyncConfig(**self.sync), WireConfig(**self.wire)
        return dataclasses.replace(config, optimizer=optimizer, sync=sync, wire=wire, name=name)


LOCAL = {"method": "local_sgd", "workers": 2, "every": 3}
DILOCO = {"method": "diloco", "workers": 2, "every": 3}
STREAMING = {"method": "streaming_diloco", "workers": 2, "every": 4, "delay": 2}
STALE = {"method": "stale", "workers": 2, "staleness": 2}

EQUAL = {
    "local_sgd": Case(2, LOCAL),
    "local_sgd of 4 workers": Case(4, {**LOCAL, "workers": 4}),
    "diloco, every worker of 2 copies": Case(4, DILOCO, train={"accumulation": 2}),
    "diloco, tied table on both stages": Case(4, DILOCO, {"pp": 2}, train={"accumulation": 2}),
    "diloco, zero 3": Case(4, DILOCO, {"zero": 3}),
    "streaming_diloco, tp": Case(4, STREAMING, {"tp": 2}),
    "stale": Case(2, {**STALE, "staleness": 1}),
    "stale, cp, zero 1": Case(4, STALE, {"cp": 2, "zero": 1}),
    "stale, gradients in files": Case(4, STALE, {"zero": 2}, train={"offload_gradients": True}),
}
CODED = {"outer": "int8", "dp": "int8"}
RESUMED = {  # saved after step 6, where an exchange is under way: streaming's second fragment, and two gradients
    "synchronous": Case(4, {}, wire={"dp": "int4"}),
    "diloco": Case(4, DILOCO, {"zero": 1}, {"outer": "int4"}),
    "streaming_diloco": Case(4, STREAMING, wire=CODED),
    "stale": Case(4, STALE, {"tp": 2}, CODED),
}
MANY = {"global_batch": 64}  # so that activations outweigh gradients
WIRED = {  # ranks 0 and 2, one on each host, but for outer
    "dp": (Case(2, {}), {"dp": "int8"}),
    "dp, zero": (Case(2, {}, {"zero": 2}), {"dp": "int8", "error_feedback": False}),
    "tp": (Case(2, {}, {"tp": 2}, train=MANY), {"tp": "int8"}),
    "cp": (Case(2, {}, {"cp": 2, "context": "ulysses"}, train=MANY), {"cp": "fp8"}),
    "cp, latents": (Case(2, {}, {"cp": 2, "context": "ulysses"}, train=MANY, model=LATENT), {"cp": "fp8"}),
    "ep": (Case(2, {}, {"ep": 2}, train=MANY, model=MOE), {"ep": "bf16"}),
    "outer": (Case(4, {**LOCAL, "every": 1}), {"outer": "int4"}),
}


class Oracle:
    """The methods in one process: a gradient function, AdamW by its formula, and lists of workers."""

    def __init__(self, alone: Any, case: Case, out_dir: str) -> None:
        self.config = config = case.config(out_dir, "oracle")
        self.n = config.sync.workers
        of_worker = {"accumulation": 1, "global_batch": config.train.global_batch // self.n, "offload_gradients": False}
        train = dataclasses.replace(config.train, **of_worker)
        layout = LayoutConfig()
        single = dataclasses.replace(config, train=train, layout=layout, sync=SyncConfig(), wire=WireConfig())
        self.trainer = Trainer(single, alone)
        self.masters = self.trainer.optimizer.masters
        self.start = {name: each.clone() for name, each in self.masters.items()}

    def gradient(self, worker: dict[str, Any], sequences: list[int]) -> tuple[float, dict[str, Tensor]]:
        """The worker's loss, and the gradient of its mean."""
        trainer = self.trainer
        for name, master in self.masters.items():
            master.copy_(worker["p"][name])
        batch = trainer.corpus.batch([trainer.corpus.train_window(i, self.config.train.seed) for i in sequences])
        n_tokens = batch.tokens.numel()
        loss = float(trainer.pipeline.step([batch], Scales(1 / n_tokens, 0.0), trainer.optimizer))
        trainer.optimizer.wait()
        return loss / n_tokens, {name: each.clone() for name, each in trainer.optimizer.gradients().items()}

    def sequences(self, step: int, worker: int) -> list[int]:
        """As the trainer deals them: micro-batch after micro-batch over all data parallel ranks of all workers."""
        train = self.config.train
        of_micro_batch = train.global_batch // train.accumulation
        of_worker = of_micro_batch // self.n
        firsts = [step * train.global_batch + m * of_micro_batch for m in range(train.accumulation)]
        return [first + worker * of_worker + i for first in firsts for i in range(of_worker)]

    def adamw(self, worker: dict[str, Any], gradient: dict[str, Tensor], step: int) -> None:
        config = self.config.optimizer
        norm = float(sum(each.double().square().sum() for each in gradient.values()) ** 0.5)
        scale = config.clip_norm / norm if norm > config.clip_norm else 1.0
        lr, t = learning_rate(step, N_STEPS, config), worker["t"] + 1
        worker["t"] = t
        for name, p in worker["p"].items():
            g = gradient[name] * scale
            m, v = worker["m"][name], worker["v"][name]
            m.mul_(config.beta1).add_(g, alpha=1 - config.beta1)
            v.mul_(config.beta2).add_(g * g, alpha=1 - config.beta2)
            p.mul_(1 - lr * (config.weight_decay if p.dim() > 1 else 0.0))
            root = (v / (1 - config.beta2**t)).sqrt() + config.eps
            p.sub_(lr * (m / (1 - config.beta1**t)) / root)

    def run(self) -> tuple[list[float], dict[str, Any]]:
        """The first worker's losses, and the parameters that all agree on after the last step."""
        zeros = {name: torch.zeros_like(each) for name, each in self.start.items()}
        workers = [
            {"t": 0}
            | {
                key: {x: each.clone() for x, each in of.items()}
                for key, of in zip("pmv", (self.start, zeros, zeros), strict=True)
            }
            for _ in range(self.n)
        ]
        losses: list[float] = []
        (self.stale if self.config.sync.method == "stale" else self.outer)(workers, losses)
        return losses, {name: each.numpy() for name, each in workers[0]["p"].items()}

    def backward(self, workers: list[dict[str, Any]], step: int, losses: list[float]) -> list[dict[str, Tensor]]:
        found = [self.gradient(worker, self.sequences(step, index)) for index, worker in enumerate(workers)]
        losses.append(found[0][0])
        return [gradient for _, gradient in found]

    def stale(self, workers: list[dict[str, Any]], losses: list[float]) -> None:
        history: list[dict[str, Tensor]] = []
        for step in range(N_STEPS):
            of_workers = self.backward(workers, step, losses)
            history.append({name: sum(each[name] for each in of_workers) / self.n for name in self.start})  # type: ignore[misc]
            late = step - self.config.sync.staleness
            for worker in workers if late >= 0 else ():
                self.adamw(worker, history[late], step)

    def outer(self, workers: list[dict[str, Any]], losses: list[float]) -> None:
        sync = self.config.sync
        streams, plain = sync.method == "streaming_diloco", sync.method == "local_sgd"
        lr, momentum = (1.0, 0.0) if plain else (sync.outer_lr, sync.outer_momentum)
        n, delay, mixing = (sync.fragments, sync.delay, sync.mixing) if streams else (1, 0, 0.0)
        part = {
            name: (int(name.split(".")[1]) if "blocks" in name else 0 if "embedding" in name else n - 1) % n
            for name in self.start
        }
        shared = {name: each.clone() for name, each in self.start.items()}
        velocity = {name: torch.zeros_like(each) for name, each in self.start.items()}
        sent: dict[int, tuple[int, dict[str, Tensor]]] = {}

        def delta(f: int) -> dict[str, Tensor]:
            return {x: sum(shared[x] - w["p"][x] for w in workers) / self.n for x in shared if part[x] == f}  # type: ignore[misc]

        def land(d: dict[str, Tensor]) -> None:
            for x, each in d.items():
                velocity[x] = momentum * velocity[x] + each
                shared[x] = shared[x] - lr * (each + momentum * velocity[x] if momentum else each)
                for w in workers:
                    w["p"][x].copy_(mixing * w["p"][x] + (1 - mixing) * shared[x])

        for step in range(1, N_STEPS + 1):
            for worker, gradient in zip(workers, self.backward(workers, step - 1, losses), strict=True):
                self.adamw(worker, gradient, step - 1)
            last, fresh = step == N_STEPS, set()
            for f in [f for f, (due, _) in sent.items() if due == step or last]:
                land(sent.pop(f)[1])
            for f in range(n):
                if step % sync.every == f * sync.every // n % sync.every and not (last and delay):
                    sent[f] = (step + delay, delta(f))
                    if not delay:
                        land(sent.pop(f)[1])
                        fresh.add(f)
            for f in range(n) if last else ():
                for x, each in delta(f).items() if f not in fresh else ():
                    shared[x] = shared[x] - each
                    for w in workers:
                        w["p"][x].copy_(shared[x])


def losses_and_weights(group: Any, case: Case, out_dir: str, name: str) -> tuple[list[float], float, dict[str, Any]]:
    config = case.config(out_dir, name)
    trainer = Trainer(config, group)
    losses = [trainer.train_step().loss for _ in range(N_STEPS)]
    held_out = trainer.evaluate()
    weights = checkpoint.whole_tensors(PARAMETERS, config, trainer.mesh, trainer.optimizer)
    own = {name: each.clone() for name, each in trainer.optimizer.masters.items()}
    with trainer.sync.shared_parameters():
        differ = [name for name, each in trainer.optimizer.masters.items() if not torch.equal(each, own[name])]
    trainer.close()
    return losses, held_out, {name: each.numpy() for name, each in weights.items()} | {"differ": differ}


def resume(group: Any, case: Case, out_dir: str, name: str) -> list[str]:
    """What differs between a run of N_STEPS and one that was saved after step 6 and resumed."""
    config = case.config(out_dir, name)
    whole = Trainer(config, group)
    for _ in range(6):
        whole.train_step()
    whole.save()
    resumed = Trainer(config, group)
    assert resumed.resume() and resumed.progress == whole.progress
    wrong = []
    for _ in range(2):
        if whole.train_step().loss != resumed.train_step().loss:
            wrong.append(f"loss of step {whole.progress.step}")
    mine, other = whole.optimizer.masters, resumed.optimizer.masters
    wrong += [name for name in mine if not torch.equal(mine[name], other[name])]
    for each in (whole, resumed):  # waits for what is under way, which writes residuals
        each.sync.pack()
        each.sync.release()
    kept, again = ([*each.optimizer.residuals.values(), *each.sync.residuals.values()] for each in (whole, resumed))
    wrong += [f"residual {i}" for i, pair in enumerate(zip(kept, again, strict=True)) if not torch.equal(*pair)]
    total = torch.tensor([any(each.any() for each in kept)])
    group.all_reduce(total, "max")
    if not total:
        wrong.append("no rank lost anything by coding: the case shows nothing")
    for each in (whole, resumed):
        each.close()
    return wrong


def to_other_workers(group: Any, out_dir: str) -> list[str]:
    """What is wrong where the run of two DiLoCo workers goes on synchronously, or as four workers."""
    config = dataclasses.replace(RESUMED["diloco"].config(out_dir, "diloco"), sync=SyncConfig(), wire=WireConfig())
    four = SyncConfig(**{**DILOCO, "workers": 4})
    folder = checkpoint_files.latest(config.run_dir)
    assert folder is not None
    wrong = []
    for each, file in (
        (config, "parameters"),
        (dataclasses.replace(config, sync=four, layout=LayoutConfig()), f"worker_{group.rank % 2:05d}_parameters"),
    ):
        trainer = Trainer(each, group)
        assert trainer.resume() and trainer.progress.step == 6
        stored = load_file(folder / f"{file}.safetensors")
        wrong += [f"{file} {x}" for x, p in trainer.model.named_parameters() if not torch.equal(p, stored[x])]
        trainer.train_step()
        trainer.close()
    return wrong


def bytes_between_hosts(group: Any, case: Case, wire: dict[str, Any], out_dir: str, name: str) -> tuple[float, float]:
    """Bytes of two steps after the first, of all ranks, and the last loss."""
    config = dataclasses.replace(case.config(out_dir, name), wire=WireConfig(**wire))
    trainer = Trainer(config, group)
    trainer.train_step()
    before = sum(each.group.stats().bytes_between_hosts for each in trainer.mesh.groups)
    losses = [trainer.train_step().loss for _ in range(2)]
    sent = sum(each.group.stats().bytes_between_hosts for each in trainer.mesh.groups) - before
    total = torch.tensor([float(sent), losses[-1] / group.size])
    group.all_reduce(total)
    trainer.close()
    return float(total[0]), float(total[1])


def run_all(world: Any, out_dir: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"equal": {}, "oracle": {}, "resumed": {}, "wired": {}}
    across, alone = world.split(world.rank % 2), world.split(world.rank)  # ranks 0, 2 and 1, 3: one on each host
    for name, case in EQUAL.items():
        group = world if case.n_ranks == 4 else across
        found["equal"][name] = losses_and_weights(
            group, case, out_dir, f"equal {group.name} {world.rank % 2}".replace("/", "_")
        )
    for name, case in list(EQUAL.items())[world.rank :: world.size]:
        oracle = Oracle(alone, case, out_dir)
        found["oracle"][name] = oracle.run()
        oracle.trainer.close()
    for name, case in RESUMED.items():
        found["resumed"][name] = resume(world, case, out_dir, name)
    found["others"] = to_other_workers(world, out_dir)
    for name, (case, wire) in WIRED.items():
        group = world if case.n_ranks == 4 else across
        label = f"wired {world.rank % 2 if group is across else ''}"
        found["wired"][name] = [bytes_between_hosts(group, case, each, out_dir, label) for each in ({}, wire)]
    alone.close()
    across.close()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """run_all() of each rank."""
    return run_ranks(run_all, 4, str(tmp_path_factory.mktemp("runs")), hosts=["a", "a", "b", "b"])


@pytest.mark.parametrize("name", EQUAL)
def test_workers_equal_a_plain_loop_over_them(found: list[dict[str, Any]], name: str) -> None:
    losses, _, weights = found[0]["equal"][name]
    expected_losses, expected = next(each["oracle"][name] for each in found if name in each["oracle"])
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
    assert weights.pop("differ") == [], "after the last step a worker has other parameters than it shares"
    for key, each in weights.items():
        np.testing.assert_allclose(each, expected[key], rtol=1e-4, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("name", EQUAL)
def test_every_rank_has_the_same_held_out_loss(found: list[dict[str, Any]], name: str) -> None:
    ranks = range(4) if EQUAL[name].n_ranks == 4 else range(0, 4, 2)
    assert len({found[rank]["equal"][name][1] for rank in ranks}) == 1


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_bit_equal_residuals_and_exchanges_under_way_included(
    found: list[dict[str, Any]], name: str
) -> None:
    assert [each["resumed"][name] for each in found] == [[]] * 4


def test_a_checkpoint_of_workers_resumes_with_none_and_with_more(found: list[dict[str, Any]]) -> None:
    assert [each["others"] for each in found] == [[]] * 4


@pytest.mark.parametrize("name", WIRED)
def test_the_wire_of_an_axis_reaches_its_collectives(found: list[dict[str, Any]], name: str) -> None:
    (plain, loss), (coded, coded_loss) = found[0]["wired"][name]
    most = 0.95 if name == "ep" else 0.75  # bf16 halves rows alone, and gradients cross beside them
    assert coded < most * plain, f"{coded} bytes with the wire, {plain} without"
    assert abs(coded_loss - loss) < 0.05
