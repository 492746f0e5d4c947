"""What of `make bench-gpu` needs no GPU: its figures and tables of a record, what it reads of its programs, and the
ranks that it times, on the fake device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_host  # noqa: E402
import gpu_ranks  # noqa: E402
import gpu_report  # noqa: E402
import gpu_torch  # noqa: E402
from fake_nccl import build  # noqa: E402
from gpu_clock import Clock  # noqa: E402

MIB = 1 << 20


def kernel(name: str, numel: int, nbytes: int, gb_per_s: float, by: str = "pycomm") -> dict[str, Any]:
    return {"kernel": name, "by": by, "numel": numel, "nbytes": nbytes, "median_s": nbytes / gb_per_s / 1e9}


def record() -> dict[str, Any]:
    """Made up: every bound is reached but those that a test changes."""
    kernels = [kernel("copy", numel, 4 * numel, 4000, "cudaMemcpy") for numel in (MIB, 8 * MIB, 128 * MIB)]
    for name in gpu_report.SHARED_KERNELS:
        kernels += [kernel(name, 8 * MIB, 24 * MIB, 3600), kernel(name, MIB, 3 * MIB, 100)]  # small ones have no bound
    kernels.append(kernel("pack", 8 * MIB, 32 * MIB, 200, "torch"))
    for name, bound_s in gpu_report.MOE_S.items():
        kernels.append({"kernel": name, "by": "pycomm", "numel": MIB, "nbytes": 4 * MIB, "median_s": 0.99 * bound_s})
    kernels.append({**kernels[-4], "by": "torch", "median_s": 125e-6})
    threads = [
        {"what": what, "ranks": ranks, "nbytes": nbytes, "median_s": seconds}
        for ranks in (2, 4)
        for nbytes, times in ((1024, (5e-6, 6e-6, 9e-6)), (65536, (8e-6, 9e-6, 9e-6)), (MIB, (5e-5, 4e-5, 3e-5)))
        for what, seconds in zip(("one-shot", "two-shot", "nccl"), times, strict=True)
    ]
    host = {"own": 4e-6, "in_nccl": 2e-5, "calls": 4}
    return {
        "gpu": "GPU",
        "n_gpus": 1,
        "nccl_version": 23003,
        "kernels": kernels,
        "threads": threads,
        "processes": [
            {
                "ranks": 2,
                "as": "processes",
                "nbytes": 1024,
                "peer_nbytes": MIB,
                "nccl_s": 2e-5,
                "pycomm_s": 1e-5,
                "nccl_calls": 0.0,
                "host_s": {"nccl": 1e-5, "pycomm": 1.1e-5},
            }
        ],
        "hierarchical": {
            "n_ranks": 4,
            "sizes": [{"nbytes": 64 * MIB, "pycomm_s": 1.01e-3, "bare_s": 1e-3}],
            "same_bits": True,
            "host_s": {"native": dict(host), "hierarchical": dict(host)},
        },
        "graph": {"n_ranks": 2, "called_s": 3e-4, "replayed_s": 2e-4, "same_bits": True},
        "not_measured": {},
    }


def verdicts(made: dict[str, Any]) -> dict[str, bool | None]:
    return {figure.name: figure.reached for figure in gpu_report.figures(made)}


def test_figures_of_a_record_that_reaches_them_all() -> None:
    assert set(verdicts(record()).values()) == {True}
    assert len(verdicts(record())) == 19
    text = gpu_report.tables(record())
    assert "| pack" in text and "torch" in text and "90%" in text and "MISSED" not in text


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda r: r["kernels"][3].update(median_s=1.0), "quantise int8, from 16 MiB"),
        (lambda r: r["threads"][3].update(median_s=8.1e-6), "one-shot all_reduce, 2 threads on one GPU, up to 64 KiB"),
        (lambda r: r["threads"][5].update(median_s=8e-6), "the same, 2 threads, beside NCCL on that GPU"),
        (
            lambda r: r["hierarchical"].update(same_bits=False),
            "hierarchical all_reduce: same bits on all ranks, the CPU engine's for integers",
        ),
        (
            lambda r: r["hierarchical"]["host_s"]["native"].update(own=5.1e-6),
            "native all_reduce: on the host, outside NCCL's calls",
        ),
        (
            lambda r: r["hierarchical"]["sizes"][0].update(pycomm_s=1.03e-3),
            "hierarchical all_reduce of 64 MiB, over the bare calls",
        ),
        (lambda r: r["graph"].update(same_bits=False), "graph of a training step's collectives: same bits"),
        (lambda r: r["kernels"][-5].update(median_s=155e-6), "moe expand T=4096"),
        (lambda r: r["kernels"][-4].update(median_s=155e-6), "moe combine-reduce T=4096"),
        (lambda r: r["kernels"][-3].update(median_s=65e-6), "moe quantise+pack fp8 T=4096"),
        (lambda r: r["kernels"][-2].update(median_s=9.1e-6), "moe expand T=128"),
        (lambda r: r["kernels"][-1].update(median_s=121e-6), "moe expand T=4096, beside torch's index_select"),
    ],
)
def test_each_bound_is_missed_by_itself(change: Any, name: str) -> None:
    made = record()
    change(made)
    assert [one for one, reached in verdicts(made).items() if reached is not True] == [name]
    assert "MISSED" in gpu_report.tables(made)


def test_what_was_not_measured_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = {"gpu": "GPU", "n_gpus": 1, "nccl_version": 0, "not_measured": {"all": "no NCCL"}}
    assert set(verdicts(empty).values()) == {None}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(empty))
    gpu_report.main([str(path)])
    printed = capsys.readouterr().out
    assert printed.count("not measured") == 19 and "NOT MEASURED: all: no NCCL" in printed


def test_programs_are_read_and_their_failure_is_told(tmp_path: Path) -> None:
    program = tmp_path / "bench_gpu_kernels"
    program.write_text("#!/bin/sh\nprintf 'copy\\t4\\t16\\t1.0\\t3.0\\t2.0\\npack\\t4\\t16\\t4.0\\n'\n")
    program.chmod(0o755)
    (tmp_path / "bench_gpu_moe").write_text("#!/bin/sh\necho 'no device' >&2\nexit 1\n")
    (tmp_path / "bench_gpu_moe").chmod(0o755)
    (tmp_path / "bench_gpu_peers").write_text(
        "#!/bin/sh\nprintf 'without\\tnccl\\ttoo old\\none-shot\\t2\\t256\\t1.0\\t1.0\\n'\n"
    )
    (tmp_path / "bench_gpu_peers").chmod(0o755)
    found = gpu.run_program(program)
    assert [(one["kernel"], one["by"], one["median_s"]) for one in found] == [
        ("copy", "cudaMemcpy", 2.0),
        ("pack", "pycomm", 4.0),
    ]
    missing: dict[str, str] = {}
    assert gpu.run_peers(tmp_path / "bench_gpu_peers", missing)[0]["ranks"] == 2
    assert missing == {"nccl of threads": "too old"}
    with pytest.raises(RuntimeError, match="no device"):
        gpu.run_program(tmp_path / "bench_gpu_moe")


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"finds no GPU .* nothing was measured"):
        gpu.main(["."])


def test_torchs_kernels_are_timed() -> None:
    found, missing = gpu_torch.rows(Clock("cpu", rounds=2), sizes=(1 << 14,), compiles=False)
    assert not missing and [one["kernel"] for one in found] == [
        "reduce",
        "quantise e4m3",
        "dequantise-reduce e4m3",
        "pack",
    ]
    expands = gpu_torch.expands(Clock("cpu", rounds=2), tokens=(8,), width=16, choices=2, experts=4)
    assert expands[0]["nbytes"] == 2 * (8 * 2 * 16 + 8 * 16)


def test_ranks_are_timed_on_the_fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    library = str(build())
    clock = Clock("cpu", rounds=2)
    setting = gpu_ranks.Setting(clock, 2, library, 22905, "gloo", {"PYCOMM_TEST_DEVICE": library})
    monkeypatch.setattr(gpu, "HIERARCHICAL", (1 << 12, 1 << 16))
    monkeypatch.setattr(gpu, "SIZES", (1 << 12,))
    made: dict[str, Any] = {"gpu": "fake", "n_gpus": 2, "nccl_version": 22905, "not_measured": {}}
    gpu.measure_ranks(made, setting, small=(1 << 10,))
    assert not made["not_measured"]
    assert [row["nccl_calls"] > 0 for row in made["processes"]] == [False, False, True]  # by peers, by peers, by NCCL
    assert made["hierarchical"]["same_bits"] and made["graph"]["same_bits"]
    # Native: one group of one call; hierarchical: that of each tile and step.
    calls = {way: found["calls"] for way, found in made["hierarchical"]["host_s"].items()}
    assert 0 < calls["native"] < calls["hierarchical"]
    assert all(found["own"] > 0 for found in made["hierarchical"]["host_s"].values())
    assert "2 processes" in gpu_report.tables(made)


@pytest.mark.parametrize(("code", "said", "status", "last"), [
    (0, "3 passed, 0 failed", 0, "all ran and passed"),
    (0, "NOT RUN threads: old NCCL", 0, "NOT RUN threads: old NCCL"),
    (3, "1 passed, 1 failed", 1, "FAILED (3): "),
])  # fmt: skip
def test_what_a_gpus_programs_say_is_what_is_reported(
    tmp_path: Path, code: int, said: str, status: int, last: str
) -> None:
    for name in ("gpu_kernels", "gpu_moe", "gpu_threads", "bin/compute-sanitizer"):
        program = tmp_path / name
        program.parent.mkdir(exist_ok=True)
        said_by, ended = (said, code) if name == "gpu_threads" else ("fine", 0)
        program.write_text(f"#!/bin/sh\necho '{said_by}'\nexit {ended}\n")
        program.chmod(0o755)
    script = Path(__file__).parent / "gpu/kernels.sh"
    done = subprocess.run([script, tmp_path, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == status and done.stdout.splitlines()[-1].startswith(last), done.stdout
    assert done.stdout.count("compute-sanitizer --error-exitcode 1") == 4
    not_run = (tmp_path / "not_run").read_text().splitlines()
    assert set(not_run) == ({said} if said.startswith("NOT RUN") else set())


def test_what_a_call_costs_the_host_is_counted() -> None:
    found = gpu_host.times(calls=3, rounds=2)
    native, hierarchical = found["Group.all_reduce, native"], found["Group.all_reduce, hierarchical"]
    assert native["device_calls"] == 4  # is it captured; its begin, its end, the group's last
    assert hierarchical["device_calls"] > 4 + 3 * 4  # four tiles of three steps, in order
    assert native["seconds"] > 0 and hierarchical["seconds"] > 0
