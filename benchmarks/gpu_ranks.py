"""Collectives of ranks that are processes, on the GPUs of this machine: what bench-gpu measures of pycomm's engine
beside torch's NCCL backend. Several ranks share a GPU where there are fewer GPUs. Tests run it on the fake device."""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import run_ranks
from gpu_clock import Clock

ROOT = Path(__file__).resolve().parents[1]
BATCH = 20
MANY_RANKS_A_GPU = 23003  # the first NCCL with NCCL_MULTI_RANK_GPU_ENABLE


@dataclass(frozen=True)
class Setting:
    """Where ranks run. nccl_version: 22903 is 2.29.3. other: torch's backend for tensors on the device. environment: of
    every rank."""

    clock: Clock
    n_gpus: int
    nccl_path: str
    nccl_version: int
    other: str = "nccl"
    environment: Mapping[str, str] = field(default_factory=dict)

    def begin(self, rank: int, n_ranks: int, **variables: str) -> None:
        os.environ.update({"PYCOMM_NCCL_LIB": self.nccl_path, **self.environment, **variables})
        if n_ranks > self.n_gpus:
            if self.nccl_version >= MANY_RANKS_A_GPU:
                os.environ.update(NCCL_MULTI_RANK_GPU_ENABLE="1", NCCL_NVLS_ENABLE="0")
            else:
                os.environ["NCCL_HOSTID"] = f"pycomm-rank-{rank}"
        if self.clock.is_gpu:
            torch.cuda.set_device(rank % self.n_gpus)

    def array(self, x: torch.Tensor) -> Any:
        """What a pycomm.Group takes as an array on the device."""
        return x if self.clock.is_gpu else _OnFake(x)


class _OnFake:
    def __init__(self, x: torch.Tensor) -> None:
        self.memory = x
        flat = x.numpy()
        self.__cuda_array_interface__ = {
            "shape": flat.shape,
            "typestr": flat.dtype.str,
            "data": (flat.ctypes.data, False),
            "version": 3,
            "stream": None,
        }


def timed_nccl() -> Path:
    """timed_nccl.cc, compiled where it is older than its source."""
    source, library = ROOT / "benchmarks/timed_nccl.cc", ROOT / "build/timed_nccl.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        library.parent.mkdir(exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-Wl,-Bsymbolic"]
        subprocess.run(["c++", *flags, str(source), "-ldl", "-o", str(made)], check=True)
        made.rename(library)
    return library


def counter() -> Any:
    """timed_nccl.cc's counts of this thread's calls of NCCL."""
    library = ctypes.CDLL(str(timed_nccl()))
    library.timed_nccl_ns.restype = library.timed_nccl_calls.restype = ctypes.c_uint64
    return library


# ---- all_reduce of processes ----


def all_reduces(setting: Setting, n_ranks: int, sizes: Sequence[int], peer_nbytes: int) -> list[dict[str, Any]]:
    """By size: seconds of an all_reduce of float32, the slowest rank's, on the other backend and on pycomm. pycomm
    leaves those up to peer_nbytes to the peer kernel where it can: then it calls NCCL not once (nccl_calls)."""
    timed_nccl()
    found = run_ranks(_all_reduces, n_ranks, setting, tuple(sizes), peer_nbytes)
    rows = []
    for at, nbytes in enumerate(sizes):
        row: dict[str, Any] = {"ranks": n_ranks, "as": "processes", "nbytes": nbytes, "peer_nbytes": peer_nbytes}
        for name in ("nccl", "pycomm"):
            rounds = zip(*(of_rank[at][name] for of_rank in found), strict=True)
            row[f"{name}_s"] = statistics.median(max(one) for one in rounds)
        row["nccl_calls"] = max(of_rank[at]["nccl_calls"] for of_rank in found)
        row["host_s"] = {name: max(of_rank[at][f"{name}_host"] for of_rank in found) for name in ("nccl", "pycomm")}
        rows.append(row)
    return rows


def _all_reduces(
    store: dist.Store, rank: int, n_ranks: int, setting: Setting, sizes: tuple[int, ...], peer_nbytes: int
) -> list[dict[str, Any]]:
    import pycomm  # noqa: F401  (registers the backend)

    setting.begin(
        rank,
        n_ranks,
        PYCOMM_CUDA_PEER_BYTES=str(peer_nbytes),
        TIMED_NCCL=setting.nccl_path,
        PYCOMM_NCCL_LIB=str(timed_nccl()),
    )
    counts = counter()
    clock = setting.clock
    backend = "cpu:pycomm,cuda:pycomm" if clock.is_gpu else "pycomm"
    dist.init_process_group(backend, store=store, rank=rank, world_size=n_ranks)
    groups = {"pycomm": dist.group.WORLD, "nccl": dist.new_group(backend=setting.other)}
    found = []
    for nbytes in sizes:
        sets = torch.randn(min(64, clock.sets_past_cache(nbytes)), nbytes // 4, device=clock.device)
        row: dict[str, Any] = {}
        for name, group in groups.items():
            work = sets.clone()
            seconds, host_s = [], []

            def batch(work: torch.Tensor = work, group: Any = group) -> None:
                for i in range(BATCH):
                    dist.all_reduce(work[i % len(work)], group=group)

            for turn in range(-2, clock.rounds):
                work.copy_(sets)
                clock.synchronize()
                dist.barrier(group)
                before, begin_s = counts.timed_nccl_calls(), time.perf_counter()
                elapsed = clock.elapsed_s(batch)
                host = time.perf_counter() - begin_s
                if name == "pycomm":
                    row["nccl_calls"] = (counts.timed_nccl_calls() - before) / BATCH
                if turn >= 0:
                    seconds.append(elapsed / BATCH)
                    host_s.append(host / BATCH)
            row[name], row[f"{name}_host"] = seconds, statistics.median(host_s)
        found.append(row)
    dist.destroy_process_group()
    return found


# ---- hierarchical, on emulated hosts ----


def hierarchical(setting: Setting, sizes: Sequence[int], ranks_per_host: int = 2) -> dict[str, Any]:
    """Two emulated hosts. By size: seconds of a hierarchical all_reduce of float32 and of the same three steps by the
    other backend's calls; whether all ranks had the same bits, and the CPU engine's for whole numbers; and what one
    call takes on the host beside what it spends in NCCL."""
    n_ranks = 2 * ranks_per_host
    hosts = ["a"] * ranks_per_host + ["b"] * ranks_per_host
    timed_nccl()
    found = run_ranks(_hierarchical, n_ranks, setting, tuple(sizes), hosts=hosts)
    rows = [
        {
            "nbytes": nbytes,
            **{f"{way}_s": max(statistics.median(of_rank["times"][at][way]) for of_rank in found)
               for way in ("pycomm", "bare")},
        }
        for at, nbytes in enumerate(sizes)
    ]  # fmt: skip
    return {
        "n_ranks": n_ranks,
        "sizes": rows,
        "same_bits": all(of_rank["same_bits"] for of_rank in found),
        "host_s": {
            way: {part: max(of_rank["host_s"][way][part] for of_rank in found) for part in ("own", "in_nccl", "calls")}
            for way in ("native", "hierarchical")
        },
    }


def _hierarchical(
    store: dist.Store, rank: int, n_ranks: int, setting: Setting, sizes: tuple[int, ...]
) -> dict[str, Any]:
    import pycomm

    counts = counter()
    setting.begin(rank, n_ranks, TIMED_NCCL=setting.nccl_path, PYCOMM_NCCL_LIB=str(timed_nccl()))
    clock = setting.clock
    dist.init_process_group(setting.other, store=dist.PrefixStore("other", store), rank=rank, world_size=n_ranks)
    half = n_ranks // 2
    inside = [dist.new_group(ranks) for ranks in (list(range(half)), list(range(half, n_ranks)))][rank // half]
    across = [dist.new_group([one, one + half]) for one in range(half)][rank % half]
    with pycomm.init(dist.PrefixStore("ours", store), rank, n_ranks, host_id=os.environ["PYCOMM_HOST_ID"]) as group:
        found: dict[str, Any] = {"times": [], "same_bits": True}
        for nbytes in sizes:
            numel = nbytes // 4 // n_ranks * n_ranks
            x, part = (torch.empty(size, device=clock.device) for size in (numel, numel // half))
            fresh = torch.randn(numel, device=clock.device)

            def ours(turn: int = 0, x: torch.Tensor = x) -> None:
                group.all_reduce(setting.array(x), algorithm="hierarchical")

            def bare(turn: int = 0, x: torch.Tensor = x, part: torch.Tensor = part) -> None:
                if clock.is_gpu:
                    dist.reduce_scatter_tensor(part, x, group=inside)
                else:  # Gloo has none that a test could rely on
                    dist.all_reduce(x, group=inside)
                    part.copy_(x.chunk(half)[rank % half])
                dist.all_reduce(part, group=across)
                dist.all_gather_into_tensor(x, part, group=inside)

            def refill(turn: int = 0, x: torch.Tensor = x, fresh: torch.Tensor = fresh) -> None:
                x.copy_(fresh)
                group.barrier()

            times: dict[str, list[float]] = {"pycomm": [], "bare": []}
            for turn in range(-3, clock.rounds):
                for way, run in (("pycomm", ours), ("bare", bare)):
                    refill()
                    seconds = clock.elapsed_s(run)
                    if turn >= 0:
                        times[way].append(seconds)
            found["times"].append(times)
            found["same_bits"] &= _same_bits(group, setting, numel)
        found["host_s"] = {
            way: _host_times(group, setting, counts, lambda x, way=way: group.all_reduce(x, algorithm=way))
            for way in ("native", "hierarchical")
        }
    dist.destroy_process_group()
    return found


def _same_bits(group: Any, setting: Setting, numel: int) -> bool:
    """Of random floats on all ranks; and of whole numbers, the CPU engine's."""
    x = torch.randn(numel, device=setting.clock.device)
    group.all_reduce(setting.array(x), algorithm="hierarchical")
    ints = torch.randint(-1000, 1000, (numel,))
    on_device = ints.clone().to(setting.clock.device)
    group.all_reduce(setting.array(on_device), algorithm="hierarchical")
    setting.clock.synchronize()
    everyone = torch.empty(group.size * numel)
    group.all_gather(everyone, x.cpu())
    group.all_reduce(ints)
    return all(torch.equal(other, x.cpu()) for other in everyone.chunk(group.size)) and torch.equal(
        ints, on_device.cpu()
    )


def _host_times(group: Any, setting: Setting, counts: Any, call: Callable[[Any], object]) -> dict[str, float]:
    """Of one call of 4 KiB: seconds on the host outside NCCL, within it, and how many calls of NCCL's."""
    x = setting.array(torch.zeros(1024, device=setting.clock.device))
    own, inside, calls = [], [], []
    for turn in range(-10, 10 * setting.clock.rounds):
        before_ns, before = counts.timed_nccl_ns(), counts.timed_nccl_calls()
        begin_ns = time.perf_counter_ns()
        call(x)
        spent_ns = time.perf_counter_ns() - begin_ns
        in_nccl_ns = counts.timed_nccl_ns() - before_ns
        if turn >= 0:
            own.append((spent_ns - in_nccl_ns) / 1e9)
            inside.append(in_nccl_ns / 1e9)
            calls.append(counts.timed_nccl_calls() - before)
        if turn % 10 == 0:  # never so many under way that launching one waits
            setting.clock.synchronize()
            group.barrier()
    return {"own": statistics.median(own), "in_nccl": statistics.median(inside), "calls": statistics.median(calls)}


# ---- graphs ----


def graph(setting: Setting, n_ranks: int, numel: int = 1 << 20) -> dict[str, Any]:
    """A training step's collectives, called and as a replayed graph: seconds, and whether the bits are the same."""
    found = run_ranks(_graph, n_ranks, setting, numel)
    return {
        "n_ranks": n_ranks,
        "called_s": max(one["called_s"] for one in found),
        "replayed_s": max(one["replayed_s"] for one in found),
        "same_bits": all(one["same_bits"] for one in found),
    }


def _graph(store: dist.Store, rank: int, n_ranks: int, setting: Setting, numel: int) -> dict[str, Any]:
    import pycomm  # noqa: F401  (registers the backend)

    setting.begin(rank, n_ranks)
    clock = setting.clock
    backend = "cpu:pycomm,cuda:pycomm" if clock.is_gpu else "pycomm"
    dist.init_process_group(backend, store=store, rank=rank, world_size=n_ranks)
    gradients = torch.randn(4, n_ranks * numel // 4, device=clock.device)
    shards = torch.empty(4, numel // 4, device=clock.device)
    whole, norm = torch.empty_like(gradients), torch.empty(1, device=clock.device)

    def step() -> None:
        for given, shard in zip(gradients, shards, strict=True):
            dist.reduce_scatter_tensor(shard, given)
        norm.copy_(shards.square().sum())
        dist.all_reduce(norm)
        shards.div_(1 + norm)
        for gathered, shard in zip(whole, shards, strict=True):
            dist.all_gather_into_tensor(gathered, shard)

    step()
    clock.synchronize()
    expected = [one.clone() for one in (whole, norm)]
    replay: Callable[[], None] = step
    if clock.is_gpu:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            step()
        replay = captured.replay
    whole.fill_(float("nan"))
    replay()
    clock.synchronize()
    same = all(torch.equal(ours, due) for ours, due in zip((whole, norm), expected, strict=True))
    times = {"same_bits": same}
    times |= {
        "called_s": clock.median_s(lambda turn: step(), lambda turn: dist.barrier()),
        "replayed_s": clock.median_s(lambda turn: replay(), lambda turn: dist.barrier()),
    }
    dist.destroy_process_group()
    return times
