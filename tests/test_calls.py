"""Schedules of whole collectives: proved as transfers, run by the CPU engine, projected in one order for all ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from spawn import run_ranks

from pycomm.calls import CALL_PLANNERS, TILES, hierarchical_all_reduce_calls
from pycomm.check import check
from pycomm.errors import ScheduleError
from pycomm.planning import DevicePlanning
from pycomm.project import CALL, project_calls
from pycomm.simulate import simulate
from pycomm.topology import Topology

LAYOUTS = [(2, 2), (2, 3), (3, 2), (4, 1), (1, 4), (3, 3)]


def topology_of(hosts: int, ranks: int) -> Topology:
    return Topology.from_host_ids([f"h{rank // ranks}" for rank in range(hosts * ranks)])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("collective", CALL_PLANNERS)
def test_what_the_calls_promise_is_the_collective(collective: str, layout: tuple[int, int]) -> None:
    schedule = CALL_PLANNERS[collective](topology_of(*layout))
    check(schedule.expand())
    assert np.isfinite(simulate(schedule.expand(), topology_of(*layout), 1 << 20).end_s).all()
    # Without any one of its calls it is something else.
    for index, call in enumerate(schedule.calls):
        if len(schedule.partitions[call.partition][0]) == 1:
            continue  # of one rank, which has what it gets
        calls = schedule.calls[:index] + schedule.calls[index + 1 :]
        with pytest.raises(ScheduleError):
            check(replace(schedule, calls=calls).expand())


def test_ranks_of_interleaved_hosts_and_hosts_of_unequal_size() -> None:
    for planner in CALL_PLANNERS.values():
        check(planner(Topology.from_host_ids(["a", "b", "b", "a", "a", "b"])).expand())
        with pytest.raises(ScheduleError, match="as many ranks on every host; they have 2, 1"):
            planner(Topology.from_host_ids(["a", "a", "b"]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_programs_start_their_calls_in_one_order_and_wait_for_chunks_alone(layout: tuple[int, int]) -> None:
    schedule = hierarchical_all_reduce_calls(topology_of(*layout))
    programs = [project_calls(schedule, rank) for rank in range(schedule.n_ranks)]
    orders = {tuple((collective, partition) for collective, partition, _, _ in program.calls) for program in programs}
    assert len(orders) == 1
    for rank, program in enumerate(programs):
        assert (program.steps["kind"] == CALL).all()
        assert len(program.steps) == 3 * TILES
        tiles: dict[int, list[int]] = {}
        for index, step in enumerate(program.steps):
            _, _, ranks, chunks = program.calls[step["call"]]
            assert rank in ranks
            before = program.deps[step["dep_begin"] : step["dep_begin"] + step["dep_count"]].tolist()
            tile = chunks[0] // layout[1]
            earlier = tiles.setdefault(tile, [])
            assert set(before) <= set(earlier)
            assert before[-1:] == earlier[-1:]
            earlier.append(index)


def test_planning_for_devices_names_what_there_is() -> None:
    planning = DevicePlanning(topology_of(2, 2), 3)
    assert planning.program("all_gather", "hierarchical", 0, False).rank == 3
    with pytest.raises(Exception, match="broadcast has no algorithm 'hierarchical' on devices; all_reduce, "):
        planning.program("broadcast", "hierarchical", 0, False)


def test_the_cpu_engine_runs_them() -> None:
    run_ranks(_on_cpu, 4, hosts=["a", "a", "b", "b"])


def _on_cpu(group) -> None:  # type: ignore[no-untyped-def]
    for planner in CALL_PLANNERS.values():
        group.register(replace(planner(group.topology), algorithm="as_calls").expand())
    for numel in (1, 5, 40000):
        x = np.arange(numel, dtype=np.int64) + group.rank
        group.all_reduce(x, algorithm="as_calls")
        assert (x == 4 * np.arange(numel) + 6).all()
        whole = np.empty(4 * numel, np.int64)
        mine = np.arange(numel, dtype=np.int64) + 1000 * group.rank
        group.all_gather(whole, mine, algorithm="as_calls")
        assert (whole == np.concatenate([np.arange(numel) + 1000 * rank for rank in range(4)])).all()
        group.reduce_scatter(mine, whole, algorithm="as_calls")
        assert (mine == 4 * (np.arange(numel) + 1000 * group.rank)).all()
        pieces = np.arange(4 * numel, dtype=np.int64).reshape(4, numel) + 1_000_000 * group.rank
        group.all_to_all(got := np.empty_like(pieces), pieces, algorithm="as_calls")
        assert (got == np.arange(numel) + numel * group.rank + 1_000_000 * np.arange(4)[:, None]).all()
