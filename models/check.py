"""Checks every model in this folder with spin, exhaustively: `make models`.

The first comment of a model lists its variants: "holds [-D...]" must have no error, "refuted -D..." must have one, so
that a check that finds nothing cannot pass for one that proves something."""

import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
VARIANT = re.compile(r"^ *(holds|refuted)((?: +-D\w+)*)", re.MULTILINE)


def variants(model: Path) -> list[tuple[str, list[str]]]:
    """("holds" or "refuted", its -D flags) in the model's first comment."""
    found = [(kind, flags.split()) for kind, flags in VARIANT.findall(model.read_text().split("*/")[0])]
    if {kind for kind, _ in found} != {"holds", "refuted"}:
        sys.exit(f"{model.name}: its first comment must list what holds and what is refuted")
    return found


def check(model: Path, kind: str, flags: list[str]) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as folder:

        def run(*command: str) -> str:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
            if done.returncode and command[0] != "./pan":
                sys.exit(f"{model.name}: {' '.join(command)} failed\n{done.stdout}{done.stderr}")
            return done.stdout

        for source in (model, HERE / "memory.pml"):
            shutil.copy(source, folder)
        run("spin", "-a", *flags, model.name)
        run("gcc", "-O0", "-w", "-DSAFETY", "-DMEMLIM=2000", "-o", "pan", "pan.c")
        output = run("./pan", "-m200000", "-n")
    errors = re.search(r"errors: (\d+)", output)
    states = re.search(r"(\d+) states, stored", output)
    # An error that stands for nothing but a limit of the search proves nothing.
    whole = "max search depth too small" not in output and "out of memory" not in output
    good = whole and errors is not None and (int(errors[1]) == 0) == (kind == "holds")
    first = re.search(r"pan:\d+: (.*)\(at depth", output)
    return good, f"{states[1] if states else '?'} states, {first[1].strip() if first else 'no error'}"


def main() -> int:
    if not shutil.which("spin"):
        print("models/check.py needs spin: apt-get install spin (spinroot.com has it for other systems)")
        return 1
    models = sorted(path for path in HERE.glob("*.pml") if path.name != "memory.pml")
    jobs = [(model, kind, flags) for model in models for kind, flags in variants(model)]
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda job: check(*job), jobs)
        bad = 0
        for (model, kind, flags), (good, text) in zip(jobs, results, strict=True):
            bad += not good
            print(f"{'ok  ' if good else 'FAIL'} {model.stem:11} {kind:8}{' '.join(flags):24} {text}", flush=True)
    print(f"{len(jobs)} checks, {bad} failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
