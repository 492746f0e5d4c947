"""The end of a run in words: what was learnt, and what was communicated for it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import torch

from training.machine import peak_memory_bytes
from training.step_result import StepResult
from training.trainer import Trainer


@dataclass
class Totals:
    """Sums over the steps of this process's part of the run."""

    n_steps: int = 0
    n_tokens: int = 0
    step_s: float = 0.0
    blocked_s: float = 0.0
    bubble_s: float = 0.0
    exposed_s: float = 0.0
    busy_s: float = 0.0
    bytes_inside_hosts: int = 0
    bytes_between_hosts: int = 0

    def add(self, result: StepResult) -> None:
        self.n_steps += 1
        self.n_tokens += result.n_tokens
        self.step_s += result.step_s
        self.blocked_s += result.blocked_s
        self.bubble_s += result.bubble_s
        self.exposed_s += result.exposed_s
        self.busy_s += result.busy_s
        self.bytes_inside_hosts += result.bytes_inside_hosts
        self.bytes_between_hosts += result.bytes_between_hosts

    @property
    def hidden_share(self) -> float:
        """The part of the engines' busy time in which no rank waited for them, 0 to 1."""
        return max(0.0, 1.0 - self.blocked_s / self.busy_s) if self.busy_s > 0 else 0.0


def max_peak_memory(trainer: Trainer) -> int:
    """Bytes of the rank that needed most; all ranks together."""
    peak = torch.tensor([peak_memory_bytes(trainer.device)])
    trainer.mesh.world.all_reduce(peak, "max")
    return int(peak)


def training_paragraph(trainer: Trainer, totals: Totals, eval_loss: float, peak_bytes: int) -> str:
    """What was trained, how fast and how well."""
    size = trainer.mesh.world.size
    ranks = "1 rank" if size == 1 else f"{size} ranks ({trainer.mesh.layout})"
    tokens_per_s = totals.n_tokens / totals.step_s
    return _fill(
        f"Trained {trainer.n_parameters:,} parameters on {ranks} to step {trainer.progress.step}: {totals.n_steps} "
        f"steps and {totals.n_tokens:,} tokens in {totals.step_s:.0f} s, {tokens_per_s:,.0f} tokens/s. "
        f"Held-out loss {eval_loss:.4f} nats a token. Peak memory of a rank {peak_bytes / 2**20:.0f} MiB."
    )


def communication_paragraph(trainer: Trainer, totals: Totals) -> str:
    """Bytes inside and between hosts, how much of it was hidden, and which schedule carried the gradients and why."""
    ranks = trainer.mesh.worker
    if trainer.mesh.world.size == 1:
        return "Communication: none; there was one rank."
    rank_s = totals.step_s * ranks.size
    bubble = f" and {totals.bubble_s / rank_s:.0%} in the pipeline's bubble" if totals.bubble_s > 0 else ""
    n_hosts = len(set(ranks.group.host_ids))
    workers = trainer.mesh.layout.workers
    counted = f"all {ranks.size} ranks" if workers == 1 else f"the {ranks.size} ranks of the first of {workers} workers"
    text = _fill(
        f"Communication: a step moved {_mib(totals.bytes_inside_hosts / totals.n_steps)} inside hosts and "
        f"{_mib(totals.bytes_between_hosts / totals.n_steps)} between them, {counted} on {n_hosts} "
        f"{'host' if n_hosts == 1 else 'hosts'} together. Engines were busy {totals.busy_s / ranks.size:.1f} s a rank, "
        f"{totals.hidden_share:.0%} of it hidden behind compute; a rank waited "
        f"{totals.exposed_s / rank_s:.0%} of its time for communication{bubble}."
    )
    return "\n\n".join([text, *_schedules(trainer)])


def _schedules(trainer: Trainer) -> list[str]:
    """Which schedule carried the gradients, and the activations where tensor parallelism cuts them, and why."""
    chosen = []
    buckets = [each for each in trainer.optimizer.exchanged() if each[0].size > 1]
    if buckets:
        group, op, nbytes = max(buckets, key=lambda bucket: bucket[2])
        chosen.append((f"Gradients: {len(buckets)} buckets a step, the largest of", group, op, nbytes))
    tp = trainer.mesh.tp
    if tp.size > 1:
        nbytes = trainer.activation_nbytes
        chosen.append(("Activations: gathered and scattered around each layer,", tp, "reduce_scatter", nbytes))
    products = [
        f"Products beside tp's {key[0]}, {' and '.join(str(list(shape)) for shape in key[1:])}: {plan.why}"
        for key, plan in trainer.mesh.products.items()
    ]
    return [
        f"{what} {nbytes / 1024:.0f} KiB:\n{textwrap.indent(group.group.explain(op, nbytes).rstrip(), '  ')}"
        for what, group, op, nbytes in chosen
    ] + [_fill(each) for each in products]


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.2f} MiB"


def _fill(text: str) -> str:
    return textwrap.fill(text, width=100, break_long_words=False, break_on_hyphens=False)
