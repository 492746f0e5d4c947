"""pycomm bench's arithmetic: sizes, factors, types, the oracle of results, rooflines, comparison. One process."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pycomm.bench import record
from pycomm.bench.buffers import Buffers
from pycomm.bench.cases import (
    BITWISE,
    COLLECTIVES,
    DTYPES,
    IN_PLACE,
    OPS,
    OUT_OF_PLACE,
    Case,
    Moe,
    cases,
    ladder,
)
from pycomm.bench.command import RECORD
from pycomm.bench.measure import Row, Timing
from pycomm.bench.options import parser, work
from pycomm.bench.report import Table, matrix
from pycomm.bench.roofline import link_bytes, link_limit_s, memory_limit_s
from pycomm.errors import InvalidArgument
from pycomm.overlap import Scorecard
from pycomm.topology import Topology


# nccl-tests' definitions, worked out by hand for 8 ranks: 10^9 bytes in half a second.
@pytest.mark.parametrize(
    ("collective", "busbw", "count"),
    [
        ("all_reduce", 3.5, 250_000_000),
        ("reduce_scatter", 1.75, 31_250_000),
        ("all_gather", 1.75, 31_250_000),
        ("all_to_all", 1.75, 31_250_000),
        ("gather", 1.75, 31_250_000),
        ("scatter", 1.75, 31_250_000),
        ("broadcast", 2.0, 250_000_000),
        ("reduce", 2.0, 250_000_000),
        ("sendrecv", 2.0, 250_000_000),
        ("latency", 2.0, 250_000_000),
    ],
)
def test_bandwidths_and_counts_are_nccl_tests(collective: str, busbw: float, count: int) -> None:
    case = Case(collective, "float32", 10**9, 8)
    assert case.algbw(0.5) == 2.0
    assert case.busbw(0.5) == busbw
    assert case.count == count


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.name)
def test_whole_numbers_have_torchs_bits_up_to_the_exact_limit(dtype) -> None:
    kind = getattr(torch, dtype.name)
    values = torch.arange(min(dtype.exact, 5000) + 1)
    ours = torch.from_numpy(dtype.encode(values.numpy())).view(kind)
    assert torch.equal(ours.double(), values.double())
    if dtype.floating:  # the limit is the largest one
        assert float(torch.tensor(dtype.exact + 1, dtype=torch.float64).to(kind)) != dtype.exact + 1


def decoded(array: np.ndarray, dtype: str) -> np.ndarray:
    return torch.from_numpy(array.copy()).view(getattr(torch, dtype)).to(torch.float64).numpy()


def reduced(op: str, contributions: list[np.ndarray]) -> np.ndarray:
    stack = np.stack(contributions)
    if op in BITWISE:
        name = {"band": "bitwise_and", "bor": "bitwise_or", "bxor": "bitwise_xor"}[op]
        return getattr(np, name).reduce(stack.astype(np.int64)).astype(np.float64)
    if op == "avg":
        return stack.sum(0) / len(stack)
    return {"sum": stack.sum, "product": stack.prod, "min": stack.min, "max": stack.max}[op](0)


def replay(case: Case, everyone: list[Buffers], contributions: list[np.ndarray] | None = None) -> None:
    """What a right library does, by numpy: writes every rank's output. contributions: of the reduction instead."""
    given_values = [decoded(b.input, case.dtype) for b in everyone]
    n, each, root = case.n_ranks, case.count, case.root
    total = reduced(case.op, contributions or given_values) if case.kind.reduces else np.empty(0)
    for rank, b in enumerate(everyone):
        mine = slice(rank * each, (rank + 1) * each)
        result = {
            "all_reduce": lambda: total,
            "reduce": lambda rank=rank: total if rank == root else None,
            "reduce_scatter": lambda mine=mine: total[mine],
            "broadcast": lambda: given_values[root],
            "scatter": lambda mine=mine: given_values[root][mine],
            "all_gather": lambda: np.concatenate(given_values),
            "gather": lambda rank=rank: np.concatenate(given_values) if rank == root else None,
            "all_to_all": lambda mine=mine: np.concatenate([values[mine] for values in given_values]),
            "sendrecv": lambda rank=rank: given_values[(rank - 1) % n],
        }[case.collective]()
        if result is not None:
            b.output[:] = case.element.encode(result)


@st.composite
def some_case(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from([name for name in COLLECTIVES if name != "barrier"]))
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    ops = [op for op in OPS if op not in BITWISE or not DTYPES[dtype].floating]
    n_ranks = draw(st.integers(1, 8))
    numel = draw(st.integers(1, 200)) * n_ranks
    op = draw(st.sampled_from(ops)) if COLLECTIVES[name].reduces else "sum"
    return Case(name, dtype, numel * DTYPES[dtype].nbytes, n_ranks, op, draw(st.integers(0, n_ranks - 1)))


def everyones_buffers(case: Case, placement: str) -> list[Buffers]:
    found = []
    for rank in range(case.n_ranks):
        a, b = (np.zeros(case.numel, case.element.raw) for _ in range(2))
        found.append(Buffers(case, placement, rank, a, b))
        found[-1].fill()
    return found


@settings(deadline=None, max_examples=300)
@given(case=some_case(), data=st.data())
def test_the_oracle_takes_what_is_right_and_counts_each_wrong_element(case: Case, data: st.DataObject) -> None:
    placement = data.draw(st.sampled_from(case.kind.placements))
    everyone = everyones_buffers(case, placement)
    assert all(b.exact for b in everyone)
    replay(case, everyone)
    assert [b.wrong() for b in everyone] == [0] * case.n_ranks
    holders = [b for b in everyone if len(b.output) and (case.collective != "reduce" or b.rank == case.root)]
    victim = data.draw(st.sampled_from(holders))
    places = data.draw(st.sets(st.integers(0, len(victim.output) - 1), min_size=1, max_size=5))
    for place in places:
        victim.output.view(f"u{case.element.nbytes}")[place] ^= 1
    assert sum(b.wrong() for b in everyone) == len(places)


@settings(deadline=None, max_examples=100)
@given(case=some_case().filter(lambda c: c.n_ranks > 1 and c.numel >= 2 * c.n_ranks and c.kind.reduces))
def test_a_missing_contribution_is_seen(case: Case) -> None:
    """... of any rank, and one that counts twice in its place; min and max are seen where that rank decides."""
    everyone = everyones_buffers(case, OUT_OF_PLACE)
    values = [decoded(b.input, case.dtype) for b in everyone]
    for missing in range(case.n_ranks):
        without = values[:missing] + values[missing + 1 :]
        replaced = [*without, without[0]]
        replay(case, everyone, replaced)
        assert sum(b.wrong() for b in everyone) > 0, missing


def test_nothing_is_filled_in_where_no_call_was_made() -> None:
    for name, kind in COLLECTIVES.items():
        if name != "barrier":
            case = Case(name, "float32", 4 * 4 * 64, 4)
            for b in everyones_buffers(case, kind.placements[0]):
                expects = name not in ("reduce", "gather") or b.rank == case.root
                assert (b.wrong() > 0) == expects, (name, b.rank)


def test_a_type_too_small_for_the_sum_is_said_to_be_unchecked() -> None:
    few, many = (
        Buffers(Case("all_reduce", "float8_e5m2", 64, n), IN_PLACE, 0, *np.zeros((2, 64), np.uint8)) for n in (8, 9)
    )
    assert few.exact and not many.exact


def test_ladder() -> None:
    assert ladder(8, 70, 2, None) == [8, 16, 32, 64]
    assert ladder(8, 8, None, None) == [8]
    assert ladder(8, 40, None, 16) == [8, 24, 40]


def asked(*argv: str, n_ranks: int = 4, first_remote: int | None = None):
    return work(parser().parse_args(list(argv)), n_ranks, first_remote)


@pytest.mark.parametrize(
    ("argv", "facts"),
    [
        (["all_reduc"], ["no collective 'all_reduc'", "all_reduce", "moe_dispatch"]),
        (["all_reduce", "-d", "fp12"], ["no type 'fp12'", "bfloat16", "bf16"]),
        (["all_reduce", "-o", "xor"], ["no reduction 'xor'", "bxor"]),
        (["all_reduce", "--vs", "oneccl"], ["no library 'oneccl'", "gloo, mpi, nccl"]),
        (["all_reduce", "-b", "1M", "-e", "1K"], ["begin at 1048576", "end at 1024", "-b"]),
        (["all_reduce", "-b", "0"], ["begin at 0"]),
        (["all_reduce", "-b", "10"], ["10 bytes in float32 does not divide", "multiples of 4", "-b 12"]),
        (["all_gather", "-b", "8", "-e", "8"], ["multiples of 16", "4 ranks", "-b 16"]),
        (["all_reduce", "-b", "8", "-i", "3"], ["11 bytes in float32 does not divide"]),
        (["all_reduce", "-f", "2", "-i", "8"], ["either -f", "or -i"]),
        (["all_reduce", "-f", "1"], ["factor", "2 or more"]),
        (["all_reduce", "-b", "8Q"], ["size '8Q' is not understood"]),
        (["all_reduce", "-o", "band"], ["band needs a type of whole numbers, not float32"]),
        (["reduce", "-r", "4"], ["root 4 is not among ranks 0 .. 3"]),
        (["all_reduce", "-n", "0"], ["--iters is 0"]),
        (["all_reduce", "-c", "-1"], ["--check is -1"]),
        (["all_reduce", "--noise", "0"], ["--noise is 0"]),
        *((["all_reduce", "-T", s], [f"--timeout is {s}; give"]) for s in ("nan", "inf", "0", "1e+300")),
        *((["all_reduce", "--noise", s], [f"--noise is {s}"]) for s in ("nan", "inf", "-1.0")),
        (["moe", "--experts", "6"], ["6 experts do not spread evenly over 4 ranks"]),
        (["moe", "--top-k", "9"], ["--top-k 9", "1 to 4"]),
        (["moe", "-d", "int8"], ["not int8"]),
        (["moe", "-b", "8"], ["--hidden 512", "--top-k 2", "-b 4096"]),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_to_do(argv: list[str], facts: list[str]) -> None:
    with pytest.raises(InvalidArgument) as error:
        asked(*argv)
    for fact in facts:
        assert fact in str(error.value)


def test_messages_need_two_ranks() -> None:
    for name in ("sendrecv", "latency", "bandwidth"):
        with pytest.raises(InvalidArgument, match="at least 2 ranks"):
            asked(name, n_ranks=1)


def test_options_become_rows() -> None:
    every = asked("all", "-d", "all", "-o", "all", "-b", "960", "-e", "960", n_ranks=3)
    assert {case.collective for case in every.sweep} == set(COLLECTIVES)
    assert {case.dtype for case in every.sweep} == set(DTYPES)
    assert {case.op for case in every.sweep if case.collective == "reduce"} == {"sum", "product", "min", "max", "avg"}
    assert asked("broadcast", "-r", "2", "-d", "half,bf16,float").sweep[0].root == 2
    default = asked("all_gather,all_reduce", "-d", "float64,bf16", n_ranks=6).sweep
    assert default[0].nbytes == 48 and max(case.nbytes for case in default) <= 64 << 20  # 8 bytes do not divide
    assert asked("all_reduce", "--vs", "all").baselines == ["gloo", "mpi", "nccl"]


def test_pairs_are_swept_inside_and_between_hosts_and_all_of_them_make_a_matrix() -> None:
    found = asked("latency,bandwidth", "-b", "8", "-e", "1K", "-f", "128", n_ranks=4, first_remote=2)
    assert {case.pair for case in found.sweep} == {(0, 1), (0, 2)}
    latency, bandwidth = found.matrices
    assert [case.pair for case in latency] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert {case.nbytes for case in latency} == {8} and {case.nbytes for case in bandwidth} == {1024}
    assert asked("latency", n_ranks=2).matrices == []


SIZE = 1200


@pytest.mark.parametrize(
    ("collective", "host_ids", "expected"),
    [
        ("all_reduce", "aabb", [SIZE, SIZE]),
        ("all_reduce", "aabbcc", [1600, 1600, 1600]),
        ("all_gather", "aabb", [600, 600]),
        ("reduce_scatter", "aaab", [900, 900]),
        ("all_to_all", "aabb", [SIZE, SIZE]),
        ("all_to_all", "aaab", [900, 900]),
        ("broadcast", "aabb", [SIZE, SIZE]),
        ("gather", "aaab", [300, 300]),
        ("sendrecv", "aabb", [SIZE, SIZE]),
        ("sendrecv", "abab", [2 * SIZE, 2 * SIZE]),
        ("all_reduce", "aaaa", [0]),
        ("barrier", "aabb", [0, 0]),
    ],
)
def test_bytes_that_must_cross_hosts(collective: str, host_ids: str, expected: list[float]) -> None:
    case = Case(collective, "float32", 0 if collective == "barrier" else SIZE, len(host_ids))
    topology = Topology.from_host_ids(host_ids)
    assert link_bytes(case, topology).tolist() == pytest.approx(expected)
    limit = link_limit_s(case, topology, np.full(len(expected), 100.0))
    assert limit == (pytest.approx(max(expected) / 100) if any(expected) else None)


def test_pairs_cross_hosts_where_their_ranks_do() -> None:
    topology = Topology.from_host_ids("aabbc")
    case = Case("latency", "float32", SIZE, 5, pair=(1, 2))
    assert link_bytes(case, topology).tolist() == [SIZE, SIZE, 0]
    assert link_limit_s(case, topology, np.array([100.0, 50.0, 1.0])) == SIZE / 50
    assert not link_bytes(Case("latency", "float32", SIZE, 5, pair=(0, 1)), topology).any()


def test_memory_must_read_each_input_and_write_each_output() -> None:
    mib = 1 << 20
    assert memory_limit_s(Case("all_reduce", "float32", mib, 4), 8 * mib) == 1.0  # 4 read, 4 written
    assert memory_limit_s(Case("all_gather", "float32", mib, 4), 5 * mib) == 1.0  # 1 read, 4 written
    assert memory_limit_s(Case("broadcast", "float32", mib, 4), 4 * mib) == 1.0  # 1 read, 3 written
    assert memory_limit_s(Case("all_reduce", "float32", mib // 2, 4), 1.0) is None


# What is printed and kept.


def row(p50_us: float = 100.0, wrong: int | None = 0, **changes) -> Row:
    case = Case(**{"collective": "all_reduce", "dtype": "float32", "nbytes": 4000, "n_ranks": 4} | changes)
    timing = Timing(5, 2 * p50_us, p50_us, 3 * p50_us, 4 * p50_us, wrong)
    slower = Timing(5, 9 * p50_us, 3 * p50_us, 9 * p50_us, 9 * p50_us, 0)
    placements = dict.fromkeys(case.kind.placements, timing)
    return Row(case, {"pycomm": placements, "gloo": dict.fromkeys(case.kind.placements, slower)}, limit_us=50.0)


def columns(table: Table, row: Row) -> dict[str, list[str]]:
    """Each heading's values, left to right."""
    names = table.heading(row.case)[2].lstrip("#").replace("% roof", "roof").split()
    found: dict[str, list[str]] = {}
    for name, cell in zip(names, table.row(row).split(), strict=True):
        found.setdefault(name, []).append(cell)
    return found


def test_table_has_nccl_tests_columns_and_ours() -> None:
    table = Table(["gloo", "mpi"])
    found = columns(table, Row(**vars(row()) | {"algorithm": "ring", "bytes_inside": 7, "bytes_between": 8}))
    assert {name: found[name] for name in ("size", "count", "type", "redop", "root")} == {
        "size": ["4000"], "count": ["1000"], "type": ["float32"], "redop": ["sum"], "root": ["-1"],
    }  # fmt: skip
    assert found["time"] == ["200.0", "200.0"] and found["#wrong"] == ["0", "0"]
    assert found["algbw"] == ["0.02", "0.02"] and found["busbw"] == ["0.03", "0.03"]  # 4000 B / 200 us; × 2·3/4
    assert (found["p50"], found["p95"], found["p99"]) == (["100.0"], ["300.0"], ["400.0"])
    assert (found["algorithm"], found["roof"], found["inside"], found["between"]) == (["ring"], ["50"], ["7"], ["8"])
    assert found["/gloo"] == ["3.00x"] and found["/mpi"] == ["N/A"]
    only_out = columns(table, Row(**vars(row(collective="all_to_all")) | {"algorithm": "bruck"}))
    assert only_out["time"] == ["200.0", "N/A"] and only_out["#wrong"] == ["0", "N/A"]
    assert columns(table, Row(**vars(row(collective="gather", root=2)) | {"algorithm": "tree"}))["root"] == ["2"]


def test_footer_counts_wrong_elements_and_names_them() -> None:
    rows = [row(), row(wrong=3, nbytes=8000)]
    text = "\n".join(Table(["gloo"]).footer(rows))
    assert "Out of bounds values : 6 FAILED" in text
    assert "all_reduce float32 7.812 KiB sum: pycomm, in_place: 3 elements" in text
    assert "Avg bus bandwidth    : 0.045 GB/s (all_reduce)" in text  # 0.03 and 0.06, twice each
    assert "0 OK" in "\n".join(Table([]).footer([row()]))
    assert Table([]).footer([]) == ["# nothing was measured"]


def test_a_scorecard_says_what_overlapping_gains() -> None:
    measured = (("alone", 40.0), ("compute", 100.0), ("serial", 150.0), ("together", 110.0))
    timings = {name: Timing(1, us, us, us, us, 0) for name, us in measured}
    overlap = Row(Case("overlap_all_reduce", "float32", 4000, 4), {"pycomm": timings})
    card = overlap.scorecard("pycomm")
    assert card is not None and overlap.scorecard("gloo") is None
    assert card.overlap == pytest.approx(0.8) and card.exposed_s == pytest.approx(10e-6)
    assert card.over_limit == pytest.approx(1.1)
    assert Scorecard(2.0, 1.0, 2.0, 2.0).overlap is None and Scorecard(1.0, 3.0, 4.0, 4.0).overlap == 0
    assert Table(["gloo"]).heading(overlap.case)[1] == "# overlap_all_reduce"
    found = columns(Table(["gloo"]), overlap)
    cells = [found[name] for name in ("compute", "comm", "serial", "together", "exposed", "E_overlap")]
    assert cells == [["100.0"], ["40.00"], ["150.0"], ["110.0"], ["10.00"], ["80"]]
    assert found["T/max"][0] == "1.10"


def test_matrix_is_symmetric() -> None:
    pairs = [((0, 1), 1.0), ((0, 2), 2.0), ((1, 2), 3.0)]
    lines = matrix([row(p50_us=us, collective="latency", pair=pair, n_ranks=3) for pair, us in pairs], 3)
    cells = [line.split() for line in lines[-3:]]
    assert cells == [["0", "-", "1.00", "2.00"], ["1", "1.00", "-", "3.00"], ["2", "2.00", "3.00", "-"]]


def full(*rows: Row) -> dict:
    about = {"machine": {"cpu": "x", "cores": 2, "torch": "2"}, "n_ranks": 4, "host_ids": ["a"] * 4}
    return json.loads(json.dumps(record.full_record(rows, about)))


def test_records_keep_times_and_bandwidths(tmp_path) -> None:
    found = full(row(), row(collective="latency", pair=(0, 3)))
    timing = found["rows"][0]["timings"]["pycomm"]["in_place"]
    assert timing["algbw_GBps"] == pytest.approx(0.02) and timing["busbw_GBps"] == pytest.approx(0.03)
    record.write_json(tmp_path / "a.json", found)
    assert record.load(tmp_path / "a.json") == found
    record.write_csv(tmp_path / "a.csv", found)
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0].split(",") == list(record.CSV_COLUMNS)
    assert len(lines) == 1 + 2 * 2 + 2  # header; two libraries in two placements; two in one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json"]


def test_compare_names_what_became_slower_than_the_noise_allows() -> None:
    old, new = full(row(100.0), row(100.0, nbytes=8000)), full(row(109.0), row(112.0, nbytes=8000))
    regressions, notes = record.compare(old, new, 0.1)
    assert [line.split(":")[0] for line in regressions] == [
        "all_reduce float32 sum 8000 B, out_of_place",
        "all_reduce float32 sum 8000 B, in_place",
    ]
    assert "100.0 -> 112.0 us, +12%" in regressions[0] and notes == []
    assert record.compare(old, new, 0.15) == ([], [])
    assert record.compare(new, old, 0.01) == ([], [])  # faster is no regression
    elsewhere = copy.deepcopy(new)
    elsewhere["machine"]["cpu"] = "y"
    elsewhere["rows"].pop()
    assert record.compare(old, elsewhere, 0.5) == ([], ["cpu was x, is y", "1 of 2 old rows were not measured again"])


def test_compare_refuses_what_cannot_be_compared(tmp_path) -> None:
    with pytest.raises(InvalidArgument, match="nothing to compare"):
        record.compare(full(row(nbytes=8000)), full(row()), 0.1)
    with pytest.raises(InvalidArgument, match="ranks and hosts"):
        record.compare(full(row()) | {"host_ids": ["a", "a", "b", "b"]}, full(row()), 0.1)
    for text, fact in (("[]", "no record"), ("{", "cannot read"), ('{"rows": [], "version": 0}', "version 0")):
        (tmp_path / "old.json").write_text(text)
        with pytest.raises(InvalidArgument, match=fact):
            record.load(tmp_path / "old.json")
    with pytest.raises(InvalidArgument, match="cannot read"):
        record.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda found: found.pop("host_ids"),
        lambda found: found.pop("n_ranks"),
        lambda found: found.pop("machine"),
        lambda found: found["machine"].pop("cpu"),
        lambda found: found.update(machine=None),
        lambda found: found.update(rows=7),
        lambda found: found.update(rows=["row"]),
        lambda found: found["rows"][0].pop("nbytes"),
        lambda found: found["rows"][0].pop("timings"),
        lambda found: found["rows"][0]["timings"]["pycomm"].update(in_place=3),
        lambda found: found["rows"][0]["timings"]["pycomm"]["in_place"].update(p50_us="soon"),
        lambda found: found["rows"][0]["timings"]["pycomm"]["in_place"].update(p50_us=0),
        lambda found: found["rows"][0]["timings"]["pycomm"]["in_place"].update(p50_us=float("nan")),
    ],
)
def test_a_record_that_lacks_what_is_compared_is_refused(tmp_path, spoil) -> None:
    found = full(row())
    spoil(found)
    (tmp_path / "old.json").write_text(json.dumps(found))
    with pytest.raises(InvalidArgument, match="no whole record"):
        record.load(tmp_path / "old.json")


@pytest.mark.parametrize(
    ("ranks_code", "new", "code"),
    [
        (0, full(row(100.0)), 0),
        (0, full(row(200.0)), 1),
        (3, full(row(200.0)), 3),
        (130, full(row(200.0)), 130),
        (130, full(), 130),
        (0, full(), 2),
        (7, None, 7),
    ],
    ids=["as before", "slower", "wrong and slower", "Ctrl-C", "Ctrl-C before a row", "no row in both", "ranks failed"],
)
def test_what_the_ranks_end_with_counts_before_a_regression(
    tmp_path, monkeypatch, pycomm_command, ranks_code, new, code
) -> None:
    record.write_json(tmp_path / "old.json", full(row(100.0)))

    def launch(*arguments, **options):
        if new is not None:
            record.write_json(Path(os.environ[RECORD]), new)
        return ranks_code

    monkeypatch.setattr("pycomm.launch.launch", launch)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    found, stdout, stderr = pycomm_command("bench", "all_reduce", "--compare", str(tmp_path / "old.json"))
    assert found == code, (stdout, stderr)
    assert ("nothing to compare" in stdout + stderr) == (new is not None and not new["rows"])


def test_cases_of_a_barrier_need_no_size() -> None:
    found = cases(["barrier"], ["float32", "int8"], ["sum", "max"], [3, 5], 4, 0, [], Moe(8, 2, 4))
    assert found == [Case("barrier", "float32", 0, 4)]
