"""The choice by size, and its explanation."""

import subprocess
import sys
from itertools import pairwise

import pytest

from pycomm.errors import InvalidArgument
from pycomm.explain import explain, format_nbytes, parse_nbytes
from pycomm.planners import PLANNERS, THREE_LEVEL, TWO_LEVEL
from pycomm.predict import predict
from pycomm.topology import Link, Topology
from pycomm.tuner import LADDER, TIE, choice_table, choose

SHAPES = [[1], [2], [4], [2, 2], [3, 1], [4, 4], [2, 2, 2]]


@pytest.mark.parametrize("collective", PLANNERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_table_covers_every_size_once(collective, shape):
    table = choice_table(Topology.emulated(shape), collective)
    limits = [limit for limit, _ in table]
    assert limits[-1] is None
    assert limits[:-1] == sorted(set(limits[:-1]))
    assert all(algorithm in PLANNERS[collective] for _, algorithm in table)
    assert all(one != other for (_, one), (_, other) in pairwise(table))
    assert table == choice_table(Topology.emulated(shape), collective)


@pytest.mark.parametrize("collective", PLANNERS)
@pytest.mark.parametrize("shape", [[4], [2, 2], [3, 1], [2, 2, 2]])
def test_the_choice_is_within_the_models_precision_of_the_best(collective, shape):
    topology = Topology.emulated(shape)
    table = choice_table(topology, collective)
    for nbytes in LADDER[::5]:
        times = {name: predict(p(topology), topology, nbytes)[0] for name, p in PLANNERS[collective].items()}
        assert times[choose(table, nbytes)] <= TIE * min(times.values())


def test_choose():
    table = ((10, "tree"), (100, "ring"), (None, "hierarchical"))
    assert [choose(table, nbytes) for nbytes in (0, 10, 11, 100, 101)] == [
        "tree",
        "tree",
        "ring",
        "ring",
        "hierarchical",
    ]


def test_one_host_needs_no_second_level():
    for collective in PLANNERS:
        assert not {algorithm for _, algorithm in choice_table(Topology.emulated([4]), collective)} & TWO_LEVEL


@pytest.mark.parametrize("bytes_per_s", [25e6, 125e6, 1.2e9])
@pytest.mark.parametrize("shape", [[2, 2], [4, 4], [3, 1], [2, 2, 2, 2]])
def test_large_all_reduce_across_hosts_is_two_level_wherever_the_ranks_stand(shape, bytes_per_s):
    nic = Link(50e-6, bytes_per_s, 5e-6)
    contiguous = Topology.emulated(shape, nic)
    dealt_out = Topology.from_host_ids(
        [host for i in range(4) for host, n in zip("abcd", shape, strict=False) if i < n], nic
    )
    for topology in (contiguous, dealt_out):
        assert choose(choice_table(topology, "all_reduce"), 16 << 20) in TWO_LEVEL


def test_many_rounds_do_not_win_for_small_messages():
    assert choose(choice_table(Topology.emulated([16]), "all_reduce"), 256) in ("tree", "doubling", "halving_doubling")
    assert choose(choice_table(Topology.emulated([16]), "broadcast"), 256) == "tree"


def test_an_explanation_names_candidates_costs_and_choice():
    found = explain(Topology.emulated([2, 2]), "all_reduce", 64 << 20)
    assert {candidate.algorithm for candidate in found.candidates} == set(PLANNERS["all_reduce"]) - THREE_LEVEL
    times = [candidate.total_s for candidate in found.candidates]
    assert times == sorted(times)
    cost = {candidate.algorithm: candidate for candidate in found.candidates}
    assert cost["ring"].link_bytes == 96 << 20
    assert cost["hierarchical"].link_bytes == 64 << 20
    assert cost["hierarchical"].bytes_between_hosts == 128 << 20
    assert found.choice in TWO_LEVEL
    lines = str(found).splitlines()
    assert lines[0] == "all_reduce of 64 MiB on 4 ranks, 2 hosts (host0: 2, host1: 2)"
    assert len(lines) == 3 + len(found.candidates)
    assert [line.split()[1] for line in lines if line.strip().startswith("->")] == [found.choice]
    assert lines[-1] == found.reason


@pytest.mark.parametrize("collective", PLANNERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_choice_has_a_reason(collective, shape):
    for nbytes in (0, 100, 3000, 70_000, 1 << 20, 300 << 20):
        found = explain(Topology.emulated(shape), collective, nbytes, root=sum(shape) - 1)
        assert found.reason.endswith(".")
        assert found.choice in str(found)
        assert found.choice in found.reason or sum(shape) == 1


def test_wrong_questions_are_refused():
    topology = Topology.emulated([2])
    with pytest.raises(InvalidArgument, match="no collective 'all_reduced'; choose from all_reduce"):
        explain(topology, "all_reduced", 8)
    with pytest.raises(InvalidArgument, match="nbytes is -1"):
        explain(topology, "all_reduce", -1)
    with pytest.raises(InvalidArgument, match=r"root 2 is not among ranks 0 .. 1"):
        explain(topology, "broadcast", 8, root=2)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("512", 512),
        ("8B", 8),
        ("4k", 4096),
        ("4KiB", 4096),
        ("10kb", 10_000),
        ("64MiB", 64 << 20),
        ("64M", 64 << 20),
        (" 1.5 GiB ", 3 << 29),
        ("2TiB", 2 << 40),
        ("0.5k", 512),
    ],
)
def test_sizes_are_read(text, nbytes):
    assert parse_nbytes(text) == nbytes
    assert parse_nbytes(format_nbytes(1 << 20)) == 1 << 20


@pytest.mark.parametrize("text", ["", "MiB", "-1", "4 apples", "1e6", "0.3", "1..5M"])
def test_other_sizes_are_not(text):
    with pytest.raises(InvalidArgument, match=r"size '.*' is"):
        parse_nbytes(text)


def test_planning_needs_numpy_alone():
    """Also where torch and the extension are absent."""
    program = (
        "import sys; sys.modules['torch'] = sys.modules['pycomm._C'] = None\n"
        "from pycomm.explain import explain; from pycomm.topology import Topology\n"
        "print(explain(Topology.emulated([2, 2]), 'all_reduce', 1 << 20).choice)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in PLANNERS["all_reduce"]
