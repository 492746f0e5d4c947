"""Pipeline schedules: complete, ordered, without deadlock, and with the bubbles that theory gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from training.config import Config
from training.errors import ConfigError
from training.schedules import Action, Schedule, check, plan
from training.stages import Placement, assign_layers

ALL = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zb_h1", 1), ("zbv", 1)]


@pytest.mark.parametrize(("name", "chunks"), ALL)
def test_every_size_is_complete_ordered_and_ends(name: Any, chunks: int) -> None:
    for n_ranks in (1, 2, 3, 4, 7, 8):
        for groups in (1, 2, 3, 5):
            n = groups * n_ranks if name == "interleaved" else groups
            schedule = plan(name, n_ranks, n, chunks)  # checks itself
            held = check(schedule).peak
            most = {"gpipe": n, "1f1b": min(n, n_ranks), "zb_h1": n_ranks, "zbv": 2 * n_ranks}.get(name)
            if most is not None:
                assert max(held) <= max(most, 1), (n_ranks, n)


@pytest.mark.parametrize("n_ranks", [2, 4, 8])
def test_bubbles_are_those_of_theory(n_ranks: int) -> None:
    def idle(name: Any, chunks: int = 1) -> float:
        """In units of a whole rank's forward of a micro-batch, with F = B = W."""
        schedule = plan(name, n_ranks, 4 * n_ranks, chunks)
        return max(check(schedule).idle) / schedule.placement.n_chunks

    assert idle("gpipe") == idle("1f1b") == 3 * (n_ranks - 1)
    assert idle("interleaved", 2) == 3 * (n_ranks - 1) / 2
    assert idle("interleaved", 3) == pytest.approx(n_ranks - 1)


@pytest.mark.parametrize("p", [2, 3, 4, 5, 8, 11])
def test_zero_bubble_schedules_idle_as_little_as_their_papers_say(p: int) -> None:
    for m in (p, p + 1, 2 * p - 1, 2 * p, 4 * p + 1):
        h1 = plan("zb_h1", p, m)
        assert set(check(h1).idle) == {p - 1} and set(check(h1).peak) == {p}
        for f, b, w in ((1.0, 1.0, 0.5), (1.0, 1.5, 1.0), (1.0, 1.25, 0.75)):
            assert check(h1, f, b, w).idle == pytest.approx([(p - 1) * (f + b - w)] * p)
        v = check(plan("zbv", p, m))  # a chunk's action is half a rank's
        assert max(v.peak) <= 2 * p
        if m == p or m >= 2 * p - 1:
            assert set(v.idle) == {p - 1}
        if m >= 2 * p - 1:
            assert max(check(plan("zbv", p, m), 1.0, 1.0, 0.5).idle) == pytest.approx(p - 1)


def test_messages_and_uneven_stages_delay_what_waits_for_them() -> None:
    p, m, hop = 4, 8, 0.25
    slow_last = [1.0, 1.0, 1.0, 2.0]
    assert check(plan("gpipe", p, m), slow_last, 0.0, 0.0).makespan == 3 + 2 * m  # the others' forwards once, then it
    assert check(plan("gpipe", p, m), 1.0, slow_last, 0.0).makespan == (p - 1 + m) + (2 * m + 3)
    plain = check(plan("1f1b", p, m)).makespan
    assert check(plan("1f1b", p, 1), hop=hop).makespan == 3 * p + 2 * (p - 1) * hop  # alone, each hop down and up
    assert plain + 2 * (p - 1) * hop <= check(plan("1f1b", p, m), hop=hop).makespan <= plain + 2 * m * hop
    assert check(plan("gpipe", 2, m), 1.0, 0.0, 0.0, hop=3.0).makespan == 2 * (1 + 3 * m)  # one by one
    v = plan("zbv", 2, 4)
    ends = check(v, hop=hop).end
    assert max(ends) > check(v).makespan and len(ends) == 2


def changed(schedule: Schedule, rank: int, actions: list[Action]) -> Schedule:
    lists = list(schedule.actions)
    lists[rank] = tuple(actions)
    return dataclasses.replace(schedule, actions=tuple(lists))


def test_the_checker_refuses_what_is_wrong() -> None:
    good = plan("zb_h1", 2, 3)
    first = list(good.actions[0])
    forward, *_ = first
    with pytest.raises(ValueError, match="rank 0: missing, twice or foreign: F of micro-batch 0 in chunk 0"):
        check(changed(good, 0, first[1:]))
    with pytest.raises(ValueError, match="rank 0: missing, twice or foreign"):
        check(changed(good, 0, [forward, *first]))
    with pytest.raises(ValueError, match="rank 0: missing, twice or foreign: F of micro-batch 0 in chunk 1"):
        check(changed(good, 0, [*first, Action("F", 1, 0)]))
    backward, weights = Action("B", 0, 0), Action("W", 0, 0)
    swapped = {backward: weights, weights: backward}
    with pytest.raises(ValueError, match="a deadlock: rank 0 at W of micro-batch 0 in chunk 0"):
        check(changed(good, 0, [swapped.get(each, each) for each in first]))
    late = [each for each in first if each != weights]
    with pytest.raises(ValueError, match="gradients do not come in the order of micro-batches"):
        check(changed(good, 0, [*late, weights]))
    one = plan("1f1b", 2, 2)
    forwards, backwards = [Action("F", 0, 0), Action("F", 0, 1)], [Action("B", 0, 0), Action("B", 0, 1)]
    eager = changed(one, 0, [forwards[0], backwards[0], forwards[1], backwards[1]])
    with pytest.raises(ValueError, match="a deadlock: rank 0 at B of micro-batch 0 in chunk 0, rank 1 at F of micro-b"):
        check(changed(eager, 1, [*forwards, *backwards]))


def test_layers_are_spread_and_named_stages_kept() -> None:
    assert assign_layers(7, Placement(3)).bounds == (0, 2, 5, 7)
    assert assign_layers(5, Placement(2), [4, 1]).bounds == (0, 4, 5)
    v = assign_layers(5, Placement(2, 2, v_shape=True))
    assert [v.placement.stage(0, chunk) for chunk in (0, 1)] == [0, 3]
    assert v.ranks_of("blocks.4.attention.out.weight") == v.ranks_of("norm.weight") == (0,)
    assert v.ranks_of("embedding.weight") == (0,)
    around = assign_layers(5, Placement(2))
    assert around.ranks_of("embedding.weight") == (0, 1)
    assert around.ranks_of("head.weight") == (1,)
    with pytest.raises(ConfigError, match="4 stages, the model has 3 layers"):
        assign_layers(3, Placement(4))


def test_the_default_layout_has_no_pipeline() -> None:
    layout = Config().layout
    assert plan(layout.schedule, layout.pp, 2).actions == (
        (Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1)),
    )
