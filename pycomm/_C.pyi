from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch._C._distributed_c10d import Backend as C10dBackend
from torch._C._distributed_c10d import Store

Array = TypeVar("Array")  # torch.Tensor or numpy.ndarray

class Stats:
    ops: int
    bytes_inside_hosts: int
    bytes_between_hosts: int
    busy_s: float

class Work:
    def wait(self, timeout_s: float | None = None) -> None: ...
    def is_completed(self) -> bool: ...
    @property
    def duration_s(self) -> float: ...
    @property
    def source(self) -> int: ...

class Endpoint:
    def __init__(self, store: Store, rank: int, size: int, host_id: str, address: str, timeout_s: float) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor: ...
    @property
    def warnings(self) -> list[str]: ...
    @property
    def host_ids(self) -> list[str]: ...

class Group:
    timeout_s: float
    def __init__(
        self,
        endpoint: Endpoint,
        store: Store,
        name: str,
        key: str,
        ranks: Sequence[int],
        planner: Any,
        timeout_s: float,
        device_planner: Any = None,
        nccl_wheel: str = "",
        part: Callable[[Store, list[int], str], Group] | None = None,
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def name(self) -> str: ...
    def native_nbytes(self, collective: str) -> int: ...
    @overload
    def all_reduce(
        self,
        x: Array,
        op: str = "sum",
        *,
        async_op: Literal[False] = False,
        timeout_s: float | None = None,
        algorithm: str | None = None,
        wire: str | None = None,
        wire_nonfinite: str = "pass",
        wire_residual: Any = None,
    ) -> Array: ...
    @overload
    def all_reduce(
        self,
        x: Array,
        op: str = "sum",
        *,
        async_op: bool,
        timeout_s: float | None = None,
        algorithm: str | None = None,
        wire: str | None = None,
        wire_nonfinite: str = "pass",
        wire_residual: Any = None,
    ) -> Any: ...
    def reduce(
        self,
        x: Any,
        root: int = 0,
        op: str = "sum",
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
        algorithm: str | None = None,
    ) -> Any: ...
    def broadcast(
        self,
        x: Any,
        root: int = 0,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
        algorithm: str | None = None,
    ) -> Any: ...
    def all_gather(
        self,
        output: Any,
        input: Any,
        counts: Sequence[int] | None = None,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
        algorithm: str | None = None,
        wire: str | None = None,
        wire_nonfinite: str = "pass",
    ) -> Any: ...
    def reduce_scatter(
        self,
        output: Any,
        input: Any,
        op: str = "sum",
        counts: Sequence[int] | None = None,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
        algorithm: str | None = None,
        wire: str | None = None,
        wire_nonfinite: str = "pass",
    ) -> Any: ...
    def gather(
        self,
        output: Any,
        input: Any,
        root: int = 0,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
        algorithm: str | None = None,
    ) -> Any: ...
    def scatter(
        self,
        output: Any,
        input: Any,
        root: int = 0,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
        algorithm: str | None = None,
    ) -> Any: ...
    def all_to_all(
        self,
        output: Any,
        input: Any,
        output_counts: Sequence[int] | None = None,
        input_counts: Sequence[int] | None = None,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
        algorithm: str | None = None,
        wire: str | None = None,
        wire_nonfinite: str = "pass",
    ) -> Any: ...
    def barrier(self, *, async_op: bool = False, timeout_s: float | None = None) -> Any: ...
    def send(
        self, x: Any, dst: int, tag: int = 0, *, async_op: bool = False, timeout_s: float | None = None
    ) -> Any: ...
    def recv(
        self, x: Any, src: int | None = None, tag: int = 0, *, async_op: bool = False, timeout_s: float | None = None
    ) -> Any: ...
    def exchange(
        self,
        sends: Iterable[tuple[Any, int]] = (),
        receives: Iterable[tuple[Any, int]] = (),
        tag: int = 0,
        *,
        async_op: bool = False,
        timeout_s: float | None = None,
    ) -> Any: ...
    def symmetric_memory(
        self, like: Any, nbytes: int, instead: SymmetricMemory | None = None
    ) -> SymmetricMemory | str: ...
    def stats(self) -> Stats: ...
    def revoke(self, why: str) -> None: ...
    def close(self) -> None: ...
    def _closer(self) -> Callable[[], None]: ...

class SymmetricMemory:
    @property
    def nbytes(self) -> int: ...
    def of(self, rank: int) -> torch.Tensor: ...

class RowMemory:
    def __init__(self, keeps_nbytes: int) -> None: ...
    def empty(self, n_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor: ...

class ExpertPlaces:
    def __init__(
        self,
        rank: int,
        n_experts: int,
        host_of: Sequence[int],
        n_held: Sequence[int],
        rank_of: Sequence[int],
        local_of: Sequence[int],
        expert_of: Sequence[int],
    ) -> None: ...

def expert_tables(
    places: ExpertPlaces,
    ids: torch.Tensor,
    n_tokens: Sequence[int],
    mode: str,
    layout: str,
    cuts_experts: bool,
    n_crossings: int,
    n_stages: int,
    align: int,
    max_tokens: int,
    drop: bool,
) -> dict[str, Any]: ...
def copy_rows(
    out: torch.Tensor,
    sources: Sequence[torch.Tensor],
    source: torch.Tensor,
    rows: torch.Tensor,
    to: torch.Tensor | None = None,
) -> None: ...
def count_slots(positions: torch.Tensor, counts: torch.Tensor, offsets: torch.Tensor, bins: torch.Tensor) -> None: ...
def combine_rows(
    out: torch.Tensor,
    sources: Sequence[torch.Tensor],
    source: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> None: ...
def row_dots(
    out: torch.Tensor,
    a: torch.Tensor,
    a_rows: torch.Tensor | None,
    b: torch.Tensor,
    b_rows: torch.Tensor | None,
) -> None: ...
def encode_rows(coded: torch.Tensor, values: torch.Tensor, wire: str) -> None: ...
def decode_rows(values: torch.Tensor, coded: torch.Tensor, wire: str) -> None: ...
def pack_coded_rows(
    buffers: Sequence[torch.Tensor],
    starts: torch.Tensor,
    buffer: torch.Tensor,
    to: torch.Tensor,
    values: torch.Tensor,
) -> None: ...
def expand_coded_rows(
    out: torch.Tensor,
    sources: Sequence[torch.Tensor],
    source: torch.Tensor,
    rows: torch.Tensor,
    to: torch.Tensor | None = None,
) -> None: ...
def weigh_rows(
    out: torch.Tensor,
    dots: torch.Tensor | None,
    sources: Sequence[torch.Tensor],
    source: torch.Tensor,
    rows: torch.Tensor,
    to: torch.Tensor | None,
    places: torch.Tensor | None,
    weights: torch.Tensor,
    b: torch.Tensor | None,
) -> None: ...
def peer_bytes(endpoint: Endpoint, rank: int, address: int, nbytes: int) -> torch.Tensor: ...
def swap_memory(a: torch.Tensor, b: torch.Tensor) -> None: ...
def round_trip(values: NDArray[np.float32], wire: str) -> NDArray[np.float32]: ...

class Backend(C10dBackend):
    def __init__(
        self,
        group: Group,
        endpoint: Endpoint,
        store: Store,
        nccl_wheel: str,
        hosts: list[str],
        device_planner: Any,
        split: Callable[[Store, list[int], str], Group],
        merge: Callable[[Store, int, int, str, float], Backend],
    ) -> None: ...
    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def pycomm_group(self) -> Group: ...
    def all_reduce_wire(
        self, tensor: torch.Tensor, op: str, wire: str, residual: torch.Tensor | None = None
    ) -> Any: ...

# Only where the CUDA sources were compiled in.
def cuda_info(nccl_wheel: str = "") -> dict[str, Any]: ...
