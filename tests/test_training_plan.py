"""The planner of layouts: its parts against arithmetic of their own, its choice against every other candidate."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from training_runs import tiny

import pycomm
from pycomm.topology import Link
from training import mesh
from training.__main__ import main
from training.config import Config
from training.errors import ConfigError
from training.layer_rate import layer_flops, planning_flops
from training.layout import Layout, resolve_layout
from training.links import Links, around_cp, between_stages, groups_of, tied
from training.memory import require_fit
from training.plan_layout import Plan, _possible, search, whole_specs
from training.plan_report import settings
from training.presets import load_preset
from training.step_time import AXES, Costs, StepTime, step_time

ROOT = Path(__file__).parents[1]
FAST = Link(1e-6, 100e9, 1e-7)
RATE = 1e12
MODEL = {"vocab_size": 1024, "n_layers": 8, "d_model": 512, "n_heads": 8, "n_kv_heads": 4, "d_ff": 1536}


def dense(**train: Any) -> Config:
    config = tiny(model=MODEL, data={"seq_len": 512}, **{"global_batch": 64, "eval_sequences": 64, **train})
    return dataclasses.replace(config, plan=dataclasses.replace(config.plan, show=4, max_pp=4))


def sparse() -> Config:
    config = dense()
    experts = dataclasses.replace(config.model, n_experts=8, top_k=2, d_ff_expert=768, n_shared_experts=1)
    return dataclasses.replace(config, model=experts)


def cluster(hosts: int, ranks: int, between: Link = FAST) -> Any:
    topology = pycomm.Topology.emulated([ranks] * hosts, between, FAST)
    return dataclasses.replace(topology, reduce_bytes_per_s=1e12)


def with_layout(config: Config, accumulation: int, **layout: Any) -> Config:
    train = dataclasses.replace(config.train, accumulation=accumulation)
    return dataclasses.replace(config, layout=dataclasses.replace(config.layout, **layout), train=train)


def timed(config: Config, topology: Any, rate: float = RATE) -> StepTime:
    layout = resolve_layout(config, topology.n_ranks)
    return step_time(config, layout, Costs(config.model, whole_specs(config)), Links(topology), rate)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(4, 2, 2, 2, 2),
        Layout(2, 1, 1, 4, 3),
        Layout(8, 4, 8),
        Layout(4, 2, 2, 2, 2, experts_over_tp="spread"),
        Layout(4, 2, 2, 2, 2, experts_over_tp="split"),
        Layout(4, 2, 2, 2, 3, outermost="dp"),
        Layout(8, 1, 1, 2, 2, experts_over_tp="spread", outermost="dp"),
    ],
)
def test_groups_are_those_of_the_mesh(layout: Layout) -> None:
    places = [mesh._Place.of(rank, layout) for rank in range(layout.n_ranks)]
    colors: dict[str, Any] = {
        "tp": lambda at: (at.pp, at.dp, at.cp),
        "cp": lambda at: (at.pp, at.dp, at.tp),
        "dp": lambda at: (at.pp, at.tp),
        "ep": lambda at: (at.pp, at.replica, at.cp, None if layout.experts_over_tp == "spread" else at.tp),
        "stage": lambda at: at.pp,
        "expert_replicas": lambda at: (at.pp, at.ep, None if layout.experts_over_tp == "none" else at.tp),
    }
    for name, groups in groups_of(layout).items():
        members: dict[Any, list[int]] = {}
        for rank, at in enumerate(places):
            members.setdefault(colors[name](at), []).append(rank)
        assert sorted(groups.tolist()) == sorted(members.values()), name
    ways = [("cp", around_cp(layout))]
    ways += [("pp", between_stages(layout, stage, (stage + 1) % layout.pp)) for stage in range(layout.pp)]
    for axis, pairs in ways:
        n = getattr(layout, axis)
        assert len(pairs) == layout.n_ranks // (layout.pp if axis == "pp" else 1)
        for here, there in pairs.tolist():
            assert (getattr(places[here], axis) + 1) % n == getattr(places[there], axis)
            assert places[here]._replace(**{axis: 0}) == places[there]._replace(**{axis: 0})
    assert len(set(places)) == layout.n_ranks
    outermost = [at.pp if layout.outermost == "pp" else at.replica for at in places]
    assert outermost == sorted(outermost)
    last = layout.pp - 1
    if last:
        for group in tied(layout, last).tolist():
            assert group == sorted(group)  # as the mesh has them
            assert len({places[rank].tp for rank in group}) == 1
            assert {places[rank].pp for rank in group} == {0, last}


def test_groups_that_cross_a_nic_share_it() -> None:
    topology = cluster(2, 2, Link(0.0, 1e9, 0.0))
    nbytes = 1 << 30  # 4 ranks: 0 1 | 2 3
    alone = Links(topology).seconds(np.array([[0, 2]]), "all_gather", nbytes)
    both = Links(topology).seconds(np.array([[0, 2], [1, 3]]), "all_gather", nbytes)
    inside = Links(topology).seconds(np.array([[0, 1], [2, 3]]), "all_gather", nbytes)
    assert alone == pytest.approx(nbytes / 2 / 1e9, rel=0.02)  # each sends its half
    assert both == pytest.approx(2 * alone, rel=0.02)
    assert inside < alone / 50
    assert Links(topology).seconds(np.array([[0], [1]]), "all_reduce", nbytes) == 0.0


def test_messages_both_ways_do_not_share_a_nic() -> None:
    topology = cluster(2, 2, Link(0.0, 1e9, 0.0))
    nbytes = 1 << 30
    one, around, two = (
        Links(topology).send_s(np.array(pairs), nbytes) for pairs in ([[0, 2]], [[0, 2], [2, 0]], [[0, 2], [1, 3]])
    )
    assert one == around == pytest.approx(nbytes / 1e9, rel=0.02)
    assert two == pytest.approx(2 * one, rel=0.02)


def test_groups_that_cross_an_uplink_share_it(tmp_path: Path) -> None:
    hosts = cluster(4, 1).hosts
    text = "".join(
        f'[[hosts]]\nname = "{host.name}"\nranks = [{i}]\nswitch = "rack{i // 2}"\n'
        "nic = { latency_s = 0, bytes_per_s = 1e11 }\n"
        for i, host in enumerate(hosts)
    )
    racks = "".join(
        f'[[switches]]\nname = "rack{i}"\nuplink = {{ latency_s = 0, bytes_per_s = 1e9 }}\n' for i in (0, 1)
    )

    def seconds(groups: list[list[int]], path: Path) -> float:
        return Links(pycomm.Topology.load(path)).seconds(np.array(groups), "all_gather", 1 << 30)

    path = tmp_path / "racks.toml"
    path.write_text(racks + text)
    assert seconds([[0, 2]], path) == pytest.approx((1 << 29) / 1e9, rel=0.02)
    assert seconds([[0, 2], [1, 3]], path) == pytest.approx((1 << 30) / 1e9, rel=0.02)
    assert seconds([[0, 1], [2, 3]], path) < 0.1


@pytest.mark.parametrize(
    "preset", ["default", "gpt2", "llama_8b", "mixtral_8x7b", "deepseek_moe_16b", "deepseek_v2_lite", "deepseek_v3"]
)
def test_flops_of_the_parts_are_those_of_the_model(preset: str) -> None:
    config = load_preset(preset)
    costs = Costs(config.model, whole_specs(config))
    core = costs.core(config.data.seq_len) * config.model.n_layers
    assert 3 * (sum(costs.blocks) + costs.head + core) == pytest.approx(
        config.model.flops_per_token(config.data.seq_len), rel=1e-5
    )


@pytest.mark.parametrize(
    "model",
    [
        {"block": "llama"},
        {"block": "gpt2"},
        {"n_experts": 8},
        {"d_model": 8192},
        {"kv_lora_rank": 8, "qk_rope_head_dim": 4},
    ],
)
def test_the_rate_to_plan_with_is_given_or_measured(model: dict[str, Any]) -> None:
    config = load_preset("tiny")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    assert 1e6 < layer_flops(config) < 1e15
    given = dataclasses.replace(config, plan=dataclasses.replace(config.plan, tflops=0.5))
    assert planning_flops(given) == 0.5e12


def test_the_search_keeps_to_what_it_may_try() -> None:
    config = dense()
    few = dataclasses.replace(config, plan=dataclasses.replace(config.plan, max_cp=2, max_pp=1))
    tried = [layout for _, layout in _possible(few, 8, Counter())]
    assert {layout.cp for layout in tried} == {1, 2}
    assert {layout.pp for layout in tried} == {1}


def test_one_rank_computes_and_waits_for_nobody() -> None:
    config = dense()
    time = timed(config, cluster(1, 1))
    tokens = config.train.global_batch * config.data.seq_len
    assert time.total_s == pytest.approx(tokens * config.model.flops_per_token(512) / RATE, rel=1e-6)
    assert time.parts == {"compute": time.compute_s, "bubble": 0.0, **dict.fromkeys(AXES, 0.0)}


@pytest.mark.parametrize("accumulation", [4, 8, 16])
def test_the_bubble_is_that_of_the_schedule(accumulation: int) -> None:
    config = with_layout(dense(), accumulation, pp=4, schedule="1f1b")
    time = timed(config, cluster(1, 4))
    costs = Costs(config.model, whole_specs(config))
    tokens = 64 / accumulation * 512
    stage = 3 * tokens * 2 * (costs.blocks[0] + costs.core(512)) / RATE  # two layers, forward and backward
    head = 3 * tokens * costs.head / RATE
    assert time.compute_s == pytest.approx(accumulation * (stage + head))  # the last stage is the busiest
    assert time.bubble_s == pytest.approx(3 * stage)  # the three stages before it, once down and once up
    assert time.total_s == pytest.approx(sum(time.parts.values()))
    assert timed(config, cluster(1, 4, FAST)).exposed_s["pp"] < 0.01 * time.total_s


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_costs_a_forward_of_what_it_drops(recompute: str) -> None:
    time, plain = (timed(dense(recompute=each), cluster(1, 1)) for each in (recompute, "none"))
    config = dense()
    tokens = config.train.global_batch * config.data.seq_len
    costs = Costs(config.model, whole_specs(config))
    core = 8 * costs.core(512)
    dropped = core if recompute == "selective" else core + sum(costs.blocks)
    assert time.compute_s - plain.compute_s == pytest.approx(tokens * dropped / RATE)


def test_tensor_parallel_waits_are_those_of_its_collectives() -> None:
    config = with_layout(dense(), 1, tp=2)
    topology = cluster(1, 2)
    group, whole = np.array([[0, 1]]), 512 * 64 * 512 * 4  # fp32 [S, B, D]
    of = Links(topology)
    gather, scatter = (of.seconds(group, each, whole) for each in ("all_gather", "reduce_scatter"))
    maximum, sums = (of.seconds(group, "all_reduce", 4 * k * config.train.loss_chunk) for k in (1, 2))
    n_chunks = 512 * 64 // config.train.loss_chunk
    halves = 2 * 8 * 2  # attention and feed-forward, of 8 layers, forward and backward
    expected = (halves + 2) * (gather + scatter) + n_chunks * (maximum + sums)  # 2: embedding and head
    assert timed(config, topology).exposed_s["tp"] == pytest.approx(expected)


def test_what_tensor_parallel_products_hide_is_not_waited_for() -> None:
    """Across hosts; on one host the cores compute, and only "always" splits. The sums are written out here."""
    topology, rate = cluster(2, 1, Link(1e-5, 1e9, 1e-6)), 1e11
    never, auto, always = (
        timed(with_layout(dense(), 1, tp=2, tp_overlap=each), topology, rate).exposed_s["tp"]
        for each in ("never", "auto", "always")
    )
    tokens, d, of, pair = 512 * 64, 512, Links(topology), np.array([[0, 1]])
    whole = {each: of.seconds(pair, each, tokens * d * 4) for each in ("all_gather", "reduce_scatter")}
    ends = never - 2 * 8 * 2 * sum(whole.values())
    expected = {"auto": ends, "always": ends}
    for inward, outward in ((2 * 512, 512), (2 * 1536, 1536)):  # query, key and value, out; gate and up, down
        for width, collective in itertools.product((inward, outward), whole):  # forward the one, backward the other
            small = of.seconds(pair, collective, 1024)
            product = 2 * d * width * tokens / 2 / rate
            for way, most in (("auto", 8), ("always", 2)):
                rest = whole[collective] - small  # one part goes to the other rank
                n = max(1, min(most, int(rest / 10 / (small + 2e-5)))) if way == "auto" else most
                piece, hop = product / (2 * n), rest / n + small + 2e-5
                ring = max(product + hop, n * hop + piece)
                hidden = whole[collective] + product - ring
                if way == "always" or ring <= 0.95 * (whole[collective] + product):
                    assert hidden > 0
                    expected[way] += 8 * (whole[collective] - hidden)
                else:
                    expected[way] += 8 * whole[collective]
    assert auto == pytest.approx(expected["auto"], rel=1e-3)
    assert always == pytest.approx(expected["always"], rel=1e-3)
    assert auto < 0.8 * never
    inside = [
        timed(with_layout(dense(), 1, tp=2, tp_overlap=each), cluster(1, 2), rate).exposed_s["tp"]
        for each in ("never", "auto", "always")
    ]
    assert inside[0] == inside[1] != inside[2]
    for model in ({"n_experts": 8, "n_shared_experts": 1}, {"block": "gpt2", "n_kv_heads": 8}):
        config = dense()
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
        waits = [
            timed(with_layout(config, 1, tp=2, tp_overlap=each), topology, rate).exposed_s["tp"]
            for each in ("auto", "never")
        ]
        assert waits[0] < waits[1], model


def test_copies_outermost_keep_a_pipeline_off_the_slow_link() -> None:
    """Two hosts of two stages: the stages' messages cross, or the sums of gradients do."""
    topology = cluster(2, 2, Link(1e-5, 1e8, 1e-6))
    stages, copies = (
        timed(with_layout(dense(), 8, pp=2, schedule="1f1b", outermost=each), topology) for each in ("pp", "dp")
    )
    assert stages.exposed_s["pp"] > 20 * copies.exposed_s["pp"]
    assert stages.exposed_s["dp"] < copies.exposed_s["dp"]
    assert stages.compute_s == copies.compute_s
    tried = [(each.pp > 1 and each.replicas > 1, each.outermost) for _, each in _possible(sparse(), 8, Counter())]
    assert set(tried) == {(False, "pp"), (True, "pp"), (True, "dp")}
    assert tried.count((True, "pp")) == tried.count((True, "dp"))
    for sequences, best in ((64, "pp"), (256, "dp")):  # gradients are as many however long a step is
        config = dense(global_batch=sequences)
        plan = chosen(dataclasses.replace(config, plan=dataclasses.replace(config.plan, show=40)), topology)
        pipelines = [each.layout for each, _ in plan.fitting if each.layout.pp == 2 and each.layout.dp == 2]
        assert [each.outermost for each in pipelines] == [best]


def test_each_message_between_stages_takes_the_time_of_its_own_link() -> None:
    """Four stages on two hosts: one boundary of three crosses. Messages are shorter than actions, and fill the pipe."""
    slow = Link(1e-5, 1e9, 1e-6)
    config = with_layout(dense(), 16, pp=4, schedule="1f1b")
    two, four = (timed(config, cluster(*shape, slow)).exposed_s["pp"] for shape in ((2, 2), (4, 1)))
    assert 0 < two < 0.5 * four


@pytest.mark.parametrize("context", ["ring", "ulysses"])
def test_context_parallel_ranks_pay_for_the_latents_they_exchange(context: str) -> None:
    topology, tp, cp, rate = cluster(4, 1, Link(1e-5, 1e9, 1e-6)), 2, 2, 1e15
    latent = dataclasses.replace(dense().model, n_kv_heads=8, kv_lora_rank=32, qk_rope_head_dim=16, v_head_dim=64)
    config = with_layout(dataclasses.replace(dense(), model=latent), 1, tp=tp, cp=cp, context=context)
    of_latents = timed(config, topology, rate).exposed_s["cp"]
    of_heads = timed(with_layout(config, 1, context_latents=False), topology, rate).exposed_s["cp"]
    of, tokens = Links(topology), 512 * 64 // cp
    pairs = np.array([[0, 2], [1, 3]])
    if context == "ring":  # the link is so slow beside the rate that all of it is waited for: rows, and fp32 gradients
        per_layer = {
            width: 2 * of.send_s(pairs, tokens * width * 4) + 2 * of.send_s(pairs, tokens * width * 4)
            for width in (32 + 16, 8 // tp * (64 + 16 + 64))
        }
    else:
        both = [of.seconds(pairs, "all_to_all", tokens * 8 // tp * width * 4) for width in (64 + 16, 64)]
        ways = [of.seconds(pairs, way, cp * tokens * (32 + 16) * 4) for way in ("all_gather", "reduce_scatter")]
        per_layer = {32 + 16: 2 * sum(both) + sum(ways), 8 // tp * (64 + 16 + 64): 4 * sum(both)}
    found = of_latents, of_heads
    assert found == pytest.approx([8 * each for each in per_layer.values()], rel=0.02)
    made = 2 * tokens * 32 * 8 // tp * (64 + 64) / 1e9  # seconds of one rank's rows at a rate that compute takes long
    slow = timed(with_layout(config, 1), cluster(4, 1), 1e9).exposed_s["cp"]
    assert slow == pytest.approx(8 * 7 * made, rel=0.02) if context == "ring" else slow < made


def test_zero_stages_pay_for_what_they_gather_and_reduce_again() -> None:
    slow = cluster(4, 1, Link(1e-5, 1e8, 1e-6))
    one, two, three = (timed(with_layout(dense(), 4, zero=zero), slow).exposed_s["dp"] for zero in (1, 2, 3))
    assert one < two < three  # a link this slow hides nothing: 1, 4 reductions, and 8 gathers beside


LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"tp": 4}),
    (2, {"cp": 2, "tp": 2}),
    (2, {"cp": 2, "context": "ulysses", "zero": 2}),
    (8, {"pp": 4, "schedule": "1f1b"}),
    (8, {"pp": 4, "schedule": "interleaved", "chunks": 2}),
    (8, {"pp": 2, "schedule": "zbv", "zero": 3}),
    (4, {"pp": 2, "schedule": "zb_h1", "tp": 2, "zero": 1}),
    (2, {"ep": 2, "zero": 3}),
    (4, {"ep": 4, "pp": 2}),
]


@pytest.mark.parametrize(("accumulation", "layout"), LAYOUTS)
def test_a_faster_link_never_makes_a_step_slower(accumulation: int, layout: dict[str, Any]) -> None:
    config = with_layout(sparse() if "ep" in layout else dense(), accumulation, **layout)
    totals = [timed(config, cluster(4, 2, Link(5e-5, 1e6 * 4**power, 5e-6))).total_s for power in range(8)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]


def chosen(config: Config, topology: Any) -> Plan:
    return search(config, topology, RATE)


@pytest.mark.parametrize("gib", [0.0, 0.5])
def test_the_choice_is_valid_fits_and_nothing_that_fits_is_faster(gib: float) -> None:
    config = dataclasses.replace(dense(memory_gib=gib), layout=dataclasses.replace(dense().layout, auto=True))
    topology = cluster(2, 4, Link(2e-5, 1e9, 1e-6))
    plan = chosen(config, topology)
    best, specs = plan.first, whole_specs(config)
    assert resolve_layout(best.config, 8) == best.layout
    assert not best.config.layout.auto
    memory = require_fit(best.config, best.layout, specs)
    assert memory == plan.fitting[0][1]
    assert gib == 0 or memory.total <= gib * 2**30
    costs, of = Costs(config.model, specs), Links(topology)
    n_tried, n_smaller = 0, 0
    for each, layout in _possible(config, 8, Counter()):
        n_tried += 1
        if step_time(each, layout, costs, of, RATE).total_s < best.time.total_s:
            n_smaller += 1
            with pytest.raises(ConfigError, match=r"train\.memory_gib allows"):
                require_fit(each, layout, specs)
    assert n_tried == plan.n_timed > 100
    assert (n_smaller > 0) == (len(plan.unfit) > 0) == (gib > 0)
    order = [each.time.total_s for each, _ in plan.fitting]
    assert order == sorted(order)
    assert len({each.mesh for each, _ in plan.fitting}) == len(order) == 4


def test_a_slow_link_between_hosts_keeps_tensor_parallel_ranks_together() -> None:
    config = dense(global_batch=1)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, n_kv_heads=8),
        plan=dataclasses.replace(config.plan, max_cp=1),  # which would take its place
    )
    fast, slow = (cluster(2, 4, link) for link in (FAST, Link(1e-4, 2.5e7, 1e-5)))  # slow: 200 Mbit/s
    assert chosen(config, fast).first.layout.tp == 8
    first = chosen(config, slow).first
    assert first.layout.tp > 1
    assert all(len(set(slow.host_index[group].tolist())) == 1 for group in groups_of(first.layout)["tp"])


def test_experts_stay_in_the_search() -> None:
    config = dataclasses.replace(sparse(), plan=dataclasses.replace(sparse().plan, show=40))
    plan = chosen(config, cluster(2, 2))
    assert {each.layout.ep for each, _ in plan.fitting} == {1, 2, 4}
    exchanging = [each.layout.ep > 1 or each.layout.experts_over_tp == "spread" for each, _ in plan.fitting]
    assert [each.time.exposed_s["ep"] > 0 for each, _ in plan.fitting] == exchanging
    tried = {(each.tp > 1, each.experts_over_tp) for _, each in _possible(sparse(), 4, Counter())}
    assert tried == {(False, "none"), (True, "none"), (True, "spread"), (True, "split")}


def test_experts_over_tensor_parallel_ranks_are_timed_by_what_they_send() -> None:
    topology, tokens, width = cluster(2, 2), 512 * 32, 512  # of a micro-batch on 2 data parallel ranks
    none, spread, split = (
        timed(with_layout(sparse(), 1, tp=2, ep=2, experts_over_tp=each), topology).exposed_s
        for each in ("none", "spread", "split")
    )
    of, all_ranks, pairs = Links(topology), np.array([[0, 1, 2, 3]]), np.array([[0, 2], [1, 3]])
    exchanges = 8 * 4  # layers; there and back, forward and backward
    rows = tokens * 2 * width * 4  # fp32, two experts a token
    assert none["ep"] == pytest.approx(exchanges * of.seconds(pairs, "all_to_all", rows / 2))
    assert spread["ep"] == pytest.approx(exchanges * of.seconds(all_ranks, "all_to_all", rows / 2))
    assert split["ep"] == pytest.approx(exchanges * of.seconds(pairs, "all_to_all", rows))
    tp = np.array([[0, 1], [2, 3]])
    gather, scatter = (of.seconds(tp, each, tokens * width * 4) for each in ("all_gather", "reduce_scatter"))
    routes = of.seconds(tp, "all_gather", tokens * 2 * 12)  # an fp32 weight and an int64 expert
    routes += of.seconds(tp, "reduce_scatter", tokens * 2 * 4)  # gradients of weights
    assert spread["tp"] == none["tp"]
    assert split["tp"] - none["tp"] == pytest.approx(8 * (2 * (gather + scatter) + routes))


def test_what_cannot_be_planned_is_named(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match=r"none of \d+ layouts of 4 ranks fits; .* train.memory_gib allows 0.001"):
        chosen(dense(memory_gib=0.001), cluster(1, 4))
    with pytest.raises(ConfigError, match=r"no layout of 3 ranks is possible: .*\(6\)"):
        chosen(tiny(global_batch=16, model={"n_heads": 4, "n_kv_heads": 4, "n_layers": 2}), cluster(1, 3))
    monkeypatch.setenv("RANK", "0")
    cluster(2, 2).save(tmp_path / "c.toml")
    for options, message in (
        ([], "--topology FILE"),
        (["--topology", str(tmp_path / "none.toml")], "cannot read topology"),
        (["--topology", str(tmp_path / "c.toml"), "--gpus", "8"], "--gpus is 8"),
    ):
        assert main(["plan", "tiny", *options]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["run", "tiny", "--layout.auto", "--model.n-layers", "0"]) == 2  # before its layers are timed
    assert "error: model.n_layers is 0; it must be at least 1" in capsys.readouterr().err


def test_the_command_prints_a_table_and_the_options_of_its_first_choice(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("COLUMNS", "250")
    cluster(2, 4).save(tmp_path / "c.toml")
    options = ["--gpus", "4", f"--topology={tmp_path / 'c.toml'}", "--plan.tflops", "1", "--show", "2"]
    assert main(["plan", "tiny", *options]) == 0
    printed = capsys.readouterr().out
    config = load_preset("tiny")
    config = dataclasses.replace(config, plan=dataclasses.replace(config.plan, show=2))
    plan = search(config, cluster(1, 4), 1e12)
    assert "4 ranks on 1 host, 1 TFLOP/s each" in printed
    assert str(plan.fitting[0][0]) in printed
    assert str(plan.fitting[1][0]) in printed
    assert " ".join(settings(plan.first.config, config)) in printed


GIVEN: list[dict[str, Any]] = [
    {},
    {"auto": True, "zero": 3, "zero_ranks": 4},
    {"pp": 2, "stage_layers": "3,5", "outermost": "dp"},
    {"pp": 2, "schedule": "interleaved", "chunks": 2, "ep": 0, "experts_over_tp": "split"},
]


@pytest.mark.parametrize("given", GIVEN)
def test_the_printed_options_give_the_layout_whatever_was_given(given: dict[str, Any]) -> None:
    config = with_layout(sparse(), 4, **given)
    tried = [each for each, _ in _possible(config, 8, Counter())]
    for chosen in tried[:: len(tried) // 12]:
        assert tyro.cli(Config, default=config, args=settings(chosen, config)) == chosen


@pytest.mark.parametrize(
    ("offload", "stages"), [({"offload_parameters": True}, {3}), ({"offload_gradients": True}, {2, 3})]
)
def test_offloading_finds_the_zero_that_it_needs(offload: dict[str, bool], stages: set[int]) -> None:
    """Also where a rank shares parameters with none: alone, or as a pipeline."""
    config = dense(**offload)
    assert {each.layout.zero for each, _ in _possible(config, 1, Counter())} == stages
    assert chosen(config, cluster(1, 1)).first.config.layout.zero in stages
    pipelines = {each.layout.zero for each, layout in _possible(config, 4, Counter()) if layout.pp == 4}
    assert pipelines == stages


def test_offloading_on_gpus_is_only_planned_where_it_can_be() -> None:
    config = dense(offload_optimizer=True)
    on_gpus = dataclasses.replace(config, train=dataclasses.replace(config.train, device="cuda"))
    assert {each.layout.zero for each, _ in _possible(config, 4, Counter())} == {0, 1, 2, 3}
    assert {each.layout.zero for each, _ in _possible(config, 4, Counter(), on_gpus=True)} == {0}
    assert {each.layout.zero for each, _ in _possible(on_gpus, 4, Counter())} == {0}
    with pytest.raises(ConfigError, match=r"no layout of 2 ranks is possible: train.offload_gradients is for CPUs"):
        search(dense(offload_gradients=True), cluster(1, 2), RATE, on_gpus=True)


def test_a_run_takes_the_first_choice(tmp_path: Path) -> None:
    launch = f"{sys.executable} -m pycomm launch --hosts 1 --ranks-per-host 2 -- {sys.executable}"
    run = f"-m training run tiny --layout.auto --layout.tp 77 --out-dir {tmp_path} --train.steps 2"
    done = subprocess.run(
        f"{launch} {run} --plan.tflops 0.001 --data.path {__file__}".split(),
        capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = next(line for line in done.stdout.splitlines() if "layout.auto: " in line)
    trained = next(line for line in done.stdout.splitlines() if "a new run" in line)
    assert said.split("layout.auto: ")[1].split(";")[0].split(", ")[0] in trained
