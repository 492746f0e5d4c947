"""docs/own_algorithm.md runs as it stands and prints what it says; what register() refuses; ranks that disagree."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import PYCOMM
from matplotlib.figure import Figure
from spawn import run_ranks

from pycomm.errors import CollectiveMismatch, InvalidArgument, PycommError, ScheduleError
from pycomm.own import Algorithm, algorithm
from pycomm.planners import PLANNERS
from pycomm.plot import space_time
from pycomm.schedule import Schedule, transfers
from pycomm.simulate import simulate
from pycomm.topology import Topology
from pycomm.tuner import candidates, choice_table

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "own_algorithm.md").read_text()
PROGRAM = "\n".join(re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
PRINTED = re.findall(r"^It prints\n\n```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def run(folder, command):
    (folder / "own.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_example_prints_what_the_page_says(tmp_path):
    done = run(tmp_path, [sys.executable, "own.py"])
    assert done.returncode == 0, done.stderr
    assert [done.stdout] == PRINTED
    assert (tmp_path / "two_lines.png").read_bytes().startswith(b"\x89PNG")


def test_the_example_runs_in_a_group(tmp_path):
    done = run(tmp_path, [*PYCOMM, "launch", "--hosts", "2", "--ranks-per-host", "2", "own.py"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "two_lines" in done.stdout


def renamed(name, algorithm, topology):
    schedule = PLANNERS["all_reduce"][algorithm](topology, 0)
    return Schedule("all_reduce", name, schedule.n_ranks, schedule.n_chunks, 0, schedule.transfers)


def register_and_call(group, algorithms):
    group.register(renamed("mine", algorithms[group.rank], group.topology))
    x = np.full(5, group.rank + 1.0)
    try:
        group.all_reduce(x, algorithm="mine")
    except CollectiveMismatch as error:
        return str(error)
    return x.tolist()


def test_a_registered_schedule_runs():
    assert run_ranks(register_and_call, 4, ["ring"] * 4, hosts="aabb") == [[10.0] * 5] * 4


def test_different_schedules_of_one_name_are_a_mismatch_on_every_rank():
    found = run_ranks(register_and_call, 3, ["ring", "pairwise", "ring"], hosts="aab")
    assert all("mine#" in text for text in found)


def chosen(group):
    group.register(fast_all_reduce)
    x = np.full(1 << 10, group.rank + 1.0)
    group.all_reduce(x)
    return x[0], refused_late(group)


def fast_all_reduce(topology, root=0):
    """Half of the tensor is reduced on each of two ranks, and goes back."""
    there = transfers(0, [0, 1], [1, 0], [0, 1], reduce=True)
    back = transfers(1, [1, 0], [0, 1], [0, 1])
    return Schedule("all_reduce", "fast", 2, 2, root, np.concatenate([there, back]))


def refused_late(group):
    try:
        group.register(renamed("late", "ring", group.topology))
    except InvalidArgument as error:
        return str(error)
    return None


def test_a_group_that_has_chosen_takes_no_more():
    found = run_ranks(chosen, 2, hosts="ab")
    assert {value for value, _ in found} == {3.0}
    assert all("has chosen among the algorithms of all_reduce already" in text for _, text in found)


def test_the_choice_weighs_what_is_registered():
    topology = Topology.emulated([1, 1])
    mine = algorithm(fast_all_reduce, topology, ())
    assert set(candidates(topology, "all_reduce", (mine,))) == {*candidates(topology, "all_reduce"), "fast"}
    assert "fast" not in candidates(topology, "broadcast", (mine,))
    assert choice_table(topology, "all_reduce", own=(Algorithm("all_reduce", "nothing", nothing),)) == (
        (None, "nothing"),
    )


def nothing(topology, root=0):
    """No all_reduce at all, so that it is faster than any: the choice looks at the time, register() at the rest."""
    return Schedule("all_reduce", "nothing", topology.n_ranks, 1, root, transfers([], [], [], []))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda t: renamed("ring", "ring", t), InvalidArgument, "all_reduce/ring is one of pycomm.planners"),
        (lambda t: renamed("a#b", "ring", t), InvalidArgument, "cannot be a name"),
        (lambda t: renamed("", "ring", t), InvalidArgument, "cannot be a name"),
        (lambda t: renamed("mine", "ring", Topology.emulated([3])), InvalidArgument, "has 3 ranks, the group 2"),
        (lambda t: Schedule("all_reduce", "mine", 2, 1, 0, transfers([], [], [], [])), ScheduleError, "rank 0 ends"),
        (lambda t: renamed("taken", "ring", t), InvalidArgument, "all_reduce/taken is registered already"),
    ],
)
def test_what_cannot_be_registered_is_refused(given, error, message):
    topology = Topology.emulated([1, 1])
    taken = algorithm(renamed("taken", "ring", topology), topology, ())
    with pytest.raises(error, match=message):
        algorithm(given(topology), topology, (taken,))


def test_a_schedule_serves_its_root_alone():
    topology = Topology.emulated([1, 1])
    tree = PLANNERS["broadcast"]["tree"](topology, 1)
    mine = algorithm(Schedule("broadcast", "mine", 2, 1, 1, tree.transfers), topology, ())
    assert mine.planner(topology, 1).root == 1
    with pytest.raises(InvalidArgument, match="registered for root 1, not for 0"):
        mine.planner(topology, 0)
    assert "mine" in candidates(topology, "broadcast", (mine,), root=1)
    assert "mine" not in candidates(topology, "broadcast", (mine,), root=0)


def broadcast_from_each(group):
    tree = PLANNERS["broadcast"]["tree"](group.topology, 1)
    group.register(Schedule("broadcast", "of_one", 3, tree.n_chunks, 1, tree.transfers))
    results = []
    for root, name in ((0, None), (1, None), (2, None), (1, "of_one")):
        x = np.full(5, group.rank + 1.0)
        group.broadcast(x, root, algorithm=name)
        results.append(x[0])
    with pytest.raises(InvalidArgument, match="registered for root 1, not for 0"):
        group.broadcast(x, 0, algorithm="of_one")
    weighed = ["of_one" in str(group.explanation("broadcast", 40, root)) for root in range(3)]
    return results, weighed, "of_one" in group.explain("broadcast", 40)


def test_a_registered_root_leaves_the_others_their_choice():
    for found in run_ranks(broadcast_from_each, 3, hosts="aab"):
        assert found == ([1, 2, 3, 2], [False, True, False], False)


def test_a_schedule_of_a_collective_without_a_root_serves_every_call():
    topology = Topology.emulated([1, 1])
    ring = PLANNERS["all_reduce"]["ring"](topology, 0)
    mine = algorithm(Schedule("all_reduce", "mine", 2, ring.n_chunks, 1, ring.transfers), topology, ())
    assert mine.planner(topology, 0).root == 1
    assert "mine" in candidates(topology, "all_reduce", (mine,))


def test_a_digest_tells_schedules_apart():
    topology = Topology.emulated([2, 2])
    digests = {name: renamed("mine", name, topology).digest() for name in PLANNERS["all_reduce"]}
    assert digests["ring"] == renamed("other", "ring", topology).digest()
    assert len({digests[name] for name in ("ring", "pairwise", "tree", "hierarchical", "doubling")}) == 5


def test_pycomm_explain_draws_its_choice(tmp_path):
    done = run(tmp_path, [*PYCOMM, "explain", "all_reduce", "1MiB", "--png", "choice.png"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "choice.png").read_bytes().startswith(b"\x89PNG")
    done = run(tmp_path, [*PYCOMM, "explain", "all_reduce", "1MiB", "--png", "choice.odd"])
    assert done.returncode == 2
    assert "cannot write choice.odd" in done.stderr


def test_a_diagram_has_a_line_for_each_transfer():
    topology = Topology.emulated([2, 2])
    schedule = renamed("mine", "hierarchical", topology)
    axes = Figure().add_subplot()
    result = simulate(schedule, topology, 1 << 20, failed_links=[(0, 2)])
    space_time(result, topology, axes)
    ended = np.isfinite(result.end_s)
    assert 0 < ended.sum() < len(ended)
    segments = [line.get_xydata() for line in axes.lines if line.get_linestyle() in ("-", "--")]
    drawn = sorted((x[0, 0], x[1, 0]) for x in segments if x[0, 1] != x[1, 1])
    wanted = sorted(zip(result.begin_s[ended] * 1e3, result.end_s[ended] * 1e3, strict=True))
    assert np.allclose(drawn, wanted)
    big = Topology.emulated([160])
    with pytest.raises(PycommError, match="more than a space-time diagram can show"):
        space_time(simulate(renamed("mine", "ring", big), big, 1000, same_time=1e-3), big, axes)
