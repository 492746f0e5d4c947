"""How a collective on devices goes: whole to NCCL ("native"), or inside hosts and across in turn (calls.py).

Times that `pycomm tune --devices` measured decide where there are any; else costs do. Costs are those of the algorithms
that NCCL has, in the latency-bandwidth model: rings for large tensors, double binary trees for small all_reduces,
messages of each pair for all_to_all. A topology of the devices gives the figures: `inside` joins the devices of a host,
NICs are what hosts have for them, and starting one call takes `inside.overhead_s`. Uplinks of switches count as a ring
meets them, one host after the other.
Sources: Thakur, Rabenseifner & Gropp, IJHPCA 19(1), 2005; Sanders, Speck & Traff, Parallel Computing 35(12), 2009
(trees); Hu et al., Demystifying NCCL, arXiv 2507.04786, 2025 (what NCCL runs)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pycomm.calls import CALL_PLANNERS, CallSchedule
from pycomm.errors import InvalidArgument
from pycomm.explain import Candidate, Explanation
from pycomm.hosts import Link, slowest
from pycomm.topology import Topology
from pycomm.tuner import LADDER, TIE, Choices, as_choices, choose

NATIVE, HIERARCHICAL = "native", "hierarchical"
Floats = NDArray[np.float64]
Points = Mapping[str, Sequence[tuple[int, float]]]  # by algorithm: bytes, seconds


@dataclass(frozen=True)
class Ring:
    """n_ranks in a row over n_hosts. across: of a host's link, what this ring has of it; no meaning on one host."""

    n_ranks: int
    n_hosts: int
    inside: Link
    across: Link

    def pass_s(self, nbytes: Floats) -> Floats:
        """Once around: reduce_scatter or all_gather of nbytes, of which each link carries (n-1)/n."""
        crossings = self.n_hosts - 1
        return np.asarray(
            (self.n_ranks - 1 - crossings) * _step_s(self.inside)
            + crossings * _step_s(self.across)
            + (self.n_ranks - 1) / self.n_ranks * nbytes / self._bytes_per_s
        )

    def tree_all_reduce_s(self, nbytes: Floats) -> Floats:
        """Up and down two binary trees of hosts, a chain inside each; every link carries nbytes each way."""
        inside = (self.n_ranks // self.n_hosts - 1) * _step_s(self.inside)
        across = math.ceil(math.log2(self.n_hosts)) * _step_s(self.across)
        return np.asarray(2 * (inside + across) + 2 * nbytes / self._bytes_per_s)

    def collective_s(self, collective: str, nbytes: Floats) -> Floats:
        if self.n_ranks == 1:
            return np.zeros_like(nbytes)
        if collective == "all_reduce":
            return np.minimum(2 * self.pass_s(nbytes), self.tree_all_reduce_s(nbytes))
        return self.pass_s(nbytes)

    @property
    def _bytes_per_s(self) -> float:
        rates = [self.across.bytes_per_s] if self.n_hosts > 1 else []
        return min(rates + [self.inside.bytes_per_s] * (self.n_ranks > self.n_hosts))


def _step_s(link: Link) -> float:
    return link.latency_s + link.overhead_s


def _exchange_s(link: Link, n_messages: int, nbytes: Floats) -> Floats:
    """A rank's messages, one after the other on its link."""
    return np.asarray((n_messages > 0) * link.latency_s + n_messages * link.overhead_s + nbytes / link.bytes_per_s)


def _across(topology: Topology) -> Link:
    """Between neighbouring hosts: all NICs of a host together. One host: its own NICs, which nothing crosses."""
    firsts = [topology.hosts[host].ranks[0] for host in topology.hosts_in_order()]
    if len(firsts) == 1:
        return topology.hosts[0].nic
    return slowest(topology.link(here, there) for here, there in pairwise([*firsts, firsts[0]]))


def _share(link: Link, of: int) -> Link:
    return Link(link.latency_s, link.bytes_per_s / of, link.overhead_s)


def _native_s(topology: Topology, collective: str, nbytes: Floats) -> Floats:
    n_ranks, n_hosts, inside, across = topology.n_ranks, len(topology.hosts), topology.inside, _across(topology)
    if collective != "all_to_all":
        return Ring(n_ranks, n_hosts, inside, across).collective_s(collective, nbytes)
    local = max(len(host.ranks) for host in topology.hosts)
    piece = nbytes / n_ranks
    here = _exchange_s(inside, local - 1, (local - 1) * piece)
    away = n_ranks - local
    return np.maximum(here, _exchange_s(_share(across, local), away, away * piece))


def _calls_s(topology: Topology, schedule: CallSchedule, nbytes: Floats) -> Floats:
    """As the engine runs them: a partition's one after the other, each behind those that touched its chunks."""
    (hosts, _), across = schedule.partitions, _across(topology)
    n_hosts, local = len(hosts), len(hosts[0])
    inside_hosts = Ring(local, 1, topology.inside, across)
    between = Ring(n_hosts, n_hosts, topology.inside, _share(across, local))
    exchange = schedule.collective == "all_to_all"
    chunk = nbytes / (topology.n_ranks if exchange else schedule.n_chunks)
    ends: dict[int, Floats] = {}
    free = [np.zeros_like(nbytes), np.zeros_like(nbytes)]
    for call in schedule.calls:
        ring = (inside_hosts, between)[call.partition]
        if exchange:
            each = len(call.chunks[0]) // ring.n_ranks**2
            others = ring.n_ranks - 1
            # Chunks for one rank go as one message across, one by one inside (csrc/cuda/hierarchical.cc).
            link, messages = ((topology.inside, others * each), (ring.across, others))[call.partition]
            took = _exchange_s(link, messages, others * each * chunk)
        else:
            took = ring.collective_s(call.collective, len(call.chunks[0]) * chunk)
        touched = [one for part in call.chunks for one in part]
        start = np.maximum.reduce([free[call.partition], *(ends[one] for one in touched if one in ends)])
        free[call.partition] = start + took + topology.inside.overhead_s
        ends |= dict.fromkeys(touched, free[call.partition])
    return np.maximum(*free)


def has_calls(topology: Topology, collective: str) -> bool:
    """Whether the collective can go inside hosts and across in turn: several hosts, with as many ranks each."""
    return (
        collective in CALL_PLANNERS
        and len(topology.hosts) > 1
        and len({len(host.ranks) for host in topology.hosts}) == 1
    )


def costs(topology: Topology, collective: str, nbytes: ArrayLike) -> dict[str, Floats]:
    """Predicted seconds by algorithm, [len(nbytes)] each. nbytes: the longest buffer a rank passes in or gets.

    Raises InvalidArgument for a collective that NCCL is always left."""
    if collective not in CALL_PLANNERS:
        raise InvalidArgument(
            f"{collective} on devices is NCCL's at every size; a choice have {', '.join(CALL_PLANNERS)}"
        )
    sizes = np.atleast_1d(np.asarray(nbytes, np.float64))
    found = {NATIVE: _native_s(topology, collective, sizes) + topology.inside.overhead_s}
    if has_calls(topology, collective):
        found[HIERARCHICAL] = _calls_s(topology, CALL_PLANNERS[collective](topology), sizes)
    return found


def choice_table(topology: Topology, collective: str) -> Choices:
    """As tuner.choice_table(); native wins where the other is not better by more than the model's uncertainty."""
    found = costs(topology, collective, LADDER)
    if HIERARCHICAL not in found:
        return ((None, NATIVE),)
    wins = found[HIERARCHICAL] * TIE < found[NATIVE]
    return as_choices(LADDER, [HIERARCHICAL if win else NATIVE for win in wins.tolist()])


def measured_table(points: Points) -> Choices:
    """The same by measured times of both, at the same sizes: their ratio is interpolated between those, and holds
    beyond. REQUIRES: is_measured(points)."""
    sizes = np.log2([nbytes for nbytes, _ in points[NATIVE]])
    native, hierarchical = (np.log([seconds for _, seconds in points[name]]) for name in (NATIVE, HIERARCHICAL))
    ratio = np.interp(np.log2(LADDER), sizes, hierarchical - native)
    return as_choices(LADDER, [HIERARCHICAL if win else NATIVE for win in (ratio < -np.log(TIE)).tolist()])


def seconds_between(points: Sequence[tuple[int, float]], nbytes: int) -> float:
    """By measured (bytes, seconds), smallest first: on the line between neighbours, the first one's time below them,
    the last one's rate beyond."""
    sizes, seconds = zip(*points, strict=True)
    return float(np.interp(nbytes, sizes, seconds)) * float(max(1.0, nbytes / sizes[-1]))


def is_measured(points: Points) -> bool:
    """Whether a table's times (TuningTable.device_points) are of both ways at the same sizes."""
    sizes = [[nbytes for nbytes, _ in points.get(name, ())] for name in (NATIVE, HIERARCHICAL)]
    return bool(sizes[0]) and sizes[0] == sizes[1]


def threshold_table(hierarchical_nbytes: int) -> Choices:
    """From that many bytes on hierarchical."""
    if hierarchical_nbytes <= 1:
        return ((None, HIERARCHICAL),)
    return ((hierarchical_nbytes - 1, NATIVE), (None, HIERARCHICAL))


def explain_devices(topology: Topology, collective: str, nbytes: int) -> Explanation:
    """As explain.explain(), for ranks that are devices. Raises InvalidArgument as costs(), and for negative sizes."""
    if nbytes < 0:
        raise InvalidArgument(f"explain: nbytes is {nbytes}; give 0 or more")
    n_ranks, n_hosts = topology.n_ranks, len(topology.hosts)
    fractions = {NATIVE: (n_ranks - 1) / n_ranks, HIERARCHICAL: (n_hosts - 1) / n_hosts}
    if n_hosts == 1:
        fractions[NATIVE] = 0.0
    found = []
    for algorithm, seconds in costs(topology, collective, nbytes).items():
        passes = 2 if collective == "all_reduce" else 1
        if collective == "all_to_all":
            local = max(len(host.ranks) for host in topology.hosts)
            of_host = local * (n_ranks - local) / n_ranks * nbytes
        else:
            of_host = passes * fractions[algorithm] * nbytes
        total_s, n_calls = float(seconds[0]), 1
        if algorithm == HIERARCHICAL:
            n_calls = 1 + max(call.round for call in CALL_PLANNERS[collective](topology).calls)
        found.append(Candidate(algorithm, total_s, total_s, None, int(of_host), int(of_host * n_hosts), n_calls))
    found.sort(key=lambda candidate: candidate.expected_s)
    choice = choose(choice_table(topology, collective), nbytes)
    return Explanation(topology, collective, nbytes, choice, tuple(found))
