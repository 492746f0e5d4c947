"""Where each layer of a pipeline runs: virtual stages in order, and the rank of each.

A rank holds n_chunks virtual stages ("chunks"). They go around the ranks, or, with the V placement, down and up again,
so that the first and the last one share a rank (zero-bubble V, arXiv:2405.15362):

    around, 2 ranks, 2 chunks    rank 0: stages 0, 2      V    rank 0: stages 0, 3
                                 rank 1: stages 1, 3           rank 1: stages 1, 2

Pure Python: nothing here knows torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """n_ranks * n_chunks virtual stages on n_ranks pipeline ranks. v_shape needs 2 chunks."""

    n_ranks: int
    n_chunks: int = 1
    v_shape: bool = False

    @property
    def n_stages(self) -> int:
        return self.n_ranks * self.n_chunks

    def stage(self, rank: int, chunk: int) -> int:
        """The virtual stage that is a rank's chunk."""
        if self.v_shape and chunk == 1:
            return 2 * self.n_ranks - 1 - rank
        return chunk * self.n_ranks + rank

    def rank(self, stage: int) -> int:
        """The rank of a virtual stage."""
        if self.v_shape and stage >= self.n_ranks:
            return 2 * self.n_ranks - 1 - stage
        return stage % self.n_ranks

    @property
    def last_rank(self) -> int:
        """The rank that has the head and the loss."""
        return self.rank(self.n_stages - 1)


@dataclass(frozen=True)
class Stages:
    """A placement and the layers of each virtual stage: stage s has layers bounds[s] to bounds[s + 1]."""

    placement: Placement
    bounds: tuple[int, ...]

    def layers(self, stage: int) -> range:
        return range(self.bounds[stage], self.bounds[stage + 1])

    def ranks_of(self, name: str) -> tuple[int, ...]:
        """The pipeline ranks that hold a parameter of the model, the first of them its owner. The embedding's table is
        on the last one too where that is another rank (a tied head reads it there)."""
        last = self.placement.last_rank
        kind, _, rest = name.partition(".")
        if kind == "blocks":
            layer = int(rest.split(".")[0])
            return (self.placement.rank(next(s for s in range(len(self.bounds)) if layer < self.bounds[s + 1])),)
        if kind in ("embedding", "positions"):
            return (0,) if last == 0 or kind == "positions" else (0, last)
        return (last,)


def assign_layers(n_layers: int, placement: Placement, given: Sequence[int] = ()) -> Stages:
    """The layers in order over the stages: as many as given says for each, or evenly, with what is left over in the
    middle, since the first stage has the embedding and the last one the head. Raises ConfigError for more stages than
    layers, or given counts that do not fit."""
    n = placement.n_stages
    if n > n_layers:
        raise ConfigError(
            f"layout.pp × chunks is {n} stages, the model has {n_layers} layers (model.n_layers); each stage needs "
            "one: lower layout.pp or layout.chunks, or add layers"
        )
    counts = list(given)
    if not counts:
        counts = [n_layers // n] * n
        first = (n - n_layers % n) // 2
        for stage in range(first, first + n_layers % n):
            counts[stage] += 1
    if len(counts) != n or sum(counts) != n_layers or min(counts) < 1:
        raise ConfigError(
            f"layout.stage_layers is {counts}, {len(counts)} stages of {sum(counts)} layers; give {n} numbers of at "
            f"least 1 (layout.pp × chunks) that add up to model.n_layers, {n_layers}"
        )
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return Stages(placement, tuple(bounds))
