"""docs/training_figures.md shows the committed results of the trainer's benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_shows_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import training_report

    found = training_report.records()
    assert set(found) == {"trainer", "torchtitan", "bubble", "exposed", "training_memory", "planner"}
    _, _, rest = training_report.PAGE.read_text().partition("<!-- figures: begin -->\n")
    assert rest.partition("<!-- figures: end -->")[0] == "\n".join(training_report.page(found))
