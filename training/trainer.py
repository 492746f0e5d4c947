"""One training step, from the batch to the update, and evaluation: everything that a layout must not change."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training import checkpoint
from training.checkpoint import Progress
from training.config import Config, resolve_layout
from training.data import Corpus, open_corpus
from training.errors import DataError, DivergenceError
from training.mesh import Mesh
from training.model import GPT
from training.optimizer import Optimizer, learning_rate
from training.sharding import initialise

if TYPE_CHECKING:
    from pycomm.group import Group


@dataclass(frozen=True)
class StepResult:
    """One step. Loss and norm are of the whole batch and model; times and bytes are summed over all ranks."""

    step: int  # updates done, this one included
    loss: float  # mean cross-entropy of a token, before the update
    grad_norm: float  # before clipping
    lr: float
    step_s: float  # of this rank
    n_tokens: int
    blocked_s: float  # in which a rank did nothing but wait for communication
    busy_s: float  # in which an engine had communication to do
    bytes_inside_hosts: int
    bytes_between_hosts: int
    stopping: bool  # whether some rank was asked to stop

    def exposed_share(self, world_size: int) -> float:
        """The part of the ranks' time that they spent waiting for communication, 0 to 1."""
        return self.blocked_s / (self.step_s * world_size)


class Trainer:
    """The model, its data and its state on one rank. All ranks of the world construct it and call it together."""

    def __init__(self, config: Config, world: Group) -> None:
        self.config = config
        self.mesh = Mesh(world, resolve_layout(config, world.size))
        self.corpus: Corpus = open_corpus(config.data, config.model.vocab_size)
        self.corpus.require(config.train.global_batch, config.train.eval_sequences)
        self._check_same_corpus()
        self.model = GPT(config.model, self.mesh)
        initialise(self.model, self.mesh, config.train.seed)
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        train = config.train
        self.optimizer = Optimizer(
            self.model,
            self.mesh,
            config.optimizer,
            self.dtype,
            train.bucket_kib * 1024 or None,
            None if train.wire == "none" else train.wire,
            train.error_feedback,
        )
        self.progress = Progress()
        self.stop_requested = False  # a signal handler sets it; all ranks learn of it in the same step

    def _check_same_corpus(self) -> None:
        """Raises DataError on every rank where ranks read different data, naming the first that differs from rank 0."""
        world = self.mesh.world
        fingerprints = torch.empty(world.size, dtype=torch.int64)
        world.all_gather(fingerprints, torch.tensor([self.corpus.fingerprint()]))
        differing = (fingerprints != fingerprints[0]).nonzero().flatten().tolist()
        if differing:
            raise DataError(
                f"rank {differing[0]} reads other data at {self.config.data.path!r} than rank 0; give every host the "
                "same files (for 'stdlib': the same Python version)"
            )

    @property
    def n_parameters(self) -> int:
        """Of the whole model."""
        return sum(math.prod(spec.shape) for spec in self.optimizer.specs.values())

    @property
    def activation_nbytes(self) -> int:
        """Of one micro-batch between two layers, over its whole sequence."""
        return self.config.data.seq_len * self._micro_batch_size * self.config.model.d_model * self.dtype.itemsize

    @property
    def _micro_batch_size(self) -> int:
        train = self.config.train
        return train.global_batch // (self.mesh.layout.dp * train.accumulation)

    def train_step(self) -> StepResult:
        """Forward and backward of this rank's part of the global batch, reduction, clipping, update.

        Raises DivergenceError on every rank when loss or gradient norm is not finite; nothing was updated then."""
        train, before = self.config.train, self._counters()
        started = time.perf_counter()
        n_tokens = train.global_batch * self.config.data.seq_len
        loss_sum = torch.zeros(())
        micro_batches = self._micro_batches()
        for index, windows in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with nullcontext() if last else self.optimizer.no_sync():
                cross_entropy, balance = self.model.loss(*self.corpus.batch(windows))
                objective = cross_entropy / n_tokens
                if self.config.model.n_experts:
                    objective = objective + balance * (self.config.model.aux_loss_weight / train.global_batch)
                objective.backward()
            loss_sum += cross_entropy.detach()
        self.optimizer.wait()

        figures = torch.tensor(
            [
                float(loss_sum) / (n_tokens * self.mesh.tp.size),  # every tp rank has the whole loss
                self.optimizer.norm_squared_share(),
                float(self.stop_requested),
                *(now - then for now, then in zip(self._counters(), before, strict=True)),
            ],
            dtype=torch.float64,
        )
        self.mesh.world.all_reduce(figures)
        loss, norm_squared, stopping, blocked_s, busy_s, inside, between = figures.tolist()
        step = self.progress.step + 1
        grad_norm = math.sqrt(norm_squared) if norm_squared >= 0 else math.nan
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise DivergenceError(
                f"step {step}: the loss is {loss}, the gradient norm {grad_norm}; resume from the last checkpoint with "
                "a lower optimizer.lr or longer warmup_steps"
            )
        lr = learning_rate(self.progress.step, train.steps, self.config.optimizer)
        self.optimizer.step(lr, grad_norm)
        self.progress = Progress(step, self.progress.position + train.global_batch)
        return StepResult(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            step_s=time.perf_counter() - started,
            n_tokens=n_tokens,
            blocked_s=blocked_s,
            busy_s=busy_s,
            bytes_inside_hosts=round(inside),
            bytes_between_hosts=round(between),
            stopping=stopping > 0,
        )

    def _micro_batches(self) -> list[list[int]]:
        """This rank's windows of the next global batch, one list for each micro-batch."""
        train, dp, size = self.config.train, self.mesh.layout.dp, self._micro_batch_size
        firsts = [(index * dp + self.mesh.dp_index) * size for index in range(train.accumulation)]
        return [
            [self.corpus.train_window(self.progress.position + first + i, train.seed) for i in range(size)]
            for first in firsts
        ]

    def _counters(self) -> tuple[float, float, int, int]:
        """Seconds blocked, seconds busy, bytes sent inside hosts and between them, of this rank until now."""
        stats = [group.group.stats() for group in self.mesh.groups]
        return (
            self.mesh.blocked_s(),
            sum(each.busy_s for each in stats),
            sum(each.bytes_inside_hosts for each in stats),
            sum(each.bytes_between_hosts for each in stats),
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean cross-entropy of a token on the held-out windows."""
        train, dp, size = self.config.train, self.mesh.layout.dp, self._micro_batch_size
        mine = [
            self.corpus.eval_window(index, train.eval_sequences)
            for index in range(self.mesh.dp_index, train.eval_sequences, dp)
        ]
        total = torch.zeros(1, dtype=torch.float64)
        for first in range(0, len(mine), size):
            total += self.model.loss(*self.corpus.batch(mine[first : first + size]))[0]
        self.mesh.world.all_reduce(total)
        return float(total) / (self.mesh.tp.size * train.eval_sequences * self.config.data.seq_len)

    def next_token_logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits fp32 [V] of what follows tokens (at most seq_len of them count), whole on every rank."""
        context = list(tokens)[-self.config.data.seq_len :]
        padded = context + [0] * (-len(context) % self.mesh.tp.size)  # sequence parallelism needs a multiple of tp
        with torch.no_grad():
            logits, _ = self.model(torch.tensor(padded).unsqueeze(-1))
        return self.model.whole_logits(logits[len(context) - 1])[0]

    def save(self) -> None:
        checkpoint.save(self.config, self.mesh, self.optimizer, self.progress)

    def resume(self) -> bool:
        """Continues from the run's newest checkpoint, if it has one."""
        folder = checkpoint.find(self.config.run_dir, self.mesh)
        if folder is None:
            return False
        self.progress = checkpoint.load(folder, self.config, self.mesh, self.optimizer)
        return True

    def close(self) -> None:
        """Releases what the trainer made; the world stays its owner's."""
        self.optimizer.close()
        self.mesh.close()
