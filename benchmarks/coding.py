"""How fast the wire's kernels are, in % of what memcpy moves on one core: python benchmarks/coding.py

Compiles coding.cc with csrc/cpu/coding*.cc, and writes results/coding.json, from which docs/wire.md has its table.
Bytes are those read and written. Kernels and memcpy take turns; as in STREAM the best of the rounds counts."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from common import environment, markdown_table, write_json

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "coding"
        sources = [Path(__file__).with_name("coding.cc"), *sorted((CSRC / "cpu").glob("coding*.cc"))]
        command = ["g++", "-std=c++20", "-O3", f"-I{CSRC}", *map(str, sources), "-o", str(program)]
        subprocess.run(command, check=True)
        done = subprocess.run([str(program)], check=True, capture_output=True, text=True, timeout=300)
    results = []
    for line in done.stdout.splitlines():
        kernel, numel, nbytes, *seconds = line.split("\t")
        rate = int(nbytes) / min(map(float, seconds))
        results.append({"kernel": kernel, "numel": int(numel), "bytes_per_s": round(rate)})
    copies = {row["numel"]: row["bytes_per_s"] for row in results if row["kernel"] == "copy"}
    table = []
    for kernel in dict.fromkeys(str(row["kernel"]) for row in results):
        cells = [kernel]
        for numel, copy in copies.items():
            rate = next(row["bytes_per_s"] for row in results if (row["kernel"], row["numel"]) == (kernel, numel))
            cells += [f"{rate / 1e9:.1f} GB/s", f"{rate / copy:.0%}"]
        table.append(cells)
    path = write_json("coding", {"environment": environment(), "results": results})
    head = ["kernel", "64 KiB, in the cache", "of memcpy", "64 MiB", "of memcpy"]
    print(markdown_table(head, table))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
