"""benchmarks/train_gpu.py runs from end to end, on a CPU and a small model; what it measures there means nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_trainer_and_plain_torch_run_in_turns() -> None:
    command = [sys.executable, "benchmarks/train_gpu.py", "--preset", "tiny", "--device", "cpu", "--eager"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*command, "--rounds", "1", "--steps", "1"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(trainer|plain torch) +[\d,]+ tokens/s .* loss ([\d.]+) to ([\d.]+)$", done.stdout, re.M)
    assert [name for name, *_ in rows] == ["trainer", "plain torch"]
    for _, first, last in rows:
        assert abs(float(first) - 5.55) < 0.3 and float(last) < float(first)  # ln 256
