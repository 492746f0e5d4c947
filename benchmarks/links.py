"""TCP between two emulated hosts, beside what the link gives to plain C: python benchmarks/links.py [SECTION...]

Hosts are network namespaces joined by veth pairs; tc (tbf) shapes what each NIC sends, Ethernet frames and all. Needs
root.
Sections, each in namespaces of its own and under a minute; a run replaces its own sections in results/links.json:

  200mbit 1gbit 2gbit unshaped   1 rank on each host, 4 to 64 MiB
  hosts-of-2                     2 ranks on each host, 1 Gbit/s
  2nics                          two NICs of 500 Mbit/s each between the hosts
  latency                        8 bytes, link unshaped and at 1 Gbit/s
  sockets                        PYCOMM_SOCKETS from 1 to 8 on 1 Gbit/s, also where each connection gets a quarter of it
  groups                         8 bytes in one group while another moves 64 MiB, 1 Gbit/s

The reference is benchmarks/bare.c, compiled here and called by the same processes in turn with pycomm: it moves the
bytes that must cross the link in each direction, both directions at once, and does nothing else. "of the link": those
bytes over the time and the nominal rate; of 1514 bytes that tc counts for a full frame 1448 are payload, so that 95.6 %
is all that TCP can have. Every result is verified before and after it is timed."""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    RESULTS,
    environment,
    markdown_table,
    microseconds,
    read_json,
    run_ranks,
    size_name,
    write_figures,
    write_json,
)
from netns import HOSTS, shape_connections

from pycomm.netns import emulated_hosts, why_unavailable

MIB = 1 << 20
COLLECTIVES = ("send/recv", "all_reduce", "all_gather", "broadcast", "reduce_scatter", "all_to_all")
PAYLOAD_SHARE = 1448 / 1514  # MTU 1500: IP and TCP headers with timestamps inside, Ethernet's 14 bytes around
N_BLOCKS = 8  # of bare C and of pycomm each, in turn; half as many where a call is longer than a block
BLOCK_S = 0.1
SOCKETS, SOCKETS_COLLECTIVES, SOCKETS_NBYTES = (1, 2, 4, 8), ("send/recv", "all_reduce"), 16 * MIB


class Bare:
    """bare.c on sockets to the other host's first rank, `each` per NIC. On the first rank of each host."""

    def __init__(
        self, library: str, store: Any, host: str, addresses: dict[str, list[str]], name: str = "bare", each: int = 1
    ) -> None:
        self._c = ctypes.CDLL(library)
        self._c.exchange.restype = ctypes.c_double
        self._sockets = []
        self.first = host == "a"
        pairs = list(zip(addresses[host], addresses["b" if self.first else "a"], strict=True))
        for i, (mine, theirs) in enumerate(pairs * each):
            key = f"{name}/{i}"
            if not self.first:  # as with pycomm, the lower rank connects
                with socket.create_server((mine, 0)) as listener:
                    listener.settimeout(20)
                    store.set(key, str(listener.getsockname()[1]))
                    end = listener.accept()[0]
            else:
                end = socket.create_connection((theirs, int(store.get(key))), 20, (mine, 0))
            end.settimeout(None)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets.append(end)
        self._fds = (ctypes.c_int * len(self._sockets))(*(s.fileno() for s in self._sockets))
        self._memory = torch.zeros(2, 128 * MIB, dtype=torch.uint8)

    def exchange(self, a_to_b: int, b_to_a: int) -> float:
        """Seconds to send and receive that many bytes, cut evenly over the sockets."""
        n = len(self._sockets)
        out, inward = (a_to_b, b_to_a) if self.first else (b_to_a, a_to_b)
        memory = [ctypes.c_void_p(self._memory[i].data_ptr()) for i in range(2)]
        seconds = float(
            self._c.exchange(
                self._fds, n, memory[0], ctypes.c_size_t(out // n), memory[1], ctypes.c_size_t(inward // n)
            )
        )
        if seconds < 0:
            raise RuntimeError("bare exchange failed")
        return seconds

    def ping(self, spin: bool, n: int) -> np.ndarray:
        """Microseconds of n round trips, as the first side sees them."""
        return self._timed(self._c.ping, int(self.first), spin, n)

    def swap(self, spin: bool, n: int) -> np.ndarray:
        return self._timed(self._c.swap, spin, n)

    def _timed(self, function: Any, *args: Any) -> np.ndarray:
        us = np.zeros(args[-1])
        if function(self._fds[0], *map(int, args), us.ctypes.data_as(ctypes.c_void_p)) != 0:
            raise RuntimeError("bare ping failed")
        return us


def compile_bare(folder: str) -> str:
    library = str(Path(folder) / "bare.so")
    source = Path(__file__).with_name("bare.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def on_the_link(collective: str, nbytes: int, n_hosts: int, n_ranks: int) -> tuple[int, int]:
    """Bytes that a host must send, and receive, where all hosts have as many ranks; of two hosts, the first. nbytes as
    nccl-tests counts them."""
    others = nbytes * (n_hosts - 1) // n_hosts  # what others hold, or get
    both = {
        "all_reduce": 2 * others,
        "all_gather": others,
        "reduce_scatter": others,
        "all_to_all": n_ranks // n_hosts * others,
    }
    return (both[collective],) * 2 if collective in both else (nbytes, 0)


class Case:
    """One rank's tensors of a collective, its call, and what must come out. Small integers: sums are exact."""

    def __init__(self, group: Any, collective: str, nbytes: int) -> None:
        rank, n = group.rank, group.size
        rows = nbytes // 4 // n
        ramp = (torch.arange(rows * n, dtype=torch.int32) % 61).float()
        self._filled = ramp + 100 * rank
        self._piece = self._filled.view(n, -1)[rank].clone()
        self._whole, self._source, self._part = self._filled.clone(), self._filled, self._piece.clone()
        mine, total = ramp.view(n, -1)[rank], ramp * n + 100 * sum(range(n))
        last = n - 1
        calls: dict[str, Callable[[], Any]] = {
            "send/recv": {0: partial(group.send, self._whole, last), last: partial(group.recv, self._whole, 0)}.get(
                rank, lambda: None
            ),
            "all_reduce": partial(group.all_reduce, self._whole),
            "all_gather": partial(group.all_gather, self._whole, self._part),
            "broadcast": partial(group.broadcast, self._whole, 0),
            "reduce_scatter": partial(group.reduce_scatter, self._part, self._source),
            "all_to_all": partial(group.all_to_all, self._whole, self._source),
        }
        expected = {
            "send/recv": (self._whole, ramp if rank == last else self._filled),
            "all_reduce": (self._whole, total),
            "all_gather": (self._whole, ramp + 100 * torch.arange(n).repeat_interleave(rows)),
            "broadcast": (self._whole, ramp),
            "reduce_scatter": (self._part, total.view(n, -1)[rank].clone()),
            "all_to_all": (self._whole, torch.cat([mine + 100 * r for r in range(n)])),
        }
        self.call, self._expected, self._name = (
            calls[collective],
            expected[collective],
            f"{collective} of {nbytes} bytes",
        )

    def verify(self) -> None:
        self._whole.copy_(self._filled)
        self._part.copy_(self._piece)
        self.call()
        if not torch.equal(*self._expected):
            raise AssertionError(f"wrong result: {self._name}")
        self._whole.zero_()  # sums in place do not grow


def measure_rates(
    store: Any,
    rank: int,
    n: int,
    library: str,
    addresses: dict[str, list[str]],
    cases: Sequence[tuple[str, int]],
) -> list[dict[str, list[float]]]:
    """One rank: for each case the seconds of a call, block by block, bare and ours."""
    import pycomm

    host, local = os.environ["PYCOMM_HOST_ID"], n // 2
    group = pycomm.init(store, rank, n, timeout_s=60)
    bare = Bare(library, store, host, addresses) if rank % local == 0 else None
    results = []
    for collective, nbytes in cases:
        case = Case(group, collective, nbytes)
        case.verify()
        link_bytes = on_the_link(collective, nbytes, 2, n)

        def ours(n_calls: int, call: Callable[[], Any] = case.call) -> float:
            group.barrier()
            begin = time.perf_counter()
            for _ in range(n_calls):
                call()
            return (time.perf_counter() - begin) / n_calls

        def reference(n_calls: int, link_bytes: tuple[int, int] = link_bytes) -> float:
            group.barrier()
            return sum(bare.exchange(*link_bytes) for _ in range(n_calls)) / n_calls if bare is not None else 0.0

        longest = np.array([max(ours(1), reference(1))])
        group.all_reduce(longest, "max")
        n_calls = int(min(max(BLOCK_S / longest[0], 1), 50))
        times: dict[str, list[float]] = {"bare": [], "pycomm": []}
        for block in range(N_BLOCKS if longest[0] < BLOCK_S else N_BLOCKS // 2):
            for name in ("bare", "pycomm") if block % 2 == 0 else ("pycomm", "bare"):
                times[name].append(ours(n_calls) if name == "pycomm" else reference(n_calls))
        case.verify()
        results.append(times)
    group.barrier()
    group.close()
    return results


def rates(section: str, library: str) -> dict[str, Any]:
    name, nics, local, sizes = {
        "200mbit": ("200mbit", 1, 1, (4, 16)),
        "1gbit": ("1gbit", 1, 1, (4, 16, 64)),
        "2gbit": ("2gbit", 1, 1, (4, 16, 64)),
        "unshaped": (None, 1, 1, (4, 16, 64)),
        "hosts-of-2": ("1gbit", 1, 2, (4, 16)),
        "2nics": ("500mbit", 2, 1, (4, 16, 64)),
    }[section]
    cases = [(collective, size * MIB) for collective in COLLECTIVES for size in sizes]
    hosts = [host for host in HOSTS for _ in range(local)]
    with emulated_hosts(nics) as network:
        network.shape(name)
        addresses = {host: network.addresses(host) for host in HOSTS}
        by_rank = run_ranks(
            measure_rates, len(hosts), library, addresses, cases, hosts=hosts, network=network, timeout_s=120
        )
    nominal = None if name is None else nics * int(name[:-4]) * (1e9 if name.endswith("gbit") else 1e6) / 8
    entries = []
    for (collective, nbytes), *ranks in zip(cases, *by_rank, strict=True):
        crossing = max(on_the_link(collective, nbytes, 2, 2 * local))
        blocks = {  # each as long as its slowest rank
            who: np.max([rank[who] for rank in ranks], axis=0) for who in ("bare", "pycomm")
        }
        seconds = {who: float(np.median(block)) for who, block in blocks.items()}
        best = {who: float(np.min(block)) for who, block in blocks.items()}
        entry = {"collective": collective, "nbytes": nbytes, "link_bytes": crossing}
        for who, s in seconds.items():
            entry[f"{who}_ms"] = round(s * 1e3, 3)
            entry[f"{who}_mb_per_s"] = round(crossing / s / 1e6, 1)
            if nominal is not None:
                entry[f"{who}_of_link"] = round(crossing / s / nominal, 4)
            if nominal is not None:
                entry[f"{who}_of_link_best"] = round(crossing / best[who] / nominal, 4)
        entry["of_bare"] = round(seconds["bare"] / seconds["pycomm"], 4)
        entries.append(entry)
    return {"rate": name, "nics": nics, "ranks_per_host": local, "entries": entries}


def rates_table(record: dict[str, Any]) -> str:
    shaped = record["rate"] is not None
    head = [f"{record['rate'] or 'unshaped'} x {record['nics']}, {record['ranks_per_host']} rank(s) a host"]
    head += ["bare C, MB/s", "pycomm, MB/s", "of bare C"]
    head += ["of the link (best block), bare C", "of the link (best block), pycomm"] if shaped else []
    rows = []
    for e in record["entries"]:
        row = [f"{e['collective']} {size_name(e['nbytes'])}", f"{e['bare_mb_per_s']:,.0f}"]
        row += [f"{e['pycomm_mb_per_s']:,.0f}", f"{e['of_bare']:.1%}"]
        for who in ("bare", "pycomm") if shaped else ():
            row.append(f"{e[f'{who}_of_link']:.1%} ({e[f'{who}_of_link_best']:.1%})")
        rows.append(row)
    return markdown_table(head, rows)


def keep_to_own_cores() -> None:
    """Hosts share no cores, so emulated ones do not either: each keeps to its half of them. Else two that wait for each
    other may stand on one core, where whoever sleeps at once does best, and on real hosts worst."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    if half > 0:
        os.sched_setaffinity(0, cores[:half] if os.environ["PYCOMM_HOST_ID"] == "a" else cores[half:])


def measure_latency(
    store: Any, rank: int, n: int, library: str, addresses: dict[str, list[str]]
) -> dict[str, list[list[float]]]:
    """Microseconds of each call, block by block. A round trip counts half."""
    import pycomm

    group = pycomm.init(store, rank, n, timeout_s=60)
    bare = Bare(library, store, os.environ["PYCOMM_HOST_ID"], addresses)
    keep_to_own_cores()
    x, y = torch.zeros(2), torch.zeros(2)
    gc.disable()

    def there_and_back() -> None:
        if rank == 0:
            group.send(x, 1)
            group.recv(y, 1)
        else:
            group.recv(y, 0)
            group.send(x, 0)

    def timed(call: Callable[[], Any], n_calls: int) -> np.ndarray:
        times = np.zeros(n_calls)
        for i in range(n_calls):
            begin = time.perf_counter_ns()
            call()
            times[i] = (time.perf_counter_ns() - begin) / 1e3
        return times

    contenders: dict[str, Callable[[int], np.ndarray]] = {
        "bare ping-pong, blocking": lambda k: bare.ping(False, k) / 2,
        "bare ping-pong, spinning": lambda k: bare.ping(True, k) / 2,
        "bare swap, blocking": partial(bare.swap, False),
        "bare swap, spinning": partial(bare.swap, True),
        "send/recv": lambda k: timed(there_and_back, k) / 2,
        "all_reduce": partial(timed, partial(group.all_reduce, x)),
        "broadcast": partial(timed, partial(group.broadcast, x)),
        "barrier": partial(timed, group.barrier),
    }
    times: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for _ in range(24):
        for name, contender in contenders.items():
            group.barrier()
            contender(10)
            times[name].append(contender(100).tolist())
    group.barrier()
    group.close()
    return times


def latency(_: str, library: str) -> dict[str, Any]:
    entries = []
    for rate in (None, "1gbit"):
        with emulated_hosts() as network:
            network.shape(rate)
            addresses = {host: network.addresses(host) for host in HOSTS}
            by_rank = run_ranks(measure_latency, 2, library, addresses, hosts=HOSTS, network=network, timeout_s=120)
        for name in by_rank[0]:
            longest = np.max([rank[name] for rank in by_rank], axis=0)
            entries.append(
                {
                    "rate": rate,
                    "what": name,
                    "best_us": round(float(np.median(longest, axis=1).min()), 2),
                    "median_us": round(float(np.median(longest)), 2),
                    "p99_us": round(float(np.percentile(longest, 99)), 2),
                }
            )
    return {"entries": entries}


def latency_table(record: dict[str, Any]) -> str:
    rows = []
    for e in record["entries"]:
        kind = "ping-pong" if e["what"] == "send/recv" else "swap"  # what each cannot do without
        bare = [o for o in record["entries"] if o["rate"] == e["rate"] and o["what"].startswith(f"bare {kind}")]
        keys = ("best_us", "median_us")
        ratios = [f"{e[key] / min(o[key] for o in bare):.2f}" for key in keys]
        if e["what"].startswith("bare"):
            ratios = ["", ""]
        figures = [microseconds(e[key]) for key in (*keys, "p99_us")]
        rows.append([f"{e['what']}, {e['rate'] or 'unshaped'}", *figures, *ratios])
    head = ["8 B, one way", "best block, µs", "median, µs", "p99, µs", "best: x bare C", "median: x bare C"]
    return markdown_table(head, rows)


def measure_groups(
    store: Any, rank: int, n: int, library: str, addresses: dict[str, list[str]]
) -> dict[str, list[float]]:
    """Microseconds of 8-byte calls in one group, alone and while the other moves 64 MiB; and of bare C likewise."""
    import pycomm

    host = os.environ["PYCOMM_HOST_ID"]
    group = pycomm.init(store, rank, n, timeout_s=60)
    large_group, small_group = group.new_group([0, 1]), group.new_group([0, 1])
    assert large_group is not None and small_group is not None
    bare_large, bare_small = (Bare(library, store, host, addresses, name) for name in ("large", "small"))
    large, small = torch.zeros(64 * MIB // 4), torch.zeros(2)
    large_group.all_reduce(large)
    keep_to_own_cores()
    results: dict[str, list[float]] = {}

    def small_calls() -> list[float]:
        times = []
        for _ in range(20):
            begin = time.perf_counter_ns()
            small_group.all_reduce(small)
            times.append((time.perf_counter_ns() - begin) / 1e3)
        return times

    def rounds(name: str, start: Callable[[], Any], calls: Callable[[], list[float]]) -> None:
        # Both ranks stop after the same number of rounds, which rank 0 tells through the calls' own number.
        results[name] = []
        for _ in range(3):
            group.barrier()
            work = start()
            results[name] += [us for _ in range(5) for us in calls()]
            work.wait()

    class Nothing:
        def wait(self) -> None: ...

    class InThread:
        def __init__(self, call: Callable[[], Any]) -> None:
            self._thread = threading.Thread(target=call)
            self._thread.start()
            time.sleep(0.02)  # until it is under way

        def wait(self) -> None:
            self._thread.join()

    bare_calls = lambda: bare_small.swap(False, 20).tolist()  # noqa: E731
    rounds("bare C, alone", Nothing, bare_calls)
    rounds("pycomm, alone", Nothing, small_calls)
    rounds("bare C, beside 64 MiB", lambda: InThread(partial(bare_large.exchange, 64 * MIB, 64 * MIB)), bare_calls)
    rounds("pycomm, beside 64 MiB (async_op)", lambda: large_group.all_reduce(large, async_op=True), small_calls)
    rounds("pycomm, beside 64 MiB (thread)", lambda: InThread(partial(large_group.all_reduce, large)), small_calls)
    group.barrier()
    for each in (large_group, small_group, group):
        each.close()
    return results


def groups(_: str, library: str) -> dict[str, Any]:
    with emulated_hosts() as network:
        network.shape("1gbit")
        addresses = {host: network.addresses(host) for host in HOSTS}
        by_rank = run_ranks(measure_groups, 2, library, addresses, hosts=HOSTS, network=network, timeout_s=120)
    entries = []
    for name in by_rank[0]:
        longest = np.max([rank[name] for rank in by_rank], axis=0)
        at = {f"{label}_us": round(float(np.percentile(longest, q)), 1) for label, q in (("median", 50), ("p90", 90))}
        entries.append({"what": name, **at, "max_us": round(float(longest.max()), 1), "calls": len(longest)})
    return {"rate": "1gbit", "entries": entries}


def groups_table(record: dict[str, Any]) -> str:
    rows = [
        [e["what"], *(microseconds(e[key]) for key in ("median_us", "p90_us", "max_us"))] for e in record["entries"]
    ]
    return markdown_table(["8 B all_reduce, 1 Gbit/s", "median, µs", "p90, µs", "max, µs"], rows)


def measure_sockets(
    store: Any, rank: int, n: int, library: str, addresses: dict[str, list[str]]
) -> dict[str, list[float]]:
    """Seconds of a call by "collective/PYCOMM_SOCKETS/who", in turn."""
    import pycomm

    group = pycomm.init(store, rank, n, timeout_s=60)
    cases, bares = {}, {}
    for sockets in SOCKETS:
        os.environ["PYCOMM_SOCKETS"] = str(sockets)
        own = group.new_group([0, 1])
        for collective in SOCKETS_COLLECTIVES:
            cases[collective, sockets] = Case(own, collective, SOCKETS_NBYTES)
            cases[collective, sockets].verify()  # connections open on first use
        bares[sockets] = Bare(library, store, os.environ["PYCOMM_HOST_ID"], addresses, f"bare{sockets}", sockets)
    times: dict[str, list[float]] = {}
    for _ in range(3):
        for (collective, sockets), case in cases.items():
            reference = partial(bares[sockets].exchange, *on_the_link(collective, SOCKETS_NBYTES, 2, 2))
            for who, call in (("bare", reference), ("pycomm", case.call)):
                group.barrier()
                begin = time.perf_counter()
                call()
                times.setdefault(f"{collective}/{sockets}/{who}", []).append(time.perf_counter() - begin)
    for case in cases.values():
        case.verify()
    group.barrier()
    group.close()
    return times


def sockets_section(_: str, library: str) -> dict[str, Any]:
    entries = []
    for each in (None, "250mbit"):
        with emulated_hosts() as network:
            if each is None:
                network.shape("1gbit")
            else:
                shape_connections(network, "1gbit", each)
            addresses = {host: network.addresses(host) for host in HOSTS}
            by_rank = run_ranks(measure_sockets, 2, library, addresses, hosts=HOSTS, network=network, timeout_s=120)
        for collective in SOCKETS_COLLECTIVES:
            crossing = max(on_the_link(collective, SOCKETS_NBYTES, 2, 2))
            for sockets in SOCKETS:
                entry = {"collective": collective, "nbytes": SOCKETS_NBYTES, "each": each, "sockets": sockets}
                for who in ("bare", "pycomm"):
                    calls = np.max([rank[f"{collective}/{sockets}/{who}"] for rank in by_rank], axis=0)
                    entry[f"{who}_of_link"] = round(crossing / float(np.median(calls)) / 125e6, 4)
                entries.append(entry)
    return {"rate": "1gbit", "entries": entries}


def sockets_table(record: dict[str, Any]) -> str:
    rows = []
    for e in record["entries"]:
        limit = "no limit" if e["each"] is None else e["each"]
        what = f"{e['collective']} {size_name(e['nbytes'])}, {limit} per connection, {e['sockets']} socket(s)"
        rows.append([what, *(f"{e[f'{who}_of_link']:.1%}" for who in ("bare", "pycomm"))])
    return markdown_table(["1 Gbit/s", "of the link, bare C", "of the link, pycomm"], rows)


SECTIONS: dict[str, tuple[Callable[[str, str], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    **dict.fromkeys(("200mbit", "1gbit", "2gbit", "unshaped", "hosts-of-2", "2nics"), (rates, rates_table)),
    "latency": (latency, latency_table),
    "sockets": (sockets_section, sockets_table),
    "groups": (groups, groups_table),
}


def write_tables(record: dict[str, Any]) -> None:
    """Into docs/tcp.md."""
    parts = []
    for name, (_, table) in SECTIONS.items():
        if name in record:
            about = record[name]["environment"]
            load = about["load_average_before"][0]
            parts.append(f"{about['cpu']}, {about['cores']} cores, {about['tcp_congestion_control']}, load {load}:\n")
            parts.append(table(record[name]) + "\n")
    write_figures(Path(__file__).parents[1] / "docs" / "tcp.md", parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--tables", action="store_true", help="measure nothing; the recorded tables go to docs/tcp.md")
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}")
    path = RESULTS / "links.json"
    record = read_json("links")
    if options.tables:
        write_tables(record)
        return 0
    if (why := why_unavailable()) is not None:
        print(f"links.py cannot emulate hosts here: {why}", file=sys.stderr)
        return 2
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the store's complaints that addresses have no names
    with tempfile.TemporaryDirectory() as folder:
        library = compile_bare(folder)
        for name in options.sections or SECTIONS:
            measure, table = SECTIONS[name]
            congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
            about = {**environment(), "tcp_congestion_control": congestion}
            about["command"] = shlex.join(["python", "benchmarks/links.py", name])
            record[name] = {"environment": about, **measure(name, library)}
            print(f"{table(record[name])}\n", flush=True)
            write_json("links", {key: record[key] for key in SECTIONS if key in record})
    write_tables(record)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
