"""Which algorithm for which size: every candidate simulated over a ladder of sizes.

Deterministic: every rank of a group computes the same table from the same topology, and asks no other rank."""

from __future__ import annotations

from typing import Final

import numpy as np

from pycomm.errors import InvalidArgument
from pycomm.own import Own
from pycomm.planners import PLANNERS, THREE_LEVEL, TWO_LEVEL, Planner
from pycomm.predict import predict
from pycomm.topology import Topology

Choices = tuple[tuple[int | None, str], ...]

LADDER: Final = tuple(1 << power for power in range(8, 29))  # 256 B to 256 MiB; nothing changes beyond either end
LARGE_GROUP: Final = 32  # ranks beyond which every second size must do: a simulation costs n_ranks^2 steps and more
TIE: Final = 1.05  # the model is no better: within 5 % of the best the planner named first wins


def candidates(topology: Topology, collective: str, own: Own = ()) -> dict[str, Planner]:
    """The planners that make sense here, by algorithm, and those of `own` for this collective.

    Raises InvalidArgument for an unknown collective."""
    if collective not in PLANNERS:
        raise InvalidArgument(f"no collective {collective!r}; choose from {', '.join(PLANNERS)}")
    pointless = TWO_LEVEL if len(topology.hosts) == 1 else frozenset() if topology.switches else THREE_LEVEL
    found = {name: plan for name, plan in PLANNERS[collective].items() if name not in pointless}
    return found | {algorithm.name: algorithm.planner for algorithm in own if algorithm.collective == collective}


def choice_table(topology: Topology, collective: str, root: int = 0, own: Own = ()) -> Choices:
    """((max_nbytes, algorithm), ..): a size belongs to the first entry that is not below it; the last has None.

    `nbytes` is meant as in schedule.chunk_nbytes."""
    ladder = LADDER if topology.n_ranks <= LARGE_GROUP else LADDER[::2]
    planners = candidates(topology, collective, own)
    times = np.stack([predict(plan(topology, root), topology, ladder) for plan in planners.values()])
    winners = np.array(list(planners))[(times <= times.min(axis=0) * TIE).argmax(axis=0)].tolist()
    table: list[tuple[int | None, str]] = []
    for nbytes, name, following in zip(ladder, winners, [*winners[1:], None], strict=True):
        if name != following:
            table.append((nbytes if following else None, name))
    return tuple(table)


def choose(table: Choices, nbytes: int) -> str:
    """The algorithm of a choice table for one size."""
    return next(name for max_nbytes, name in table if max_nbytes is None or nbytes <= max_nbytes)
