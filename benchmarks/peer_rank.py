"""One rank of one library, told by peers.py or hosts.py what to run: python peer_rank.py KIND NAME SOCKET KEY

Needs numpy, this repository and the library, nothing else: each library has an environment of its own. What goes in and
what must come out is pycomm.bench's. Between two commands a rank sleeps on its connection, so that libraries do not
disturb each other."""

from __future__ import annotations

import ctypes
import os
import statistics
import sys
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pycomm.bench.buffers import Buffers
from pycomm.bench.cases import COLLECTIVES, DTYPES, Case
from pycomm.bench.trials import Call, timed

F32, BF16 = "float32", "bfloat16"


class PeerBuffers:
    """A rank's arrays for one case: `whole` has a piece for each rank, `piece` is one of them, `source` as whole.

    nbytes: of the whole tensor, of which what does not divide by the ranks is left out. sendrecv: there and back
    between each even rank and the next."""

    def __init__(
        self, collective: str, dtype: str, nbytes: int, rank: int, n: int, empty: Callable[[int, str], Any]
    ) -> None:
        width, pieces = DTYPES[dtype].nbytes, 1 if collective in ("sendrecv", "barrier") else n
        self.collective, self.dtype, self.rank = collective, dtype, rank
        self.each = max(1, nbytes // width // pieces)
        self.numel = self.each * pieces
        self.whole = empty(self.numel, dtype)
        self.piece = empty(self.each, dtype) if collective in ("all_gather", "reduce_scatter") else self.whole[:0]
        self.source = empty(self.numel, dtype) if collective == "all_to_all" else self.whole[:0]
        pair = (rank & ~1, rank | 1) if collective == "sendrecv" else None
        case = Case("latency" if pair else collective, dtype, self.numel * width, n, pair=pair)
        given, result = {
            "all_gather": (self.piece, self.whole),
            "reduce_scatter": (self.whole, self.piece),
            "all_to_all": (self.source, self.whole),
        }.get(collective, (self.whole, self.whole))
        self._buffers = Buffers(case, COLLECTIVES[case.collective].native if not pair else "", rank, given, result)

    def fill(self) -> None:
        """What goes in; where a result is to stand, what cannot be one."""
        self._buffers.fill()

    def right(self) -> bool:
        """Whether what came out is right, to the last element."""
        return self._buffers.wrong() == 0

    def zero(self) -> None:
        """Repeated sums in place do not grow from here."""
        self._buffers.zero()


class Library:
    """What a rank can be told to run. Most have one contender, and ordinary memory."""

    rank: int
    size: int
    version: str

    def join(self, exchange: Callable[[Any], Any]) -> None:
        """Meets the other ranks; exchange(x) gives every rank what rank 0 gave."""

    def contenders(self) -> tuple[str, ...]:
        return ("",)

    def empty(self, contender: str, numel: int, dtype: str) -> Any:
        return np.empty(numel, DTYPES[dtype].raw)

    def call(self, contender: str, b: PeerBuffers) -> Call:
        raise NotImplementedError


class Mpi(Library):
    """An MPI through mpi4py, buffers and datatypes prepared once."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self.mpi, self.comm = MPI, MPI.COMM_WORLD
        self.rank, self.size = self.comm.rank, self.comm.size
        self.version = MPI.Get_library_version().split("\n")[0].split("\0")[0].strip()
        if "MPICH" in self.version:  # has the type, under a name of its own
            self.bf16 = MPI.Datatype.fromhandle(0x4C00024C)
            self.bf16_sum = MPI.SUM
        else:
            op = ctypes.CDLL(os.environ["PEER_BF16_OP"]).bf16_sum
            op.restype = ctypes.c_uint64
            self.bf16, self.bf16_sum = MPI.UINT16_T, MPI.Op.fromhandle(op())

    def call(self, contender: str, b: PeerBuffers) -> Call:
        comm, mpi = self.comm, self.mpi
        kind = mpi.FLOAT if b.dtype == F32 else self.bf16
        op = mpi.SUM if b.dtype == F32 else self.bf16_sum
        whole, piece, source = [b.whole, kind], [b.piece, kind], [b.source, kind]
        peer = b.rank ^ 1

        def ping_pong() -> None:
            if b.rank & 1:
                comm.Recv(whole, peer)
                comm.Send(whole, peer)
            else:
                comm.Send(whole, peer)
                comm.Recv(whole, peer)

        calls: dict[str, Call] = {
            "all_reduce": lambda: comm.Allreduce(mpi.IN_PLACE, whole, op),
            "reduce_scatter": lambda: comm.Reduce_scatter_block(whole, piece, op),
            "all_gather": lambda: comm.Allgather(piece, whole),
            "all_to_all": lambda: comm.Alltoall(source, whole),
            "broadcast": lambda: comm.Bcast(whole, 0),
            "sendrecv": ping_pong,
            "barrier": comm.Barrier,
        }
        return calls[b.collective]


class OneCcl(Library):
    """oneCCL by ctypes, over its own MPI. Its send and recv crash on CPU memory (2022.1.2), so it has none here."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL(os.environ["PEER_SHIM"])
        for name in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all"):
            getattr(self.lib, f"peer_{name}").argtypes = [
                ctypes.c_void_p,
                ctypes.c_void_p,
                ctypes.c_size_t,
                ctypes.c_int,
            ]
        self.lib.peer_broadcast.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.rank, self.size = int(os.environ["PMI_RANK"]), int(os.environ["PMI_SIZE"])
        self.version = "oneCCL " + os.environ["PEER_VERSION"]

    def join(self, exchange: Callable[[Any], Any]) -> None:
        address = ctypes.create_string_buffer(256)
        if self.rank == 0:
            self.lib.peer_address(address)
        self.lib.peer_join(self.size, self.rank, exchange(address.raw))

    def call(self, contender: str, b: PeerBuffers) -> Call:
        lib, bf16 = self.lib, int(b.dtype == BF16)
        whole, piece, source = (array.ctypes.data for array in (b.whole, b.piece, b.source))
        calls: dict[str, Call] = {
            "all_reduce": lambda: lib.peer_all_reduce(whole, whole, b.numel, bf16),
            "reduce_scatter": lambda: lib.peer_reduce_scatter(whole, piece, b.each, bf16),
            "all_gather": lambda: lib.peer_all_gather(piece, whole, b.each, bf16),
            "all_to_all": lambda: lib.peer_all_to_all(source, whole, b.each, bf16),
            "broadcast": lambda: lib.peer_broadcast(whole, b.numel, bf16),
            "barrier": lib.peer_barrier,
        }
        return calls[b.collective]


class Torch(Library):
    """Gloo and pycomm's ways in, from one process: they share what surrounds them."""

    GLOO, TORCH, GROUP, OWN = "Gloo", "torch.distributed", "Group", "Group, pycomm.empty"
    NULL = "torch.distributed, no-op"  # a backend that does nothing: torch's own share of a call

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.torch = torch
        self.rank, self.size = int(os.environ["PEER_RANK"]), int(os.environ["PEER_SIZE"])
        self.version = f"torch {torch.__version__}"

    def join(self, exchange: Callable[[Any], Any]) -> None:
        from datetime import timedelta

        import torch.distributed as dist

        import pycomm

        host, port = os.environ["PEER_STORE"].split(":")
        store = dist.TCPStore(host, int(port), is_master=False)
        patience = timedelta(seconds=120)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=patience)
        import null_backend

        null_backend.register()
        self.dist = dist
        self.groups = {
            self.GLOO: dist.group.WORLD,
            self.TORCH: dist.new_group(backend="pycomm", timeout=patience),
            self.NULL: dist.new_group(backend="null", timeout=patience),
        }
        self.group = pycomm.init(dist.PrefixStore("group", store), self.rank, self.size, timeout_s=120)

    def contenders(self) -> tuple[str, ...]:
        return (self.GLOO, self.NULL, self.TORCH, self.GROUP, self.OWN)

    def empty(self, contender: str, numel: int, dtype: str) -> Any:
        if contender != self.OWN:
            return np.empty(numel, DTYPES[dtype].raw)
        kept = self.group.empty(max(numel, 1), dtype=getattr(self.torch, dtype))
        array: Any = kept[:numel].view(self.torch.uint16 if dtype == BF16 else self.torch.float32).numpy()
        return array

    def _tensor(self, array: Any, dtype: str) -> Any:
        return self.torch.from_numpy(array).view(getattr(self.torch, dtype))

    def call(self, contender: str, b: PeerBuffers) -> Call:
        whole, piece, source = (self._tensor(array, b.dtype) for array in (b.whole, b.piece, b.source))
        peer = b.rank ^ 1
        if contender in (self.GROUP, self.OWN):
            g = self.group
            send, recv = (lambda: g.send(whole, peer)), (lambda: g.recv(whole, peer))
            calls: dict[str, Call] = {
                "all_reduce": lambda: g.all_reduce(whole),
                "reduce_scatter": lambda: g.reduce_scatter(piece, whole),
                "all_gather": lambda: g.all_gather(whole, piece),
                "all_to_all": lambda: g.all_to_all(whole, source),
                "broadcast": lambda: g.broadcast(whole, 0),
                "barrier": g.barrier,
            }
        else:
            dist, group = self.dist, self.groups[contender]
            # torch 2.13 renamed these; the old names warn on every call
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            send, recv = (
                (lambda: dist.send(whole, peer, group=group)),
                (lambda: dist.recv(whole, peer, group=group)),
            )
            calls = {
                "all_reduce": lambda: dist.all_reduce(whole, group=group),
                "reduce_scatter": lambda: scatter(piece, whole, group=group),
                "all_gather": lambda: gather(whole, piece, group=group),
                "all_to_all": lambda: dist.all_to_all_single(whole, source, group=group),
                "broadcast": lambda: dist.broadcast(whole, 0, group=group),
                "barrier": lambda: dist.barrier(group=group),
            }
        first, second = (recv, send) if b.rank & 1 else (send, recv)

        def ping_pong() -> None:
            first()
            second()

        calls["sendrecv"] = ping_pong
        return calls[b.collective]


class GlooAlone(Torch):
    """Between emulated hosts, in processes of its own: after seconds of its work the scheduler makes its processes
    wait, whoever calls from them next."""

    def join(self, exchange: Callable[[Any], Any]) -> None:
        from datetime import timedelta

        import torch.distributed as dist

        host, port = os.environ["PEER_STORE"].split(":")
        store = dist.TCPStore(host, int(port), is_master=False)
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.size, timeout=timedelta(seconds=120)
        )
        self.dist, self.groups = dist, {self.GLOO: dist.group.WORLD}

    def contenders(self) -> tuple[str, ...]:
        return (self.GLOO,)


class Hosts(Torch):
    """Between emulated hosts: pycomm as it chooses once it has measured its links and algorithms (as after `pycomm
    tune`), its flat ring, and plain C moving what must cross a link."""

    CHOICE, RING, BARE = "pycomm", "pycomm, flat ring", "bare C"

    def join(self, exchange: Callable[[Any], Any]) -> None:
        import torch.distributed as dist
        from links import Bare, on_the_link

        import pycomm
        from pycomm.tune import tune

        host, port = os.environ["PEER_STORE"].split(":")
        store = dist.TCPStore(host, int(port), is_master=False)
        untuned = pycomm.init(dist.PrefixStore("group", store), self.rank, self.size, timeout_s=120)
        table = tune(untuned)
        self.group = untuned.replan(table.topology, table)
        self.hosts = sorted(set(self.group.host_ids))
        mine = self.group.host_ids[self.rank]
        self.bare, self.on_the_link = None, on_the_link
        if mine in self.hosts[:2] and self.group.host_ids.index(mine) == self.rank:
            addresses = {name: os.environ[f"PEER_ADDRESS_{name}"].split(",") for name in self.hosts[:2]}
            self.bare = Bare(os.environ["PEER_BARE"], store, mine, addresses)

    def contenders(self) -> tuple[str, ...]:
        return (self.CHOICE, self.RING, self.BARE)

    def algorithm(self, collective: str, nbytes: int) -> str:
        """What CHOICE runs."""
        return self.group.explanation(collective, nbytes).choice

    def call(self, contender: str, b: PeerBuffers) -> Call:
        if contender == self.BARE:
            n_bytes = self.on_the_link(b.collective, b.numel * DTYPES[b.dtype].nbytes, len(self.hosts), self.size)
            return (lambda: self.bare.exchange(*n_bytes)) if self.bare is not None else (lambda: None)
        if contender == self.RING:
            whole, piece = self._tensor(b.whole, b.dtype), self._tensor(b.piece, b.dtype)
            calls: dict[str, Call] = {
                "all_reduce": lambda: self.group.all_reduce(whole, algorithm="ring"),
                "reduce_scatter": lambda: self.group.reduce_scatter(piece, whole, algorithm="ring"),
                "all_gather": lambda: self.group.all_gather(whole, piece, algorithm="ring"),
            }
            return calls[b.collective]
        return super().call(self.GROUP, b)


class Nothing(Library):
    """What the memory does: every rank copies at once, with nobody to wait for."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["PEER_RANK"]), int(os.environ["PEER_SIZE"])
        self.version = f"numpy {np.__version__}"

    def call(self, contender: str, b: PeerBuffers) -> Call:
        half = len(b.whole) // 2
        to, source = b.whole[:half], b.whole[half : 2 * half]
        return lambda: np.copyto(to, source)


def serve(library: Library, control: Connection) -> None:
    """Runs what comes over the connection until it closes."""
    buffers: dict[str, PeerBuffers] = {}
    calls: dict[str, Call] = {}
    idle = isinstance(library, Nothing)
    while True:
        command, *arguments = control.recv()
        answer: Any = None
        if command == "prepare":
            collective, dtype, nbytes, contenders = arguments
            shared: PeerBuffers | None = None
            for name in contenders:
                if name == Torch.OWN or shared is None:
                    b = PeerBuffers(
                        collective,
                        dtype,
                        nbytes,
                        library.rank,
                        library.size,
                        lambda k, d, who=name: library.empty(who, k, d),
                    )
                    if name != Torch.OWN:
                        shared = b
                else:
                    b = shared
                buffers[name], calls[name] = b, library.call(name, b)
        elif command == "release":
            buffers, calls = {}, {}
        elif command == "calibrate":
            name, n_calls = arguments
            buffers[name].zero()
            answer = statistics.median(timed(calls[name], n_calls)[1:])
        elif command == "block":
            name, n_calls, warm_up, verify = arguments
            b, call = buffers[name], calls[name]
            if verify and not idle and name not in (Torch.NULL, Hosts.BARE):
                b.fill()
                call()
                answer = b.right()
                b.zero()
            else:
                answer = True
            timed(call, warm_up)
            answer = (answer, timed(call, n_calls))
        elif command == "algorithm" and isinstance(library, Hosts):
            answer = library.algorithm(*arguments)
        elif command == "end":
            control.send(None)
            return
        control.send(answer)


def main() -> None:
    kinds: dict[str, Callable[[], Library]] = {
        "mpi": Mpi,
        "oneccl": OneCcl,
        "torch": Torch,
        "hosts": Hosts,
        "gloo": GlooAlone,
        "copy": Nothing,
    }
    kind, name, address, key = sys.argv[1:5]
    library = kinds[kind]()
    control = Client(address, authkey=bytes.fromhex(key))
    control.send((name, library.rank, library.version, library.contenders()))

    def exchange(mine: Any) -> Any:
        control.send(mine)
        return control.recv()

    import gc

    gc.disable()  # a collection in the midst of a call would count as its time
    library.join(exchange)
    control.send("joined")
    serve(library, control)
    os._exit(0)  # finalising a library may wait for ranks that ended otherwise


if __name__ == "__main__":
    main()
