"""Which algorithm for which size: every candidate's expected time over a ladder of sizes.

The model is asked first: it predicts every candidate, with measured link figures where a group has them. Where a
tuning table holds times of the group's own layout, a prediction is multiplied by measured / predicted, interpolated
between the sizes that were measured; a candidate without times is taken for as far off as the worst of the measured,
so that nothing unmeasured is chosen unless it is expected to win even so; so is one that was measured at other sizes
alone, where others have times.

Deterministic: every rank of a group computes the same from the same topology and table, and asks no other rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pycomm.check import check_coded
from pycomm.errors import InvalidArgument, ScheduleError
from pycomm.own import Own
from pycomm.planners import PLANNERS, THREE_LEVEL, TWO_LEVEL, Planner
from pycomm.predict import predict
from pycomm.schedule import Schedule
from pycomm.table import TuningTable
from pycomm.topology import Topology, WireLinks

Choices = tuple[tuple[int | None, str], ...]

LADDER: Final = tuple(1 << power for power in range(8, 29))  # 256 B to 256 MiB; nothing changes beyond either end
LARGE_GROUP: Final = 32  # ranks beyond which every second size must do: a simulation costs n_ranks^2 steps and more
# No expectation is better: within 5 % of the best one wins what won at the nearest two measured sizes, the nearer
# first; else the planner named first. From LARGE on only those of all within 10 % take part in this that steadiest()
# names; not where nothing was measured, for a link may also be too fast for one flow.
TIE: Final = 1.05
TIE_OF_FEWER: Final = 1.1
LARGE: Final = 1 << 16
_LEAST_S: Final = 1e-12  # predictions below count as this long: one rank's are 0


@dataclass(frozen=True, eq=False)
class Costs:
    """What candidates cost at some sizes, [n_algorithms, n_sizes] each. predicted_s: the model's. expected_s: corrected
    by what was measured. measured: whether the size lies between sizes that were measured. connections: [n_algorithms],
    the most over which a host gets what comes from others."""

    algorithms: tuple[str, ...]
    predicted_s: NDArray[np.float64]
    expected_s: NDArray[np.float64]
    measured: NDArray[np.bool_]
    connections: NDArray[np.int64]


def candidates(
    topology: Topology, collective: str, own: Own = (), coded: WireLinks | None = None, root: int = 0
) -> dict[str, Planner]:
    """The planners that make sense here, by algorithm, and those of `own` for this collective that serve the root;
    coded: of these the ones that a wire on these links can run on (check_coded). Raises InvalidArgument for an unknown
    collective."""
    if collective not in PLANNERS:
        raise InvalidArgument(f"no collective {collective!r}; choose from {', '.join(PLANNERS)}")
    pointless = TWO_LEVEL if len(topology.hosts) == 1 else frozenset() if topology.switches else THREE_LEVEL
    found = {name: plan for name, plan in PLANNERS[collective].items() if name not in pointless}
    mine = (one for one in own if one.collective == collective and one.root in (None, root))
    found |= {one.name: one.planner for one in mine}
    if coded is None:
        return found
    sides = topology.sides(coded)
    return {name: plan for name, plan in found.items() if codes_once(plan(topology, root), sides)}


def codes_once(schedule: Schedule, sides: NDArray[np.int64]) -> bool:
    """Whether check_coded() passes."""
    try:
        check_coded(schedule, sides)
    except ScheduleError:
        return False
    return True


def costs(
    topology: Topology,
    collective: str,
    nbytes: tuple[int, ...],
    root: int = 0,
    table: TuningTable | None = None,
    own: Own = (),
    coded: WireLinks | None = None,
) -> Costs:
    """Every candidate's times. table: of this topology's layout, or None; its times were measured with root 0. own:
    a group's own algorithms. coded: of the candidates for a wire on these links, whose bytes are predicted as if they
    crossed uncoded: what a wire saves, it saves all of them."""
    planners = candidates(topology, collective, own, coded, root)
    points = {} if table is None else table.points(collective)
    sizes = np.log2(np.maximum(1, nbytes))
    predicted, ratios, connections = [], [], []
    measured = np.zeros((len(planners), len(nbytes)), np.bool_)
    for row, (name, plan) in enumerate(planners.items()):
        at = tuple(size for size, _ in points.get(name, ()))
        schedule = plan(topology, root)
        times = np.maximum(_LEAST_S, predict(schedule, topology, (*nbytes, *at)))
        connections.append(_connections(schedule, topology))
        predicted.append(times[: len(nbytes)])
        if not at:
            ratios.append(np.full(len(nbytes), np.nan))
            continue
        off = np.log([seconds for _, seconds in points[name]] / times[len(nbytes) :])
        ratios.append(np.exp(np.interp(sizes, np.log2(at), off)))
        measured[row] = (np.array(nbytes) >= at[0]) & (np.array(nbytes) <= at[-1])
    model, ratio = np.stack(predicted), np.stack(ratios)
    if points.keys() & planners.keys():
        # As far off as the worst: what has no times, and what has some at other sizes alone, where others have them.
        ratio = np.where(np.isnan(ratio), np.fmax(1.0, np.nanmax(ratio, axis=0)), ratio)
        worst = np.where(measured, ratio, 0.0).max(axis=0)
        ratio = np.where(measured, ratio, np.fmax(ratio, worst))
    else:
        ratio = np.ones_like(ratio)
    return Costs(tuple(planners), model, model * ratio, measured, np.array(connections))


def _connections(schedule: Schedule, topology: Topology) -> int:
    """Pairs of ranks that bring a host something from others, of the host that has the most."""
    rows, host = schedule.transfers, topology.host_index
    src, dst = (rows[end].astype(np.int64) for end in ("src", "dst"))
    crosses = host[src] != host[dst]
    pairs = np.unique(src[crosses] + dst[crosses] * topology.n_ranks)
    return int(np.bincount(host[pairs // topology.n_ranks], minlength=1).max())


def choice_table(
    topology: Topology,
    collective: str,
    root: int = 0,
    table: TuningTable | None = None,
    own: Own = (),
    coded: WireLinks | None = None,
) -> Choices:
    """((max_nbytes, algorithm), ..): a size belongs to the first entry that is not below it; the last has None.

    `nbytes` is meant as in schedule.chunk_nbytes. table, own, coded: as in costs()."""
    ladder = LADDER if topology.n_ranks <= LARGE_GROUP else LADDER[::2]
    points = {} if table is None else table.points(collective)
    sizes = tuple(sorted({nbytes for times in points.values() for nbytes, _ in times}))
    found = costs(topology, collective, ladder + sizes, root, table, own, coded)
    won = found.expected_s[:, len(ladder) :].argmin(axis=0)  # at each measured size
    winners = []
    for column, (nbytes, expected) in enumerate(zip(ladder, found.expected_s.T, strict=False)):
        nearest = np.argsort(np.abs(np.log2(sizes) - np.log2(nbytes)), kind="stable")[:2].tolist() if sizes else []
        preferred = [*won[nearest], *range(len(expected))]
        rows = preferred
        if sizes and nbytes >= LARGE:
            within = [row for row in rows if expected[row] <= expected.min() * TIE_OF_FEWER]
            rows = steadiest(found, within, column)
        winner = next(row for row in rows if expected[row] <= expected[rows].min() * TIE)
        winners.append(found.algorithms[winner])
    return as_choices(ladder, winners)


def steadiest(found: Costs, rows: list[int], column: int) -> list[int]:
    """Of some candidates for large calls of one size those that are as quick in a long series of calls as in the short
    one that was measured: of all that the model has within TIE_OF_FEWER of the best of them, those that reach a host
    over the fewest connections. A short series ends before bytes have crossed that the model counts, and flows that
    share a link get in each other's way more than the model knows and a short series shows (docs/hosts.md)."""
    predicted = found.predicted_s[:, column]
    likely = [row for row in rows if predicted[row] <= predicted[rows].min() * TIE_OF_FEWER]
    fewest = found.connections[likely].min()
    return [row for row in likely if found.connections[row] == fewest]


def as_choices(ladder: Sequence[int], winners: Sequence[str]) -> Choices:
    """The choice table of a ladder of sizes, whose last one's winner wins beyond it."""
    choices: list[tuple[int | None, str]] = []
    for nbytes, name, following in zip(ladder, winners, [*winners[1:], None], strict=True):
        if name != following:
            choices.append((nbytes if following else None, name))
    return tuple(choices)


def choose(table: Choices, nbytes: int) -> str:
    """The algorithm of a choice table for one size."""
    return next(name for max_nbytes, name in table if max_nbytes is None or nbytes <= max_nbytes)
