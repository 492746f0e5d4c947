"""All-to-all in log2 n rounds, for many small pieces.

Source: Bruck, Ho, Kipnis, Upfal & Weathersby, Efficient algorithms for all-to-all communications in multiport
message-passing systems, IEEE TPDS 8(11), 1997."""

from __future__ import annotations

import numpy as np

from pycomm.schedule import Schedule, in_parallel, transfers
from pycomm.topology import Topology


def bruck_all_to_all(topology: Topology, root: int = 0) -> Schedule:
    """ceil(log2 n) rounds; a piece for the rank d further on moves once for every bit set in d, so each rank sends
    about half its input a round."""
    n, order = topology.n_ranks, topology.by_host()
    position, distance = np.mgrid[:n, :n]
    chunk = order[position] * n + order[(position + distance) % n]
    rounds = []
    for bit in range((n - 1).bit_length()):
        moves = (distance >> bit & 1) == 1
        here = (position + (distance & ((1 << bit) - 1)))[moves]
        rounds.append(transfers(bit, order[here % n], order[(here + (1 << bit)) % n], chunk[moves]))
    return Schedule("all_to_all", "bruck", n, n * n, root, in_parallel(rounds))
