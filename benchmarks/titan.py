"""Whether torchtitan trains on CPU, so that it could run beside the trainer: python benchmarks/titan.py

Installs torchtitan from PyPI into an environment of its own (build/peers/torchtitan), which sees this one's torch,
starts its trainer with its debug model on one rank, and notes in results/torchtitan.json how that ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import environment, write_json
from peers import PEERS

VERSION = "0.3.0"
TRITON = "3.9.0"  # which it imports, also without a GPU, and does not name as what it needs
COMMAND = "python -m torchtitan.train --module llama3 --config llama3_debugmodel --training.steps 2"


def install() -> Path:
    place = PEERS / "torchtitan"
    done = place / "complete"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        packages = next(place.glob("lib/python*/site-packages"))
        (packages / "this.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # another torch would be gigabytes
        pip = [
            place / "bin/pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            f"torchtitan=={VERSION}",
            f"triton=={TRITON}",
        ]
        subprocess.run(pip, check=True)
        done.touch()
    return place


def main() -> None:
    place = install()
    one_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [str(place / "bin/python"), *COMMAND.split()[1:], "--dump_folder", folder],
            env=os.environ | one_rank,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line.strip() for line in lines if re.match(r"\s*(\w+\.)*\w*(Error|Exception)\b.*:", line)]
    places = re.findall(r'File ".*/site-packages/(torchtitan/[^"]+)", line (\d+), in (\S+)', done.stderr)
    record = {
        "environment": environment(),
        "version": VERSION,
        "tried": COMMAND,
        "status": done.returncode,
        "says": "runs" if done.returncode == 0 else (errors or lines or ["nothing"])[-1],
        "at": ":".join(places[-1]) if places else "",
    }
    print(done.stdout[-2000:], done.stderr[-3000:], sep="\n")
    print(record)
    print(f"written: {write_json('torchtitan', record)}")


if __name__ == "__main__":
    main()
