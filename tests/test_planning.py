"""What a job's ranks plan from: tables and topologies that rank 0 reads and all use; refusals, and what is said."""

import dataclasses
import json
import os
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as c10d
from torch_ranks import run_processes

import pycomm
from pycomm.agreement import agree, engine_version, fit, table_folder, with_switches
from pycomm.discover import describe
from pycomm.errors import InvalidArgument, PeerLost, PeerTimeout, PycommWarning, TopologyError
from pycomm.explain import explain
from pycomm.hosts import Link, Switch
from pycomm.machine import this_machine
from pycomm.planners import PLANNERS
from pycomm.table import Times, TuningTable
from pycomm.topology import Topology
from pycomm.tuner import choice_table, choose

HOSTS = ("a", "a", "b", "b")
SLOW = Link(2e-3, 1e6, 1e-5)


def table(topology=None, **changes):
    """A table for jobs on HOSTS here, which finds all_reduce by ring best at every size."""
    topology = topology or Topology.from_host_ids(HOSTS, nic=SLOW)
    times = tuple(
        Times("all_reduce", name, ((1 << 10, seconds), (1 << 20, seconds)))
        for name, seconds in (("ring", 1e-6), ("doubling", 1e-3), ("hierarchical", 1e-3))
    )
    hardware = (describe(this_machine(), ()),) * len(topology.hosts)
    return dataclasses.replace(TuningTable(engine_version(), hardware, topology, times), **changes)


def rank_main(port, rank, n_ranks, environments, body, topologies):
    os.environ.update(environments[rank])
    store = c10d.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    given = None if topologies is None else topologies[rank]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with pycomm.init(store, rank, n_ranks, timeout_s=30, topology=given) as group:
                result = body(group)
        except TopologyError as error:
            result = str(error)
    return [str(w.message) for w in caught if issubclass(w.category, PycommWarning)], result


def run(body, environments=None, hosts=HOSTS, topologies=None):
    """(warnings, body(group)) by rank; environments: one for all, or by rank."""
    n = len(hosts)
    if not isinstance(environments, list):
        environments = [environments or {}] * n
    empty = {"PYCOMM_TUNE_DIR": "/nonexistent"}
    environments = [{**empty, **environment} for environment in environments]
    return run_processes(rank_main, n, environments, body, topologies, hosts=list(hosts))


def say(group):
    x = np.ones(64, np.float32)
    group.all_reduce(x)
    assert (x == group.size).all()
    chosen = choose(choice_table(group.topology, "all_reduce", table=group._planning.table), 1 << 16)
    return group.topology, chosen, group.explain("all_reduce", 1 << 16)


def test_without_files_nothing_is_read_and_the_default_figures_stand():
    for warned, (topology, _, _) in run(say):
        assert warned == [] and topology == Topology.from_host_ids(HOSTS)


def test_a_table_in_rank_0s_folder_serves_all_ranks(tmp_path):
    saved = table()
    saved.save(tmp_path / saved.file_name())
    table(engine="older").save(tmp_path / table(engine="older").file_name())  # beside one that holds, no matter
    for warned, (topology, chosen, text) in run(say, [{"PYCOMM_TUNE_DIR": str(tmp_path)}, {}, {}, {}]):
        assert warned == []
        assert topology == saved.topology
        assert chosen == "ring"
        assert text == str(explain(saved.topology, "all_reduce", 1 << 16, table=saved))
        assert "ring is measured fastest" in text


def test_a_table_serves_hosts_of_other_names(tmp_path):
    table().save(tmp_path / "t.json")
    for warned, (topology, chosen, _) in run(say, {"PYCOMM_TUNE_FILE": str(tmp_path / "t.json")}, hosts="ppqq"):
        assert warned == [] and chosen == "ring"
        assert [host.name for host in topology.hosts] == ["p", "q"]


def test_an_empty_name_means_no_table(tmp_path):
    table().save(tmp_path / table().file_name())
    environment = {"PYCOMM_TUNE_DIR": str(tmp_path), "PYCOMM_TUNE_FILE": ""}
    for warned, (topology, _, _) in run(say, environment):
        assert warned == [] and topology == Topology.from_host_ids(HOSTS)


REFUSED = {
    "stale": (lambda: table(engine="0+0ld").to_json(), "measured with engine 0+0ld, this is"),
    "foreign hardware": (lambda: table(hardware=("Cray-1", "Cray-1")).to_json(), "it was measured on Cray-1"),
    "foreign layout": (
        lambda: table(Topology.from_host_ids("abab", nic=SLOW)).to_json(),
        "placed abab, this job has 4 ranks on 2 host(s) (2, 2), placed aabb",
    ),
    "other format": (lambda: json.dumps({"format": 99}), "it has format 99, this pycomm reads format 3"),
    "changed by hand": (lambda: table().to_json().replace("1e-06", "Infinity"), "its digest is"),
}


@pytest.mark.parametrize("kind", [*REFUSED, "missing"])
def test_a_table_that_does_not_hold_is_refused_once_and_the_model_stands(tmp_path, kind):
    path, fact = tmp_path / "t.json", "t.json cannot be read"
    if kind != "missing":
        make, fact = REFUSED[kind]
        path.write_text(make())
    results = run(say, {"PYCOMM_TUNE_FILE": str(path)})
    assert [len(warned) for warned, _ in results] == [1, 0, 0, 0]
    (warned,) = results[0][0]
    assert fact in warned and str(path) in warned and "the model chooses" in warned and "pycomm tune" in warned
    assert all(topology == Topology.from_host_ids(HOSTS) for _, (topology, _, _) in results)


def sub_groups(group):
    pair = group.new_group([1, 2])
    local = group.new_group([0, 1])
    reverse = group.new_group([3, 2, 1, 0])
    same = group.new_group([0, 1, 2, 3])
    split = group.split(group.rank % 2)
    found = []
    for made in (pair, local, reverse, same, split):
        if made is not None:
            x = np.ones(8, np.float32)
            made.all_reduce(x)
            assert (x == made.size).all()
        found.append(made and (made.topology, made._planning.table is not None))
    return found


def test_sub_groups_use_measured_links_and_only_the_whole_group_its_times(tmp_path):
    table().save(tmp_path / "t.json")
    for rank, (_, found) in enumerate(run(sub_groups, {"PYCOMM_TUNE_FILE": str(tmp_path / "t.json")})):
        pair, local, reverse, same, split = found
        whole = table().topology
        assert pair == ((whole.select([1, 2]), False) if rank in (1, 2) else None)
        assert local == ((whole.select([0, 1]), False) if rank in (0, 1) else None)
        assert reverse == (whole.select([3, 2, 1, 0]), False)
        assert same == (whole, True)
        assert split == (whole.select([rank % 2, rank % 2 + 2]), False)
        assert pair is None or pair[0].link(0, 1) == SLOW


# Topologies


def fitting(**changes):
    racks = (Switch("rack0", SLOW), Switch("rack1", SLOW))
    plain = Topology.from_host_ids(HOSTS)
    hosts = tuple(dataclasses.replace(host, switch=rack.name) for host, rack in zip(plain.hosts, racks, strict=True))
    return dataclasses.replace(plain, hosts=hosts, switches=racks, **changes)


def test_a_topology_in_rank_0s_file_serves_all_ranks_and_their_groups(tmp_path):
    fitting().save(tmp_path / "cluster.toml")
    environments = [{"PYCOMM_TOPOLOGY": str(tmp_path / "cluster.toml")}, {}, {}, {}]
    for warned, (topology, _, text) in run(say, environments):
        assert warned == [] and topology == fitting()
        assert text == str(explain(fitting(), "all_reduce", 1 << 16))


def test_a_tables_times_serve_beside_a_topology(tmp_path):
    table().save(tmp_path / "t.json")
    given = Topology.from_host_ids(HOSTS, nic=Link(1e-4, 1e9))
    for warned, (topology, chosen, _) in run(
        say, {"PYCOMM_TUNE_FILE": str(tmp_path / "t.json")}, topologies=[given] * 4
    ):
        assert warned == [] and topology == given and chosen == "ring"


def test_a_table_measured_below_the_switches_that_were_given_serves_with_its_links(tmp_path):
    saved = table(with_switches(Topology.from_host_ids(HOSTS, nic=Link(3e-4, 5e6)), fitting()))
    saved.save(tmp_path / "t.json")
    uplinks = tuple(dataclasses.replace(switch, uplink=Link(1e-3, 2e6)) for switch in fitting().switches)
    given = dataclasses.replace(fitting(), hosts=fitting().hosts[::-1], switches=uplinks)
    for warned, (topology, chosen, _) in run(
        say, {"PYCOMM_TUNE_FILE": str(tmp_path / "t.json")}, topologies=[given] * 4
    ):
        assert warned == [] and chosen == "ring"
        assert topology == dataclasses.replace(saved.topology, switches=uplinks)


def test_a_table_measured_without_the_switches_that_were_given_is_refused(tmp_path):
    table().save(tmp_path / "t.json")
    results = run(say, {"PYCOMM_TUNE_FILE": str(tmp_path / "t.json")}, topologies=[fitting()] * 4)
    assert [len(warned) for warned, _ in results] == [1, 0, 0, 0]
    assert "it was measured without switches; this job's hosts are below switches rack0, rack1" in results[0][0][0]
    assert all(topology == fitting() for _, (topology, _, _) in results)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        (None, "cannot read topology"),
        ("hosts = 1", "no [[hosts]] tables"),
        ("[[hosts]]\nname='a'\nranks=[0,1]\n[[hosts]]\nname='c9'\nranks=[2,3]", "host 'c9' has no ranks in this job"),
        ("[[hosts]]\nname='a'\nranks=[0,1]", "the topology has ranks 0 .. 1, this job 0 .. 3"),
        (
            "[[hosts]]\nname='a'\nranks=[0,2]\n[[hosts]]\nname='b'\nranks=[1,3]",
            "rank 2 on host 'a', and it runs on 'b'",
        ),
        ("[[hosts]]\nname='a'\nranks=[0,1,3]", "missing or out of range"),
        ("[[hosts]]\nname='a'\nranks=[0,1,2,3]\nnic={latency_s=0,bytes_per_s=-1}", "give a positive rate"),
        ("[[hosts]]\nname='a'\nranks=[0,1,2,3]\nnic={latency_s=0,bytes_per_s=0}", "give a positive rate"),
        (
            "[[switches]]\nname='x'\nparent='y'\nuplink={latency_s=0,bytes_per_s=1}\n"
            "[[switches]]\nname='y'\nparent='x'\nuplink={latency_s=0,bytes_per_s=1}\n"
            "[[hosts]]\nname='a'\nranks=[0,1,2,3]\nswitch='x'",
            "switches stand in a circle",
        ),
    ],
)
def test_a_topology_that_is_not_the_jobs_is_an_error_on_every_rank(tmp_path, text, fact):
    path = tmp_path / "cluster.toml"
    if text is not None:
        path.write_text(text)
    for warned, error in run(say, [{"PYCOMM_TOPOLOGY": str(path)}, {}, {}, {}]):
        assert warned == [] and isinstance(error, str) and fact in error


def test_ranks_that_were_given_another_topology_say_so_and_use_rank_0s(tmp_path):
    other = fitting(reduce_bytes_per_s=1e9)
    (tmp_path / "bad.toml").write_text("hosts = 1")
    results = run(say, topologies=[fitting(), other, None, str(tmp_path / "bad.toml")])
    assert [len(warned) for warned, _ in results] == [0, 1, 0, 1]
    assert f"rank 1's topology is {other.fingerprint()}, rank 0's is {fitting().fingerprint()}" in results[1][0][0]
    assert "rank 3's topology cannot be used" in results[3][0][0] and "plan from rank 0's" in results[3][0][0]
    assert all(topology == fitting() for _, (topology, _, _) in results)


def test_a_topology_that_rank_0_lacks_is_not_used():
    results = run(say, topologies=[None, fitting(), None, None])
    assert [len(warned) for warned, _ in results] == [0, 1, 0, 0]
    assert "rank 0 was given none; all ranks plan from default link figures" in results[1][0][0]
    assert all(topology == Topology.from_host_ids(HOSTS) for _, (topology, _, _) in results)


def test_hosts_are_known_with_and_without_what_the_engine_appends():
    ids = ["b1-5f3e9a01", "b1-5f3e9a01", "b2-0badcafe"]
    for names in (("b1", "b2"), ("b1-5f3e9a01", "b2"), ("b1-11111111", "b2-22222222")):  # the last: before a reboot
        fitted = fit(Topology.from_host_ids([names[0], names[0], names[1]]), ids)
        assert [host.name for host in fitted.hosts] == ["b1-5f3e9a01", "b2-0badcafe"]
    with pytest.raises(TopologyError, match="host 'vm' has no ranks"):  # two machines of one name: which?
        fit(Topology.from_host_ids(["vm", "x"]), ["vm-aaaaaaaa", "vm-bbbbbbbb"])


# replan, c10d, explain


def replanned(group):
    better = group.replan(fitting())
    pair = better.new_group([1, 2])
    x = np.ones(8, np.float32)
    better.all_reduce(x)
    assert (x == 4).all()
    small = group.new_group([0, 1])
    if small is not None:
        with pytest.raises(InvalidArgument, match="not the group of all the job's ranks"):
            small.replan(fitting().select([0, 1]))
    with pytest.raises(TopologyError, match=r"this job 0 \.\. 3"):
        group.replan(Topology.emulated([2]))
    return group.topology, better.topology, pair and pair.topology


def test_a_group_planned_anew_and_those_made_from_it():
    for rank, (_, (before, after, pair)) in enumerate(run(replanned)):
        assert before == Topology.from_host_ids(HOSTS)
        assert after == fitting()
        assert pair == (fitting().select([1, 2]) if rank in (1, 2) else None)


def torch_main(port, rank, n_ranks, folder, output):
    os.environ |= {"PYCOMM_TUNE_DIR": folder if rank == 0 else "/nonexistent", "PYCOMM_EXPLAIN": "1"}
    errors = os.open(f"{output}/{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    store = c10d.TCPStore("127.0.0.1", port, is_master=False)
    c10d.init_process_group("pycomm", store=store, rank=rank, world_size=n_ranks)
    x = torch.ones(1 << 14)
    c10d.all_reduce(x)
    c10d.all_reduce(torch.ones(1 << 14))
    part = c10d.new_group([1, 2])
    if rank in (1, 2):
        c10d.all_reduce(x, group=part)
    c10d.destroy_process_group()
    return x[0].item()


def test_torchs_backend_plans_from_the_table_and_explains_each_choice_once(tmp_path):
    folder, output = tmp_path / "tables", tmp_path / "errors"
    output.mkdir()
    table().save(folder / table().file_name())
    results = run_processes(torch_main, 4, str(folder), str(output), hosts=list(HOSTS))
    assert results == [4, 8, 8, 4]
    lines = [
        [line for line in (output / str(rank)).read_text().splitlines() if line.startswith("pycomm: ")]
        for rank in range(4)
    ]
    assert [len(of_rank) for of_rank in lines] == [1, 1, 0, 0]  # rank 1 is rank 0 of the second group
    assert "all_reduce of any size: ring; predicted at 1 MiB:" in lines[0][0]
    assert "ring" in lines[0][0] and "(measured 1 us)" in lines[0][0] and "ring is measured fastest" in lines[0][0]
    assert "measured" not in lines[1][0]


LINKS = Topology.from_host_ids(HOSTS, nic=Link(1e-4, 2e7, 1e-5))
CLASSES = choice_table(LINKS, "all_reduce")
UNCHOSEN = next(name for name in PLANNERS["all_reduce"] if name not in [chosen for _, chosen in CLASSES])


def explained(group):
    errors = os.open(os.environ["ERRORS"], os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    x = np.ones(1 << 20, np.float32)
    for _ in range(2):
        group.all_reduce(x[:8])
        group.all_reduce(x)
    group.all_reduce(x, algorithm=UNCHOSEN)
    return Path(os.environ["ERRORS"]).read_text().splitlines() if group.rank == 0 else []


def test_each_size_class_in_use_is_explained_once_on_rank_0(tmp_path):
    environments = [{"PYCOMM_EXPLAIN": "1", "ERRORS": str(tmp_path / str(rank))} for rank in range(4)]
    lines = run(explained, environments, topologies=[LINKS] * 4)[0][1]
    in_use = dict.fromkeys(choose(CLASSES, nbytes) for nbytes in (32, 4 << 20))
    classes = [name for name in in_use for _, other in CLASSES if other == name]
    assert [line.split(": ")[3].split(";")[0] for line in lines[:-1]] == classes
    assert lines[-1] == f"pycomm: group 'world': all_reduce: {UNCHOSEN}, which the caller named"
    assert all((tmp_path / str(rank)).read_text() == "" for rank in (1, 2, 3))


def test_nothing_is_explained_unasked(tmp_path):
    results = run(explained, [{"PYCOMM_EXPLAIN": "0", "ERRORS": str(tmp_path / str(rank))} for rank in range(4)])
    assert results[0][1] == []


def test_where_tables_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("PYCOMM_TUNE_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert table_folder() == tmp_path
    monkeypatch.delenv("PYCOMM_TUNE_DIR")
    assert table_folder() == Path("/xdg/pycomm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert table_folder() == Path("/home/me/.cache/pycomm")


def test_a_rank_0_that_never_says_is_a_timeout():
    endpoint = SimpleNamespace(rank=1, host_ids=list(HOSTS))
    with pytest.raises(PeerTimeout, match=r"rank 0 did not say within 0.2 s what the job plans from"):
        agree(c10d.HashStore(), endpoint, None, 0.2)


def test_a_store_that_ends_first_is_a_lost_peer():
    serving = c10d.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = c10d.TCPStore("127.0.0.1", serving.port, is_master=False)
    del serving
    endpoint = SimpleNamespace(rank=1, host_ids=list(HOSTS))
    with pytest.raises(PeerLost, match=r"the job's store ended before rank 0 said what the job plans from"):
        agree(store, endpoint, None, 20)
