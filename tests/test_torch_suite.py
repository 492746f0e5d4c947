"""torch's own distributed tests on pycomm, at 2 ranks; `make torch-suite` runs them at 2, 3 and 4, and on Gloo."""

import json

import pytest
import torch
import torch_suite


@pytest.mark.timeout(600)
def test_torchs_own_tests_pass_with_two_ranks():
    results = torch_suite.run_all("pycomm", 2, lambda name: True, jobs=2, log=None, say=False)
    found = torch_suite.problems({("pycomm", 2): results})
    assert not found, "\n".join(found)
    record = json.loads(torch_suite.REPORT.with_suffix(".json").read_text())
    if record["torch"] == torch.__version__:  # what passed when the report was written has not come to be skipped
        recorded = {
            name: by_backend["pycomm"][record["ranks"].index(2)] for name, by_backend in record["tests"].items()
        }
        assert {name: result["outcome"] for name, result in results.items()} == recorded
