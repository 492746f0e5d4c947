"""docs/predictions.md shows the committed results of benchmarks/predictions.py, and they follow from today's code."""

import json
from pathlib import Path

import pytest

from pycomm.planners import PLANNERS
from pycomm.predict import predict

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def predictions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import predictions

    return predictions


def test_the_page_shows_the_results(predictions):
    found = json.loads(predictions.RESULTS.read_text())
    _, _, rest = predictions.PAGE.read_text().partition(predictions.BEGIN)
    assert rest.partition(predictions.END)[0] == predictions.figures(found)


@pytest.mark.parametrize("name", ["h100", "h100_one_nic", "ethernet", "wan"])
def test_the_results_are_what_is_predicted_now(predictions, name):
    _, build, _ = predictions.CLUSTERS[name]
    topology = build(8)
    for algorithm, times in json.loads(predictions.RESULTS.read_text())[name]["8"].items():
        schedule = PLANNERS["all_reduce"][algorithm](topology, 0)
        assert predict(schedule, topology, predictions.SIZES).tolist() == pytest.approx(times, rel=1e-9)
