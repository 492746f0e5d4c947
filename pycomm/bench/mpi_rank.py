"""One rank of an MPI that pycomm bench started beside its own: python -m pycomm.bench.mpi_rank HOST:PORT

It needs numpy and mpi4py, nothing else. Between two commands it sleeps on its connection, so that it disturbs nobody;
when that closes it ends. The connection's key is in PYCOMM_BENCH_KEY."""

from __future__ import annotations

import importlib
import os
import sys
from multiprocessing.connection import Client
from typing import Any, Final

from pycomm.bench.cases import IN_PLACE, WINDOW, Case
from pycomm.bench.trials import Call, LocalTrial, Memory

KEY: Final = "PYCOMM_BENCH_KEY"
_DATATYPES: Final = {
    "float32": "FLOAT", "float64": "DOUBLE", "int8": "INT8_T", "uint8": "UINT8_T", "int32": "INT32_T",
    "int64": "INT64_T",
}  # fmt: skip
_OPS: Final = {
    "sum": "SUM", "product": "PROD", "min": "MIN", "max": "MAX", "band": "BAND", "bor": "BOR", "bxor": "BXOR",
}  # fmt: skip


def mpi_module() -> Any:
    """mpi4py.MPI, whose import begins MPI."""
    return importlib.import_module("mpi4py.MPI")


def refusal(case: Case) -> str:
    """Why no MPI is measured on this case; empty where it is."""
    if case.moe is not None or case.collective.startswith("overlap_"):
        return "on MPI, single collectives and pairs of ranks are measured"
    if case.kind.reduces and case.op not in _OPS:
        return f"MPI has no {case.op}"
    if case.kind.reduces and case.dtype not in _DATATYPES:
        return f"MPI has no reduction of {case.dtype}"
    return ""


def mpi_trial(comm: Any, case: Case, placement: str, memory: Memory) -> LocalTrial:
    """A case on an MPI communicator whose ranks are the case's."""
    MPI = mpi_module()
    buffers = memory.buffers(placement)
    if case.dtype in _DATATYPES:
        kind = getattr(MPI, _DATATYPES[case.dtype])
        x, y = [buffers.input, kind], [buffers.output, kind]
    else:
        x, y = ([array.view("u1"), MPI.BYTE] for array in (buffers.input, buffers.output))
    op = getattr(MPI, _OPS.get(case.op, "SUM"))
    root, at_root = case.root, comm.rank == case.root
    here: Any = MPI.IN_PLACE if placement == IN_PLACE else x
    into: Any = MPI.IN_PLACE if placement == IN_PLACE else y

    def reduce() -> None:
        if at_root:
            comm.Reduce(here, y, op, root)
        else:
            comm.Reduce(x, None, op, root)

    def broadcast() -> None:
        if at_root and placement != IN_PLACE:
            buffers.output[:] = buffers.input
        comm.Bcast(y, root)

    calls: dict[str, Call] = {
        "all_reduce": lambda: comm.Allreduce(here, y, op),
        "reduce": reduce,
        "reduce_scatter": lambda: comm.Reduce_scatter_block(x, y, op),
        "all_gather": lambda: comm.Allgather(here, y),
        "broadcast": broadcast,
        "gather": lambda: comm.Gather(here if at_root else x, y if at_root else None, root),
        "scatter": lambda: comm.Scatter(x if at_root else None, into if at_root else y, root),
        "all_to_all": lambda: comm.Alltoall(x, y),
        "sendrecv": lambda: comm.Sendrecv(
            x, (comm.rank + 1) % comm.size, recvbuf=y, source=(comm.rank - 1) % comm.size
        ),
        "barrier": comm.Barrier,
    }
    if case.collective == "reduce_scatter" and placement == IN_PLACE:
        return LocalTrial(buffers, _reduce_scatter_in_place(comm, MPI, case, memory, op))
    return LocalTrial(buffers, calls[case.collective] if case.pair is None else _pair_call(comm, MPI, case, y))


def _reduce_scatter_in_place(comm: Any, MPI: Any, case: Case, memory: Memory, op: Any) -> Call:
    """MPI leaves the result at the buffer's begin, nccl-tests at the rank's own piece: with a copy there."""
    kind = getattr(MPI, _DATATYPES[case.dtype])
    whole, each = memory.a, case.count

    def call() -> None:
        comm.Reduce_scatter_block(MPI.IN_PLACE, [whole, kind], op)
        if comm.rank:
            whole[comm.rank * each : (comm.rank + 1) * each] = whole[:each]

    return call


def _pair_call(comm: Any, MPI: Any, case: Case, y: list[Any]) -> Call:
    """As workloads.pair_call has it."""
    assert case.pair is not None
    if comm.rank not in case.pair:
        return lambda: None
    first, second = case.pair
    other = second if comm.rank == first else first
    word = [y[0][: case.element.nbytes if y[1] == MPI.BYTE else 1], y[1]]

    def ping() -> None:
        comm.Send(y, other)
        comm.Recv(y, other)

    def pong() -> None:
        comm.Recv(y, other)
        comm.Send(y, other)

    def give() -> None:
        MPI.Request.Waitall([comm.Isend(y, other) for _ in range(WINDOW)])
        comm.Recv(word, other)

    def take() -> None:
        MPI.Request.Waitall([comm.Irecv(y, other) for _ in range(WINDOW)])
        comm.Send(word, other)

    calls = {"latency": (ping, pong), "bandwidth": (give, take)}[case.collective]
    return calls[comm.rank != first]


def main() -> None:
    MPI = mpi_module()
    comm = MPI.COMM_WORLD
    host, _, port = sys.argv[1].rpartition(":")
    control = Client((host, int(port)), authkey=bytes.fromhex(os.environ[KEY]))
    control.send((comm.rank, comm.size, MPI.Get_library_version().split("\n")[0].split("\0")[0].strip()))
    trials: dict[str, LocalTrial] = {}
    case: Case | None = None
    while True:
        try:
            command, *arguments = control.recv()
        except EOFError:
            os._exit(0)  # finalising may wait for ranks that ended otherwise
        answer: Any = None
        if command == "trial":
            new, placement = arguments
            if new != case:
                case, trials, memory = new, {}, Memory(new, comm.rank)
            trials[placement] = mpi_trial(comm, new, placement, memory)
        elif command == "check":
            answer = trials[arguments[0]].check()
        elif command == "block":
            placement, n_calls, n_warmup = arguments
            answer = trials[placement].block(n_calls, n_warmup)
        control.send(answer)


if __name__ == "__main__":
    main()
