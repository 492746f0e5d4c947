"""The pipeline's bubble: counted from what actions took, and taken off what ranks waited."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from spawn import run_ranks
from training_runs import tiny

from training.bubble import Bubble
from training.config import Config
from training.live import LiveTable
from training.run import run
from training.schedules import check, plan
from training.trainer import Trainer

AXES = ("pp", "tied", "world")


def test_the_bubble_is_the_idle_time_of_the_schedule_with_the_measured_actions() -> None:
    p, m, of_stage = 4, 8, 2
    took = {0: (1.0, 2.0), 1: (1.0, 3.0), 2: (2.0, 2.0), 3: (1.5, 2.5)}  # F, B of a micro-batch, by rank
    rows = [[m * f, m * b, 0.0] for f, b in took.values() for _ in range(of_stage)]
    bubble = Bubble(plan("1f1b", p, m), AXES)
    timing = check(plan("1f1b", p, m), [f for f, _ in took.values()], [b for _, b in took.values()], 0.0)
    found = bubble.seconds(torch.tensor(rows, dtype=torch.float64), own_s=99.0)
    assert found == pytest.approx(of_stage * sum(timing.idle))
    outermost = Bubble(plan("1f1b", p, m), AXES, copies=of_stage)
    found = outermost.seconds(torch.tensor(rows[::of_stage] * of_stage, dtype=torch.float64), own_s=99.0)
    assert found == pytest.approx(of_stage * sum(timing.idle))


def test_ranks_of_a_stage_count_by_their_mean_and_chunks_as_the_v_places_them() -> None:
    m = 4
    rows = [  # F, B, W of chunk 0, then of chunk 1: stages 0 and 3 on the first rank, 1 and 2 on the second
        [m * s for s in (1.0, 1.0, 1.0, 4.0, 4.0, 4.0)],
        [m * s for s in (2.0, 2.0, 2.0, 3.0, 3.0, 3.0)],
    ]
    schedule, by_stage = plan("zbv", 2, m), [1.0, 2.0, 3.0, 4.0]
    idle = sum(check(schedule, by_stage, by_stage, by_stage).idle)
    assert Bubble(schedule, AXES).seconds(torch.tensor(rows, dtype=torch.float64), 0.0) == pytest.approx(idle)
    apart = [[2 * s for s in rows[0]], [0.0] * 6, *[rows[1]] * 2]
    assert Bubble(schedule, AXES).seconds(torch.tensor(apart, dtype=torch.float64), 0.0) == pytest.approx(2 * idle)


def test_where_nothing_is_measured_actions_count_as_equal_and_as_long_as_the_ranks_own_work() -> None:
    bubble = Bubble(plan("zb_h1", 4, 8), AXES)
    own_s = 4 * 3.0
    assert bubble.seconds(torch.zeros(4, 3, dtype=torch.float64), own_s) == pytest.approx(own_s * 3 / 24)
    assert bubble.seconds(torch.zeros(4, 3, dtype=torch.float64), -own_s) == 0.0  # a device's first steps
    assert Bubble(plan("1f1b", 1, 8), AXES).seconds(torch.zeros(4, 3, dtype=torch.float64), own_s) == 0.0


@pytest.mark.parametrize(
    ("bubble_s", "left"),
    [
        (0.0, {"tp": 4.0, "dp": 1.0, "pp": 3.0, "world": 2.0}),
        (2.0, {"tp": 4.0, "dp": 1.0, "pp": 1.0, "world": 2.0}),
        (4.0, {"tp": 4.0, "dp": 1.0, "world": 1.0}),
        (6.0, {"tp": 3.0, "dp": 1.0}),
        (9.5, {"dp": 0.5}),
        (11.0, {}),
    ],
)
def test_the_bubble_is_taken_off_the_waits_for_other_stages_first(bubble_s: float, left: dict[str, float]) -> None:
    blocked = {"tp": 4.0, "dp": 1.0, "pp": 3.0, "world": 2.0}
    found = Bubble(plan("1f1b", 2, 2), AXES).exposed_s(blocked, bubble_s)
    assert found == left
    assert sum(found.values()) == max(0.0, sum(blocked.values()) - bubble_s)


SLOW_S = 0.02


def slow_forwards(group: Any, config: Config) -> tuple[list[float], float, dict[str, float], float]:
    """A pipeline whose second stage takes SLOW_S longer for each forward: its actions, and the last step's figures."""
    torch.set_num_threads(1)
    trainer = Trainer(config, group)
    if group.rank == 1:
        whole = trainer.model.run_blocks

        def slowly(*args: Any) -> Any:
            time.sleep(SLOW_S)
            return whole(*args)

        trainer.model.run_blocks = slowly  # type: ignore[method-assign]
    result = [trainer.train_step() for _ in range(2)][-1]
    actions = trainer.pipeline.action_s()
    trainer.close()
    assert result.exposed_s <= result.blocked_s
    assert result.exposed_s == pytest.approx(max(0.0, result.blocked_s - result.bubble_s))
    return actions, result.bubble_s, result.exposed_by_axis_s, result.step_s


def test_a_stage_that_takes_longer_is_seen_in_its_actions_and_makes_the_other_one_idle(tmp_path: Path) -> None:
    m = 4
    config = tiny(tmp_path, layout={"pp": 2, "schedule": "zb_h1"}, accumulation=m)
    (first, bubble_s, _, step_s), (second, *_) = run_ranks(slow_forwards, 2, config)
    assert min(*first, *second) > 0.0
    assert second[0] >= m * SLOW_S
    assert second[0] <= step_s
    idle = check(plan("zb_h1", 2, m), *([a / m, b / m] for a, b in zip(first, second, strict=True))).idle
    assert bubble_s == pytest.approx(sum(idle))
    assert bubble_s > m * SLOW_S - sum(first)  # the first stage waits while the second one sleeps


def ranks_of_copies(group: Any, config: Config) -> int:
    trainer = Trainer(config, group)
    trainer.close()
    return trainer._bubble.copies


def test_copies_of_the_pipeline_that_stand_outermost_are_told_apart(tmp_path: Path) -> None:
    for outermost, copies in (("pp", 1), ("dp", 2)):
        config = tiny(tmp_path, layout={"pp": 2, "outermost": outermost}, accumulation=2)
        assert run_ranks(ranks_of_copies, 4, config) == [copies] * 4


def run_config(group: Any, config: Config) -> None:
    run(config, group)


def test_a_run_with_a_pipeline_reports_its_bubble(tmp_path: Path) -> None:
    config = tiny(tmp_path, layout={"pp": 2}, steps=3, accumulation=4)
    run_ranks(run_config, 2, config)
    records = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        assert 0.0 < record["bubble_share"] < 1.0
        assert record["exposed_share"] == pytest.approx(sum(record["exposed_by_axis"].values()))
        blocked_share = record["blocked_s"] / (2 * record["step_s"])
        assert record["exposed_share"] == pytest.approx(max(0.0, blocked_share - record["bubble_share"]))
    report = " ".join((config.run_dir / "report.txt").read_text().split())
    assert "of its time for communication and" in report and "in the pipeline's bubble" in report

    printed = io.StringIO()
    with LiveTable(Console(file=printed, width=200), 3) as live:
        live.show({**records[-1], "bubble_share": 0.17, "exposed_share": 0.05, "exposed_by_axis": {"world": 0.05}})
        live.show({**records[-1], "bubble_share": 0.0})
    first, second = printed.getvalue().splitlines()
    assert "exposed comm 5%  bubble 17%  peak memory" in first
    assert "bubble" not in second
