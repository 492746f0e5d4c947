"""Which way collectives on devices take: costs against arithmetic by hand, tables against costs, and what is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pycomm.calls import CALL_PLANNERS, TILES
from pycomm.cli import main
from pycomm.device_choice import HIERARCHICAL, NATIVE, choice_table, costs, explain_devices, threshold_table
from pycomm.errors import InvalidArgument
from pycomm.hosts import Link
from pycomm.planning import DevicePlanning, JobPlan, plan_devices
from pycomm.topology import Topology
from pycomm.tuner import LADDER, TIE, choose

INSIDE, ACROSS = Link(3e-6, 200e9, 4e-6), Link(20e-6, 50e9, 2e-6)


def devices(*ranks_per_host: int, inside: Link = INSIDE, across: Link = ACROSS) -> Topology:
    return Topology.emulated(ranks_per_host, across, inside)


def test_costs_are_those_of_the_algorithms_by_hand() -> None:
    """2 hosts of 4: a step inside takes 7 us, one across 22 us, starting a call 4 us."""
    nbytes = 64e6
    found = {collective: costs(devices(4, 4), collective, nbytes) for collective in CALL_PLANNERS}
    ring = 6 * 7e-6 + 22e-6 + 7 / 8 * nbytes / 50e9  # 8 ranks in a row, the slower link counts
    tree = 2 * (3 * 7e-6 + 22e-6) + 2 * nbytes / 50e9
    assert found["all_reduce"][NATIVE] == pytest.approx([min(2 * ring, tree) + 4e-6])
    assert found["all_gather"][NATIVE] == pytest.approx([ring + 4e-6])
    # Inside first, 4 ranks; then 4 pairs across, each with a quarter of the NIC, and a quarter of the bytes.
    hops = 3 * 7e-6 + 3 / 4 * nbytes / 200e9 + 4e-6 + 22e-6 + 1 / 2 * nbytes / 4 / 12.5e9 + 4e-6
    assert found["reduce_scatter"][HIERARCHICAL] == pytest.approx([hops])
    assert found["all_gather"][HIERARCHICAL] == pytest.approx([hops])
    # 4 messages to the other host from each of 4 ranks; in two steps one message, of 4 pieces.
    piece = nbytes / 8
    assert found["all_to_all"][NATIVE] == pytest.approx([20e-6 + 4 * 2e-6 + 4 * piece / 12.5e9 + 4e-6])
    inside = 3e-6 + 6 * 4e-6 + 6 * piece / 200e9 + 4e-6
    across = 20e-6 + 2e-6 + 4 * piece / 12.5e9 + 4e-6
    assert found["all_to_all"][HIERARCHICAL] == pytest.approx([inside + across])
    # Tiles overlap: what is slower decides, and the other shows once at each end.
    tile = nbytes / TILES
    scattered, reduced = 3 * 7e-6 + 3 / 4 * tile / 200e9 + 4e-6, 2 * (22e-6 + tile / 4 / 2 / 12.5e9) + 4e-6
    assert found["all_reduce"][HIERARCHICAL] == pytest.approx([2 * scattered + TILES * reduced], rel=1e-3)


@pytest.mark.parametrize("layout", [(1,), (8,), (2, 2), (8, 8, 8), (3, 1), (1, 1, 1, 1)])
def test_tables_take_what_is_cheaper(layout: tuple[int, ...]) -> None:
    topology = devices(*layout)
    for collective in CALL_PLANNERS:
        table, found = choice_table(topology, collective), costs(topology, collective, LADDER)
        assert (HIERARCHICAL in found) == (len(layout) > 1 and len(set(layout)) == 1)
        for place, nbytes in enumerate(LADDER):
            wins = HIERARCHICAL in found and found[HIERARCHICAL][place] * TIE < found[NATIVE][place]
            assert choose(table, nbytes) == (HIERARCHICAL if wins else NATIVE)
        assert all((np.diff(times) >= 0).all() and (times >= 0).all() for times in found.values())


def test_a_thin_link_makes_large_tensors_hierarchical_and_small_ones_not() -> None:
    topology = devices(8, 8, 8, 8, across=Link(20e-6, 10e9, 2e-6))
    table = choice_table(topology, "all_reduce")
    assert choose(table, 4096) == NATIVE
    assert choose(table, 256 << 20) == HIERARCHICAL
    exchange = devices(*[8] * 8, across=Link(20e-6, 50e9, 8e-6))  # many small messages of 8 us each
    assert choose(choice_table(exchange, "all_to_all"), 64 << 10) == HIERARCHICAL
    found = explain_devices(topology, "all_reduce", 256 << 20)
    assert found.choice == found.candidates[0].algorithm == HIERARCHICAL
    assert "hierarchical is predicted fastest; native takes" in str(found)
    assert explain_devices(devices(3, 1), "all_gather", 1 << 20).reason == "native is the only way there is here."
    with pytest.raises(InvalidArgument, match="broadcast on devices is NCCL's at every size"):
        costs(topology, "broadcast", 1)
    with pytest.raises(InvalidArgument, match="nbytes is -1"):
        explain_devices(topology, "all_reduce", -1)


def test_a_group_chooses_by_what_the_job_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    hosts = ("a", "b", "a", "b")
    thin = Topology.from_host_ids(hosts, Link(1e-6, 1e6), Link(1e-6, 1e9))

    def of(job: JobPlan, ranks: list[int]) -> DevicePlanning:
        return plan_devices(job, "world", ranks, ranks[0])

    everyone = [0, 1, 2, 3]
    assert of(JobPlan(hosts), everyone).choices("all_reduce", 0, False) == ((None, NATIVE),)
    assert of(JobPlan(hosts), everyone).choices("all_reduce", 0, True) == ((None, HIERARCHICAL),)  # a wire
    by_size = JobPlan(hosts, hierarchical_nbytes=1000, explains=True)
    assert of(by_size, everyone).choices("all_to_all", 0, False) == threshold_table(1000)
    assert threshold_table(1000) == ((999, NATIVE), (None, HIERARCHICAL)) and threshold_table(0) == (
        (None, HIERARCHICAL),
    )
    said = capsys.readouterr().err
    assert "group 'world' on devices: all_to_all of 0 B to 999 B: native, as PYCOMM_CUDA_HIERARCHICAL_BYTES" in said
    by_cost = JobPlan(hosts, device_topology=thin, explains=True)
    planning = of(by_cost, everyone)
    assert choose(planning.choices("all_reduce", 0, False), 1 << 20) == HIERARCHICAL
    assert "predicted fastest" in capsys.readouterr().err
    planning.choices("all_reduce", 0, False)
    assert capsys.readouterr().err == ""  # once
    # Three ranks stand two and one on their hosts; two of one host cross nothing.
    assert of(by_cost, [0, 1, 2]).choices("all_reduce", 0, False) == ((None, NATIVE),)
    assert of(by_cost, [0, 2]).choices("all_reduce", 0, False) == ((None, NATIVE),)


def test_the_command_explains_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devices(4, 4).save(tmp_path / "gpus.toml")
    assert main(["explain", "all_reduce", "64MiB", "--devices", "--topology", str(tmp_path / "gpus.toml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "all_reduce of 64 MiB on 8 ranks, 2 hosts (host0: 4, host1: 4)"
    assert {line.removeprefix("  ->").split()[0] for line in lines[2:4]} == {NATIVE, HIERARCHICAL}
    assert sum("->" in line for line in lines) == 1 and "predicted fastest" in lines[4]
    with pytest.raises(SystemExit):
        main(["explain", "all_reduce", "64MiB", "--devices"])
    assert "--devices needs --topology" in capsys.readouterr().err
