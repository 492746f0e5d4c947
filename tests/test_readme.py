"""The README's code runs as it stands: each python block is saved under the name in its first line, and each bash
block's commands run in that folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
FILES = {match[1]: text for kind, text in BLOCKS if kind == "python" and (match := re.match(r"# file: (\S+)\n", text))}
COMMANDS = [
    line.partition("  #")[0].strip()
    for kind, text in BLOCKS
    if kind == "bash"
    for line in text.splitlines()
    if line.strip()
]


def test_every_python_block_has_a_name_and_a_command_that_runs_it():
    assert len(FILES) == sum(kind == "python" for kind, _ in BLOCKS) > 0
    for name in FILES:
        assert any(name in command.split() for command in COMMANDS), f"no command runs {name}"


def test_figures_are_those_of_the_committed_results(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme

    _, _, rest = (ROOT / "README.md").read_text().partition(readme.BEGIN)
    assert rest.partition(readme.END)[0] == readme.figures()


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command: str, tmp_path: Path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), f"{command} printed nothing"
