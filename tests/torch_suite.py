"""torch's own distributed tests (torch.testing._internal.distributed.distributed_test), run on pycomm and on Gloo.

    python tests/torch_suite.py                          # 2, 3 and 4 ranks on both; writes docs/torch_suite.{md,json}
    python tests/torch_suite.py --ranks 2 --backends pycomm --no-report -k all_to_all

The tests come from the installed wheel and are not changed. What a backend is able to do stands in torch's source in
lists of names; LISTS and LIFTED say where pycomm belongs. `gloo+` is Gloo with the same lists: a test that fails
there too is one that no backend of this kind can pass.

Exits with 1 where a test passes on Gloo and not on pycomm, or fails on pycomm and WHY does not say why.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "docs" / "torch_suite"
BACKENDS = ("gloo", "gloo+", "pycomm")
TIMEOUT_S = 180  # one test; on one core the longest takes a third of this

# The lists in torch's source that say what a backend is able to do, and on which pycomm stands. ("cuda" and "gpu" are
# asked for by tests of CPU tensors as well; those that need a GPU say so once more and are skipped by that.)
LISTS = ("gpu", "cuda", "ddp", "subgroup", "plugin")

# Skips whose condition is a backend's name, and which say nothing about what the test needs of a CPU backend.
LIFTED = (
    "Only gloo backend supports timeouts",
    "Only Gloo backend supports sparse all reduce",
    "GLOO Batch Send Recv CPU",
    "Only MPI supports all_to_all",
    "Only MPI supports CPU all_to_all_single",
    "get_future is only supported on mpi, nccl and gloo",
    "Only NCCL and GLOO backend support DistributedDataParallel",
    re.compile(r"Test requires backend \w+ to be one of \{'gloo'\}"),
)

# Failures on pycomm that are the test's own: why.
WHY = {
    "test_ddp_logging_data_cpu": "torch logs every backend that it did not bring itself as 'custom'",
}


# ---- in a lane: one process per (backend, n_ranks), and forked from its fork server the ranks ----


class AlsoGloo(str):
    """A backend's name, for tests that ask while they run whether they run on Gloo, meaning: on CPU tensors."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or other == "gloo"

    __hash__ = str.__hash__


def load() -> Any:
    """The class with torch's tests, as BACKEND and WORLD_SIZE in the environment have it."""
    import torch.distributed as dist
    from torch.testing._internal import common_distributed

    import pycomm  # noqa: F401  (registers the backend)

    shipped = os.environ["BACKEND"]
    widened = os.environ["TORCH_SUITE_LISTS"] == "pycomm"
    if widened:
        for feature in LISTS:
            common_distributed.DistTestCases.backend_feature[feature].add(shipped)
        if int(os.environ["WORLD_SIZE"]) >= 3:  # of any backend but MPI it asks 8; the tests use ranks 1 and 2
            common_distributed.skip_if_small_worldsize = lambda function: function
    from torch.testing._internal.distributed import distributed_test as module

    if widened:
        module.BACKEND = AlsoGloo(shipped)
        for backends in (module.PROFILING_SUPPORTED_BACKENDS, module.SEND_RECV_PROFILING_SUPPORTED_BACKENDS):
            if shipped not in backends:
                backends.append(dist.Backend(shipped))

    class Suite(module.TestDistBackend, module.DistributedTest._DistTestBase):
        pass

    if widened:
        for name in tests_of(Suite):
            function = getattr(Suite, name)
            if any(re.fullmatch(lift, skip_reason(function) or "") for lift in LIFTED):
                function.__unittest_skip__ = False
    return Suite


def tests_of(suite: type) -> list[str]:
    return sorted(name for name in dir(suite) if name.startswith("test_"))


def skip_reason(function: Any) -> str | None:
    return function.__unittest_skip_why__ if getattr(function, "__unittest_skip__", False) else None


def needs_accelerator(function: Any) -> bool:
    """Whether a decorator of torch's will skip the test here for want of a GPU: what it says only once ranks run."""
    import torch

    while not torch.accelerator.is_available() and hasattr(function, "__wrapped__"):
        outside = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        on_cpu = "allow_cpu" in outside and outside["allow_cpu"].cell_contents
        if function.__code__.co_qualname.startswith(("skip_if_no_gpu", "skip_if_lt_x_gpu")) and not on_cpu:
            return True
        function = function.__wrapped__
    return False


def run_rank(_port: int, rank: int, n_ranks: int, name: str, rendezvous: str, folder: str) -> tuple[str, str]:
    """What TestDistBackend._run does in a rank's process, but for how the outcome is told."""
    import unittest
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    from torch.testing._internal import common_distributed, common_utils
    from torch.testing._internal.distributed import distributed_test as module

    os.environ["TEMP_DIR"] = folder
    module.INIT_METHOD = f"file://{folder}/again"  # for tests that make the default group once more
    os.environ["TORCH_SHOW_CPP_STACKTRACES"] = "1"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    torch.set_num_threads(1)
    case = SUITE(name)
    case.rank, case.file_name = rank, rendezvous
    limit = timedelta(seconds=module.CUSTOM_PG_TIMEOUT.get(name, module.default_pg_timeout))
    dist.init_process_group(
        os.environ["BACKEND"], init_method=f"file://{rendezvous}", rank=rank, world_size=n_ranks, timeout=limit
    )
    case._barrier()
    common_utils.set_rng_seed()
    try:
        getattr(case, name)()
    except unittest.SkipTest as skip:
        return "skipped", str(skip)
    except SystemExit as end:
        skips = {skip.exit_code: skip.message for skip in common_distributed.TEST_SKIPS.values()}
        if end.code not in skips:
            raise
        return "skipped", skips[end.code]
    case._barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
    return "passed", ""


def run_test(name: str, n_ranks: int) -> dict[str, Any]:
    import tempfile

    import torch_ranks

    if why := skip_reason(getattr(SUITE, name)):
        return {"outcome": "skipped", "why": why, "seconds": 0.0}
    if needs_accelerator(getattr(SUITE, name)):
        return {"outcome": "skipped", "why": "needs a GPU", "seconds": 0.0}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for sub in ("barrier", "test_dir"):
            os.mkdir(os.path.join(folder, sub))
        try:
            outcomes = torch_ranks.run_processes(
                run_rank,
                n_ranks,
                name,
                os.path.join(folder, "rendezvous"),
                folder,
                hosts=None,
                timeout_s=TIMEOUT_S,
                may_die=(),
            )
            outcome, why = max(set(outcomes), key=lambda pair: pair[0])  # one skipped rank: the test is skipped
        except torch_ranks.RanksFailed as failure:
            outcome, why = "failed", str(failure)
    return {"outcome": outcome, "why": why, "seconds": round(time.monotonic() - began, 2)}


def lane(backend: str, n_ranks: int) -> None:
    """Names of tests on stdin, their outcomes as JSON on stdout, a line each."""
    import torch_ranks

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed
    torch_ranks._context.set_forkserver_preload(["torch", "pycomm", "torch_suite"])
    print(json.dumps(tests_of(SUITE)), file=answers)
    for line in sys.stdin:
        print(json.dumps(run_test(line.strip(), n_ranks)), file=answers)


# Read once by a lane and once by its fork server, which gives it to the ranks.
SUITE: Any = load() if "TORCH_SUITE_LISTS" in os.environ else None


# ---- the runner ----


class Lane:
    def __init__(self, backend: str, n_ranks: int, log: Any) -> None:
        environment = {
            **os.environ,
            "BACKEND": backend.rstrip("+"),
            "WORLD_SIZE": str(n_ranks),
            "TORCH_SUITE_LISTS": "torch" if backend == "gloo" else "pycomm",
            "PYTHONPATH": str(Path(__file__).parent),  # the fork server imports by name
            "INIT_METHOD": "file://",  # what a test that asks at import wants to see; each rank has its own
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, "-c", f"import torch_suite; torch_suite.lane({backend!r}, {n_ranks})"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        self.tests: list[str] = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a lane of the runner ended with {self.process.wait()}; run with --log to see why")
        return json.loads(line)

    def run(self, name: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return dict(self._answer())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


Results = dict[str, dict[str, Any]]


def run_all(backend: str, n_ranks: int, keep: Any, jobs: int, log: Any, say: bool) -> Results:
    """Outcome by test, the tests shared out over `jobs` lanes."""
    first = Lane(backend, n_ranks, log)
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    names = [name for name in first.tests if keep(name)]
    for name in names:
        todo.put(name)
    results: Results = {}

    def work(lane: Lane) -> None:
        try:
            while True:
                name = todo.get_nowait()
                results[name] = lane.run(name)
                if say:
                    print(f"{backend} x{n_ranks} {name}: {results[name]['outcome']} {results[name]['seconds']} s")
        except queue.Empty:
            lane.close()

    others = min(jobs, len(names)) - 1
    threads = [threading.Thread(target=work, args=(Lane(backend, n_ranks, log),)) for _ in range(others)]
    for thread in threads:
        thread.start()
    work(first)
    for thread in threads:
        thread.join()
    return {name: results[name] for name in names}


def problems(results: dict[tuple[str, int], Results]) -> list[str]:
    """What must not be: worse than Gloo, or failed with no reason known."""
    found = []
    for (backend, n_ranks), outcomes in results.items():
        if backend != "pycomm":
            continue
        shipped = results.get(("gloo", n_ranks), {})
        for name, outcome in outcomes.items():
            known = WHY.get(name)
            if outcome["outcome"] == "failed" and not known:
                found.append(f"{name} fails on pycomm with {n_ranks} ranks:\n{tail(outcome['why'])}")
            elif outcome["outcome"] != "passed" and shipped.get(name, {}).get("outcome") == "passed" and not known:
                found.append(f"{name} passes on Gloo with {n_ranks} ranks and is {outcome['outcome']} on pycomm")
    return found


def tail(why: str) -> str:
    """The lines of a traceback that say what was wrong."""
    return "\n".join(line for line in why.splitlines() if re.match(r"--- rank|[\w.]+(Error|Exception|Timeout)\b", line))


def counts(outcomes: Results) -> dict[str, int]:
    return dict(collections.Counter(outcome["outcome"] for outcome in outcomes.values()))


def report(results: dict[tuple[str, int], Results]) -> None:
    """Writes REPORT.json, what each test did, and REPORT.md, for people."""
    import torch

    n_ranks = sorted({n for _, n in results})
    names = list(next(iter(results.values())))
    ours = {name: [results["pycomm", n][name] for n in n_ranks] for name in names}
    record = {
        "torch": torch.__version__,
        "ranks": n_ranks,
        "tests": {
            name: {backend: [results[backend, n][name]["outcome"] for n in n_ranks] for backend in BACKENDS}
            for name in names
        },
    }
    REPORT.with_suffix(".json").write_text(compact_json(record))

    def passed(backend: str, name: str) -> bool:
        return any(results[backend, n][name]["outcome"] == "passed" for n in n_ranks)

    lines = [
        "# torch's own distributed tests",
        "",
        "The tests of `torch.testing._internal.distributed.distributed_test`, as they ship in the wheel of torch "
        f"{torch.__version__}, run by `make torch-suite` (tests/torch_suite.py, which wrote this page). Every test "
        "that passes on Gloo passes on pycomm, but for what stands under *Failed*.",
        "",
        "`Gloo` is Gloo with the tests as torch has them. torch says in lists of names what a backend is able to do; "
        "the runner puts pycomm on those lists, and takes away skips whose condition is a name. `Gloo, same lists` "
        "is Gloo with exactly that.",
        "",
        "| ranks | backend | passed | skipped | failed |",
        "|---|---|---|---|---|",
    ]
    titles = {"gloo": "Gloo", "gloo+": "Gloo, same lists", "pycomm": "pycomm"}
    for n in n_ranks:
        for backend in BACKENDS:
            number = counts(results[backend, n])
            row = " | ".join(str(number.get(outcome, 0)) for outcome in ("passed", "skipped", "failed"))
            lines.append(f"| {n} | {titles[backend]} | {row} |")
    lines += ["", "## Failed", "", "| test | ranks | why |", "|---|---|---|"]
    for name, outcomes in ours.items():
        failed = [str(n) for n, outcome in zip(n_ranks, outcomes, strict=True) if outcome["outcome"] == "failed"]
        if failed:
            lines.append(f"| {name} | {', '.join(failed)} | {WHY.get(name, 'unknown')} |")
    lines += ["", "## Passed on pycomm, skipped or failed on Gloo even with the same lists", ""]
    lines.append(", ".join(name for name in names if passed("pycomm", name) and not passed("gloo+", name)) or "none")
    lines += ["", "## Skipped at every number of ranks, by torch's own reason", ""]
    reasons: dict[str, list[str]] = {}
    for name, outcomes in ours.items():
        if all(outcome["outcome"] == "skipped" for outcome in outcomes):
            reasons.setdefault(outcomes[0]["why"], []).append(name)
    for why, skipped in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines += [f"**{why}** ({len(skipped)})", "", ", ".join(skipped), ""]
    lines += ["## Skipped at some", "", "| test | ranks | torch's reason |", "|---|---|---|"]
    for name, outcomes in ours.items():
        skipped = [(n, o["why"]) for n, o in zip(n_ranks, outcomes, strict=True) if o["outcome"] == "skipped"]
        if 0 < len(skipped) < len(n_ranks):
            lines.append(f"| {name} | {', '.join(str(n) for n, _ in skipped)} | {skipped[0][1]} |")
    REPORT.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n")


def compact_json(record: dict[str, Any]) -> str:
    """One line a test."""
    tests = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in record["tests"].items())
    head = {key: value for key, value in record.items() if key != "tests"}
    return json.dumps(head)[:-1] + ', "tests": {\n' + tests + "\n}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("-k", dest="words", nargs="+", help="only tests whose name holds one of these")
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time")
    parser.add_argument("--no-report", action="store_true", help=f"leave {REPORT}.* as they are")
    parser.add_argument("--log", action="store_true", help="let the ranks write on stderr; each failure in full")
    options = parser.parse_args()

    def keep(name: str) -> bool:
        return not options.words or any(word in name for word in options.words)

    log = None if options.log else subprocess.DEVNULL
    results = {}
    for n_ranks in options.ranks:
        for backend in options.backends:
            outcomes = run_all(backend, n_ranks, keep, options.jobs, log, say=True)
            results[backend, n_ranks] = outcomes
            if options.log:
                for name, outcome in outcomes.items():
                    if outcome["outcome"] == "failed":
                        print(f"\n==== {backend} x{n_ranks} {name}\n{outcome['why']}")
            seconds = sum(outcome["seconds"] for outcome in outcomes.values())
            print(f"{backend} x{n_ranks}: {counts(outcomes)}, {seconds:.0f} s", flush=True)
    if not (options.no_report or options.words or set(options.backends) != set(BACKENDS)):
        report(results)
    found = problems(results)
    print("\n".join(found))
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
