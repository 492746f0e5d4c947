"""`pycomm tune` and `pycomm topo`: what they print, write and refuse, and that a job uses what was measured."""

import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys
import tomllib
import types

import numpy as np
import pytest
from commands import PYCOMM
from matplotlib.backends.backend_agg import FigureCanvasAgg
from spawn import run_ranks

from pycomm import tune as tune_module
from pycomm.agreement import engine_version
from pycomm.errors import InvalidArgument
from pycomm.explain import explain
from pycomm.hosts import Link, Nic, Switch
from pycomm.measure import measure_links
from pycomm.planners import PLANNERS
from pycomm.table import load
from pycomm.timing import BLOCKS
from pycomm.topo import Node, picture, tree
from pycomm.topology import Host, Topology
from pycomm.tune import tune, tune_in_background
from pycomm.tuner import Costs


def pycomm(*arguments, **options):
    """(exit code, stdout, stderr)."""
    command = PYCOMM if arguments[0] in ("launch", "explain") else [sys.executable, "-m", "pycomm"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)
    return done.returncode, done.stdout, done.stderr


def test_tune_saves_a_table_that_the_next_job_uses(tmp_path):
    path = tmp_path / "made" / "table.json"
    code, stdout, stderr = pycomm("tune", "--hosts", "2,1", "--budget", "2", "--output", path)
    assert (code, stderr) == (0, "")
    table = load(path)
    assert table.engine == engine_version()
    assert [host.ranks for host in table.topology.hosts] == [(0, 1), (2,)]
    assert table.times and {times.collective for times in table.times} <= PLANNERS.keys()
    assert f"saved to {path}" in stdout and "host host0, lo: " in stdout
    assert re.search(r"^all_reduce +\w+.*\(\d of 8 sizes measured\)$", stdout, re.M)

    times = table.times[0]
    code, stdout, _ = pycomm("explain", times.collective, times.points[0][0], "--table", path)
    assert code == 0 and "measured" in stdout.splitlines()[1]

    program = tmp_path / "job.py"
    program.write_text(
        "import pycomm\nwith pycomm.init() as group:\n    if group.rank == 0: print(group.topology.fingerprint())\n"
    )
    environment = {**os.environ, "PYCOMM_TUNE_FILE": str(path)}
    code, stdout, stderr = pycomm(
        "launch", "--output", "rank0", "--hosts", "2,1", "--", "python", program, env=environment
    )
    assert (code, stdout.strip(), stderr) == (0, table.topology.fingerprint(), "")


def tuned(group):
    with pytest.raises(InvalidArgument, match="not the group of all the job's ranks"):
        pair = group.new_group([0, 2])
        if pair is None:
            raise InvalidArgument("not the group of all the job's ranks")
        tune(pair, 0.1)
    table = tune(group, 0.2)
    with group.replan(table.topology, table) as better:
        x = np.arange(1000, dtype=np.float32)
        better.all_reduce(x)
    return table, x[999]


def test_every_rank_gets_the_same_table():
    results = run_ranks(tuned, 4, hosts=list("aabb"))
    assert all(result == results[0] for result in results)
    assert results[0][1] == 4 * 999


def test_the_first_round_has_blocks_of_lone_calls_or_one_of_two(monkeypatch):
    nics = (Nic("eth0", Link(1e-5, 1.25e8)),)
    topology = Topology((Host("a", (0, 1), nics), Host("b", (2, 3), nics)))
    group = types.SimpleNamespace(topology=topology, size=4, all_reduce=lambda *_: None)
    rounds = {}

    def time_algorithms(group, collective, nbytes, names, calls, n_blocks):
        rounds.setdefault((collective, nbytes), []).append((list(calls), n_blocks))
        return [1e-4 + 1e-9 * nbytes] * len(names)

    monkeypatch.setattr(tune_module, "time_algorithms", time_algorithms)
    samples = {}
    tune_module._measure(group, ("x", "x"), 15.0, samples)
    short, long = rounds["all_reduce", 1 << 10], rounds["all_reduce", 1 << 24]
    (first, n_blocks), (well, _) = short
    assert set(first) == {1} and n_blocks == BLOCKS and min(well) >= 4
    (first, n_blocks), (well, _) = long
    assert set(first) == {2} and n_blocks == 1 and min(well) >= 4
    assert set(samples["all_reduce", "ring"]) == {size for collective, size in rounds if collective == "all_reduce"}


def test_the_less_time_the_fewer_are_measured():
    expected = np.array([[1.0], [1.1], [1.4], [2.0], [9.0]])
    cost = Costs(tuple("abcde"), expected, expected, np.ones((5, 1), np.bool_), np.ones(5, np.int64))
    found = [tune_module._rounds(cost, seconds) for seconds in (1000, 120, 70, 58, 50, 42, 36, 31, 20)]
    assert [plan and ("".join(plan.names), plan[3:]) for plan in found] == [
        ("abcd", (4, 5)),
        ("abcd", (3, 5)),
        ("abcd", (2, 5)),
        ("abcd", (2, 3)),
        ("abcd", (2, 3)),
        ("abc", (2, 3)),
        ("ab", (2, 3)),
        None,
        None,
    ]


def in_background(group, path):
    future = tune_in_background(group, path)
    x = np.ones(1000, np.float32)
    n = 0
    while not group_agrees(group, future.done()):
        group.all_reduce(x, "max")
        n += 1
    assert n > 0 and (x == 1).all()
    return future.result()


def group_agrees(group, done):
    flag = np.array([done], np.uint8)
    group.all_reduce(flag, "min")
    return bool(flag[0])


def test_a_job_goes_on_while_it_is_measured_in_the_background(tmp_path):
    results = run_ranks(in_background, 3, tmp_path / "t.json", hosts=list("aab"))
    assert all(result == results[0] for result in results)
    assert load(tmp_path / "t.json") == results[0]


def tuned_at_1_kib(group):
    tune_module.SIZES, tune_module.PLANNERS = (1 << 10,), {"all_reduce": PLANNERS["all_reduce"]}
    tune_module.measure_links = functools.partial(measure_links, target_s=0.002)
    return tune(group, 60)


def test_racks_are_kept_and_what_knows_them_is_measured(tmp_path):
    racks = tuple(Switch(f"rack{number}", Link(1e-3, 1e7)) for number in range(2))
    plain = Topology.from_host_ids("abcd")
    hosts = tuple(dataclasses.replace(host, switch=f"rack{at // 2}") for at, host in enumerate(plain.hosts))
    dataclasses.replace(plain, hosts=hosts, switches=racks).save(tmp_path / "racks.toml")
    environment = {"PYCOMM_TOPOLOGY": str(tmp_path / "racks.toml"), "PYCOMM_TUNE_FILE": ""}
    table, *others = run_ranks(tuned_at_1_kib, 4, hosts="abcd", environment=environment)
    assert all(other == table for other in others)
    assert table.topology.switches == racks
    for host, given in zip(table.topology.hosts, hosts, strict=True):
        assert host.switch == given.switch and host.nic != given.nic
    found = explain(table.topology, "all_reduce", 1 << 10, table=table)
    assert next(one for one in found.candidates if one.algorithm == "rack_leader").measured_s is not None


def one_host(group):
    table = tune(group, 0.2)
    return table.times, table.topology.inside.bytes_per_s


def test_one_host_has_links_and_nothing_to_choose():
    assert all(times == () and rate > 0 for times, rate in run_ranks(one_host, 2))


def alone(group):
    with pytest.raises(InvalidArgument, match="one rank has no links"):
        tune(group)


def test_one_rank_has_nothing_to_measure():
    run_ranks(alone, 1)


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["tune"], "no ranks to measure"),
        (["tune", "--hosts", "2"], "needs --ranks-per-host"),
        *((["tune", "--hosts", "2,2", "--budget", s], f"{s}; give seconds above 0") for s in ("0", "nan", "inf")),
        (["topo", "--measure"], "topo --measure needs ranks"),
        (["topo", "--topology", "x.toml", "--measure"], "leave --hosts, --ranks and --measure out"),
        (["topo", "--topology", "/no/such.toml"], "cannot read topology /no/such.toml"),
        (["topo", "--png", "/no/such/folder/t.png"], "cannot write the picture /no/such/folder/t.png"),
        (["topo", "--png", "t.nonsense"], "cannot write the picture t.nonsense"),
        (["topo", "--save", "/no/such/folder/t.toml"], "/no/such/folder/t.toml"),
        (["explain", "all_reduce", "1", "--table", "/no/such.json"], "make one with `pycomm tune`"),
        (["explain", "all_reduce", "1", "--table", "x", "--ranks", "2"], "leave --ranks, --hosts and --topology out"),
    ],
)
def test_what_cannot_be_done_is_said(pycomm_command, arguments, fact):
    code, _, stderr = pycomm_command(*arguments)
    assert code == 2 and fact in stderr


def test_a_job_of_one_rank_says_so_and_ends():
    code, _, stderr = pycomm("tune", "--ranks", "1", "--budget", "1")
    assert code != 0 and "one rank has no links" in stderr


# pycomm topo


def test_topo_shows_measures_saves_and_draws_a_job(tmp_path):
    saved, picture = tmp_path / "t.toml", tmp_path / "t.png"
    code, stdout, stderr = pycomm("topo", "--hosts", "3,1,2", "--measure", "--save", saved, "--png", picture)
    assert (code, stderr) == (0, "")
    assert stdout.startswith("6 ranks, 3 hosts\n├─ host host0: ranks 0-2\n")
    for line in ("├─ host host1: rank 3", "├─ host host2: ranks 4-5", "they are one machine (one boot id)"):
        assert line in stdout
    assert "is assumed" not in stdout  # it was measured
    topology = Topology.load(saved)
    assert [host.ranks for host in topology.hosts] == [(0, 1, 2), (3,), (4, 5)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    matrix = stdout[stdout.index("one transfer at a time") :].splitlines()[1:8]
    assert [row.split()[0] for row in matrix[1:]] == ["0", "1", "2", "3", "4", "5"]
    for index, row in enumerate(matrix[1:]):
        cells = row.split()[1:]
        assert cells[index] == "-" and all(float(cell) > 0 for cell in cells[:index] + cells[index + 1 :])


def test_topo_says_what_it_could_not_find_out(tmp_path):
    code, stdout, _ = pycomm("topo", "--hosts", "1,1", "--save", tmp_path / "t.toml")
    assert code == 0 and "not found out:\n" in stdout
    assert "host host1: the rate of lo: loopback is memory, not a link; 9.6 Gbit/s is assumed" in stdout
    assert len(tomllib.loads((tmp_path / "t.toml").read_text())["hosts"]) == 2


def test_topo_alone_shows_this_machine(pycomm_command):
    code, stdout, stderr = pycomm_command("topo")
    assert (code, stderr) == (0, "") and stdout.startswith("1 rank, 1 host\n")


RACKS = Topology(
    (
        Host(
            "a", (0, 1, 5), (Nic("eth0", Link(1e-5, 1.25e9)), Nic("eth1", Link(1e-5, 1.25e9))), "rack0", ((0, 5), (1,))
        ),
        Host("b", (2,), (Nic("eth0", Link(1e-5, 1.25e9)),), "rack0"),
        Host("c", (3, 4), (Nic("eth0", Link(1e-5, 1.25e8)),), "rack1"),
    ),
    switches=(
        Switch("row", Link(1e-3, 1.25e9)),
        Switch("rack0", Link(1e-4, 5e9), "row"),
        Switch("rack1", Link(0, 5e9)),
    ),
)


def test_a_file_of_racks_is_shown_as_a_tree_and_drawn(pycomm_command, tmp_path):
    RACKS.save(tmp_path / "racks.toml")
    code, stdout, _ = pycomm_command(
        "topo", "--topology", str(tmp_path / "racks.toml"), "--png", str(tmp_path / "racks.png")
    )
    assert code == 0
    assert stdout.splitlines()[:-1] == [
        "6 ranks, 3 hosts",
        "├─ switch row: uplink 10 Gbit/s, 1 ms",
        "│  └─ switch rack0: uplink 40 Gbit/s, 100 us",
        "│     ├─ host a: ranks 0-1, 5",
        "│     │  ├─ NIC eth0: 10 Gbit/s, 10 us",
        "│     │  ├─ NIC eth1: 10 Gbit/s, 10 us",
        "│     │  ├─ NUMA 0: ranks 0, 5",
        "│     │  └─ NUMA 1: rank 1",
        "│     └─ host b: rank 2",
        "│        └─ NIC eth0: 10 Gbit/s, 10 us",
        "├─ switch rack1: uplink 40 Gbit/s, 0 us",
        "│  └─ host c: ranks 3-4",
        "│     └─ NIC eth0: 1 Gbit/s, 10 us",
        "└─ inside hosts: 48 Gbit/s, 1 us; sums at 64 Gbit/s",
    ]
    assert (tmp_path / "racks.png").stat().st_size > 10_000


def test_a_picture_of_three_levels_shows_each_nic_and_no_box_covers_another():
    """Two NICs of different rates are two lines; their sum would hide that one of them is slow."""
    links = (Nic("eth0", Link(1e-5, 1.25e8)), Nic("eth1", Link(1e-5, 2.5e7)))
    levels = [("site", None), ("pod", "site"), ("rack0", "pod"), ("rack1", "pod")]
    topology = Topology(
        (Host("a", (0,), links, "rack0"), Host("b", (1,), links, "rack1"), Host("c", (2, 3), links[:1], "rack1")),
        switches=tuple(Switch(name, Link(1e-3, 1.25e9), parent) for name, parent in levels),
    )
    figure = picture(topology, None)
    FigureCanvasAgg(figure).draw()
    texts = {text.get_text(): text.get_bbox_patch().get_window_extent() for text in figure.axes[0].texts}
    assert "a\neth0: 1 Gbit/s, 10 us\neth1: 200 Mbit/s, 10 us" in texts and len(texts) == 3 + 4 + 4 + 1
    for (one, here), (other, there) in itertools.combinations(texts.items(), 2):
        assert not here.overlaps(there), f"{one!r} and {other!r}"


def test_every_switch_and_host_of_a_tree_is_below_the_root():
    def count(node: Node) -> int:
        return 1 + sum(count(below) for below in node.below)

    assert count(tree(RACKS)) == 1 + len(RACKS.switches) + len(RACKS.hosts) + 4 + 2 + 1
