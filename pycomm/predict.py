"""predict(schedule, topology, nbytes): how long a schedule takes, for many sizes in one pass.

The closed form of what simulate() follows event by event, for the tuner, which asks for every candidate and size when a
group is made. Ports serve one transfer at a time instead of sharing their rate: by round, and in a round every sending
port's first transfer before any second. So the order of everything is known beforehand, and all sizes are one array.
tests/test_predict.py holds both against each other."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pycomm.errors import InvalidArgument
from pycomm.schedule import Schedule, chunk_nbytes
from pycomm.topology import Topology
from pycomm.traffic import SEGMENT_BYTES, Floats, Ints, traffic


def predict(
    schedule: Schedule, topology: Topology, nbytes: ArrayLike, segment_bytes: int = SEGMENT_BYTES
) -> NDArray[np.float64]:
    """[len(nbytes)]: seconds until the last byte of `schedule` has arrived and is reduced, for every size.

    A transfer begins when its ports are free and the first segments of the values it reads are there. It holds each
    port for its bytes at the port's rate, and overhead_s. It ends once all its bytes have left on the slowest, one
    segment after the last of the values it reads at the earliest, and arrives latency_s later. A reduction holds the
    receiving port inside a host; between hosts it goes on beside the NIC, and only its last segment adds time.
    Raises InvalidArgument where the topology has other ranks than the schedule, and for sizes that cannot be."""
    sizes = chunk_nbytes(schedule, np.atleast_1d(np.asarray(nbytes, np.int64)))
    if segment_bytes < 1:
        raise InvalidArgument(f"predict: segment_bytes is {segment_bytes}; give at least 1")
    if sizes.min(initial=0) < 0:
        raise InvalidArgument("predict: nbytes must be sizes of 0 or more")
    return np.asarray(_ends(schedule, topology, sizes, segment_bytes).max(axis=0, initial=0.0))


def _ends(schedule: Schedule, topology: Topology, sizes: Ints, segment_bytes: int) -> Floats:
    """[n_transfers, n_sizes]: when each transfer ends, for all columns of `sizes`, [n_chunks, n_sizes]."""
    load = traffic(schedule, topology)
    rows = schedule.transfers
    ports, needs = load.ports, load.needs
    order = _in_turn(schedule, ports[:, 0])
    n, n_sizes = len(rows), sizes.shape[1]
    latency, per_byte, overhead = (column[:, None] for column in (load.latency_s, load.s_per_byte, load.overhead_s))
    reduce_per_byte = np.where(rows["reduce"], 1 / topology.reduce_bytes_per_s, 0.0)[:, None]
    beside_per_byte = np.where(load.between[:, None], reduce_per_byte, 0.0)
    hold_per_byte = per_byte + reduce_per_byte - beside_per_byte
    port_per_byte = load.port_s_per_byte[ports]
    port_per_byte[:, 1] += (reduce_per_byte - beside_per_byte)[:, 0]
    first, last = np.zeros((2, n + 1, n_sizes))  # row n: what a transfer that needs nothing waits for
    free = np.zeros((len(load.port_s_per_byte), n_sizes))
    for wave in _waves(ports, needs, order, len(load.port_s_per_byte)):
        chunk = sizes[rows["chunk"][wave]].astype(np.float64)
        segment = np.minimum(chunk, segment_bytes)
        own_ports, own_needs = ports[wave], needs[wave]
        start = np.maximum(free[own_ports].max(axis=1), first[own_needs].max(axis=1))
        leave = start + overhead[wave]
        tail = segment * (per_byte[wave] + reduce_per_byte[wave])
        held = leave + chunk * hold_per_byte[wave]
        done = np.maximum(held + segment * beside_per_byte[wave], last[own_needs].max(axis=1) + tail)
        first[wave], last[wave] = leave + tail + latency[wave], done + latency[wave]
        free[own_ports] = leave[:, None] + chunk[:, None] * port_per_byte[wave][:, :, None]
        free[-1] = 0.0
    return last[:-1]


def _in_turn(schedule: Schedule, port: NDArray[np.int32]) -> Ints:
    """The order of service: by round; in a round every port's first transfer, then every port's second, .."""
    by_port = np.lexsort((port, schedule.transfers["round"]))
    place = np.arange(len(port))
    sorted_port, sorted_round = port[by_port], schedule.transfers["round"][by_port]
    begins = np.append(True, (np.diff(sorted_port) != 0) | (np.diff(sorted_round) != 0))[: len(port)]
    turn = np.empty(len(port), np.int64)
    turn[by_port] = place - np.maximum.accumulate(np.where(begins, place, 0))
    return np.lexsort((turn, schedule.transfers["round"]))


def _waves(ports: NDArray[np.int32], needs: Ints, order: Ints, n_ports: int) -> list[Ints]:
    """The transfers in groups that share no port and need only earlier groups; on each port they keep their order."""
    of_port = [0] * n_ports
    levels = [0] * (len(ports) + 1)  # the last: what a transfer that needs nothing comes after
    for index, own_ports, (value, own) in zip(
        order.tolist(), ports[order].tolist(), needs[order].tolist(), strict=True
    ):
        level = max(levels[value], levels[own], *[of_port[port] for port in own_ports]) + 1
        levels[index] = level
        for port in own_ports:
            of_port[port] = level
        of_port[-1] = 0  # no port
    level_of = np.array(levels[:-1], np.int64)[order]
    by_level = order[np.argsort(level_of, kind="stable")]
    bounds = np.searchsorted(np.sort(level_of), np.arange(1, max(levels) + 2))
    return [by_level[begin:end] for begin, end in pairwise(bounds.tolist())]
