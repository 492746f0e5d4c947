"""One training step, from the batch to the update, and evaluation: everything that a layout must not change."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training import checkpoint, schedules
from training.bubble import Bubble
from training.cache import KeyValueCache
from training.checkpoint_files import Progress
from training.config import Config
from training.context import own_part, positions
from training.data import Batch, Prefetcher
from training.device import Span, choose_device, dtype_of
from training.divergence import Divergence
from training.graphed import Graphed
from training.host_memory import HostActivations
from training.layout import resolve_layout, stages_of
from training.machine import give_back_free_memory
from training.mesh import Mesh
from training.metered import SLOW_S, on_every_rank
from training.model import GPT, Parallel, specs_of_whole
from training.moe import balance_routers
from training.offload import ActivationFile
from training.optimizer import Optimizer, learning_rate
from training.outer import Outer
from training.pipeline import Pipeline, Saving, Scales
from training.ready import open_same_corpus, require_device
from training.sharding import filler
from training.stale import Stale
from training.step_result import Measuring, StepResult, Submitted
from training.synchronise import Synchronous

if TYPE_CHECKING:
    from pycomm.group import Group


class Trainer:
    """The model, its data and its state on one rank. All ranks of the world construct it and call it together."""

    def __init__(self, config: Config, world: Group) -> None:
        self.config = config
        train, layout = config.train, config.layout
        stages, resolved = stages_of(config), resolve_layout(config, world.size)
        self.device = choose_device(train.device, world)
        self.dtype = dtype_of(train.precision)
        self.mesh = Mesh(world, resolved, stages.placement, config.wire, self.device)
        everywhere = self.mesh.world
        self._graphed = None
        if train.cuda_graph:
            self._graphed = on_every_rank(everywhere, lambda: Graphed(self.device, self._whole_step))
        self.mesh.fp8 = train.matmul == "fp8"
        checkpoint.require_same_model(config, self.mesh)
        specs = specs_of_whole(config.model, self.mesh)
        self.memory = require_device(config, self.mesh, specs)
        self.corpus = open_same_corpus(config, everywhere)
        parallel = Parallel(stages, layout.context, layout.context_latents, train.recompute, train.loss_chunk)
        with self.device.making():
            self.model = GPT(config.model, self.mesh, parallel)
        self.model.to(self.device.where)  # the frequencies of rotations, which the CPU makes
        if train.compile:
            self.model.compile_blocks()
        fill = filler(self.model, self.mesh, train.seed)
        self.optimizer = on_every_rank(everywhere, lambda: Optimizer(self.model, self.mesh, config, self.dtype, fill))
        self.sync = _synchronisation(self.optimizer, self.mesh, config)
        saving: Saving = nullcontext
        if train.offload_activations and self.device.late:
            saving = HostActivations(self.device, self.model.parameters()).saving
        elif train.offload_activations:
            saved = on_every_rank(everywhere, lambda: ActivationFile(config.offload_dir, self.model.parameters()))
            saving = saved.saving
        schedule = schedules.plan(layout.schedule, layout.pp, train.accumulation, layout.chunks)
        self.pipeline = Pipeline(self.model, self.mesh, schedule, self.dtype, saving)
        self._bubble = Bubble.of(schedule, self.mesh)
        self.progress = Progress()
        self._batches = Prefetcher(self.corpus, self._micro_batches, train.global_batch, self.device)
        self._measuring = Measuring(self.mesh)
        self._submitted: Submitted | None = None  # a step that a device may be busy with
        self._results: list[StepResult] = []
        self._is_first = True
        self._broken = torch.zeros((), device=self.device.where)  # 1 from the first step on that must not update
        self.divergence = Divergence(self.model, self.mesh, config.monitor.max_loss_jump)
        self.stop_requested = False  # a signal handler sets it; all ranks learn of it in the same step

    @property
    def n_parameters(self) -> int:
        """Of the whole model."""
        return self.config.model.n_parameters

    @property
    def activation_nbytes(self) -> int:
        """Of one micro-batch between two layers, over its whole sequence."""
        return self.config.data.seq_len * self._micro_batch_size * self.config.model.d_model * self.dtype.itemsize

    @property
    def _n_tokens(self) -> int:
        """Of a step of one worker."""
        return self.config.train.global_batch // self.mesh.layout.workers * self.config.data.seq_len

    @property
    def _micro_batch_size(self) -> int:
        train = self.config.train
        return train.global_batch // (self.mesh.layout.n_data * train.accumulation)

    def train_step(self) -> StepResult:
        """submit_step() and its result, for which a device is waited for."""
        self.submit_step()
        return self.results(until_now=True)[-1]

    def results(self, until_now: bool = False) -> list[StepResult]:
        """Of the steps that were not given yet, in order: of a CPU all, of a device all but the one that it may be busy
        with, which until_now waits for. Raises as submit_step()."""
        if until_now:
            self._settle()
        found, self._results = self._results, []
        return found

    def submit_step(self) -> None:
        """Forward and backward of this rank's part of the global batch, reduction, clipping, update. A device is handed
        all of it, and waited for until it has done the step before.

        Raises DivergenceError on every rank when loss or gradient norm is not finite, or the loss jumped; nothing was
        updated then. On a device that is found one step later; the step that is named has not updated either, but where
        a loss jumped."""
        train, step = self.config.train, self.progress.step + 1
        self._measuring.begin()
        span, batches = Span(self.device), self._batches.at(self.progress.position)
        lr = learning_rate(self.progress.step, train.steps, self.config.optimizer)
        updates = True
        if self._graphed is not None:
            lr_there = self.device.put(self.device.staged(torch.tensor(lr)))
            tensors = [self.device.put(x) for batch in batches for x in batch if x is not None]
            submitted = self._submission(batches, span, lr, self._graphed(self._own(), lr_there, *tensors))
        else:
            loss = self._forward_backward(batches)
            updates = self.sync.reduce(step)
            shares = self._of_all_ranks(loss, self._own())
            submitted = self._submission(batches, span, lr, shares)
            if not self.device.late:
                self._require_sound(submitted)
            self._update(shares, lr, updates)
        self.sync.updated(step)
        self.progress = Progress(step, self.progress.position + train.global_batch, self.progress.updates + updates)
        if self._is_first:
            self._is_first = False
            give_back_free_memory()  # of making the model and laying out buckets
        span.stop()
        if self.device.late:
            self._settle()  # the step before, now that the device has this one to do
        self._submitted = submitted
        if not self.device.late:
            self._settle()

    def _own(self) -> Tensor:
        """This rank's row of Submitted.shares, on the device, but for its part of loss and norm."""
        own = [[0.0, 0.0, float(self.stop_requested), *self._measuring.own(), *self.pipeline.action_s()]]
        return self.device.put(self.device.staged(torch.tensor(own, dtype=torch.float64)))

    def _of_all_ranks(self, loss: Tensor, own: Tensor) -> Tensor:
        """Submitted.shares, on the device."""
        own[0, 0], own[0, 1] = loss, self.optimizer.norm_squared_share()
        shares = own.new_empty(self.mesh.worker.size, own.shape[1])
        self.mesh.worker.all_gather(shares, own)
        return shares

    def _submission(self, batches: list[Batch], span: Span, lr: float, shares: Tensor) -> Submitted:
        fetched, n_workers = self.device.fetch(shares), self.mesh.layout.workers
        return Submitted(self.progress.step + 1, lr, self._n_tokens, n_workers, batches, span, fetched, self._bubble)

    def _update(self, shares: Tensor, lr: float | Tensor, updates: bool = True) -> None:
        """The update, if it is due. On a device nothing is updated from the first step on that is not finite."""
        grad_norm = shares[:, 1].sum().sqrt()
        if self.device.late:
            finite = shares[:, 0].sum().isfinite() & grad_norm.isfinite()
            torch.maximum(self._broken, (~finite).float(), out=self._broken)
        if updates:
            self.optimizer.step(lr, grad_norm, self._broken if self.device.late else None)
        balance_routers(self.model, self.mesh)

    def _whole_step(self, own: Tensor, lr: Tensor, *tensors: Tensor) -> Tensor:
        """All that a device does in a step, as a function of tensors; Submitted.shares."""
        n = len(tensors) // self.config.train.accumulation
        batches = [Batch(*tensors[i : i + n], *[None] * (3 - n)) for i in range(0, len(tensors), n)]
        shares = self._of_all_ranks(self._forward_backward(batches), own)
        self._update(shares, lr)
        return shares

    def _settle(self) -> None:
        """The result of the step that was submitted last, if it was not taken yet."""
        step, self._submitted = self._submitted, None
        if step is None:
            return
        if self.device.late:
            self._require_sound(step)
            self._measuring.ended(step.span.seconds())
        self.divergence.recent_losses.append(step.loss)
        stopping = bool(step.shares.value()[:, 2].any())
        self._results.append(step.result(self._stops(step.step, stopping)))

    def _require_sound(self, step: Submitted) -> None:
        self.divergence.require_sound(step, lambda: self._forward_backward(step.batches), self.optimizer.gradients)

    def _pause(self) -> None:
        """No step is under way, and what is done now is none."""
        self._settle()
        self._measuring.pause()

    def _stops(self, step: int, asked: bool) -> bool:
        """Whether all workers stop after this step; asked: whether a rank of this one was asked to."""
        if not self.sync.meets(step):
            return False
        flag = torch.tensor([asked])
        if self.mesh.layout.workers > 1:
            self.mesh.outer.all_reduce(flag, "max", timeout_s=SLOW_S)
        return bool(flag)

    def _forward_backward(self, batches: Sequence[Batch]) -> Tensor:
        """Forward, backward and reduction of this rank's micro-batches; its share of the worker's mean cross-entropy of
        a token, fp64 scalar on the device."""
        weight = self.config.model.aux_loss_weight if self.config.model.n_experts else 0.0
        scales = Scales(1 / self._n_tokens, weight / (self._n_tokens // self.config.data.seq_len))
        self.optimizer.begin()
        there = [Batch(*map(self.device.put, batch)) for batch in batches]
        loss_sum = self.pipeline.step(there, scales, self.optimizer)
        self.optimizer.wait()
        return loss_sum.double() / (self._n_tokens * self.mesh.tp.size)  # every tp rank has the whole loss

    def _micro_batches(self, position: int) -> list[list[int]]:
        """This rank's windows of the global batch that begins at a position, one list for each micro-batch."""
        train, n_data, size = self.config.train, self.mesh.layout.n_data, self._micro_batch_size
        firsts = [(index * n_data + self.mesh.data_index) * size for index in range(train.accumulation)]
        return [[self.corpus.train_window(position + first + i, train.seed) for i in range(size)] for first in firsts]

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean cross-entropy of a token on the held-out windows, of the model that all workers agree on."""
        self._pause()
        train, size = self.config.train, self._micro_batch_size
        mine = [
            self.corpus.eval_window(index, train.eval_sequences)
            for index in range(self.mesh.data_index, train.eval_sequences, self.mesh.layout.n_data)
        ]
        total = torch.zeros(1, dtype=torch.float64, device=self.device.where)
        with self.sync.shared_parameters():
            for first in range(0, len(mine), size):
                batch = Batch(*map(self.device.put, self.corpus.batch(mine[first : first + size])))
                output = self.pipeline.forward(batch)
                if output is not None:
                    total += self.model.cross_entropy(output, own_part(batch.targets, self.mesh))
        self.mesh.world.all_reduce(total, timeout_s=SLOW_S)  # the slowest worker may be some steps behind
        return float(total) / (self.mesh.tp.size * train.eval_sequences * self.config.data.seq_len)

    def new_cache(self) -> KeyValueCache | None:
        """For next_token_logits() of one text; None with context parallel ranks, whose sequence is cut."""
        tp = self.mesh.tp.size
        return KeyValueCache(self.config.data.seq_len + tp) if self.mesh.cp.size == 1 else None

    def next_token_logits(self, tokens: Sequence[int], cache: KeyValueCache | None = None) -> Tensor:
        """Logits fp32 [V] of what follows tokens (at most seq_len of them count), whole on every rank's host.

        cache: of the same text's calls before; then the new tokens alone are computed, until there are more than
        seq_len."""
        self._pause()
        context = list(tokens)[-self.config.data.seq_len :]
        if len(tokens) > len(context):
            cache = None  # positions move with each token
        elif cache is not None:
            context = context[cache.n_seen :]
        mesh = self.mesh
        pieces = mesh.tp.size * (1 if mesh.cp.size == 1 else 2 * mesh.cp.size)  # that the sequence is cut into
        padded = torch.tensor(context + [0] * (-len(context) % pieces), device=self.device.where).unsqueeze(-1)
        logits = torch.zeros(self.config.model.vocab_size, device=self.device.where)
        with self.model.keeping(cache):
            output = self.pipeline.forward(Batch(padded, padded, None))
        if cache is not None:
            cache.n_seen += len(context)
        if output is not None:
            with torch.no_grad():
                own = self.model.logits(output)
            at = positions(len(padded), mesh.cp.size, mesh.cp.rank, padded.device)
            row = (at == len(context) - 1).nonzero()
            if len(row):
                whole = self.model.whole_logits(own[int(row)])[0]
                if mesh.data_index == mesh.tp.rank == 0:  # one rank of the world gives it to all
                    logits = whole.contiguous()
        mesh.world.all_reduce(logits)
        return logits.cpu()

    def save(self) -> None:
        self._pause()
        losses = self.divergence.recent_losses
        data = self.corpus.fingerprint()
        checkpoint.save(self.config, self.mesh, self.optimizer, self.sync, self.progress, data, losses)

    def resume(self) -> bool:
        """Continues from the run's newest checkpoint, if it has one."""
        folder = checkpoint.find(self.config.run_dir, self.mesh)
        if folder is None:
            return False
        self.progress, losses = checkpoint.load(folder, self.config, self.mesh, self.optimizer, self.sync)
        self.divergence.recent_losses.extend(losses)
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
