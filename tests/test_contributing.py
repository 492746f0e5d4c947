"""CONTRIBUTING.md's worked example runs as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"


def test_planner_example_is_checked_and_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(block, str(GUIDE), "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    # The tensor crosses from one host to the other once as a sum and once as the total.
    assert re.fullmatch(r"1 MiB in \d+\.\d\d ms, 2097152 bytes between hosts\n", printed)


def test_planner_example_keeps_its_promise_of_20_lines() -> None:
    (planner,) = re.findall(r"^def line_all_reduce.*?^    return .*?$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(planner.splitlines()) <= 20
