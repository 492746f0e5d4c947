from collections.abc import Callable, Sequence
from typing import Any

from torch._C._distributed_c10d import Backend as C10dBackend
from torch._C._distributed_c10d import Store

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
    @property
    def host_ids(self) -> list[str]: ...

class Group:
    timeout_s: float
    def __init__(
        self, endpoint: Endpoint, store: Store, name: str, ranks: Sequence[int], planner: Any, timeout_s: float
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def name(self) -> str: ...
    def native_nbytes(self, collective: str) -> int: ...
    def all_reduce(self, x: Any, op: str, async_op: bool, timeout_s: float | None, algorithm: str | None, /) -> Any: ...
    def reduce(
        self, x: Any, root: int, op: str, async_op: bool, timeout_s: float | None, algorithm: str | None, /
    ) -> Any: ...
    def broadcast(
        self, x: Any, root: int, async_op: bool, timeout_s: float | None, algorithm: str | None, /
    ) -> Any: ...
    def all_gather(
        self,
        output: Any,
        input: Any,
        counts: Sequence[int] | None,
        async_op: bool,
        timeout_s: float | None,
        algorithm: str | None,
        /,
    ) -> Any: ...
    def reduce_scatter(
        self,
        output: Any,
        input: Any,
        op: str,
        counts: Sequence[int] | None,
        async_op: bool,
        timeout_s: float | None,
        algorithm: str | None,
        /,
    ) -> Any: ...
    def gather(
        self, output: Any, input: Any, root: int, async_op: bool, timeout_s: float | None, algorithm: str | None, /
    ) -> Any: ...
    def scatter(
        self, output: Any, input: Any, root: int, async_op: bool, timeout_s: float | None, algorithm: str | None, /
    ) -> Any: ...
    def all_to_all(
        self,
        output: Any,
        input: Any,
        output_counts: Sequence[int] | None,
        input_counts: Sequence[int] | None,
        async_op: bool,
        timeout_s: float | None,
        algorithm: str | None,
        /,
    ) -> Any: ...
    def barrier(self, async_op: bool, timeout_s: float | None, /) -> Any: ...
    def send(self, x: Any, dst: int, tag: int, async_op: bool, timeout_s: float | None, /) -> Any: ...
    def recv(self, x: Any, src: int | None, tag: int, async_op: bool, timeout_s: float | None, /) -> Any: ...
    def stats(self) -> Stats: ...
    def revoke(self, why: str) -> None: ...
    def close(self) -> None: ...

class Backend(C10dBackend):
    def __init__(
        self, group: Group, make_group: Callable[[Store, list[int], str], Group], endpoint: Endpoint
    ) -> None: ...
    @property
    def endpoint(self) -> Endpoint: ...
    @property
    def pycomm_group(self) -> Group: ...

# Only where the CUDA sources were compiled in.
def cuda_info(nccl_wheel: str = "") -> dict[str, Any]: ...
