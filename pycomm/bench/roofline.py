"""What memory and links allow: the least time of a case, from rates that were measured in the same run.

Inside a host every input must be read and every output written once, at the rate at which all ranks together copy:
tensors of that size, or, where those are large, memory that no cache holds, whichever is faster.
Between hosts the least bytes cross each host's links, at the rate of plain sockets between the hosts' first ranks; for
an all_reduce 2S(N-1)/N bytes, N hosts, each way (Patarasuk & Yuan, JPDC 69(2), 2009, with hosts in place of ranks)."""

from __future__ import annotations

import hmac
import secrets
import socket
import threading
import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pycomm.bench.cases import MOE, Case
from pycomm.errors import PeerTimeout
from pycomm.group import Group
from pycomm.machine import local_address
from pycomm.topology import Topology

MEMORY_FROM: Final = 1 << 20  # bytes; smaller tensors are a matter of latency, and of what the caches hold
LINK_S: Final = 0.5  # how long a host sends while the links are measured
START_S: Final = 0.1  # not counted: TCP's slow start, and the burst that a shaper lets through
_CHUNK: Final = 1 << 18
_WORD: Final = 512  # bytes of what a rank tells the others about its sockets


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

    All ranks together. Raises PeerTimeout where a host's first rank cannot be reached."""
    hosts = group.topology.hosts
    if len(hosts) == 1:
        return None
    mine = int(group.topology.host_index[group.rank])
    leads = group.topology.local_rank[group.rank] == 0
    addresses = local_address().split(",")
    listeners = [socket.create_server((address, 0)) for address in addresses] if leads else []
    try:
        ports = [listener.getsockname()[1] for listener in listeners]
        secret = secrets.token_hex(16)
        words = _told(group, " ".join([secret, *(f"{a}:{p}" for a, p in zip(addresses, ports, strict=False))]))
        rates = np.zeros(len(hosts))
        if leads:
            following = hosts[(mine + 1) % len(hosts)].ranks[0]
            rates[mine] = _exchange(listeners, secret, words[following], group.timeout_s)
    finally:
        for listener in listeners:
            listener.close()
    group.all_reduce(rates, "max")
    return rates


def _told(group: Group, word: str) -> list[str]:
    """Every rank's word."""
    padded = np.frombuffer(word.encode().ljust(_WORD), np.uint8).copy()
    everyone = np.empty(group.size * _WORD, np.uint8)
    group.all_gather(everyone, padded)
    return [row.tobytes().decode().strip() for row in everyone.reshape(group.size, _WORD)]


def _exchange(listeners: list[socket.socket], secret: str, following: str, timeout_s: float) -> float:
    """Sends to the next host and receives from the one before, at once; bytes received a second."""
    their_secret, *ends = following.split()
    found: list[float] = []
    problems: list[OSError] = []

    def run(work: object, *arguments: object) -> None:
        try:
            found.append(work(*arguments))  # type: ignore[operator]
        except OSError as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(_receive, each, secret, timeout_s)) for each in listeners]
    for i, end in enumerate(ends):
        source = listeners[i % len(listeners)].getsockname()[0]
        threads.append(threading.Thread(target=run, args=(_send, end, source, their_secret, timeout_s)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise PeerTimeout(f"the links between hosts cannot be measured: {problems[0]}; next host at {' '.join(ends)}")
    return sum(found)


def _send(end: str, source: str, secret: str, timeout_s: float) -> float:
    host, _, port = end.rpartition(":")
    with socket.create_connection((host, int(port)), timeout_s, (source, 0)) as stream:
        stream.sendall(secret.encode())
        chunk = bytes(_CHUNK)
        until = time.perf_counter() + LINK_S
        while time.perf_counter() < until:
            stream.sendall(chunk)
    return 0.0


def _receive(listener: socket.socket, secret: str, timeout_s: float) -> float:
    listener.settimeout(timeout_s)
    while True:
        stream, _ = listener.accept()
        with stream:
            stream.settimeout(timeout_s)
            greeting = stream.recv(len(secret), socket.MSG_WAITALL)
            if not hmac.compare_digest(greeting, secret.encode()):
                continue  # not of this job
            buffer = bytearray(_CHUNK)
            received, begin, started = 0, time.perf_counter(), False
            while n := stream.recv_into(buffer):
                received += n
                if not started and time.perf_counter() - begin > START_S:
                    received, begin, started = 0, time.perf_counter(), True
            return received / (time.perf_counter() - begin)
