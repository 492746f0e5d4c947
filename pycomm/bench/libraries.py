"""Libraries whose ranks are this job's own processes: pycomm, Gloo and NCCL, and the plain copies of the roofline.

A library turns a case into trials, one for each placement; measure.py lets the trials take turns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from pycomm.bench.buffers import Array
from pycomm.bench.cases import IN_PLACE, Case
from pycomm.bench.trials import Call, LocalTrial, Memory, Nanoseconds, Trial, Unavailable, timed
from pycomm.bench.workloads import as_tensor, local_trial, pair_call, ring_call
from pycomm.group import Group
from pycomm.machine import local_interfaces


class Library(Protocol):
    """Anything that can be measured: give the session an object with these."""

    name: str

    def trial(self, case: Case, placement: str, memory: Memory) -> Trial:
        """All ranks together. Raises Unavailable where the library has no such call; alike on every rank."""

    def close(self) -> None: ...


class Copies:
    """Every rank copies memory at once, half a tensor to the other half, with nobody to wait for."""

    name = "copy"

    def trial(self, case: Case, placement: str, memory: Memory) -> Trial:
        half = len(memory.b) // 2
        to, source = memory.b[:half], memory.b[half : 2 * half]
        return LocalTrial(memory.buffers(placement), lambda: np.copyto(to, source))

    def close(self) -> None: ...


class Pycomm:
    """pycomm through its Python API."""

    name = "pycomm"

    def __init__(self, group: Group) -> None:
        self.group = group

    def trial(self, case: Case, placement: str, memory: Memory) -> Trial:
        return local_trial(self, case, placement, memory)

    def call(self, case: Case, x: torch.Tensor, y: torch.Tensor, placement: str, async_op: bool = False) -> Call:
        """One call from input x to output y; with async_op it returns a Work."""
        g, op, root, at_root = self.group, case.op, case.root, self.group.rank == case.root
        calls: dict[str, Call] = {
            "all_reduce": lambda: g.all_reduce(y, op, async_op=async_op),
            "reduce": lambda: g.reduce(y, root, op),
            "reduce_scatter": lambda: g.reduce_scatter(y, x, op, async_op=async_op),
            "all_gather": lambda: g.all_gather(y, x, async_op=async_op),
            "broadcast": lambda: g.broadcast(y, root),
            "gather": lambda: g.gather(y if at_root else None, x, root),
            "scatter": lambda: g.scatter(y, x if at_root else None, root),
            "all_to_all": lambda: g.all_to_all(y, x, async_op=async_op),
            "sendrecv": ring_call(g.rank, g.size, self, x, y),
            "barrier": g.barrier,
        }
        if case.pair is not None:
            return pair_call(case, g.rank, self, y)
        return copied_first(case, placement, g.rank, x, y, calls[case.collective.removeprefix("overlap_")])

    def send(self, x: torch.Tensor, peer: int) -> Any:
        return self.group.send(x, peer)

    def recv(self, x: torch.Tensor, peer: int) -> Any:
        return self.group.recv(x, peer)

    def isend(self, x: torch.Tensor, peer: int) -> Any:
        return self.group.send(x, peer, async_op=True)

    def irecv(self, x: torch.Tensor, peer: int) -> Any:
        return self.group.recv(x, peer, async_op=True)

    @property
    def rows_group(self) -> Group:
        """What ExpertParallel exchanges rows with."""
        return self.group

    def close(self) -> None: ...


class TorchDistributed:
    """A process group of torch.distributed."""

    def __init__(self, name: str, process_group: Any, rank: int, size: int) -> None:
        self.name, self.rank, self.size = name, rank, size
        self._group = process_group

    def trial(self, case: Case, placement: str, memory: Memory) -> Trial:
        return local_trial(self, case, placement, memory)

    def call(self, case: Case, x: torch.Tensor, y: torch.Tensor, placement: str, async_op: bool = False) -> Call:
        group, root, at_root = self._group, case.root, self.rank == case.root
        op = getattr(dist.ReduceOp, case.op.upper())
        pieces_in = list(x.chunk(self.size)) if case.collective == "scatter" and at_root else None
        pieces_out = list(y.chunk(self.size)) if case.collective == "gather" and at_root else None
        # torch 2.13 renamed these; the old names warn on every call
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        calls: dict[str, Call] = {
            "all_reduce": lambda: dist.all_reduce(y, op, group, async_op),
            "reduce": lambda: dist.reduce(y, root, op, group),
            "reduce_scatter": lambda: reduce_scatter(y, x, op, group, async_op),
            "all_gather": lambda: all_gather(y, x, group, async_op),
            "broadcast": lambda: dist.broadcast(y, root, group),
            "gather": lambda: dist.gather(x, pieces_out, root, group),
            "scatter": lambda: dist.scatter(y, pieces_in, root, group),
            "all_to_all": lambda: dist.all_to_all_single(y, x, group=group, async_op=async_op),
            "sendrecv": ring_call(self.rank, self.size, self, x, y),
            "barrier": lambda: dist.barrier(group),
        }
        if case.pair is not None:
            return pair_call(case, self.rank, self, y)
        return copied_first(case, placement, self.rank, x, y, calls[case.collective.removeprefix("overlap_")])

    def send(self, x: torch.Tensor, peer: int) -> Any:
        return dist.send(x, peer, self._group)

    def recv(self, x: torch.Tensor, peer: int) -> Any:
        return dist.recv(x, peer, self._group)

    def isend(self, x: torch.Tensor, peer: int) -> Any:
        return dist.isend(x, peer, self._group)

    def irecv(self, x: torch.Tensor, peer: int) -> Any:
        return dist.irecv(x, peer, self._group)

    @property
    def rows_group(self) -> TorchDistributed:
        return self

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_counts: Sequence[int] | None = None,
        input_counts: Sequence[int] | None = None,
    ) -> None:
        """This and all_gather() as pycomm.moe.RowsGroup asks for."""
        out_counts, in_counts = (None if each is None else list(each) for each in (output_counts, input_counts))
        dist.all_to_all_single(output, input, out_counts, in_counts, self._group)

    def all_gather(self, output: torch.Tensor, input: torch.Tensor) -> None:
        dist.all_gather_into_tensor(output.view(-1), input.view(-1), self._group)  # Gloo does not stack

    def close(self) -> None: ...


def copied_first(case: Case, placement: str, rank: int, x: torch.Tensor, y: torch.Tensor, call: Call) -> Call:
    """Out of place where the library has the call only in place: the copy is part of it."""
    if placement == IN_PLACE or case.kind.native != IN_PLACE or (case.collective == "broadcast" and rank != case.root):
        return call

    def copy_and_call() -> Any:
        y.copy_(x)
        return call()

    return copy_and_call


class DeviceTrial:
    """A case on an accelerator's memory: the tensors live there, and a call ends when the device has done it."""

    def __init__(self, library: TorchDistributed, case: Case, placement: str, memory: Memory, device: str) -> None:
        self._buffers, self._device = memory.buffers(placement), torch.device(device)
        self._host = [as_tensor(array, case) for array in (memory.a, memory.b)]
        self._there = [tensor.to(self._device, copy=True) for tensor in self._host]
        x, y = (self._placed(array, memory, case) for array in (self._buffers.input, self._buffers.output))
        self._enqueue = library.call(case, x, y, placement)

    def _placed(self, array: Array, memory: Memory, case: Case) -> torch.Tensor:
        """The device's part that stands for a part of the host's memory."""
        for whole, there in zip((memory.a, memory.b), self._there, strict=True):
            begin = (array.ctypes.data - whole.ctypes.data) // case.element.nbytes
            if len(array) and 0 <= begin < len(whole):
                return there[begin : begin + len(array)]
        return self._there[0][:0]

    def _call(self) -> None:
        self._enqueue()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def check(self) -> int | None:
        self._buffers.fill()
        for here, there in zip(self._host, self._there, strict=True):
            there.copy_(here)
        self._call()
        for here, there in zip(self._host, self._there, strict=True):
            here.copy_(there)
            there.zero_()
        wrong = self._buffers.wrong() if self._buffers.exact else None
        self._buffers.zero()
        return wrong

    def block(self, n_calls: int, n_warmup: int) -> Nanoseconds:
        for _ in range(n_warmup):
            self._call()
        return timed(self._call, n_calls)


class Nccl(TorchDistributed):
    """NCCL on the rank's GPU. What goes through host memory in between, as the MoE exchange here, it does not run."""

    def __init__(self, process_group: Any, rank: int, size: int, device: str) -> None:
        super().__init__("nccl", process_group, rank, size)
        self._device = device

    def trial(self, case: Case, placement: str, memory: Memory) -> Trial:
        if case.moe is not None or case.collective.startswith("overlap_"):
            raise Unavailable("on NCCL, single collectives and pairs of ranks are measured")
        return DeviceTrial(self, case, placement, memory, self._device)


def nccl_refusal(group: Group) -> str:
    """Why NCCL cannot run on this rank; empty where it can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if not dist.is_nccl_available():
        return f"torch {torch.__version__} was built without NCCL"
    n_local = group.host_ids.count(group.host_ids[group.rank])
    if torch.cuda.device_count() < n_local:
        return f"{n_local} ranks on a host of {torch.cuda.device_count()} GPU(s); NCCL wants one for each"
    return ""


def open_gloo(group: Group, timeout_s: float) -> TorchDistributed:
    """Gloo on the interfaces that pycomm is told to use, where it is told (PYCOMM_ADDRESS); else on its own choice."""
    if os.environ.get("PYCOMM_ADDRESS") and (names := local_interfaces()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", ",".join(names))
    return TorchDistributed("gloo", _process_group("gloo", timeout_s), group.rank, group.size)


def open_nccl(group: Group, timeout_s: float) -> Nccl:
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    torch.cuda.set_device(device)
    return Nccl(_process_group("nccl", timeout_s), group.rank, group.size, device)


def _process_group(backend: str, timeout_s: float) -> Any:
    patience = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=patience)
    return dist.new_group(backend=backend, timeout=patience)
