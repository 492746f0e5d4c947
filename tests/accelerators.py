"""Where the tensors of gpu_bodies.py are: on GPUs with the real NCCL, or on the fake device, whose tensors are CPU
tensors (tests/cc/fake_nccl). What the fake has not, streams of torch's and graphs, each says here in its own way."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from fake_groups import DeviceGroup, on_device

MANY_RANKS_A_GPU = 23003  # the first NCCL with NCCL_MULTI_RANK_GPU_ENABLE


class Accelerator(Protocol):
    device: str  # of tensors, as torch has it
    backend: str  # of init_process_group
    tells_mismatch: bool  # whether ranks that call different collectives never end

    def environment(self, n_ranks: int) -> dict[str, str]:
        """What every rank needs in its environment."""

    def begin(self, rank: int, n_ranks: int) -> None:
        """In each rank before its first tensor."""

    def cpu_group(self) -> dist.ProcessGroup | None:
        """All ranks, for collectives on CPU tensors: what results on the device are compared with. All ranks call."""

    def other_backend(self) -> dist.ProcessGroup:
        """All ranks, on a backend of torch's own, for tensors on the device. All ranks call."""

    def on_stream(self) -> AbstractContextManager[Any]:
        """The current stream within is a new one."""

    def delay(self) -> None:
        """What is put on the current stream next runs about a millisecond later."""

    def synchronize(self) -> None: ...

    def graph(self, record: Callable[[], None]) -> Callable[[], None]:
        """Captures what record() puts on the current stream; gives what replays it, on the same memory."""

    def array(self, x: torch.Tensor) -> Any:
        """What a Group takes as an array on the device: x's memory, on x's device."""

    def device_group(self, group: Any) -> AbstractContextManager[Any]:
        """A pycomm.Group of group's ranks; within, tensors of this device that it is given are the device's. All ranks
        call."""

    def foreign(self, x: torch.Tensor) -> Any:
        """An array as other libraries' (CuPy's), with x's memory, on the current stream."""

    def dlpack(self, x: torch.Tensor) -> Any:
        """What has nothing but DLPack's protocol, with x's memory."""

    def cupy(self, x: torch.Tensor) -> AbstractContextManager[Any] | None:
        """Gives an array of CuPy's with x's memory; within, CuPy's current stream is torch's. None without CuPy."""

    def peer_launches(self) -> int | None:
        """How often this rank has launched the peer kernel; None where nobody counts."""


class Foreign:
    """An array that has nothing but __cuda_array_interface__, with x's memory. stream: None, the default one, or a
    cudaStream_t."""

    def __init__(self, x: torch.Tensor, interface: dict[str, Any], stream: int | None) -> None:
        self.memory = x
        self.__cuda_array_interface__ = {**interface, "version": 3, "stream": stream}


class DLPack:
    """An array that has nothing but DLPack's protocol, with x's memory."""

    def __init__(self, x: torch.Tensor) -> None:
        self.memory = x

    def __dlpack__(self, **how: Any) -> Any:
        return self.memory.__dlpack__(**how)

    def __dlpack_device__(self) -> Any:
        return self.memory.__dlpack_device__()


@contextmanager
def _in_cupy(cupy: Any, x: torch.Tensor) -> Iterator[Any]:
    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        yield cupy.from_dlpack(x)


@dataclass(frozen=True)
class Cuda:
    """The GPUs of this machine; where ranks are more than GPUs, several share one, as this NCCL lets them: since 2.30.3
    when it is told to, before only as ranks of different hosts, over sockets."""

    n_gpus: int
    nccl_version: int
    device: str = "cuda"
    backend: str = "cpu:pycomm,cuda:pycomm"
    tells_mismatch: bool = False

    def environment(self, n_ranks: int) -> dict[str, str]:
        if n_ranks <= self.n_gpus or self.nccl_version < MANY_RANKS_A_GPU:
            return {}
        return {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}

    def begin(self, rank: int, n_ranks: int) -> None:
        if n_ranks > self.n_gpus and self.nccl_version < MANY_RANKS_A_GPU:
            os.environ["NCCL_HOSTID"] = f"pycomm-rank-{rank}"
        torch.cuda.set_device(rank % self.n_gpus)

    def cpu_group(self) -> dist.ProcessGroup | None:
        return None

    def other_backend(self) -> dist.ProcessGroup:
        made = dist.new_group(backend="nccl")
        assert isinstance(made, dist.ProcessGroup)
        return made

    def on_stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(torch.cuda.Stream())

    def delay(self) -> None:
        torch.cuda._sleep(2_000_000)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def graph(self, record: Callable[[], None]) -> Callable[[], None]:
        made = torch.cuda.CUDAGraph()
        with torch.cuda.graph(made):
            record()
        return made.replay

    def array(self, x: torch.Tensor) -> Any:
        return x

    def device_group(self, group: Any) -> AbstractContextManager[Any]:
        return nullcontext(group)

    def foreign(self, x: torch.Tensor) -> Any:
        return Foreign(x, x.__cuda_array_interface__, torch.cuda.current_stream().cuda_stream or 1)

    def dlpack(self, x: torch.Tensor) -> Any:
        return DLPack(x)

    def cupy(self, x: torch.Tensor) -> AbstractContextManager[Any] | None:
        try:
            import cupy
        except ImportError:  # `make test-gpu` then says that this was not run
            return None
        return _in_cupy(cupy, x)

    def peer_launches(self) -> int | None:
        return None


@dataclass(frozen=True)
class Fake:
    """Host memory over the fake NCCL. What the engine puts on its streams runs late; the caller's stream is the host
    itself, so that the caller waits where a GPU's stream would. A graph runs its recording again."""

    library: str
    device: str = "cpu"
    backend: str = "pycomm"
    tells_mismatch: bool = True

    def environment(self, n_ranks: int) -> dict[str, str]:
        return {"PYCOMM_NCCL_LIB": self.library, "PYCOMM_TEST_DEVICE": self.library}

    def begin(self, rank: int, n_ranks: int) -> None:
        ctypes.CDLL(self.library).fake_device_delay(100)

    def cpu_group(self) -> dist.ProcessGroup | None:
        return self.other_backend()

    def other_backend(self) -> dist.ProcessGroup:
        made = dist.new_group(backend="gloo")
        assert isinstance(made, dist.ProcessGroup)
        return made

    def on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def delay(self) -> None: ...

    def synchronize(self) -> None: ...

    def graph(self, record: Callable[[], None]) -> Callable[[], None]:
        return record

    def array(self, x: torch.Tensor) -> Any:
        return self.foreign(x)

    @contextmanager
    def device_group(self, group: Any) -> Iterator[Any]:
        made = DeviceGroup.of(group)
        with on_device(made):
            yield made
        assert not made.in_use, "an operation that nobody waited for"
        made.close()

    def foreign(self, x: torch.Tensor) -> Any:
        flat = x.numpy()
        shape, address = flat.shape, (flat.ctypes.data, False)
        return Foreign(x, {"shape": shape, "typestr": flat.dtype.str, "data": address, "strides": None}, None)

    def dlpack(self, x: torch.Tensor) -> Any:
        return DLPack(x)

    def cupy(self, x: torch.Tensor) -> AbstractContextManager[Any] | None:
        return nullcontext(self.foreign(x))

    def peer_launches(self) -> int | None:
        return int(ctypes.CDLL(self.library).fake_device_n_peer_launches())
