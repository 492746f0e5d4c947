"""One training step, from the batch to the update, and evaluation: everything that a layout must not change."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training import checkpoint, schedules
from training.cache import KeyValueCache
from training.checkpoint_files import Progress
from training.config import Config
from training.context import own_part, positions
from training.data import Batch, Corpus, Prefetcher, open_corpus
from training.diagnose import first_not_finite, largest_loss_and_gradient
from training.errors import DataError, DivergenceError
from training.layout import resolve_layout, stages_of
from training.machine import give_back_free_memory, peak_memory_bytes, process_nbytes
from training.memory import require_fit
from training.mesh import AXES, Mesh
from training.metered import SLOW_S
from training.model import GPT, Parallel, specs_of_whole
from training.moe import balance_routers
from training.offload import ActivationFile
from training.optimizer import Optimizer, learning_rate
from training.outer import Outer
from training.pipeline import Pipeline, Saving, Scales
from training.sharding import filler
from training.stale import Stale
from training.synchronise import Synchronous

if TYPE_CHECKING:
    from pycomm.group import Group

_LOSSES = 20  # of the last steps, whose median a jump is told by


@dataclass(frozen=True)
class StepResult:
    """One step. Loss and norm are of the whole batch and model, times and bytes are summed over all ranks; with several
    workers ([sync]), those are the batch, model and ranks of this rank's worker."""

    step: int  # updates done, this one included
    loss: float  # mean cross-entropy of a token, before the update
    grad_norm: float  # before clipping
    lr: float
    step_s: float  # of this rank
    n_tokens: int  # of all workers
    blocked_s: float  # in which a rank did nothing but wait for communication
    blocked_by_axis_s: dict[str, float]  # the same, of each of the mesh's groups
    busy_s: float  # in which an engine had communication to do
    bytes_inside_hosts: int
    bytes_between_hosts: int
    peak_memory_bytes: int  # of the rank that had most
    slowest_rank: int  # whose own work took longest: the others waited for it
    slowest_excess_s: float  # by how much longer than the median rank's
    stopping: bool  # whether some rank was asked to stop, and all know of it

    def exposed_share(self, n_ranks: int) -> float:
        """The part of the worker's n_ranks' time that they spent waiting for communication, 0 to 1."""
        return self.blocked_s / (self.step_s * n_ranks)


class Trainer:
    """The model, its data and its state on one rank. All ranks of the world construct it and call it together."""

    def __init__(self, config: Config, world: Group) -> None:
        self.config = config
        train, layout = config.train, config.layout
        stages = stages_of(config)
        self.mesh = Mesh(world, resolve_layout(config, world.size), stages.placement, config.wire)
        checkpoint.require_same_model(config, self.mesh)
        specs = specs_of_whole(config.model, self.mesh)
        self.memory = require_fit(config, self.mesh.layout, specs, process_nbytes())
        self.corpus: Corpus = open_corpus(config.data, config.model.vocab_size)
        self.corpus.require(train.global_batch, train.eval_sequences)
        self._check_same_corpus()
        parallel = Parallel(stages, layout.context, train.recompute, train.loss_chunk)
        self.model = GPT(config.model, self.mesh, parallel)
        self.dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        self.optimizer = Optimizer(self.model, self.mesh, config, self.dtype, filler(self.model, self.mesh, train.seed))
        self.sync = _synchronisation(self.optimizer, self.mesh, config)
        saving: Saving = nullcontext
        if train.offload_activations:
            saving = ActivationFile(config.offload_dir, self.model.parameters()).saving
        schedule = schedules.plan(layout.schedule, layout.pp, train.accumulation, layout.chunks)
        self.pipeline = Pipeline(self.model, self.mesh, schedule, self.dtype, saving)
        self.progress = Progress()
        self._batches = Prefetcher(self.corpus, self._micro_batches, train.global_batch)
        self._recent_losses: deque[float] = deque(maxlen=_LOSSES)
        self.stop_requested = False  # a signal handler sets it; all ranks learn of it in the same step

    def _check_same_corpus(self) -> None:
        """Raises DataError on every rank where ranks read different data, naming the first that differs from rank 0."""
        world = self.mesh.world
        fingerprints = torch.empty(world.size, dtype=torch.int64)
        world.all_gather(fingerprints, torch.tensor([self.corpus.fingerprint()]))
        differing = (fingerprints != fingerprints[0]).nonzero().flatten().tolist()
        if differing:
            raise DataError(
                f"rank {differing[0]} reads other data at {self.corpus.name!r} than rank 0; give every host the "
                "same files (for 'stdlib': the same Python version)"
            )

    @property
    def n_parameters(self) -> int:
        """Of the whole model."""
        return self.config.model.n_parameters

    @property
    def activation_nbytes(self) -> int:
        """Of one micro-batch between two layers, over its whole sequence."""
        return self.config.data.seq_len * self._micro_batch_size * self.config.model.d_model * self.dtype.itemsize

    @property
    def _micro_batch_size(self) -> int:
        train = self.config.train
        return train.global_batch // (self.mesh.layout.n_data * train.accumulation)

    def train_step(self) -> StepResult:
        """Forward and backward of this rank's part of the global batch, reduction, clipping, update.

        Raises DivergenceError on every rank when loss or gradient norm is not finite, or the loss jumped; nothing was
        updated then."""
        train, before = self.config.train, self._counters()
        started = time.perf_counter()
        step = self.progress.step + 1
        n_tokens = train.global_batch // self.mesh.layout.workers * self.config.data.seq_len
        batches = self._batches.at(self.progress.position)
        loss_sum = self._forward_backward(batches, n_tokens)
        updates = self.sync.reduce(step)
        worked_s = time.perf_counter() - started
        passed = [now - then for now, then in zip(self._counters(), before, strict=True)]
        own = [
            loss_sum / (n_tokens * self.mesh.tp.size),  # every tp rank has the whole loss
            self.optimizer.norm_squared_share(),
            float(self.stop_requested),
            worked_s - sum(passed[3:]),
            float(peak_memory_bytes()),
            *passed,
        ]
        worker = self.mesh.worker
        ranks = torch.empty(worker.size, len(own), dtype=torch.float64)
        worker.all_gather(ranks, torch.tensor([own], dtype=torch.float64))
        loss, norm_squared, stopping, _, _, busy_s, inside, between, *blocked_s = ranks.sum(0).tolist()
        grad_norm = math.sqrt(norm_squared) if norm_squared >= 0 else math.nan
        self._stop_if_diverging(step, loss, grad_norm, ranks[:, 0], lambda: self._forward_backward(batches, n_tokens))
        lr = learning_rate(self.progress.step, train.steps, self.config.optimizer)
        if updates:
            self.optimizer.step(lr, grad_norm)
        balance_routers(self.model, self.mesh)
        self.sync.updated(step)
        n_updates = self.progress.updates + updates
        self.progress = Progress(step, self.progress.position + train.global_batch, n_updates)
        if not self._recent_losses:
            give_back_free_memory()  # of making the model and laying out buckets
        self._recent_losses.append(loss)
        return StepResult(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            step_s=time.perf_counter() - started,
            n_tokens=n_tokens * self.mesh.layout.workers,
            blocked_s=sum(blocked_s),
            blocked_by_axis_s={name: s for name, s in zip(AXES, blocked_s, strict=True) if s > 0},
            busy_s=busy_s,
            bytes_inside_hosts=round(inside),
            bytes_between_hosts=round(between),
            peak_memory_bytes=int(ranks[:, 4].max()),
            slowest_rank=int(ranks[:, 3].argmax()),
            slowest_excess_s=float(ranks[:, 3].max() - ranks[:, 3].median()),
            stopping=self._stops(step, stopping > 0),
        )

    def _stops(self, step: int, asked: bool) -> bool:
        """Whether all workers stop after this step; asked: whether a rank of this one was asked to."""
        if not self.sync.meets(step):
            return False
        flag = torch.tensor([asked])
        if self.mesh.layout.workers > 1:
            self.mesh.outer.all_reduce(flag, "max", timeout_s=SLOW_S)
        return bool(flag)

    def _forward_backward(self, batches: Sequence[Batch], n_tokens: int) -> float:
        """Forward, backward and reduction of this rank's micro-batches; their cross-entropy, summed over tokens."""
        weight = self.config.model.aux_loss_weight if self.config.model.n_experts else 0.0
        scales = Scales(1 / n_tokens, weight / (n_tokens // self.config.data.seq_len))
        self.optimizer.begin()
        loss_sum = self.pipeline.step(batches, scales, self.optimizer)
        self.optimizer.wait()
        return loss_sum

    def _stop_if_diverging(
        self, step: int, loss: float, grad_norm: float, shares: Tensor, again: Callable[[], object]
    ) -> None:
        """Raises DivergenceError on every rank for a loss or norm that is not finite, or a loss that jumped, and says
        where it came from. shares: of the loss, by rank."""
        allowed = self.config.monitor.max_loss_jump
        usual = statistics.median(self._recent_losses) if len(self._recent_losses) >= _LOSSES // 2 else math.inf
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            where = first_not_finite(self.mesh.worker, self.model, again)
            what = f"the loss is {loss}, the gradient norm {grad_norm}"
        elif allowed > 0 and loss > usual + allowed:
            losses = (shares * self.mesh.worker.size).tolist()
            where = largest_loss_and_gradient(self.mesh.worker, losses, self.optimizer.gradients())
            what = f"the loss jumped from {usual:.4f} to {loss:.4f} (monitor.max_loss_jump allows {allowed:g})"
        else:
            return
        if self.mesh.layout.workers > 1:
            where += f" of worker {self.mesh.worker_index}"
        raise DivergenceError(
            f"step {step}: {what}; {where}; resume from the last checkpoint with a lower optimizer.lr or longer "
            "warmup_steps"
        )

    def _micro_batches(self, position: int) -> list[list[int]]:
        """This rank's windows of the global batch that begins at a position, one list for each micro-batch."""
        train, n_data, size = self.config.train, self.mesh.layout.n_data, self._micro_batch_size
        firsts = [(index * n_data + self.mesh.data_index) * size for index in range(train.accumulation)]
        return [[self.corpus.train_window(position + first + i, train.seed) for i in range(size)] for first in firsts]

    def _counters(self) -> tuple[float, ...]:
        """Seconds busy, bytes sent inside hosts and between them, and seconds blocked in each group, until now."""
        stats = [group.group.stats() for group in self.mesh.groups]
        return (
            sum(each.busy_s for each in stats),
            float(sum(each.bytes_inside_hosts for each in stats)),
            float(sum(each.bytes_between_hosts for each in stats)),
            *self.mesh.blocked_by_axis_s().values(),
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean cross-entropy of a token on the held-out windows, of the model that all workers agree on."""
        train, size = self.config.train, self._micro_batch_size
        mine = [
            self.corpus.eval_window(index, train.eval_sequences)
            for index in range(self.mesh.data_index, train.eval_sequences, self.mesh.layout.n_data)
        ]
        total = torch.zeros(1, dtype=torch.float64)
        with self.sync.shared_parameters():
            for first in range(0, len(mine), size):
                batch = self.corpus.batch(mine[first : first + size])
                output = self.pipeline.forward(batch)
                if output is not None:
                    total += self.model.cross_entropy(output, own_part(batch.targets, self.mesh))
        self.mesh.world.all_reduce(total)
        return float(total) / (self.mesh.tp.size * train.eval_sequences * self.config.data.seq_len)

    def new_cache(self) -> KeyValueCache | None:
        """For next_token_logits() of one text; None with context parallel ranks, whose sequence is cut."""
        tp = self.mesh.tp.size
        return KeyValueCache(self.config.data.seq_len + tp) if self.mesh.cp.size == 1 else None

    def next_token_logits(self, tokens: Sequence[int], cache: KeyValueCache | None = None) -> Tensor:
        """Logits fp32 [V] of what follows tokens (at most seq_len of them count), whole on every rank. cache: of the
        same text's calls before; then the new tokens alone are computed, until there are more than seq_len."""
        context = list(tokens)[-self.config.data.seq_len :]
        if len(tokens) > len(context):
            cache = None  # positions move with each token
        elif cache is not None:
            context = context[cache.n_seen :]
        mesh = self.mesh
        pieces = mesh.tp.size * (1 if mesh.cp.size == 1 else 2 * mesh.cp.size)  # that the sequence is cut into
        padded = torch.tensor(context + [0] * (-len(context) % pieces)).unsqueeze(-1)
        logits = torch.zeros(self.config.model.vocab_size)
        with self.model.keeping(cache):
            output = self.pipeline.forward(Batch(padded, padded, None))
        if cache is not None:
            cache.n_seen += len(context)
        if output is not None:
            with torch.no_grad():
                own = self.model.logits(output)
            row = (positions(len(padded), mesh.cp.size, mesh.cp.rank) == len(context) - 1).nonzero()
            if len(row):
                whole = self.model.whole_logits(own[int(row)])[0]
                if mesh.data_index == mesh.tp.rank == 0:  # one rank of the world gives it to all
                    logits = whole.contiguous()
        mesh.world.all_reduce(logits)
        return logits

    def save(self) -> None:
        checkpoint.save(self.config, self.mesh, self.optimizer, self.sync, self.progress)

    def resume(self) -> bool:
        """Continues from the run's newest checkpoint, if it has one."""
        folder = checkpoint.find(self.config.run_dir, self.mesh)
        if folder is None:
            return False
        self.progress = checkpoint.load(folder, self.config, self.mesh, self.optimizer, self.sync)
        return True

    def close(self) -> None:
        """Releases what the trainer made; the world stays its owner's."""
        self._batches.close()
        self.optimizer.close()
        self.mesh.close()


def _synchronisation(optimizer: Optimizer, mesh: Mesh, config: Config) -> Synchronous:
    if config.sync.method == "synchronous":
        return Synchronous()
    return Stale(optimizer, mesh, config) if config.sync.method == "stale" else Outer(optimizer, mesh, config)
