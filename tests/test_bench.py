"""pycomm bench on real ranks: libraries in turns, wrong results counted, each launcher, files, Ctrl-C, comparison."""

from __future__ import annotations

import csv
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from commands import PYCOMM
from spawn import run_ranks

from pycomm.bench import libraries, mpi, record, roofline
from pycomm.bench.cases import EVERY, Case, Moe, cases
from pycomm.bench.libraries import Nccl, Pycomm, TorchDistributed
from pycomm.bench.measure import Effort, Row, Session, Timing
from pycomm.bench.roofline import measure_links
from pycomm.bench.trials import Unavailable
from pycomm.bench.workloads import MoeTrial
from pycomm.errors import PycommError
from pycomm.planners import PLANNERS

ROOT = Path(__file__).resolve().parents[1]
BENCH = ("-m", "pycomm", "bench")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *BENCH)
LAUNCHED = (*PYCOMM, "launch", "--ranks", "2", "--", *BENCH)
QUICK = Effort(n_iters=3, n_warmup=1)


class Broken(Pycomm):
    """Rank 1's result has two elements wrong."""

    name = "broken"

    def call(self, case, x, y, placement, async_op=False):
        right = super().call(case, x, y, placement, async_op)

        def call():
            right()
            if self.group.rank == 1:
                y[3] += 1
                y[5] += 1

        return call


class Stubborn(Pycomm):
    name = "stubborn"

    def trial(self, case, placement, memory):
        raise Unavailable("it does not want to")


class Crashing(Pycomm):
    """Fails on one rank alone, after the call that all of them made."""

    name = "crashing"

    def call(self, case, x, y, placement, async_op=False):
        right = super().call(case, x, y, placement, async_op)

        def call():
            right()
            if self.group.rank == 1:
                raise ZeroDivisionError("on rank 1")

        return call


def session(group, libraries, effort=QUICK, links=False, interrupted=lambda: False) -> Session:
    control = group.new_group(range(group.size))
    return Session(group, control, libraries, effort, measure_links(control) if links else None, interrupted)


def measure_injected(group) -> Row:
    case = Case("all_reduce", "float32", 4096, group.size)
    libraries = [Pycomm(group), Broken(group), Stubborn(group), Crashing(group)]
    row = session(group, libraries).measure(case)
    assert row is not None
    return row


def test_wrong_elements_of_an_injected_library_are_counted_and_refusals_kept() -> None:
    for row in run_ranks(measure_injected, 2):
        wrong = {name: [timing.wrong for timing in placements.values()] for name, placements in row.timings.items()}
        assert wrong == {"pycomm": [0, 0], "broken": [2, 2]}
        assert row.wrong == 4
        assert "stubborn" not in row.timings and row.refused["stubborn"] == "it does not want to"
        assert "crashing" not in row.timings and row.refused["crashing"] in ("on rank 1", "refused on another rank")
        assert row.native("broken").calls == 3 and row.ratio("broken") > 0


class Misrouted:
    """A group whose all_to_all swaps two rows that reach rank 1."""

    def __init__(self, group) -> None:
        self._group, self.rank, self.size = group, group.rank, group.size

    def all_gather(self, output, input):
        self._group.all_gather(output, input)

    def all_to_all(self, output, input, output_counts=None, input_counts=None):
        self._group.all_to_all(output, input, output_counts, input_counts)
        if self.rank == 1 and output.is_floating_point():
            output[:2] = output[:2].flip(0)


def moe_on_both(group) -> list[list[int | None]]:
    found = []
    for name in ("moe_dispatch", "moe_combine"):
        case = Case(name, "float32", 2 * 3 * 4 * 32, group.size, moe=Moe(4, 2, 3))
        found.append([MoeTrial(each, case).check() for each in (group, Misrouted(group))])
    return found


def test_rows_of_the_moe_exchange_that_went_astray_are_counted() -> None:
    first, second = run_ranks(moe_on_both, 2)
    assert first[0] == [0, 0]
    for right, misrouted in second:
        assert right == 0 and misrouted is not None and misrouted > 0


MANY = ",".join(f"127.0.0.{10 + nic}" for nic in range(32))  # addresses and ports of more than 512 bytes


def links_by_address(group) -> tuple[list[list[float]], str]:
    v6 = Path("/proc/net/if_inet6")
    has_v6 = v6.exists() and f"{1:032x}" in v6.read_text()
    rates = []
    for address in ("lo", MANY, *(["::1", "lo,::1"] if has_v6 else [])):
        os.environ["PYCOMM_ADDRESS"] = address
        rates.append(measure_links(group).tolist())
    os.environ["PYCOMM_ADDRESS"] = "192.0.2.1" if group.rank == 2 else "127.0.0.1"  # TEST-NET-1 is no host's
    try:
        measure_links(group)
    except OSError as error:
        return rates, str(error)
    return rates, "measured"


def test_links_are_measured_by_names_many_addresses_and_ipv6_and_a_failure_is_every_ranks() -> None:
    for rates, failure in run_ranks(links_by_address, 3, hosts=["a", "a", "b"]):
        assert len(rates) >= 2 and all(len(of_hosts) == 2 and min(of_hosts) > 0 for of_hosts in rates)
        assert "rank 2 (host b): cannot listen on 192.0.2.1" in failure


def test_a_stranger_on_a_measured_link_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_GREETING_S", 0.1)
    monkeypatch.setattr(roofline, "START_S", 1e9)  # what comes counts from the first byte, however late it is read
    with socket.create_server(("127.0.0.1", 0)) as listener:
        silent = socket.create_connection(listener.getsockname())
        loud = socket.create_connection(listener.getsockname())
        mine = socket.create_connection(listener.getsockname())
        loud.sendall(b"x" * 100)
        loud.close()
        mine.sendall(b"secret" + bytes(100))
        mine.close()
        assert roofline._receive(listener, "secret", 20) > 0
        silent.close()


@pytest.mark.parametrize(("address", "interfaces"), [("lo", "lo"), ("127.0.0.7,::1", "lo"), ("192.0.2.1", None)])
def test_gloo_takes_the_interfaces_that_pycomm_is_told_to_use(
    monkeypatch: pytest.MonkeyPatch, address: str, interfaces: str | None
) -> None:
    monkeypatch.setenv("PYCOMM_ADDRESS", address)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # put back at the end
    del os.environ["GLOO_SOCKET_IFNAME"]
    monkeypatch.setattr(libraries, "_process_group", lambda *arguments: None)
    libraries.open_gloo(SimpleNamespace(rank=0, size=1), 1)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == interfaces


def own_failure(group) -> str:
    try:
        session(group, [Crashing(group)]).measure(Case("all_reduce", "float32", 4096, group.size))
    except ZeroDivisionError:
        return "raised"
    except PycommError as error:
        return type(error).__name__
    return "hidden"


def test_a_failure_of_what_is_measured_is_not_a_refusal() -> None:
    assert run_ranks(own_failure, 2, op_timeout_s=3)[1] == "raised"


def measure_everything(group) -> list[Row]:
    dist.init_process_group("gloo", store=group._store, rank=group.rank, world_size=group.size)
    gloo = TorchDistributed("gloo", dist.group.WORLD, group.rank, group.size)
    device = Nccl(dist.group.WORLD, group.rank, group.size, "cpu")  # NCCL's way, with tensors of a device of its own
    measuring = session(group, [Pycomm(group), gloo, device], links=True)
    n = group.size
    asked = cases(list(EVERY), ["float32"], ["sum"], [n * 64 * 4], n, 1, [(0, 1), (0, n - 1)], Moe(n, 2, 4))
    rows = [measuring.measure(case) for case in asked]
    dist.destroy_process_group()
    return rows


@pytest.mark.parametrize("hosts", [None, ["a", "b", "a"]], ids=["one host", "two hosts"])
def test_every_case_is_right_on_every_library(hosts: list[str] | None) -> None:
    everyone = run_ranks(measure_everything, 3, hosts=hosts)
    for rows in everyone:
        assert {row.case.collective for row in rows} == set(EVERY)
        for row in rows:
            label, kind = row.case.label, row.case.kind
            assert set(row.timings) == {"pycomm", "gloo"} | ({"nccl"} if "nccl" not in row.refused else set()), (
                label,
                row.refused,
            )
            assert ("nccl" in row.refused) == (row.case.moe is not None or "overlap" in row.case.collective), label
            for library, placements in row.timings.items():
                assert set(placements) == set(kind.placements)
                for placement, timing in placements.items():
                    checked = placement != "compute" and row.case.collective != "barrier"
                    assert timing.wrong == (0 if checked else timing.wrong), (label, library, placement)
                    assert timing.calls == 3 and 0 < timing.p50_us <= timing.p95_us <= timing.p99_us
            ends = row.case.pair or (0, 1)
            crosses = hosts is not None and hosts[ends[0]] != hosts[ends[1]]
            assert (row.bytes_between > 0) == crosses, label
            assert (row.limit_us is not None) == (crosses and row.case.collective != "barrier"), label
            assert row.reason
            if hosts is None or row.case.pair is not None:
                assert row.algorithm in ("native", "messages"), label
            elif row.case.collective in PLANNERS:
                assert row.algorithm in PLANNERS[row.case.collective], label
    assert [r.algorithm for r in everyone[0]] == [r.algorithm for r in everyone[2]]


def bytes_of_one_call(group) -> list[tuple[int, int]]:
    measuring = session(group, [Pycomm(group)])
    rows = [measuring.measure(Case("all_reduce", "float32", 1 << size, group.size)) for size in (12, 20)]
    return [(row.bytes_inside, row.bytes_between) for row in rows if row is not None]


def test_bytes_per_link_class_are_those_of_one_call_of_all_ranks() -> None:
    (_, small), (_, large) = run_ranks(bytes_of_one_call, 2, hosts=["a", "b"])[0]
    assert 2 * 4096 <= small <= 2 * 4096 + 1024  # 2S(N-1)/N by each of two hosts, and headers
    assert 2 << 20 <= large <= (2 << 20) * 1.01


def stopped_at_the_third_question(group) -> tuple[Row | None, Row | None, bool]:
    asked = iter(range(100))
    measuring = session(group, [Pycomm(group)], interrupted=lambda: group.rank == 1 and next(asked) >= 2)
    case = Case("all_reduce", "float32", 4096, group.size)
    return measuring.measure(case), measuring.measure(case), measuring.stopped


def test_one_rank_that_is_interrupted_stops_all_at_the_same_round() -> None:
    for first, second, stopped in run_ranks(stopped_at_the_third_question, 2):
        assert first.native().calls == 2 and second is None and stopped  # 2 of 3 rounds of one call


# The command.


def bench(*arguments: str, launcher: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
    command = [*(launcher or (*PYCOMM, "bench")), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYCOMM_BENCH")}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment | variables)


def table_rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line[:1] == " " and line.split()[0].isdigit()]


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["all_reduc"], "no collective 'all_reduc'"),
        (["all_gather", "-b", "10"], "does not divide"),
        (["all_reduce", "--ranks", "2", "--hosts", "2"], "give either --ranks"),
        (["all_reduce", "--compare", "/no/such.json"], "/no/such.json"),
        (["all_reduce", "--json", "/no/such/folder/x.json"], "folder of /no/such/folder/x.json"),
        (["sendrecv", "--ranks", "1"], "at least 2 ranks"),
        ([], "collective"),
    ],
)
def test_a_wrong_command_line_is_said_once_before_any_rank_starts(
    pycomm_command: Callable[..., tuple[int, str, str]], arguments: list[str], fact: str
) -> None:
    code, stdout, stderr = pycomm_command("bench", *arguments)
    assert (code, stdout) == (2, "")
    assert stderr.count(fact) >= 1 and "Traceback" not in stderr
    assert stderr.count("error:") == 1


def test_alone_it_starts_its_ranks_and_writes_all_files(tmp_path: Path) -> None:
    files = {kind: tmp_path / f"r.{kind}" for kind in ("json", "csv", "png")}
    outputs = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    sizes = ["-b", "1K", "-e", "2M", "-f", "2048", "-n", "5"]
    done = bench("all_reduce,all_gather", *sizes, "-d", "bf16", "--vs", "gloo,mpi,nccl", *outputs, "--mpiexec", "false")
    assert done.returncode == 0, done.stderr
    rows = table_rows(done.stdout)
    assert [row[0] for row in rows] == ["1024", "2097152"] * 2
    assert [row[1] for row in rows] == ["512", "1048576", "256", "524288"]
    assert "# mpi not available: " in done.stdout and "# nccl not available: " in done.stdout
    assert "Out of bounds values : 0 OK" in done.stdout
    assert "[1/4] all_reduce bfloat16 1 KiB sum" in done.stderr  # no terminal: plain lines

    found = json.loads(files["json"].read_text())
    assert found["n_ranks"] == 2 and len(set(found["host_ids"])) == 1 and found["interrupted"] is False
    assert set(found["unavailable"]) == {"mpi", "nccl"} and found["command"][2] == "all_reduce,all_gather"
    row = found["rows"][0]
    timing = row["timings"]["gloo"]["in_place"]
    assert timing["algbw_GBps"] == pytest.approx(1024 / timing["mean_us"] / 1e3)
    assert timing["busbw_GBps"] == pytest.approx(timing["algbw_GBps"] * 2 * 1 / 2)
    assert row["algorithm"] == "native" and row["reason"] and row["bytes_between_hosts"] == 0
    assert [row["roofline_us"] is not None for row in found["rows"]] == [False, True, False, True]
    with files["csv"].open() as lines:
        kept = list(csv.DictReader(lines))
    assert len(kept) == 4 * 2 * 2  # rows, libraries, placements
    assert float(kept[0]["p50_us"]) == found["rows"][0]["timings"]["pycomm"]["out_of_place"]["p50_us"]
    from matplotlib import image

    assert image.imread(files["png"]).std() > 0


def test_emulated_hosts_and_two_more_workloads(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    arguments = ["moe,overlap,latency,broadcast", "-b", "24K", "-e", "24K", "-n", "2", "--hidden", "64"]
    done = bench(*arguments, "--hosts", "2,1", "--vs", "gloo,mpi", "--json", str(path), PYCOMM_ADDRESS="lo")
    assert done.returncode == 0, done.stderr
    assert "3 ranks on 2 host(s) (host0: 2, host1: 1)" in done.stdout and "# links between hosts" in done.stdout
    assert "mpi not available: the job has several hosts" in done.stdout
    assert "E_overlap" in done.stdout and "# latency, us, of 24 KiB between each two ranks" in done.stdout
    found = json.loads(path.read_text())
    assert len(found["link_bytes_per_s"]) == 2 and min(found["link_bytes_per_s"]) > 0
    assert {row["collective"] for row in found["rows"]} == {
        "moe_dispatch", "moe_combine", "overlap_all_reduce", "latency", "broadcast",
    }  # fmt: skip
    assert [row["pair"] for row in found["rows"] if row["collective"] == "latency"] == [[0, 1], [0, 2], [1, 2]]
    assert set(found["rows"][2]["scorecards"]) == {"pycomm", "gloo"}
    assert found["rows"][-1]["algorithm"] and found["rows"][-1]["bytes_between_hosts"] > 0


def test_under_pycomm_launch_and_torchrun() -> None:
    arguments = ["barrier,all_reduce", "-b", "8", "-e", "8", "-n", "3"]
    for launcher in (
        (*PYCOMM, "launch", "--hosts", "2", "--ranks-per-host", "1", "--", *BENCH),
        TORCHRUN,
    ):
        done = bench(*arguments, launcher=launcher)
        assert done.returncode == 0, done.stderr
        lines = [line.partition("] ")[2] if line.startswith("[") else line for line in done.stdout.splitlines()]
        assert [row[0] for row in table_rows("\n".join(lines))] == ["0", "8"], done.stdout
    done = bench("barrier", "--ranks", "2", launcher=launcher)
    assert done.returncode != 0 and "leave --ranks and --hosts out" in done.stderr


def test_compare_ends_with_1_where_a_median_became_slower(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    arguments = ["all_reduce", "-b", "1K", "-e", "1K", "-n", "5"]
    assert bench(*arguments, "--json", str(path)).returncode == 0
    record = json.loads(path.read_text())

    def compared(factor: float, *launcher: str) -> subprocess.CompletedProcess[str]:
        for timing in record["rows"][0]["timings"]["pycomm"].values():
            timing["p50_us"] *= factor
        path.write_text(json.dumps(record))
        return bench(*arguments, "--compare", str(path), launcher=launcher)

    slower = compared(1e-6)
    assert slower.returncode == 1
    assert "# regression: all_reduce float32 sum 1024 B, in_place: 0.0 -> " in slower.stdout
    assert "# compare: 2 regression(s) beyond 10%" in slower.stdout
    assert "failed" not in slower.stderr
    assert "# compare: 2 regression(s)" in (under := compared(1.0, *TORCHRUN)).stdout and under.returncode == 1
    faster = compared(1e12)
    assert faster.returncode == 0 and "# compare: 0 regression(s) beyond 10%" in faster.stdout
    nothing = bench("all_reduce", "-b", "2K", "-e", "2K", "-n", "5", "--compare", str(path), launcher=LAUNCHED)
    assert nothing.returncode == 2
    assert nothing.stderr.count("error: ") == 1 and "error: nothing to compare" in nothing.stderr


def test_files_are_rank_0s_alone_and_looked_for_before_anything_is_measured(tmp_path: Path) -> None:
    """Each rank in a folder of its own, as on hosts that share no file system."""
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    command = f'cd "{tmp_path}/$RANK" && exec {sys.executable} -m pycomm bench all_reduce -b 1K -e 1K -n 2 "$@"'

    def each_in_its_own(*arguments: str) -> subprocess.CompletedProcess[str]:
        around = (*PYCOMM, "launch", "--hosts", "1,1", "--", "sh", "-c", command, "sh")
        return bench(*arguments, launcher=around, PYTHONPATH=str(ROOT))

    refused = each_in_its_own("--json", "files/new.json")
    assert refused.returncode == 2 and "# pycomm bench" not in refused.stdout
    said = refused.stderr.count("error: the folder of files/new.json does not exist")  # by the first rank, perhaps by
    assert refused.stderr.count("error: ") == said >= 1  # both, and nobody lost a peer
    (tmp_path / "0" / "files").mkdir()
    slow = dict.fromkeys(("in_place", "out_of_place"), Timing(1, 1e9, 1e9, 1e9, 1e9, 0))
    about = {"machine": {"cpu": "x", "cores": 1, "torch": "1"}, "n_ranks": 2, "host_ids": ["host0", "host1"]}
    old = record.full_record([Row(Case("all_reduce", "float32", 1024, 2), {"pycomm": slow})], about)
    record.write_json(tmp_path / "0" / "files" / "old.json", old)
    again = each_in_its_own("--compare", "files/old.json", "--csv", "files/new.csv")
    assert again.returncode == 0 and "# compare: 0 regression(s)" in again.stdout, again.stderr
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["new.csv", "old.json"]


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    process = subprocess.Popen(
        [*PYCOMM, "bench", "all_reduce", "-b", "8", "-e", "1G", "-n", "2000", "--json", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    seen = []
    while len(table_rows("".join(seen))) < 2:
        seen.append(process.stdout.readline())
        assert seen[-1], "it ended before two rows were measured"
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "# interrupted" in rest and "Out of bounds values : 0 OK" in rest and "Traceback" not in errors
    found = json.loads(path.read_text())
    assert found["interrupted"] is True
    assert len(found["rows"]) == len(table_rows("".join(seen) + rest)) >= 2


def test_a_bar_where_there_is_a_terminal_and_rows_stay_whole() -> None:
    master, slave = pty.openpty()
    command = [*PYCOMM, "bench", "all_reduce", "-b", "8", "-e", "1K", "-n", "5"]
    process = subprocess.Popen(command, stdout=slave, stderr=subprocess.PIPE, env=os.environ | {"COLUMNS": "80"})
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 1 << 16)
        except OSError:  # the terminal's other end has closed
            break
    assert process.wait(30) == 0
    os.close(master)
    assert b"\x1b[" in shown and "━".encode() in shown and b"/8" in shown
    assert len([line for line in shown.splitlines() if line.rstrip().endswith(b"0") and b" native " in line]) == 8
    assert process.stderr is not None and b"[1/8]" not in process.stderr.read()


# MPI.


def one_rank_mpi(folder: Path) -> tuple[str, str]:
    """(mpiexec, interpreter) of an MPI of one rank, whose all_reduce copies."""
    package = folder / "mpi4py"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "MPI.py").write_text(
        textwrap.dedent("""
        FLOAT = DOUBLE = INT8_T = UINT8_T = INT32_T = INT64_T = BYTE = SUM = PROD = MIN = MAX = None
        IN_PLACE = "in place"
        def Get_library_version():
            return "One-rank MPI 1.0"
        class Comm:
            rank, size = 0, 1
            def Barrier(self):
                pass
            def Allreduce(self, x, y, op):
                if x is not IN_PLACE:
                    y[0][:] = x[0]
        COMM_WORLD = Comm()
    """)
    )
    mpiexec, python = folder / "mpiexec", folder / "python"
    mpiexec.write_text('#!/bin/sh\n[ "$1 $2" = "-n 1" ] || exit 1\nshift 2\nexec "$@"\n')
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}:$PYTHONPATH" exec {sys.executable} "$@"\n')
    for script in (mpiexec, python):
        script.chmod(0o755)
    return str(mpiexec), str(python)


def test_mpi_runs_as_a_companion_that_ends_with_the_job(tmp_path: Path) -> None:
    mpiexec, python = one_rank_mpi(tmp_path)
    arguments = ["all_reduce", "-b", "1K", "-e", "2K", "-n", "4", "--ranks", "1", "--vs", "mpi", "--mpi-python", python]
    done = bench(*arguments, "-d", "float32,bf16", "--json", str(tmp_path / "r.json"))
    assert done.returncode == 0, done.stderr
    assert "# beside it: mpi (One-rank MPI 1.0)" in done.stdout
    assert "mpi not measured on all_reduce bfloat16: MPI has no reduction of bfloat16" in done.stdout
    found = json.loads((tmp_path / "r.json").read_text())
    measured = [list(row["timings"].get("mpi", {})) for row in found["rows"]]
    assert measured == [["out_of_place", "in_place"], ["out_of_place", "in_place"], [], []]
    assert all(timing["wrong"] == 0 for row in found["rows"][:2] for timing in row["timings"]["mpi"].values())
    assert mpi.default_mpiexec(python) == mpiexec
    until = time.monotonic() + 10
    while subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, check=False).stdout:
        assert time.monotonic() < until, "the companion is still there"
        time.sleep(0.1)


def test_mpi_that_does_not_come_says_why(tmp_path: Path) -> None:
    _, python = one_rank_mpi(tmp_path)
    with pytest.raises(PycommError, match="0 of 1 MPI ranks came; it said: no such MPI"):
        mpi.MpiCompanion(1, True, "sh -c 'echo no such MPI; exit 1'", python, 20)
    arguments = ["all_reduce", "-b", "8", "-e", "8", "-n", "2", "--vs", "mpi", "--mpiexec", "false"]
    done = bench(*arguments)
    assert done.returncode == 0 and "has no mpi4py" in done.stdout
    done = bench(*arguments, "--mpi-python", python)
    assert done.returncode == 0 and "# mpi not available: 0 of 2 MPI ranks came" in done.stdout
    done = bench(*arguments, "--mpi-python", "/no/such/python")
    assert done.returncode == 0, done.stderr
    assert "# mpi not available: /no/such/python cannot be started: No such file or directory" in done.stdout
    with pytest.raises(PycommError, match="0 of 1 MPI ranks came; it said nothing"):
        mpi.MpiCompanion(1, True, "sh -c 'sleep 1000'", python, 1)


@pytest.mark.parametrize(
    ("program", "patience_s", "why"),
    [
        ("exit 0", 30, ""),
        ("echo something; exit 3", 30, "has no mpi4py: it ends with 3 and says nothing;"),
        ("echo line; echo ImportError >&2; echo >&2; exit 1", 30, "has no mpi4py: ImportError;"),
        ("sleep 1000 & wait", 0.2, "has not imported mpi4py in 0.2 s;"),
    ],
)
def test_an_interpreter_without_mpi4py_says_so_or_is_given_up(
    tmp_path: Path, program: str, patience_s: float, why: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    said = mpi._import_problem(str(python), patience_s)
    assert said == (f"{python} {why} name another with --mpi-python" if why else "")


STRANGERS = """
import os, socket, sys
host, port = sys.argv[-1].split(":")
silent, loud = (socket.create_connection((host, int(port))) for _ in range(2))
silent.set_inheritable(True)  # open for as long as the rank is
loud.sendall(b"GET / HTTP/1.1" * 50)
loud.close()
os.execv(sys.argv[3], sys.argv[3:])
"""


def test_strangers_at_the_companions_door_hold_up_no_mpi_rank(tmp_path: Path) -> None:
    _, python = one_rank_mpi(tmp_path)
    (tmp_path / "strangers.py").write_text(STRANGERS)
    companion = mpi.MpiCompanion(1, True, f"{sys.executable} {tmp_path}/strangers.py", python, 100)
    try:
        assert companion.version == "One-rank MPI 1.0"
        assert companion._ask("trial", Case("all_reduce", "float32", 64, 1), "in_place") == [None]
    finally:
        companion.close()


def test_a_companion_does_not_see_the_job_that_starts_it() -> None:
    job = {"RANK": "1", "MASTER_ADDR": "h", "SLURM_PROCID": "1", "PMI_RANK": "1", "OMPI_MCA_x": "1", "LOCAL_RANK": "0"}
    found = mpi.companion_environment(job | {"PATH": "/bin", "PYTHONPATH": "/x"}, "secret")
    paths = found.pop("PYTHONPATH").split(os.pathsep)
    assert paths == [str(ROOT), "/x"]
    assert found == {"PATH": "/bin", "PYCOMM_BENCH_KEY": "secret", "OMP_NUM_THREADS": "1"}


def test_an_mpi_rank_needs_numpy_alone() -> None:
    program = """
import sys
sys.modules["torch"] = sys.modules["pycomm._C"] = None
import pycomm.bench.mpi_rank, pycomm.bench.options, pycomm.bench.job
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
