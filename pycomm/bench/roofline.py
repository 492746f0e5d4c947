"""What memory and links allow: the least time of a case, from rates that were measured in the same run.

Inside a host every input must be read and every output written once, at the rate at which all ranks together copy:
tensors of that size, or, where those are large, memory that no cache holds, whichever is faster.
Between hosts the least bytes cross each host's links, at the rate of plain sockets between the hosts' first ranks; for
an all_reduce 2S(N-1)/N bytes, N hosts, each way (Patarasuk & Yuan, JPDC 69(2), 2009, with hosts in place of ranks)."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pycomm.bench.cases import MOE, Case
from pycomm.discover import gather_bytes
from pycomm.errors import PeerTimeout
from pycomm.group import Group
from pycomm.machine import local_addresses
from pycomm.topology import Topology

MEMORY_FROM: Final = 1 << 20  # bytes; smaller tensors are a matter of latency, and of what the caches hold
LINK_S: Final = 0.5  # how long a host sends while the links are measured
START_S: Final = 0.1  # not counted: TCP's slow start, and the burst that a shaper lets through
_CHUNK: Final = 1 << 18
_GREETING_S: Final = 5.0  # for whoever connects to prove that it is of this job


def memory_limit_s(case: Case, bytes_per_s: float) -> float | None:
    """bytes_per_s: what all ranks together read and write while all of them copy. None for small tensors."""
    if case.nbytes < MEMORY_FROM:
        return None
    return case.kind.touched(case.n_ranks) * case.nbytes / bytes_per_s


def link_bytes(case: Case, topology: Topology) -> NDArray[np.float64]:
    """[n_hosts]: the bytes that must at least cross each host's links, in their busier direction."""
    name, size, n = case.collective.removeprefix("overlap_"), case.nbytes, case.n_ranks
    hosts = topology.hosts
    local = np.array([len(host.ranks) for host in hosts], float)
    least = np.zeros(len(hosts))
    if len(hosts) == 1:
        return least
    rooted = np.array([case.root in host.ranks for host in hosts])
    if name == "all_reduce":
        least[:] = 2 * size * (len(hosts) - 1) / len(hosts)
    elif name in ("reduce", "broadcast"):
        least[:] = size
    elif name in ("reduce_scatter", "all_gather"):
        least = size * np.maximum(local, n - local) / n
    elif name in ("gather", "scatter"):
        least = size * np.where(rooted, n - local, local) / n
    elif name == "all_to_all" or name in MOE:
        least = size * local * (n - local) / n
    elif name == "sendrecv":
        index = topology.host_index
        np.add.at(least, index, size * (index != np.roll(index, -1)))
    elif case.pair is not None:
        ends = topology.host_index[list(case.pair)]
        least[ends] = size if ends[0] != ends[1] else 0
    return least


def link_limit_s(case: Case, topology: Topology, bytes_per_s: NDArray[np.float64]) -> float | None:
    """bytes_per_s: [n_hosts], of each host's links. None where nothing has to cross hosts."""
    least = link_bytes(case, topology)
    return float((least / bytes_per_s).max()) if least.any() else None


def measure_links(group: Group) -> NDArray[np.float64] | None:
    """[n_hosts] bytes a second that reach each host while each sends to the next, every NIC at once; None on one host.

    All ranks together. Raises, on all of them alike, OSError where a host can listen on none of its addresses, and
    PeerTimeout where a host's first rank cannot be reached."""
    hosts = group.topology.hosts
    if len(hosts) == 1:
        return None
    mine = int(group.topology.host_index[group.rank])
    leads = group.topology.local_rank[group.rank] == 0
    patience_s = group.timeout_s / 2  # the others wait timeout_s for the rank that measures
    rates, problem = np.zeros(len(hosts)), ""
    listeners, refused = _listen(local_addresses()) if leads else ([], "")
    try:
        secret = secrets.token_hex(16)
        ends = [listener.getsockname()[:2] for listener in listeners]
        words = _told(group, {"secret": secret, "ends": ends, "problem": "" if listeners else refused}, OSError)
        if leads:
            following = words[hosts[(mine + 1) % len(hosts)].ranks[0]]
            rates[mine], problem = _exchange(listeners, secret, following, patience_s)
    finally:
        for listener in listeners:
            listener.close()
    _told(group, {"problem": problem}, PeerTimeout)
    group.all_reduce(rates, "max")
    return rates


def _listen(addresses: Sequence[str]) -> tuple[list[socket.socket], str]:
    """A listener on each address that can be bound, as the engine has it, and why others cannot."""
    listeners, refused = [], []
    for address in addresses:
        try:
            found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
            family, _, _, _, at = found[0]
            listeners.append(socket.create_server(at, family=family))
        except OSError as error:
            refused.append(f"cannot listen on {address} ({error.strerror})")
    return listeners, "; ".join(refused)


def _told(group: Group, word: dict[str, Any], failure: type[Exception]) -> list[dict[str, Any]]:
    """Every rank's word. Raises the failure on all ranks alike where one has a problem."""
    words: list[dict[str, Any]] = [json.loads(each) for each in gather_bytes(group, json.dumps(word).encode())]
    for rank, each in enumerate(words):
        if each["problem"]:
            raise failure(
                f"the links between hosts cannot be measured: rank {rank} (host {group.host_ids[rank]}): "
                f"{each['problem']}; see PYCOMM_ADDRESS"
            )
    return words


def _exchange(
    listeners: Sequence[socket.socket], secret: str, following: dict[str, Any], patience_s: float
) -> tuple[float, str]:
    """Sends to the next host and receives from the one before, at once; bytes received a second, and what failed."""
    ends: list[tuple[str, int]] = [(address, port) for address, port in following["ends"]]
    found: list[float] = []
    problems: list[str] = []

    def run(work: object, *arguments: object) -> None:
        try:
            found.append(work(*arguments))  # type: ignore[operator]
        except OSError as error:
            problems.append(f"{error}; the next host is at {', '.join(address for address, _ in ends)}")

    threads = [threading.Thread(target=run, args=(_receive, each, secret, patience_s)) for each in listeners]
    for i, end in enumerate(ends):
        source = listeners[i % len(listeners)].getsockname()[0]
        threads.append(threading.Thread(target=run, args=(_send, end, source, following["secret"], patience_s)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(found), next(iter(problems), "")


def _send(end: tuple[str, int], source: str, secret: str, patience_s: float) -> float:
    leave_by = (source, 0) if (":" in source) == (":" in end[0]) else None
    with socket.create_connection(end, patience_s, leave_by) as stream:
        stream.sendall(secret.encode())
        chunk = bytes(_CHUNK)
        until = time.perf_counter() + LINK_S
        while time.perf_counter() < until:
            stream.sendall(chunk)
    return 0.0


def _receive(listener: socket.socket, secret: str, patience_s: float) -> float:
    until = time.monotonic() + patience_s
    while True:
        listener.settimeout(max(until - time.monotonic(), 1e-3))
        stream, _ = listener.accept()
        with stream:
            if not _knows(stream, secret):
                continue
            stream.settimeout(patience_s)
            buffer = bytearray(_CHUNK)
            received, begin, started = 0, time.perf_counter(), False
            while n := stream.recv_into(buffer):
                received += n
                if not started and time.perf_counter() - begin > START_S:
                    received, begin, started = 0, time.perf_counter(), True
            return received / (time.perf_counter() - begin)


def _knows(stream: socket.socket, secret: str) -> bool:
    """Whether the other end is of this job; false too where it says nothing."""
    stream.settimeout(_GREETING_S)
    try:
        return hmac.compare_digest(stream.recv(len(secret)), secret.encode())
    except OSError:
        return False
