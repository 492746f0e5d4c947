"""What this machine's memory and scheduler do, in the ways that the CPU engine could use: python benchmarks/memory.py

Compiles and runs memory.cc; writes results/memory.json, from which docs/performance.md has its first table."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from common import environment, markdown_table, microseconds, size_name, write_json


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "memory"
        source = Path(__file__).with_name("memory.cc")
        subprocess.run(["g++", "-std=c++20", "-O2", str(source), "-o", str(program)], check=True)
        done = subprocess.run([str(program)], check=True, capture_output=True, text=True, timeout=300)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    results = [
        {"group": group, "variant": variant, "nbytes": int(nbytes), "median_us": float(median)}
        for group, variant, nbytes, median in rows
    ]
    path = write_json("memory", {"environment": environment(), "results": results})
    cells = [
        [group, variant, size_name(int(nbytes)), microseconds(float(us)) if float(us) >= 1 else us]
        for group, variant, nbytes, us in rows
    ]
    print(markdown_table(["what", "how", "bytes", "median µs"], cells))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
