"""Pipeline schedules as data: for each rank the actions that it runs, in order, and a checker that proves them.

    F  forward of a micro-batch through one of the rank's chunks
    B  its backward; where weight gradients are split off (zero-bubble), only the gradient of the input
    W  the weight gradients of that backward

What goes between stages follows from the actions: F needs the activations of the stage before it, B the gradient of the
stage after it. check() runs the lists as the ranks would, with sends that never wait, and refuses what cannot finish.

    schedule       idle units of a rank, with F = B = W = 1 and m micro-batches on p ranks      split
    gpipe, 1f1b    3 (p - 1)                                                                    no (B takes 2)
    interleaved    3 (p - 1) / chunks                                                           no
    zb_h1          p - 1: (p - 1)(F + B - W), where m >= p                                      yes
    zbv            (p - 1) / 2, until the V is filled, where m >= 2 p - 1                       yes

A rank of zb_h1 or zbv holds activations of as many micro-batches as 1F1B's first one, p, at most.

Sources: GPipe arXiv:1811.06965; 1F1B arXiv:1806.03377; interleaved arXiv:2104.04473; ZB-H1 arXiv:2401.10241; ZBV
arXiv:2405.15362. Pure Python."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from training.errors import ConfigError
from training.stages import Placement

Name = Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zbv"]
Kind = Literal["F", "B", "W"]
SPLIT: tuple[Name, ...] = ("zb_h1", "zbv")


class Action(NamedTuple):
    kind: Kind
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Schedule:
    """actions[rank]: what a pipeline rank runs. split: whether backward is B and W, or B does both."""

    placement: Placement
    n_micro_batches: int
    split: bool
    actions: tuple[tuple[Action, ...], ...]


@dataclass(frozen=True)
class Timing:
    """What check() found with given costs, by rank. end: of its last action; idle: of the makespan; peak: chunks'
    micro-batches whose activations it holds at most."""

    end: tuple[float, ...]
    idle: tuple[float, ...]
    peak: tuple[int, ...]

    @property
    def makespan(self) -> float:
        return max(self.end)


@functools.lru_cache(maxsize=256)  # a planner of layouts asks for few schedules many times
def plan(name: Name, n_ranks: int, n_micro_batches: int, n_chunks: int = 1) -> Schedule:
    """A schedule by name. Raises ConfigError where the name and the numbers do not go together."""
    n_chunks = 2 if name == "zbv" and n_ranks > 1 else n_chunks
    placement = Placement(n_ranks, n_chunks, name == "zbv" and n_ranks > 1)
    if n_chunks > 1 and name not in ("interleaved", "zbv"):
        raise ConfigError(
            f"layout.chunks is {n_chunks}, but the schedule {name!r} has one chunk a rank; set layout.schedule to "
            "'interleaved', or chunks to 1"
        )
    if name == "interleaved" and n_micro_batches % n_ranks:
        raise ConfigError(
            f"the schedule 'interleaved' runs micro-batches in groups of layout.pp ({n_ranks}), which does not divide "
            f"train.accumulation ({n_micro_batches}); change one of them, or take '1f1b'"
        )
    if name == "gpipe":
        lists = [_all(n_micro_batches, "F") + _all(n_micro_batches, "B") for _ in range(n_ranks)]
    elif name in ("1f1b", "interleaved"):
        lists = [_one_forward_one_backward(rank, placement, n_micro_batches) for rank in range(n_ranks)]
    elif name == "zb_h1" or n_ranks == 1:
        lists = [_zero_bubble_h1(rank, n_ranks, n_micro_batches) for rank in range(n_ranks)]
    elif n_micro_batches >= 2 * n_ranks - 1:
        lists = [_zero_bubble_v(rank, n_ranks, n_micro_batches) for rank in range(n_ranks)]
    else:
        lists = _greedy(placement, n_micro_batches)
    schedule = Schedule(placement, n_micro_batches, name in SPLIT, tuple(tuple(each) for each in lists))
    check(schedule)
    return schedule


def _all(n_micro_batches: int, kind: Kind) -> list[Action]:
    return [Action(kind, 0, micro_batch) for micro_batch in range(n_micro_batches)]


def _one_forward_one_backward(rank: int, placement: Placement, n_micro_batches: int) -> list[Action]:
    """1F1B, and with several chunks its interleaved form: micro-batches go through the chunks in groups of n_ranks."""
    p, v = placement.n_ranks, placement.n_chunks
    total = n_micro_batches * v
    warm_up = p - 1 - rank if v == 1 else 2 * (p - 1 - rank) + (v - 1) * p
    warm_up = min(total, warm_up)

    def at(kind: Literal["F", "B"], index: int) -> Action:
        group, within = divmod(index, p * v)
        chunk, micro_batch = divmod(within, p)
        return Action(kind, chunk if kind == "F" else v - 1 - chunk, group * p + micro_batch)

    if v == 1:  # groups of one
        forwards, backwards = _all(n_micro_batches, "F"), _all(n_micro_batches, "B")
    else:
        forwards = [at("F", index) for index in range(total)]
        backwards = [at("B", index) for index in range(total)]
    actions = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        actions += [forward, backward]
    return actions + backwards[total - warm_up :]


def _zero_bubble_h1(rank: int, n_ranks: int, n_micro_batches: int) -> list[Action]:
    """1F1B whose W come as many micro-batches after their B as the rank's number: what a later rank warms up less, it
    holds longer, so all hold n_ranks micro-batches at most, and W fills the end."""
    forwards, backwards, weights = (_all(n_micro_batches, kind) for kind in ("F", "B", "W"))
    warm_up = n_ranks - 1 - rank
    actions = forwards[:warm_up]
    for at, backward in enumerate(backwards):
        actions += [*forwards[warm_up + at : warm_up + at + 1], backward]
        if at >= rank:
            actions.append(weights[at - rank])
    return actions + weights[max(0, n_micro_batches - rank) :]


def _zero_bubble_v(rank: int, n_ranks: int, n_micro_batches: int) -> list[Action]:
    """Chunk 0 fills the V, chunk 1 comes up through it and makes room for one more; then F, B, W of each in turn. W
    waits only where backward drains, behind the B that other ranks need. Needs 2 n_ranks - 1 micro-batches."""
    after, more = n_ranks - rank, n_micro_batches - 2 * n_ranks + rank + 1
    order = "F0 " * (2 * after - 1) + "F1 F0 " * rank + "F1 B1 W1 " * after
    order += "F0 B0 W0 F1 B1 W1 " * more + "B0 W0 F1 B1 W1 " * (after - 1)
    order += "B0 B1 " * rank + "B0 W0 " * after + "W1 W0 " * rank
    actions: list[Action] = []
    done: Counter[str] = Counter()
    for name in order.split():
        actions.append(Action(cast(Kind, name[0]), int(name[1]), done[name]))
        done[name] += 1
    return actions


def _greedy(placement: Placement, n_micro_batches: int) -> list[list[Action]]:
    """The V with fewer micro-batches than fill it: ranks run unit by unit, each taking the first of B, F, W that is
    ready; F only while fewer micro-batches' chunks are held than 1F1B's first rank holds: n_ranks * n_chunks. Later
    chunks go first, so that backward begins early."""
    p, v, last = placement.n_ranks, placement.n_chunks, placement.n_stages - 1
    done: dict[tuple[str, int, int], int] = {}  # (kind, stage, micro-batch) -> the unit after which it is done
    lists: list[list[Action]] = [[] for _ in range(p)]
    following = [{(kind, chunk): 0 for kind in "FBW" for chunk in range(v)} for _ in range(p)]
    most = p * v

    def ready(rank: int, kind: Kind, chunk: int, unit: int) -> bool:
        micro_batch, stage = following[rank][kind, chunk], placement.stage(rank, chunk)
        if micro_batch == n_micro_batches:
            return False
        if kind == "F":
            held = [following[rank]["F", c] - following[rank]["W", c] for c in range(v)]
            reserved = sum(1 for c in range(chunk + 1, v) if held[c] == 0)  # a place for each later chunk
            if sum(held) + reserved >= most:
                return False
            needed = None if stage == 0 else ("F", stage - 1, micro_batch)
        elif kind == "B":
            needed = ("F", stage, micro_batch) if stage == last else ("B", stage + 1, micro_batch)
            if following[rank]["F", chunk] <= micro_batch:
                return False
        else:
            needed = ("B", stage, micro_batch)
        return needed is None or done.get(needed, unit + 1) <= unit

    unit = 0
    n_actions = 3 * v * n_micro_batches
    while any(len(actions) < n_actions for actions in lists):
        chosen: list[tuple[int, Kind, int]] = []
        for rank in range(p):
            order: list[tuple[Kind, int]] = [("B", c) for c in range(v)]
            order += [("F", c) for c in reversed(range(v))] + [("W", c) for c in reversed(range(v))]
            found = next((each for each in order if ready(rank, each[0], each[1], unit)), None)
            if found is not None:
                chosen.append((rank, *found))
        if not chosen and all(end <= unit for end in done.values()):
            raise RuntimeError(f"no rank of {placement} can go on at unit {unit}")
        for rank, kind, chunk in chosen:
            micro_batch = following[rank][kind, chunk]
            lists[rank].append(Action(kind, chunk, micro_batch))
            following[rank][kind, chunk] += 1
            done[kind, placement.stage(rank, chunk), micro_batch] = unit + 1
        unit += 1
    return lists


Costs = float | Sequence[float]  # of every stage, or one of each


def check(schedule: Schedule, f: Costs = 1.0, b: Costs = 1.0, w: Costs = 1.0, hop: Costs = 0.0) -> Timing:
    """Runs a schedule with the time of each action (B takes b + w where it is not split) and of a message to another
    rank (of each pair of stages where that is a sequence: stage 0 and 1, 1 and 2, ..); messages from one rank to
    another go one after the other.

    Raises ValueError where an action is missing, stands twice or on a rank that has no such chunk, where B comes before
    its F or W before its B, where gradients of a chunk are not added in the order of micro-batches, and where ranks
    wait for each other for ever."""
    placement, n = schedule.placement, schedule.n_micro_batches
    kinds = "FBW" if schedule.split else "FB"
    expected = {(kind, c, m) for kind in kinds for c in range(placement.n_chunks) for m in range(n)}
    for rank, actions in enumerate(schedule.actions):
        if len(actions) != len(expected) or set(actions) != expected:
            wrong = sorted(set(actions) ^ expected) or sorted(a for a in set(actions) if actions.count(a) > 1)
            raise ValueError(f"rank {rank}: missing, twice or foreign: {', '.join(map(_text, wrong))}")
        for chunk in range(placement.n_chunks):
            last_kind = [a.micro_batch for a in actions if a.kind == kinds[-1] and a.chunk == chunk]
            if last_kind != sorted(last_kind):
                raise ValueError(f"rank {rank}: chunk {chunk}'s gradients do not come in the order of micro-batches")
    forward, backward, weights = (
        [each] * placement.n_stages if isinstance(each, (int, float)) else each for each in (f, b, w)
    )
    hops = [hop] * placement.n_stages if isinstance(hop, (int, float)) else hop
    if not schedule.split:
        backward = [each + later for each, later in zip(backward, weights, strict=True)]
    cost = {"F": forward, "B": backward, "W": weights}
    here: dict[tuple[str, int, int], float] = {}  # when an action is done
    there: dict[tuple[str, int, int], float] = {}  # when what it gives has come to the rank of the next stage
    free: dict[tuple[int, int], float] = {}  # when a rank's last message to another has come
    clock, at = [0.0] * placement.n_ranks, [0] * placement.n_ranks
    busy, held, peak = [0.0] * placement.n_ranks, [0] * placement.n_ranks, [0] * placement.n_ranks
    while True:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                stage = placement.stage(rank, action.chunk)
                needs = _needs(action, stage, placement.n_stages)
                if any(need not in here for need in needs):
                    break
                begins = [here[need] if placement.rank(need[1]) == rank else there[need] for need in needs]
                clock[rank] = max([clock[rank], *begins]) + cost[action.kind][stage]
                done = (action.kind, stage, action.micro_batch)
                here[done] = clock[rank]
                following = stage + {"F": 1, "B": -1, "W": placement.n_stages}[action.kind]
                if 0 <= following < placement.n_stages:
                    way = (rank, placement.rank(following))
                    there[done] = free[way] = max(clock[rank], free.get(way, 0.0)) + hops[min(stage, following)]
                busy[rank] += cost[action.kind][stage]
                held[rank] += (action.kind == "F") - (action.kind == kinds[-1])
                peak[rank] = max(peak[rank], held[rank])
                at[rank] += 1
                moved = True
        waiting = [rank for rank, actions in enumerate(schedule.actions) if at[rank] < len(actions)]
        if not waiting:
            return Timing(tuple(clock), tuple(max(clock) - each for each in busy), tuple(peak))
        if not moved:
            stuck = ", ".join(f"rank {rank} at {_text(schedule.actions[rank][at[rank]])}" for rank in waiting)
            raise ValueError(f"a deadlock: {stuck}")


@functools.lru_cache(maxsize=1024)
def held(name: Name, n_ranks: int, n_micro_batches: int, n_chunks: int = 1) -> tuple[int, ...]:
    """Timing.peak of a schedule by name, by rank."""
    return check(plan(name, n_ranks, n_micro_batches, n_chunks)).peak


def _needs(action: Action, stage: int, n_stages: int) -> list[tuple[str, int, int]]:
    micro_batch = action.micro_batch
    if action.kind == "F":
        return [("F", stage - 1, micro_batch)] if stage else []
    if action.kind == "B":
        after = [("B", stage + 1, micro_batch)] if stage < n_stages - 1 else []
        return [("F", stage, micro_batch), *after]
    return [("B", stage, micro_batch)]


def _text(action: tuple[str, int, int]) -> str:
    return f"{action[0]} of micro-batch {action[2]} in chunk {action[1]}"
