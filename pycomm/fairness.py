"""Max-min fair rates of flows that share ports.

Source: Bertsekas & Gallager, Data Networks, 2nd edition 1992, section 6.5.2 (progressive filling)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

EXACT = 1e-12  # levels closer than this, relatively, are one: they differ by rounding


def max_min_rates(
    ports: NDArray[np.int32], s_per_byte: NDArray[np.float64], at_most: NDArray[np.float64], n_ports: int
) -> NDArray[np.float64]:
    """[n_flows]: bytes per second of each flow, so that none can have more but at the cost of one that has no more.

    ports: [k, n_flows], what a flow loads; s_per_byte: [k, n_flows], for how long a byte of it keeps each of them busy,
    0 where it does not; at_most: [n_flows], bytes per second. No port is busy for more than all of the time."""
    if ports.size < n_ports:
        used, of_used = np.unique(ports, return_inverse=True)
        ports, n_ports = of_used.reshape(ports.shape).astype(np.int32), len(used)
    rates = np.zeros(ports.shape[1])
    free = np.ones(n_ports)
    flows = np.arange(ports.shape[1])
    while len(flows):
        own, weights, limit = ports[:, flows], s_per_byte[:, flows], at_most[flows]
        flat = own.ravel()
        busy = np.bincount(flat, weights.ravel(), n_ports)
        level = np.divide(free, busy, out=np.full(n_ports, math.inf), where=busy > 0)
        fair = level[own].min(axis=0)
        rate = np.minimum(fair, limit)
        # A port settles its flows where none of them is held lower by another port.
        held = rate >= level[own] * (1 - EXACT)
        settled = np.bincount(flat, held.ravel(), n_ports) == np.bincount(flat, minlength=n_ports)
        fixed = (held & settled[own]).any(axis=0) | (limit <= fair)
        rates[flows[fixed]] = rate[fixed]
        used_up = np.bincount(own[:, fixed].ravel(), (weights[:, fixed] * rate[fixed]).ravel(), n_ports)
        free = np.maximum(free - used_up, 0.0)
        flows = flows[~fixed]
    return rates
