"""Runs a pipeline schedule on this rank: forward, backward and weight gradients of micro-batches through its chunks,
and what goes between stages. Without a pipeline it is the same with one stage: forward, backward, the next micro-batch.

Sends never wait; a receive is posted a few actions ahead of its use, so that it arrives beside computation. A message's
tag names the stage that it goes to, its micro-batch and its direction, so messages of micro-batches never mix; receives
are posted in the order of the sends, for devices, whose messages have no tags.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pycomm.overlap import WeightGradients
from training.context import own_part
from training.data import Batch
from training.mesh import Mesh
from training.model import GPT
from training.schedules import Action, Schedule

_Message = tuple[str, int, int]  # what goes to a stage: F or B, the stage, the micro-batch
Saving = Callable[[], AbstractContextManager[None]]
_AHEAD = 2  # actions whose receives are posted before their turn


class Gradients(Protocol):
    """What takes the gradients: training.optimizer.Optimizer."""

    def syncing(self, last: bool) -> AbstractContextManager[None]: ...
    def backward_done(self) -> None: ...


@dataclass
class _Held:
    """What backward of a chunk's micro-batch needs. output: what backward begins at."""

    x: Tensor
    output: Tensor
    balance: Tensor | None
    later: WeightGradients | None


@dataclass(frozen=True)
class Scales:
    """What the sums are multiplied by in the objective."""

    cross_entropy: float
    balance: float


class Pipeline:
    def __init__(self, model: GPT, mesh: Mesh, schedule: Schedule, dtype: torch.dtype, saving: Saving) -> None:
        """dtype: of activations. saving: around each forward whose activations backward needs."""
        self._saving = saving
        self._model, self._mesh, self._schedule, self._dtype = model, mesh, schedule, dtype
        self._placement = schedule.placement
        self._actions = schedule.actions[mesh.pp_index]
        chunks = range(self._placement.n_chunks)
        self._stages = [self._placement.stage(mesh.pp_index, chunk) for chunk in chunks]
        # A table that two chunks of one rank share gets two gradients a micro-batch, which buckets cannot count.
        shared = model.config.tie_embeddings and model.first and model.last and len(chunks) > 1
        self._may_sync = not shared
        self._incoming = self._in_senders_order([])
        self._posted: dict[_Message, tuple[Any, Tensor]] = {}
        self._handed: dict[_Message, Tensor] = {}  # between two chunks of this rank
        self._sent: list[tuple[Any, Tensor]] = []
        self._timed = self._placement.n_ranks > 1 and not mesh.device.late
        self._action_s = dict.fromkeys(((chunk, kind) for chunk in chunks for kind in "FBW"), 0.0)

    def action_s(self) -> list[float]:
        """Seconds that the last step's F, B and W of all micro-batches took, waits left out: [F, B, W] of the first
        chunk, then of the next. 0 without a pipeline, and on a device, where the host does not know."""
        return list(self._action_s.values())

    def _in_senders_order(self, actions: Sequence[Sequence[Action]]) -> dict[int, deque[_Message]]:
        """By rank, the messages that it sends to this one as it goes through its actions. That is the order in which
        they must be received where they have no tags."""
        found: dict[int, deque[_Message]] = {}
        for rank, of_rank in enumerate(actions):
            for action in of_rank if rank != self._mesh.pp_index else ():
                stage = self._placement.stage(rank, action.chunk)
                to = {"F": stage + 1, "B": stage - 1}.get(action.kind, -1)
                if 0 <= to < self._placement.n_stages and self._placement.rank(to) == self._mesh.pp_index:
                    found.setdefault(rank, deque()).append((action.kind, to, action.micro_batch))
        return found

    def _is_last(self, action: Action) -> bool:
        return action.micro_batch == self._schedule.n_micro_batches - 1

    def step(self, batches: Sequence[Batch], scales: Scales, gradients: Gradients) -> Tensor:
        """All micro-batches, forward and backward; the cross-entropy summed over tokens, fp32 scalar on the device, 0
        but on the last stage."""
        loss_sum = torch.zeros((), device=self._mesh.device.where)
        self._incoming = self._in_senders_order(self._schedule.actions)
        held: dict[tuple[int, int], _Held] = {}
        self._action_s = dict.fromkeys(self._action_s, 0.0)
        for at, action in enumerate(self._actions):
            for coming in self._actions[at : at + _AHEAD + 1]:
                self._post(coming, batches)
            with self._timing(action):
                key = (action.chunk, action.micro_batch)
                if action.kind == "F":
                    held[key], loss = self._forward(action, batches, scales)
                    if loss is not None:
                        loss_sum += loss.detach()
                    continue
                last = self._may_sync and self._is_last(action)
                with gradients.syncing(last):
                    if action.kind == "B":
                        self._backward(action, held[key])
                    else:
                        later = held[key].later
                        assert later is not None
                        later.flush()
                if action.kind == "W" or not self._schedule.split:
                    gradients.backward_done()
                    del held[key]
        self._finish_sends()
        return loss_sum

    @contextmanager
    def _timing(self, action: Action) -> Iterator[None]:
        if not self._timed:
            yield
            return
        began_s = time.perf_counter() - self._mesh.blocked_s()
        yield
        self._action_s[action.chunk, action.kind] += time.perf_counter() - self._mesh.blocked_s() - began_s

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor | None:
        """One micro-batch through all stages: the last layer's output [S/cp/tp, B, D] on the last stage, else None."""
        output = None
        in_turn = [Action("F", chunk, 0) for chunk in range(self._placement.n_chunks)]
        self._incoming = self._in_senders_order([in_turn] * self._placement.n_ranks)
        for chunk, stage in enumerate(self._stages):
            action = Action("F", chunk, 0)
            self._post(action, [batch])
            y, _ = self._model.run_blocks(chunk, self._input(action, batch), batch.documents)
            if stage == self._placement.n_stages - 1:
                output = y
            else:
                self._hand_on("F", stage + 1, 0, y)
        self._finish_sends()
        return output

    def _forward(self, action: Action, batches: Sequence[Batch], scales: Scales) -> tuple[_Held, Tensor | None]:
        batch, stage = batches[action.micro_batch], self._stages[action.chunk]
        later = WeightGradients() if self._schedule.split else None
        x = self._input(action, batch)
        with self._putting_off(later), self._saving():
            y, balance = self._model.run_blocks(action.chunk, x, batch.documents)
        weighted = balance * scales.balance if balance.requires_grad else None
        if stage < self._placement.n_stages - 1:
            self._hand_on("F", stage + 1, action.micro_batch, y.detach())
            return _Held(x, y, weighted, later), None
        loss = self._model.cross_entropy(y, own_part(batch.targets, self._mesh))
        objective = loss * scales.cross_entropy
        return _Held(x, objective if weighted is None else objective + weighted, None, later), loss.detach()

    def _backward(self, action: Action, held: _Held) -> None:
        stage = self._stages[action.chunk]
        outputs: list[Tensor] = [held.output]
        grads: list[Tensor | None] = [None]
        if stage < self._placement.n_stages - 1:
            grads = [self._take(action)]
        if held.balance is not None:
            outputs.append(held.balance)
            grads.append(None)
        with self._putting_off(held.later):
            torch.autograd.backward(outputs, grads)
        if stage:
            assert held.x.grad is not None
            self._hand_on("B", stage - 1, action.micro_batch, held.x.grad)
        held.output = held.x = torch.empty(0)  # what they keep may go; W needs its own alone
        held.balance = None

    def _putting_off(self, later: WeightGradients | None) -> AbstractContextManager[None]:
        return nullcontext() if later is None else self._mesh.putting_off(later)

    def _input(self, action: Action, batch: Batch) -> Tensor:
        if self._stages[action.chunk] == 0:
            return self._model.embed(own_part(batch.tokens, self._mesh))
        return self._take(action).requires_grad_(torch.is_grad_enabled())

    # What goes between stages. kind "F": activations to a stage, "B": the gradient of its output.

    def _post(self, action: Action, batches: Sequence[Batch]) -> None:
        """Begins to receive what an action needs from another rank."""
        stage = self._stages[action.chunk]
        source = stage - 1 if action.kind == "F" else stage + 1
        nothing = action.kind == "W" or not 0 <= source < self._placement.n_stages
        if nothing or self._placement.rank(source) == self._mesh.pp_index:
            return
        rank, message = self._placement.rank(source), (action.kind, stage, action.micro_batch)
        while message in self._incoming.get(rank, ()):
            coming = self._incoming[rank].popleft()
            n_positions, n_sequences = batches[coming[2]].tokens.shape
            shape = (n_positions // self._mesh.sequence.size, n_sequences, self._model.config.d_model)
            x = torch.empty(shape, dtype=self._dtype, device=self._mesh.device.where)
            self._posted[coming] = (self._mesh.pp.recv(x, rank, self._tag(*coming)), x)

    def _take(self, action: Action) -> Tensor:
        message = (action.kind, self._stages[action.chunk], action.micro_batch)
        if message in self._posted:
            work, x = self._posted.pop(message)
            work.wait()
            return x
        return self._handed.pop(message)

    def _hand_on(self, kind: str, stage: int, micro_batch: int, x: Tensor) -> None:
        rank = self._placement.rank(stage)
        if rank == self._mesh.pp_index:
            self._handed[kind, stage, micro_batch] = x
            return
        x = x.contiguous()
        self._sent = [(work, sent) for work, sent in self._sent if not work.is_completed()]
        self._sent.append((self._mesh.pp.send(x, rank, self._tag(kind, stage, micro_batch)), x))

    def _tag(self, kind: str, stage: int, micro_batch: int) -> int:
        return (micro_batch * self._placement.n_stages + stage) * 2 + (kind == "B")

    def _finish_sends(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
