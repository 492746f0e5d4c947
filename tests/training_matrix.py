"""The layouts of the matrix test, and the function that runs them all in one set of 8 rank processes."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from training_runs import tiny

from training import checkpoint
from training.config import Config, LayoutConfig, SyncConfig
from training.optimizer import MOMENTS, PARAMETERS
from training.trainer import Trainer

N_STEPS = 20
# Odd sizes: 5 layers, 3 query heads a key head of 10 numbers, a width and a vocabulary that are no powers of two.
DENSE = {"n_layers": 5, "d_model": 44, "n_heads": 12, "n_kv_heads": 4, "head_dim": 10, "d_ff": 52, "vocab_size": 260}
MOE = {**DENSE, "n_experts": 4, "top_k": 2, "moe_every": 5, "n_shared_experts": 1, "d_ff_expert": 28}
UNTIED = {**DENSE, "tie_embeddings": False}
GPT2 = {**DENSE, "block": "gpt2", "max_seq_len": 50, "n_kv_heads": 12}
MLA = {**DENSE, "n_kv_heads": 12, "kv_lora_rank": 14, "q_lora_rank": 18, "qk_rope_head_dim": 6, "v_head_dim": 7}
MLA_MOE = {**MOE, **MLA, "q_lora_rank": 0}
MODELS = {"dense": DENSE, "moe": MOE, "untied": UNTIED, "gpt2": GPT2, "mla": MLA, "mla moe": MLA_MOE}

ALL_IN_FILES = {"offload_parameters": True, "offload_optimizer": True, "offload_gradients": True}


@dataclasses.dataclass(frozen=True)
class Case:
    """layout and train: fields of the configuration. exact: bit-equal to this other case."""

    n_ranks: int
    layout: dict[str, Any]
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: str = "dense"
    exact: str = ""

    @property
    def name(self) -> str:
        given = {**self.layout, **self.train}
        axes = " ".join(f"{key}={value}" for key, value in given.items())
        return f"{self.model} on {self.n_ranks}: {axes or 'dp'}"


def pipe(pp: int, schedule: str, **more: Any) -> dict[str, Any]:
    return {"pp": pp, "schedule": schedule, **more}


ACC = {"accumulation": 4}
CASES = [
    # each axis alone
    Case(2, {}),
    Case(8, {}),
    Case(2, {"tp": 2}),
    Case(4, {"tp": 4}),
    Case(2, {"cp": 2}),
    Case(4, {"cp": 4}),
    Case(4, {"cp": 4, "context": "ulysses"}),
    Case(4, {"ep": 4}, model="moe"),
    Case(2, pipe(2, "gpipe"), ACC),
    Case(2, pipe(2, "1f1b"), ACC),
    Case(2, pipe(2, "interleaved", chunks=2), ACC),
    Case(2, pipe(2, "zb_h1"), ACC),
    Case(2, pipe(2, "zbv"), ACC),
    Case(4, pipe(4, "1f1b", stage_layers="1,2,1,1"), ACC),
    Case(4, pipe(4, "zb_h1"), {"accumulation": 8}),
    # ZeRO
    Case(2, {"zero": 1}, exact="dense on 2: dp"),
    Case(2, {"zero": 2}, exact="dense on 2: dp"),
    Case(2, {"zero": 3}, exact="dense on 2: dp"),
    Case(4, {"zero": 3, "zero_ranks": 2}, {"accumulation": 2}),
    Case(4, {"zero": 1, "ep": 2}, model="moe"),
    Case(4, {"zero": 2}, {"accumulation": 2}),
    # accumulation, checkpointing, offload, chunks of logits
    Case(1, {}, ACC),
    Case(1, {}, {"recompute": "selective"}, exact="dense"),
    Case(1, {}, {"recompute": "full"}, exact="dense"),
    Case(1, {}, {"offload_optimizer": True}, exact="dense"),
    Case(1, {}, {"offload_activations": True}, exact="dense"),
    Case(1, {}, {"loss_chunk": 37}),
    # pairs
    Case(4, {"tp": 2}),
    Case(4, {"cp": 2}),
    Case(4, {"cp": 2, "context": "ulysses", "tp": 2}),
    Case(4, {"cp": 2, "tp": 2}),
    Case(4, pipe(2, "1f1b"), ACC),
    Case(4, pipe(2, "zbv", tp=2), ACC),
    Case(4, pipe(2, "zb_h1", cp=2), ACC),
    Case(4, pipe(2, "interleaved", chunks=2, ep=2), {"accumulation": 2}, "moe"),
    Case(4, {"ep": 2, "tp": 2}, model="moe"),
    Case(4, {"ep": 2, "moe_exchange": "overlapped", "moe_chunks": 2}, {"recompute": "full"}, "moe"),
    # experts cut over tensor parallel ranks
    Case(2, {"tp": 2, "experts_over_tp": "spread", "moe_exchange": "overlapped", "moe_chunks": 2}, model="moe"),
    Case(4, {"ep": 2, "tp": 2, "experts_over_tp": "spread"}, model="moe"),
    Case(8, {"tp": 2, "cp": 2, "ep": 2, "experts_over_tp": "spread", "zero": 1}, {"recompute": "full"}, "moe"),
    Case(8, pipe(2, "zbv", tp=4, experts_over_tp="spread", zero=3), {"accumulation": 4}, "moe"),
    # or split over them
    Case(4, {"ep": 2, "tp": 2, "experts_over_tp": "split"}, model="moe"),
    Case(4, {"tp": 4, "experts_over_tp": "split", "moe_exchange": "overlapped", "moe_chunks": 2}, model="moe"),
    Case(8, pipe(2, "zb_h1", tp=2, ep=2, experts_over_tp="split", zero=2), {**ACC, "recompute": "full"}, "mla moe"),
    Case(8, {"tp": 2, "cp": 2, "ep": 2, "experts_over_tp": "split", "zero": 3}, model="moe"),
    Case(4, {"ep": 2, "cp": 2}, model="moe"),
    Case(4, {"zero": 3, "tp": 2}),
    Case(4, {"zero": 3, "cp": 2}, {"recompute": "full"}),
    Case(4, pipe(2, "1f1b", zero=1), ACC),
    Case(4, pipe(2, "zbv", zero=2), {"accumulation": 2}),
    Case(4, pipe(2, "1f1b", zero=3), {"accumulation": 2, "recompute": "full"}),
    Case(4, {"tp": 2}, {"recompute": "full", "offload_activations": True}),
    Case(2, {"zero": 3}, {"offload_optimizer": True}, exact="dense on 2: dp"),
    Case(1, {"zero": 3}, {"offload_parameters": True}, exact="dense"),
    Case(2, {"zero": 3}, {"offload_parameters": True, "accumulation": 2}, exact="dense on 2: zero=3 accumulation=2"),
    Case(2, {"zero": 3}, {"accumulation": 2}),
    Case(2, {"zero": 3}, {"offload_gradients": True, "accumulation": 2}, exact="dense on 2: zero=3 accumulation=2"),
    Case(2, {"zero": 3, "zero_ranks": 1}, {"offload_gradients": True}, exact="dense on 2: dp"),
    Case(2, {"zero": 2}, {"offload_gradients": True}, exact="dense on 2: dp"),
    Case(4, pipe(2, "1f1b", ep=2, zero=2), {"accumulation": 2, "offload_gradients": True}, "moe"),
    Case(2, {"zero": 3, "zero_ranks": 1}, {"offload_parameters": True}, exact="dense on 2: dp"),
    Case(4, {"zero": 3, "zero_ranks": 2}, {**ALL_IN_FILES, "recompute": "full"}),
    # tensor parallel products in pieces
    Case(4, {"tp": 4, "tp_overlap": "always"}),
    Case(4, {"tp": 2, "tp_overlap": "always"}, {"recompute": "full", "offload_activations": True}),
    Case(4, {"tp": 2, "tp_overlap": "always", "zero": 3}),
    Case(4, pipe(2, "zb_h1", tp=2, tp_overlap="always"), ACC),
    Case(4, {"tp": 2, "cp": 2, "tp_overlap": "always"}, model="gpt2"),
    # other models
    Case(4, pipe(2, "1f1b"), ACC, "untied"),
    Case(4, pipe(2, "zbv", tp=2), ACC, "untied"),
    Case(4, {"tp": 2, "cp": 2}, model="gpt2"),
    Case(4, pipe(2, "zb_h1", zero=1), ACC, "gpt2"),
    # latent attention
    Case(4, {"tp": 2, "cp": 2}, {"recompute": "selective"}, "mla"),
    Case(4, {"cp": 2, "context": "ulysses", "zero": 3}, {"recompute": "full"}, "mla"),
    Case(2, {"cp": 2, "context_latents": False}, model="mla"),
    Case(2, {"cp": 2}, {"offload_activations": True}, "mla"),
    Case(4, pipe(2, "zb_h1", cp=2), ACC, "mla moe"),
    Case(8, pipe(2, "zb_h1", tp=2, zero=1), ACC, "mla"),
    Case(4, {"tp": 2, "ep": 2, "tp_overlap": "always"}, model="mla moe"),
    # triples, and every axis
    Case(8, pipe(2, "1f1b", tp=2), ACC),
    Case(8, pipe(2, "zbv", zero=3, zero_ranks=2), {"accumulation": 2}),
    Case(8, {"tp": 2, "cp": 2, "zero": 3, "zero_ranks": 2}, {"recompute": "selective"}),
    Case(8, pipe(2, "interleaved", chunks=2, tp=2, ep=2, zero=2), ACC, "moe"),
    Case(8, pipe(2, "zb_h1", tp=2, cp=2), {"accumulation": 4, "recompute": "full"}, "moe"),
    Case(8, pipe(2, "zbv", cp=2, ep=2, zero=3), {"accumulation": 4, "recompute": "full"}, "moe"),
    Case(8, pipe(2, "1f1b", tp=2, cp=2, zero=1), {"accumulation": 4, "offload_optimizer": True}, "untied"),
    # copies of the pipeline outermost
    # (bit-equal but for a tied table, whose gradient adds up over both stages in another order)
    Case(4, pipe(2, "1f1b", outermost="dp"), ACC, "untied", "untied on 4: pp=2 schedule=1f1b accumulation=4"),
    Case(8, pipe(2, "zbv", tp=2, outermost="dp", zero=3), ACC),
    Case(8, pipe(2, "zb_h1", ep=2, outermost="dp", zero=2, zero_ranks=2), {"accumulation": 2}, "moe"),
    Case(8, pipe(2, "zb_h1", cp=2, outermost="dp", zero=2), {"accumulation": 4, "offload_gradients": True}, "mla"),
]
CASES += [Case(1, {}, {}, model) for model in MODELS]  # what the others are compared with


def config_of(case: Case, out_dir: Path | str) -> Config:
    train = {"bucket_kib": 16, **case.train}
    config = tiny(out_dir, model=MODELS[case.model], data={"seq_len": 48}, **train)
    # With a large eps Adam's step depends on the size of the gradient, so that a wrong scale shows; with a small one it
    # makes whole steps of the rounding of gradients near 0.
    optimizer = dataclasses.replace(config.optimizer, clip_norm=0.5, eps=1e-4)
    return dataclasses.replace(config, layout=LayoutConfig(**case.layout), optimizer=optimizer, name=f"{id(case)}")


@dataclasses.dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    held_out: float
    weights: dict[str, Any]  # on the first rank
    wall_s: float


def run_case(group: Any, case: Case, out_dir: str) -> Outcome:
    started = time.perf_counter()
    config = config_of(case, out_dir)
    trainer = Trainer(config, group)
    results = [trainer.train_step() for _ in range(N_STEPS)]
    held_out = trainer.evaluate()
    weights = checkpoint.whole_tensors(PARAMETERS, config, trainer.mesh, trainer.optimizer)
    trainer.close()
    return Outcome(
        [result.loss for result in results],
        [result.grad_norm for result in results],
        held_out,
        {name: each.numpy() for name, each in weights.items()},
        time.perf_counter() - started,
    )


# One run whose checkpoints go from each of these layouts to the next.
CHAIN = [
    Case(8, pipe(2, "zbv", tp=2, ep=2, experts_over_tp="split"), ACC, "moe"),
    Case(8, {"cp": 2, "zero": 3, "zero_ranks": 2}, model="moe"),
    Case(8, pipe(4, "1f1b", zero=1, stage_layers="1,2,1,1"), ACC, "moe"),
    Case(
        8,
        {"tp": 2, "cp": 2, "context": "ulysses", "ep": 2, "experts_over_tp": "spread"},
        {"offload_optimizer": True},
        "moe",
    ),
    Case(8, pipe(2, "interleaved", chunks=2, zero=2, cp=2, outermost="dp"), ACC, "moe"),
    Case(8, {"zero": 3}, {"recompute": "full"}, "moe"),
]


# Another one, in bf16, fp32 and bf16 again, two of them with state in files.
LATENT_CHAIN = [
    Case(8, {"tp": 2, "cp": 2, "zero": 3}, {"precision": "bf16", **ALL_IN_FILES}, "mla"),
    Case(8, pipe(2, "zb_h1", tp=2, zero=1), ACC, "mla"),
    Case(8, {"cp": 2, "context": "ulysses", "zero": 2}, {"precision": "bf16", "offload_gradients": True}, "mla"),
]


def run_chain(world: Any, chain: list[Case], out_dir: str) -> tuple[list[float], list[str]]:
    """The losses of three steps in each layout of a chain, each resumed from what the one before it saved, and on the
    first rank the tensors that are not resumed bit for bit."""
    losses: list[float] = []
    saved: dict[str, dict[str, torch.Tensor]] = {}
    wrong: list[str] = []
    for case in chain:
        config = dataclasses.replace(config_of(case, out_dir), name=f"chain {case.model}")
        trainer = Trainer(config, world)

        def state(config: Config = config, trainer: Trainer = trainer) -> dict[str, dict[str, torch.Tensor]]:
            kinds = (PARAMETERS, *MOMENTS)
            return {kind: checkpoint.whole_tensors(kind, config, trainer.mesh, trainer.optimizer) for kind in kinds}

        assert trainer.resume() == bool(losses)
        if losses:
            now = state()
            wrong += [f"{case.name}: {k} {x}" for k in saved for x in saved[k] if not saved[k][x].equal(now[k][x])]
        losses += [trainer.train_step().loss for _ in range(3)]
        trainer.save()
        saved = state()
        assert bool(saved[PARAMETERS]) == (world.rank == 0)
        trainer.close()
    return losses, wrong


def run_workers(world: Any, out_dir: str) -> list[str]:
    """What differs where two workers, each of two copies of a pipeline, have copies outermost instead of stages: from
    the start, and from a checkpoint of the others amid an exchange."""
    base = config_of(Case(8, pipe(2, "1f1b"), {"accumulation": 2}, "untied"), out_dir)
    base = dataclasses.replace(base, sync=SyncConfig("streaming_diloco", workers=2, every=4, delay=2))
    losses: list[list[float]] = []
    weights: list[list[dict[str, torch.Tensor]]] = []
    for name, outermost in (("stages", "pp"), ("copies", "dp"), ("stages", "dp")):
        config = dataclasses.replace(base, name=name, layout=dataclasses.replace(base.layout, outermost=outermost))
        trainer = Trainer(config, world)
        resumed = trainer.resume()
        assert resumed == (len(losses) == 2) and trainer.progress.step == 3 * resumed
        losses.append([])
        while trainer.progress.step < 5:
            losses[-1].append(trainer.train_step().loss)
            if trainer.progress.step == 3 and outermost == "pp":
                trainer.save()
        state = (config, trainer.mesh, trainer.optimizer)
        weights.append([checkpoint.whole_tensors(PARAMETERS, *state, worker) for worker in range(2)])
        trainer.close()
    wrong = [f"losses {losses}"] if losses[1] != losses[0] or losses[2] != losses[0][3:] else []
    for way, workers in zip(("from the start", "resumed"), weights[1:], strict=True):
        for worker, (mine, others) in enumerate(zip(workers, weights[0], strict=True)):
            wrong += [f"{way}, worker {worker}: {name}" for name in others if not others[name].equal(mine[name])]
    return wrong


@dataclasses.dataclass
class Found:
    """Of one rank. chains: of each the losses, and what was not resumed bit for bit. workers: run_workers()."""

    outcomes: dict[str, Outcome]
    chains: list[tuple[list[float], list[str]]]
    workers: list[str]


def run_all(world: Any, cases: list[Case], out_dir: str) -> Found:
    """The outcomes are of the cases whose first rank is this one. Cases of fewer ranks run beside each other."""
    torch.set_num_threads(1)
    found = {}
    for n_ranks in sorted({case.n_ranks for case in cases}):
        mine = [case for case in cases if case.n_ranks == n_ranks]
        n_groups = world.size // n_ranks
        group = world if n_groups == 1 else world.split(world.rank // n_ranks)
        for case in mine[world.rank // n_ranks :: n_groups]:
            try:
                outcome = run_case(group, case, out_dir)
            except Exception as error:
                raise RuntimeError(f"in the case {case.name!r}") from error
            if group.rank == 0:
                found[case.name] = outcome
        if group is not world:
            group.close()
    chains = [run_chain(world, chain, out_dir) for chain in (CHAIN, LATENT_CHAIN)]
    return Found(found, chains, run_workers(world, out_dir))
