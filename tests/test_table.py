"""Tuning tables: files, what they hold for, and how their times bear on the choice."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pycomm.errors import InvalidArgument
from pycomm.explain import explain, format_s
from pycomm.hosts import Link, Switch
from pycomm.planners import PLANNERS
from pycomm.predict import predict
from pycomm.table import Times, TuningTable, _digest, from_json, layout, load
from pycomm.topology import Topology
from pycomm.tuner import LADDER, LARGE, TIE, TIE_OF_FEWER, candidates, choice_table, choose, costs

TOPOLOGY = Topology.emulated([4, 4], nic=Link(20e-6, 1e8, 4e-6))
TABLE = TuningTable(
    "1+abc",
    ("CPU, 2 cores, eth0 (ena)",) * 2,
    TOPOLOGY,
    (
        Times("all_reduce", "ring", ((1 << 10, 1e-4), (1 << 20, 1e-3))),
        Times("all_reduce", "hierarchical", ((1 << 10, 2e-4), (1 << 20, 4e-3))),
    ),
)


@st.composite
def tables(draw):
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    rate = draw(st.floats(1e3, 1e12))
    topology = Topology.emulated(shape, nic=Link(draw(st.floats(0, 1)), rate))
    if draw(st.booleans()):
        racks = (Switch("row", Link(0, rate)), Switch("rack", Link(1e-4, 1e9), "row"))
        hosts = tuple(dataclasses.replace(host, switch="rack", numa=(host.ranks,)) for host in topology.hosts)
        topology = dataclasses.replace(topology, hosts=hosts, switches=racks)
    names = [(collective, algorithm) for collective in PLANNERS for algorithm in PLANNERS[collective]]
    times = tuple(
        Times(
            *name,
            tuple(
                (size, draw(st.floats(1e-9, 1e3)))
                for size in sorted(draw(st.sets(st.integers(1, 1 << 62), min_size=1)))
            ),
        )
        for name in draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
    )
    return TuningTable(draw(st.text()), tuple(draw(st.text()) for _ in shape), topology, times)


@given(tables())
def test_a_table_is_read_as_it_was_written(table):
    again = from_json(table.to_json())
    assert again.fingerprint() == table.fingerprint()
    assert sorted(again.times, key=str) == sorted(table.times, key=str)
    assert (again.engine, again.hardware, again.topology) == (table.engine, table.hardware, table.topology)


def test_a_table_is_saved_whole_where_its_name_says_what_it_is(tmp_path):
    path = tmp_path / "new" / TABLE.file_name()
    TABLE.save(path)
    assert load(path) == TABLE
    assert [file.name for file in path.parent.iterdir()] == [TABLE.file_name()]
    other_engine = dataclasses.replace(TABLE, engine="2+abc")
    assert other_engine.file_name()[:9] == TABLE.file_name()[:9]  # of one layout
    assert other_engine.file_name() != TABLE.file_name()


def sealed(document):
    """The text of a table that says this, with the digest of what it says."""
    rest = {name: value for name, value in document.items() if name != "digest"}
    return json.dumps({**rest, "digest": _digest(rest, 16)})


def with_times(document, times):
    return sealed({**document, "times": times})


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda d: "{", "it is no tuning table (JSONDecodeError"),
        (lambda d: "[" * 100_000, "it is no tuning table (RecursionError"),
        (lambda d: json.dumps([1]), "it is no tuning table (TypeError"),
        (lambda d: json.dumps({**d, "format": 2}), "it has format 2, this pycomm reads format 3"),
        (lambda d: json.dumps({**d, "engine": "9"}), "its digest is"),
        (lambda d: json.dumps(d).replace("0.004", "0.003"), "its digest is"),
        (lambda d: json.dumps({k: v for k, v in d.items() if k != "digest"}), "KeyError: 'digest'"),
        (lambda d: sealed({k: v for k, v in d.items() if k != "times"}), "it is no tuning table (KeyError: 'times')"),
        (lambda d: sealed({**d, "hardware": ["x"]}), "1 hosts' hardware for 2 hosts"),
        (lambda d: with_times(d, {"all_reduce": {"ring": [[8, -1]]}}), "not a positive number of seconds"),
        (lambda d: with_times(d, {"all_reduce": {"ring": [[8, 1], [4, 1]]}}), "not ascending"),
        (lambda d: with_times(d, {"all_reduce": {"ring": [[0, 1]]}}), "not ascending from 1 to"),
        (lambda d: with_times(d, {"all_reduce": {"ring": [[1 << 70, 1]]}}), "not ascending from 1 to"),
        (lambda d: with_times(d, {"all_reduce": {"ring": [[float("inf"), 1]]}}), "OverflowError"),
        (lambda d: with_times(d, {"all_reduce": {"mine": [[8, 1]]}}), "times of all_reduce mine, which no planner"),
        (lambda d: with_times(d, {"mine": {"ring": [[8, 1]]}}), "KeyError: 'mine'"),
        (lambda d: sealed({**d, "device_times": {"mine": {"native": [[8, 1]]}}}), "times of mine on devices"),
        (lambda d: sealed({**d, "topology": {**d["topology"], "reduce_bytes_per_s": 0}}), "reduce_bytes_per_s is 0"),
        (lambda d: sealed({**d, "topology": {**d["topology"], "reduce_bytes_per_s": 10**400}}), "OverflowError"),
        (lambda d: sealed(json.loads(json.dumps(d).replace("[0, 1, 2, 3]", "[0.0, 1, 2, 3]"))), "give whole numbers"),
    ],
)
def test_what_is_no_table_is_refused_by_name(tmp_path, change, fact):
    path = tmp_path / "t.json"
    path.write_text(change(json.loads(TABLE.to_json())))
    with pytest.raises(InvalidArgument) as caught:
        load(path)
    assert str(path) in str(caught.value) and fact in str(caught.value) and "pycomm tune" in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_anything_in_any_place_gives_a_table_or_invalid_argument(data):
    document = json.loads(TABLE.to_json())
    place = data.draw(st.sampled_from(list(places(document))), label="place")
    within = document
    for key in place[:-1]:
        within = within[key]
    within[place[-1]] = data.draw(ANYTHING, label="value")
    for text in (json.dumps(document), sealed(document)):
        try:
            table = from_json(text)
        except InvalidArgument:
            continue
        assert from_json(table.to_json()).fingerprint() == table.fingerprint()


def places(document):
    """The keys that lead to each value in it."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        yield (key,)
        if isinstance(value, (dict, list)):
            yield from ((key, *rest) for rest in places(value))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InvalidArgument, match=r"none.json cannot be read.*make one with `pycomm tune`"):
        load(tmp_path / "none.json")


def test_an_algorithm_has_one_list_of_times():
    with pytest.raises(InvalidArgument, match="two lists"):
        dataclasses.replace(TABLE, times=(TABLE.times[0], TABLE.times[0]))


@pytest.mark.parametrize(
    ("job", "hardware", "engine", "fact"),
    [
        (Topology.emulated([4, 4]), TABLE.hardware, "1+abc", None),
        (Topology.from_host_ids("ppppqqqq"), TABLE.hardware, "1+abc", None),
        (
            Topology.emulated([3, 1]),
            TABLE.hardware,
            "1+abc",
            "it is of 8 ranks on 2 host(s) (4, 4), placed aaaabbbb, this job has 4 ranks on 2 host(s) (3, 1)",
        ),
        (Topology.from_host_ids("pqpqpqpq"), TABLE.hardware, "1+abc", "placed abababab"),
        (Topology.emulated([4, 4]), ("other", "other"), "1+abc", "it was measured on CPU, 2 cores, eth0 (ena); host"),
        (Topology.emulated([4, 4]), TABLE.hardware, "1+abd", "measured with engine 1+abc, this is 1+abd"),
    ],
)
def test_what_a_table_holds_for(job, hardware, engine, fact):
    reason = TABLE.refusal(job, hardware, engine)
    assert reason is None if fact is None else fact in reason
    if fact is None:
        named = TABLE.for_hosts(job)
        assert [host.name for host in named.hosts] == [host.name for host in job.hosts]
        assert named.link(0, 7) == TOPOLOGY.link(0, 7)


def below(*switches, parent=None):
    """TOPOLOGY with each host below one of these."""
    hosts = tuple(dataclasses.replace(host, switch=name) for host, name in zip(TOPOLOGY.hosts, switches, strict=True))
    made = [Switch(name, Link(1e-4, 1e9), parent) for name in dict.fromkeys(switches) if name]
    return dataclasses.replace(
        TOPOLOGY, hosts=hosts, switches=(*made, *([Switch(parent, Link(0, 1e9))] if parent else ()))
    )


def test_a_table_holds_below_the_switches_it_was_measured_below():
    below_racks = dataclasses.replace(TABLE, topology=below("r0", "r1"))
    fingerprints = {TABLE.fingerprint(), below_racks.fingerprint()}
    for job in (
        TOPOLOGY,
        below("r0", "r1"),
        dataclasses.replace(below("r0", "r1"), hosts=below("r0", "r1").hosts[::-1]),
    ):
        assert below_racks.refusal(job, TABLE.hardware, TABLE.engine) is None
    for job in (below("r0", "r0"), below("r0", None), below("r1", "r0"), below("r0", "r1", parent="row")):
        assert "below switches r0, r1; this job's" in below_racks.refusal(job, TABLE.hardware, TABLE.engine)
        assert "measured without switches; this" in TABLE.refusal(job, TABLE.hardware, TABLE.engine)
        fingerprints.add(dataclasses.replace(TABLE, topology=job).fingerprint())
    assert len(fingerprints) == 6


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12))
def test_a_layout_is_where_ranks_are_whatever_the_names(hosts):
    numbers = layout(Topology.from_host_ids(hosts))
    assert numbers == layout(Topology.from_host_ids([f"x{host}" for host in hosts]))
    assert [a == b for a in numbers for b in numbers] == [a == b for a in hosts for b in hosts]


# The choice


def test_at_a_measured_size_the_expectation_is_the_measurement():
    found = costs(TOPOLOGY, "all_reduce", (1 << 10, 1 << 15, 1 << 20, 1 << 24), table=TABLE)
    ring, hierarchical = (found.algorithms.index(name) for name in ("ring", "hierarchical"))
    assert found.expected_s[ring, [0, 2]] == pytest.approx([1e-4, 1e-3])
    assert found.expected_s[hierarchical, [0, 2]] == pytest.approx([2e-4, 4e-3])
    assert found.measured[ring].tolist() == [True, True, True, False]
    for index, name in enumerate(found.algorithms):
        (predicted,) = predict(candidates(TOPOLOGY, "all_reduce")[name](TOPOLOGY, 0), TOPOLOGY, 1 << 24)
        assert found.predicted_s[index, 3] == pytest.approx(predicted)
    # beyond what was measured a prediction stays as far off as it last was
    ratio = found.expected_s / found.predicted_s
    assert ratio[:, 3] == pytest.approx(ratio[:, 2])
    # between, the ratio lies between
    for row in (ring, hierarchical):
        assert min(ratio[row, [0, 2]]) <= ratio[row, 1] <= max(ratio[row, [0, 2]])


def test_what_was_not_measured_must_win_even_as_far_off_as_the_worst():
    found = costs(TOPOLOGY, "all_reduce", LADDER, table=TABLE)
    measured = [found.algorithms.index(times.algorithm) for times in TABLE.times]
    ratio = found.expected_s / found.predicted_s
    worst = np.maximum(1.0, ratio[measured].max(axis=0))
    for row in range(len(found.algorithms)):
        if row not in measured:
            assert ratio[row] == pytest.approx(worst)


def test_what_was_measured_elsewhere_alone_must_win_as_far_off_as_the_worst_there():
    slow, quick = 1e-2, 1e-6
    times = (
        Times("all_reduce", "ring", ((1 << 10, slow), (1 << 20, slow))),
        Times("all_reduce", "tree", ((1 << 20, quick),)),
    )
    found = costs(TOPOLOGY, "all_reduce", (1 << 10, 1 << 20, 1 << 24), table=dataclasses.replace(TABLE, times=times))
    ring, tree = (found.algorithms.index(name) for name in ("ring", "tree"))
    ratio = found.expected_s / found.predicted_s
    assert ratio[tree, 0] == pytest.approx(ratio[ring, 0])
    assert ratio[tree, 1] < ratio[ring, 1] and ratio[tree, 2] == pytest.approx(ratio[tree, 1])


def test_measured_times_overrule_the_model():
    assert choose(choice_table(TOPOLOGY, "all_reduce"), 1 << 20) != "ring"
    assert choose(choice_table(TOPOLOGY, "all_reduce", table=TABLE), 1 << 20) == "ring"
    assert choice_table(TOPOLOGY, "broadcast", table=TABLE) == choice_table(TOPOLOGY, "broadcast")
    no_times = dataclasses.replace(TABLE, times=())
    assert choice_table(TOPOLOGY, "all_reduce", table=no_times) == choice_table(TOPOLOGY, "all_reduce")


@pytest.mark.parametrize("collective", PLANNERS)
def test_the_choice_is_expected_to_win_where_it_was_measured_and_to_lose_by_a_tie_elsewhere(collective):
    times = tuple(
        Times(collective, name, ((1 << 12, 1e-3 * (index + 1)), (1 << 22, 1e-2 / (index + 1))))
        for index, name in enumerate(PLANNERS[collective])
    )
    table = dataclasses.replace(TABLE, times=times)
    found = costs(TOPOLOGY, collective, LADDER, table=table)
    chosen = [found.algorithms.index(choose(choice_table(TOPOLOGY, collective, table=table), size)) for size in LADDER]
    winners = {int(found.expected_s[:, LADDER.index(size)].argmin()) for size in (1 << 12, 1 << 22)}
    assert len(winners) == 2 or len(times) < 2
    for column, size in enumerate(LADDER):
        expected = found.expected_s[:, column]
        limit = TIE_OF_FEWER if size >= LARGE else 1.0 if size == 1 << 12 else TIE
        assert expected[chosen[column]] <= expected.min() * limit
        # Whoever won nowhere is taken only where those who did are expected to lose by more than a tie, or have more
        # connections, or are predicted to lose.
        tied = [row for row in winners if expected[row] <= expected.min() * TIE]
        predicted = found.predicted_s[:, column]
        is_steadier = all(
            found.connections[chosen[column]] < found.connections[row]
            or predicted[row] > TIE_OF_FEWER * predicted[expected <= expected.min() * TIE_OF_FEWER].min()
            for row in tied
        )
        assert chosen[column] in winners or not tied or (size >= LARGE and is_steadier)


def test_of_large_calls_that_tie_the_one_of_fewest_connections_wins():
    four = Topology.emulated([2, 2, 2, 2], nic=Link(20e-6, 1e8, 4e-6))
    found = costs(four, "all_reduce", (1 << 20,))
    connections = dict(zip(found.algorithms, found.connections.tolist(), strict=True))
    assert connections["leader_split"] == 2 and connections["halving_doubling"] == 4
    assert connections["hierarchical_direct"] == 6 and connections["pairwise"] == 12 and connections["ring"] == 2

    def found_for(nbytes, leader_split_s):
        points = (1 << 10, 1 << 20)
        names = {"hierarchical_direct": 1e-3, "leader_split": leader_split_s, "ring": 2e-3}
        times = tuple(Times("all_reduce", name, tuple((n, s) for n in points)) for name, s in names.items())
        table = TuningTable("1+abc", ("CPU",) * 4, four, times)
        return explain(four, "all_reduce", nbytes, table=table)

    tied = found_for(1 << 20, 1.09e-3)
    assert tied.choice == "leader_split" and "over 6 connections instead of 2" in tied.reason
    assert found_for(1 << 20, 1.11e-3).choice == "hierarchical_direct"


def test_of_large_calls_that_tie_one_that_is_predicted_to_lose_is_not_taken():
    four = Topology.emulated([2, 2, 2, 2], nic=Link(20e-6, 1e8, 4e-6))
    found = costs(four, "all_gather", (1 << 24,))
    ring, leader = (found.algorithms.index(name) for name in ("ring", "leader"))
    assert found.connections[ring] < found.connections[leader]
    assert found.predicted_s[ring, 0] > 1.15 * found.predicted_s[leader, 0]  # 7 of 8 pieces cross each link, not 6

    def found_for(ring_s):
        points = (1 << 10, 1 << 24)
        times = tuple(
            Times("all_gather", name, tuple((n, s) for n in points)) for name, s in (("ring", ring_s), ("leader", 1e-3))
        )
        return explain(four, "all_gather", 1 << 24, table=TuningTable("1+abc", ("CPU",) * 4, four, times))

    tied = found_for(0.95e-3)
    assert tied.choice == "leader" and "ring is within 10%, and is predicted to take 1.1" in tied.reason
    assert found_for(0.9e-3).choice == "ring"


def test_an_explanation_has_measured_times_and_says_what_decided():
    found = explain(TOPOLOGY, "all_reduce", 1 << 20, table=TABLE)
    by_name = {candidate.algorithm: candidate for candidate in found.candidates}
    assert by_name["ring"].measured_s == pytest.approx(1e-3)
    assert by_name["tree"].measured_s is None
    assert found.choice == "ring" and "ring is measured fastest" in found.reason
    head, *rows = str(found).splitlines()[1:-1]
    assert "measured" in head and len(rows) == len(found.candidates)
    assert format_s(by_name["ring"].measured_s) in next(row for row in rows if " ring " in row)
    beyond = explain(TOPOLOGY, "all_reduce", 1 << 26, table=TABLE)
    assert "expected, from its times at other sizes, fastest" in beyond.reason
    assert "measured" not in str(explain(TOPOLOGY, "all_reduce", 1 << 20)).splitlines()[1]
