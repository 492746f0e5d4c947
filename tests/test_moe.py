"""The expert exchange on 4 ranks of 2 hosts, unevenly spread and scattered, in one set of processes.

Every way of exchanging gives the same bits, those of dense arithmetic (moe_cases.py), gradients included."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import Array, Batch, Case, batch, dense, factors, replay, run_experts, through
from spawn import run_ranks
from torch import Tensor

from pycomm.errors import InvalidArgument, PycommError
from pycomm.moe import (
    ExpertParallel,
    MegatronDispatcher,
    Placement,
    StaticExpertParallel,
    TorchtitanDispatcher,
    all_to_all_single,
)

HOSTS = ["a", "b", "a", "a"]
RANKS_OF_HOSTS = [[0, 2, 3], [1]]
MODES = ("none", "rank", "host")
EVERY_MODE: list[dict[str, Any]] = [
    {"dedup": mode, "chunks": chunks}
    for mode, chunks in (*zip(MODES, (1, 1, 1)), *zip(MODES, (3, 2, 4)))  # noqa: B905
]

Check = Callable[[Any], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def run_checks(group: Any) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        try:
            function(group)
            found[name] = None
        except (Exception, pytest.fail.Exception):
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, str | None]]:
    return run_ranks(run_checks, 4, hosts=HOSTS)


def same_bits(ours: Array, expected: Array) -> bool:
    return ours.shape == expected.shape and np.array_equal(ours, expected, equal_nan=True)


def refuses(group: Any, text: str, call: Callable[[], Any]) -> None:
    """All ranks get the error; no rank is left waiting."""
    with pytest.raises(InvalidArgument, match=text):
        call()
    group.barrier(timeout_s=10)


# Every way gives the same.

cases = st.builds(
    lambda n_tokens, num_experts, top_k, hidden, routing, dtype, seed: Case(
        tuple(n_tokens), num_experts, min(top_k, num_experts), hidden, routing, True, dtype, seed
    ),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 140),
    st.sampled_from(["uniform", "uniform", "hot"]),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(0, 99),
)
placements = st.sampled_from(["even", "uneven", "replicas"])


def placed(kind: str, num_experts: int) -> Placement | None:
    if kind == "even":
        return None
    held: list[list[int]] = [[], [], [], []]
    for e in range(num_experts):
        held[(3 * e) % 4 if e % 3 else 2].append(e)
        if kind == "replicas":
            held[1].insert(0, e)
    return Placement(tuple(tuple(dict.fromkeys(each)) for each in held))


def one_property(group: Any, case: Case, kind: str, layout: str, align: int) -> str | None:
    expected = dense(case, group.rank)
    first: list[Array] | None = None
    for way in EVERY_MODE:
        if layout == "rank" and way["dedup"] == "none":
            continue
        ours = through(group, case, layout, align=align, placement=placed(kind, case.num_experts), **way)
        first = first or ours
        for name, a, b in zip(("y", "x.grad", "weights.grad", "rows"), ours, first, strict=True):
            if not same_bits(a, b):
                return f"{name} of {way} differs from the first way's"
        for name, a, b in zip(("y", "x.grad", "weights.grad"), ours, expected, strict=False):
            if not same_bits(a.astype(np.float64), b):
                return f"{name} of {way} is not the dense one"
    return None


@check
def any_shape_in_every_way(group: Any) -> None:
    """Rank 0 draws the cases and tells the others."""

    def tell(message: Any) -> Any:
        data = np.frombuffer(pickle.dumps(message).ljust(4096, b"\0"), np.uint8).copy()
        group.broadcast(data, 0)
        return pickle.loads(data.tobytes())

    def run(case: Any) -> str | None:
        problem = one_property(group, *case)
        failed = np.array([problem is not None], np.int64)
        group.all_reduce(failed, "max")
        return problem or ("another rank's result" if failed[0] else None)

    if group.rank == 0:

        @settings(max_examples=18, deadline=None, database=None, derandomize=True)
        @given(cases, placements, st.sampled_from(["expert", "expert", "token", "rank"]), st.sampled_from([1, 4]))
        def every(case: Case, kind: str, layout: str, align: int) -> None:
            tell((case, kind, layout, align))
            problem = run((case, kind, layout, align))
            assert problem is None, problem

        try:
            every()
        finally:
            tell(None)
    else:
        while (case := tell(None)) is not None:
            run(case)


@check
def fractions_in_every_way_are_the_replayed_sums(group: Any) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        case = Case((7, 0, 5, 9), 10, 4, 131, whole=False, dtype=dtype, seed=3)
        experts = Placement.even(10, 4).experts
        expected = replay(case, group.rank, RANKS_OF_HOSTS, list(experts))
        first: list[Array] | None = None
        for way in EVERY_MODE:
            ours = through(group, case, **way)
            first = first or ours
            assert all(same_bits(a, b) for a, b in zip(ours, first, strict=True)), (dtype, way)
            assert all(same_bits(a, b) for a, b in zip(ours[:2], expected, strict=True)), (dtype, way)
        again = through(group, case, dedup="host")
        assert first is not None and all(same_bits(a, b) for a, b in zip(again, first, strict=True))


@check
def a_wire_gives_the_same_bits_in_every_way_within_its_bound(group: Any) -> None:
    case = Case((6, 3, 0, 8), 8, 3, 300, whole=False, seed=5)
    exact = through(group, case, dedup="none")
    for wire in ("bf16", "fp8"):
        first: list[Array] | None = None
        for way in EVERY_MODE:
            ours = through(group, case, wire=wire, **way)
            first = first or ours
            assert all(same_bits(a, b) for a, b in zip(ours, first, strict=True)), (wire, way)
        assert first is not None
        rows, true = first[3], exact[3]
        if wire == "bf16":
            bound = 2.0**-8 * np.abs(true)
        else:
            largest = np.abs(np.pad(true, ((0, 0), (0, -300 % 128))).reshape(len(true), -1, 128)).max(-1)
            block = largest.repeat(128, axis=1)[:, :300]
            bound = np.maximum(2.0**-4 * np.abs(true), block / 458752) + 2.0**-22 * block
        assert (np.abs(rows - true) <= bound).all(), wire
        assert not same_bits(rows, true) or len(true) == 0, "it was not coded"
        # y: each term's error of a row, and bf16's of each host's sum.
        one = batch(case, group.rank)
        magnitude = np.zeros((len(one.x), 300))
        hosts = np.zeros((len(one.x), 300))
        for t in range(len(one.x)):
            for k, e in enumerate(one.idx[t].tolist()):
                w = abs(float(one.weights[t, k])) * factors(case, e).abs().numpy()
                row = one.x[t].abs().numpy()
                share = 2.0**-8 * row if wire == "bf16" else np.maximum(2.0**-4 * row, np.abs(row).max() / 458752)
                magnitude[t] += w * share * 1.001
                hosts[t] += w * row * 1.07
        assert (np.abs(first[0] - exact[0]) <= magnitude + 2.0**-8 * hosts + 1e-5).all(), wire


@check
def many_experts_and_float64_in_every_way(group: Any) -> None:
    """Ids told as int16; K at its most. float64 is summed in fp32, which whole numbers survive."""
    for num_experts, top_k, dtype in ((300, 32, "float32"), (9, 3, "float64")):
        case = Case((3, 0, 2, 4), num_experts, top_k, 5, dtype=dtype, seed=31)
        expected = dense(case, group.rank)
        for way in EVERY_MODE:
            for mine, exact in zip(through(group, case, **way), expected, strict=False):
                assert same_bits(mine.astype(np.float64), exact), (num_experts, dtype, way)


@check
def ids_of_four_bytes_reach_their_experts(group: Any) -> None:
    n = 33_000  # two of a token's experts are above what int16 holds
    one = batch(Case((2, 2, 2, 2), 4, 3, 5), group.rank)
    idx = torch.tensor([[0, 32_767, 32_768], [n - 1 - group.rank, n - 100, 8250 * group.rank]])
    for mode in MODES:
        ep = ExpertParallel(group, n, dedup=mode)
        dispatched = ep.dispatch(one.x, idx, one.weights)
        held = dispatched.expert_counts.nonzero().flatten() + 8250 * group.rank
        expected = [[0], [8250], [16_500], [24_750, 32_767, 32_768, n - 100, n - 4, n - 3, n - 2, n - 1]][group.rank]
        assert held.tolist() == expected
        assert same_bits(ep.combine(dispatched.rows, dispatched).numpy(), _plain_sum(one).numpy())


@check
def rows_reach_an_expert_by_source_rank_and_token(group: Any) -> None:
    tokens = torch.arange(4)
    x = (group.rank * 10 + tokens).float().unsqueeze(-1)
    idx = torch.stack([(tokens + 1) % 4, tokens], -1)
    for mode in MODES:
        dispatched = ExpertParallel(group, 4, dedup=mode, align=8).dispatch(x, idx, torch.ones(4, 2))
        expected = [s * 10 + t for s in range(4) for t in range(4) if group.rank in (t, (t + 1) % 4)]
        assert dispatched.rows.flatten().tolist() == expected and len(expected) == 8
        assert dispatched.expert_counts.tolist() == [8] and dispatched.expert_offsets.tolist() == [0, 8]
        assert dispatched.weights.tolist() == [1.0] * 8


@check
def sizes_are_exchanged_once(group: Any) -> None:
    """Dispatch and combine with a plan, and both backwards, exchange rows and nothing of the layout."""

    class Counting:
        def __init__(self) -> None:
            self.rank, self.size, self.gathers, self.moves = group.rank, group.size, 0, 0

        def all_to_all(self, *arguments: Any) -> Any:
            self.moves += 1
            return group.all_to_all(*arguments)

        def all_gather(self, *arguments: Any) -> Any:
            self.gathers += 1
            return group.all_gather(*arguments)

    counting = Counting()
    ep = ExpertParallel(counting, 4)
    one = batch(Case((6, 5, 4, 3), 4, 2, 5), group.rank)
    x = one.x.requires_grad_()
    plan = ep.plan(one.idx)
    seen = [(counting.gathers, counting.moves)]
    for _ in range(2):
        dispatched = ep.dispatch(x, one.idx, one.weights, plan)
        seen.append((counting.gathers, counting.moves))
        y = ep.combine(dispatched.rows * 2, dispatched)
        seen.append((counting.gathers, counting.moves))
        y.backward(one.grad)
        seen.append((counting.gathers, counting.moves))
    # A gather of some words opens each forward call: whether all ranks have what it takes. Backward moves rows alone.
    assert seen == [(2, 0), (3, 2), (4, 3), (4, 6), (5, 8), (6, 9), (6, 12)], seen


@check
def ranks_without_experts_meet_in_backward(group: Any) -> None:
    """Only experts' parameters require gradients, and one rank has no expert."""
    placement = Placement(((0, 1), (), (2,), (3,)))
    for mode in MODES:
        ep = ExpertParallel(group, 4, dedup=mode, placement=placement)
        one = batch(Case((3, 3, 3, 3), 4, 2, 5), group.rank)
        dispatched = ep.dispatch(one.x, one.idx, one.weights)
        scale = torch.ones(5, requires_grad=True)
        out = torch.cat([part * scale for part in dispatched.rows.split(dispatched.sizes)] or [dispatched.rows])
        y = ep.combine(out, dispatched)
        assert y.requires_grad
        y.backward(one.grad)
        if placement.experts[group.rank]:
            assert scale.grad is not None


# Capacity, static sizes, loss of ranks.


@check
def overflow_raises_with_the_exact_count_or_drops_and_counts(group: Any) -> None:
    case = Case((3, 3, 3, 3), 4, 2, 6, routing="hot")  # experts 2 and 3 get 12 tokens each
    one = batch(case, group.rank)
    for mode in MODES:
        ep = ExpertParallel(group, 4, max_tokens=7, dedup=mode)
        text = r"expert 2 on rank 2 gets 12 tokens, 10 slots too many in all; max_tokens is 7; raise it to 12"
        refuses(group, text, lambda ep=ep: ep.dispatch(one.x, one.idx, one.weights))  # type: ignore[misc]
        ExpertParallel(group, 4, max_tokens=12, dedup=mode).plan(one.idx)
        ep = ExpertParallel(group, 4, max_tokens=7, dedup=mode, drop=True)
        dispatched = ep.dispatch(one.x, one.idx, one.weights)
        assert dispatched.plan.dropped == 10
        assert dispatched.expert_counts.tolist() == [[0], [0], [7], [7]][group.rank]
        y = ep.combine(run_experts(case, dispatched, (group.rank,), "expert"), dispatched)
        kept = min(3, max(0, 7 - 3 * group.rank))
        assert same_bits(y[:kept].numpy().astype(np.float64), dense(case, group.rank)[0][:kept])
        assert not y[kept:].any()


@check
def static_sizes_give_the_same_bits(group: Any) -> None:
    """With room for all, where some rows are dropped, and without tokens; places that no row takes hold NaN."""
    for dtype, n, room in itertools.product(("float32", "bfloat16", "float16"), (5, 0), (20, 2)):
        case = Case((n,) * 4, 6, 3, 33, whole=False, dtype=dtype, seed=11)
        placement = placed("replicas", 6)
        assert placement is not None
        exact = through(group, case, dedup="rank", placement=placement, max_tokens=room, drop=True)
        one = batch(case, group.rank)
        x, weights = one.x.clone().requires_grad_(), one.weights.clone().requires_grad_()
        ep = StaticExpertParallel(group, 6, room, 33, 3, placement, drop=True)
        dispatched = ep.dispatch(x, one.idx, weights)
        experts, counts = placement.experts[group.rank], dispatched.expert_counts.tolist()
        assert dispatched.rows.shape == (len(experts), room, 33)
        assert (int(dispatched.plan.dropped) > 0) == (n > 0 and room == 2)
        rows = [each[:count] for each, count in zip(dispatched.rows.detach(), counts, strict=True)]
        table = torch.stack([factors(case, e) for e in experts]) if experts else torch.empty(0, 33)
        used = torch.arange(room) < torch.tensor(counts).view(-1, 1, 1).mT
        out = torch.where(used.mT, dispatched.rows * table.unsqueeze(1), torch.nan)
        y = ep.combine(out, dispatched)
        y.backward(one.grad)
        assert x.grad is not None and weights.grad is not None
        came = torch.cat(rows) if rows else dispatched.rows.flatten(0, 1)
        for ours, expected in zip((y.detach(), x.grad, weights.grad, came.detach()), exact, strict=True):
            assert same_bits(ours.float().numpy(), expected)
    one = batch(Case((5, 5, 5, 5), 6, 3, 33, seed=11), group.rank)
    small = StaticExpertParallel(group, 6, 1)
    refuses(group, "slots found no room", functools.partial(small.plan, one.idx))


@check
def static_sizes_refuse_one_ranks_bad_input_on_all(group: Any) -> None:
    one = batch(Case((2, 2, 2, 2), 4, 2, 5), group.rank)
    ep = StaticExpertParallel(group, 4, 8, 5, 2)
    bad = group.rank == 1

    def dispatch(x: Tensor = one.x, idx: Tensor = one.idx, weights: Tensor = one.weights, plan: Any = None) -> Any:
        return ep.dispatch(x, idx, weights, plan)

    far = torch.tensor([[0, 1], [2, 4]]) if bad else one.idx
    refuses(group, "rank 1: topk_idx names experts 0 to 4; there are 0 to 3", lambda: dispatch(idx=far))
    padded = torch.tensor([[0, 1], [-1, -1]]) if bad else one.idx
    dropping = StaticExpertParallel(group, 4, 8, 5, 2, drop=True)
    assert int(dropping.plan(padded).dropped) == 2
    twice = torch.tensor([[0, 1], [3, 3]]) if bad else one.idx
    for each in (ep, dropping):
        refuses(group, r"rank 1: .* twice for token 1: \[3, 3\]", functools.partial(each.plan, twice))
    few = one.weights[:, :1] if bad else one.weights
    refuses(group, r"rank 1: x is \[2, 5\], .* topk_weights \[2, 1\]", lambda: dispatch(weights=few))
    fewer = one.idx[:1] if bad else one.idx
    refuses(group, "T, the tokens of a rank: rank 0 has 2, rank 1 has 1", lambda: ep.plan(fewer))
    refuses(group, "require a gradient", lambda: dispatch(x=one.x.clone().requires_grad_(bad)))
    differing = StaticExpertParallel(group, 4, 9 if bad else 8)
    refuses(group, "settings or placement", lambda: differing.plan(one.idx))
    plan = ep.plan(one.idx)
    other = one.idx.flip(1) if bad else one.idx
    refuses(group, "rank 1: the plan is of another batch", lambda: dispatch(idx=other, plan=plan))
    dispatched = dispatch(plan=plan)
    short = dispatched.rows[:, :7] if bad else dispatched.rows
    refuses(group, r"rank 1: expert_out is \[7, 5\]", lambda: ep.combine(short, dispatched))
    assert same_bits(ep.combine(dispatched.rows, dispatched).numpy(), _plain_sum(one).numpy())  # it still works


@check
def static_ranks_without_experts_meet_in_backward(group: Any) -> None:
    """Only experts' parameters require gradients, and one rank has no expert."""
    ep = StaticExpertParallel(group, 4, 12, placement=Placement(((0, 1), (), (2,), (3,))))
    one = batch(Case((3, 3, 3, 3), 4, 2, 5), group.rank)
    dispatched = ep.dispatch(one.x, one.idx, one.weights)
    scale = torch.ones(5, requires_grad=True)
    ep.combine(dispatched.rows * scale if ep.n_local else dispatched.rows, dispatched).backward(one.grad)
    assert scale.grad is not None or not ep.n_local


@check
def a_masked_rank_gets_nothing_and_its_replicas_take_over(group: Any) -> None:
    case = Case((4, 4, 4, 4), 4, 2, 5)
    one = batch(case, group.rank)
    replicas = Placement(((0, 1), (1, 2), (2, 3), (3, 0)))
    ep = ExpertParallel(group, 4, placement=replicas, dedup="host")
    stale = ep.dispatch(one.x, one.idx, one.weights)
    ep.mask(1)
    refuses(group, "before mask", lambda: ep.combine(stale.rows, stale))
    refuses(group, "before mask", lambda: ep.dispatch(one.x, one.idx, one.weights, stale.plan))  # type: ignore[arg-type]
    dispatched = ep.dispatch(one.x, one.idx, one.weights)
    assert dispatched.plan.dropped == 0 and (group.rank != 1 or len(dispatched.rows) == 0)
    y = ep.combine(run_experts(case, dispatched, replicas.experts[group.rank], "expert"), dispatched)
    assert same_bits(y.numpy().astype(np.float64), dense(case, group.rank)[0])

    alone = ExpertParallel(group, 4)
    with pytest.raises(InvalidArgument, match=r"mask\(2\): experts \[2\] are on no other rank"):
        alone.mask(2)
    alone.mask(2, allow_lost=True)
    dispatched = alone.dispatch(one.x, one.idx, one.weights)
    everyone = torch.cat([batch(case, rank).idx for rank in range(4)])
    assert dispatched.plan.dropped == int((everyone == 2).sum())
    y = alone.combine(run_experts(case, dispatched, (group.rank,), "expert"), dispatched)
    without = dataclasses.replace(one, weights=torch.where(one.idx == 2, 0.0, one.weights))
    assert same_bits(y.numpy(), _weighted(case, without).numpy())

    # The other three ranks go on by themselves.
    survivors = group.new_group([0, 1, 3])
    if survivors is None:
        return
    rebuilt = alone.rebuild(survivors)
    dispatched = rebuilt.dispatch(one.x, one.idx, one.weights)
    y = rebuilt.combine(run_experts(case, dispatched, (group.rank,), "expert"), dispatched)
    assert same_bits(y.numpy(), _weighted(case, without).numpy())
    with pytest.raises(InvalidArgument, match=r"rebuild: experts \[2\] are on no rank of the new group"):
        ExpertParallel(group, 4, dedup="rank").rebuild(survivors, (0, 1, 3))


def _weighted(case: Case, one: Batch) -> Tensor:
    y = torch.zeros_like(one.x)
    for e in range(case.num_experts):
        y = y + one.x * factors(case, e) * (one.weights * (one.idx == e)).sum(-1, keepdim=True)
    return y


# Adapters: code written for other dispatchers.


@check
def torchtitans_dispatcher(group: Any) -> None:
    case = Case((4, 2, 0, 5), 8, 3, 6, seed=21)
    one = batch(case, group.rank)
    for before in (False, True):
        x, scores = one.x.clone().requires_grad_(), one.weights.clone().requires_grad_()
        dispatcher = TorchtitanDispatcher(ExpertParallel(group, 8, align=4), score_before_experts=before)
        rows, counts, metadata = dispatcher.dispatch(x, scores, one.idx)
        assert int(counts.sum()) == len(rows) and not (counts % 4).any()
        mine = Placement.even(8, 4).experts[group.rank]
        parts = zip(rows.split(counts.tolist()), mine, strict=True)
        routed = torch.cat([part * factors(case, e) for part, e in parts])
        out = dispatcher.combine(routed, metadata, x, lambda x: 3 * x)
        out.backward(one.grad)
        expected = dense(case, group.rank)
        shared = [3 * one.x.double().numpy(), 3 * one.grad.double().numpy(), 0]
        assert x.grad is not None and scores.grad is not None
        for ours, one_of, add in zip((out.detach(), x.grad, scores.grad), expected, shared, strict=True):
            assert same_bits(ours.double().numpy(), one_of + add)


@check
def megatrons_stages(group: Any) -> None:
    case = Case((4, 2, 6, 8), 8, 3, 6, seed=22)
    one = batch(case, group.rank)
    hidden = one.x.view(2, -1, 6).clone().requires_grad_()
    routing_map = torch.zeros(len(one.x), 8, dtype=torch.bool).scatter_(1, one.idx, True)
    probs = torch.zeros(len(one.x), 8).scatter_(1, one.idx, one.weights).requires_grad_()
    dispatcher = MegatronDispatcher(ExpertParallel(group, 8))
    states, weights = dispatcher.dispatch_preprocess(hidden, routing_map, probs)
    sent = dispatcher.token_dispatch(states, weights)
    rows, tokens_per_expert, permuted_probs = dispatcher.dispatch_postprocess(*sent)
    mine = Placement.even(8, 4).experts[group.rank]
    parts = zip(rows.split(tokens_per_expert.tolist()), mine, strict=True)
    out = torch.cat([part * factors(case, e) for part, e in parts]) * permuted_probs.unsqueeze(1)
    y = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(out)))
    assert y.shape == hidden.shape
    y.backward(one.grad.view_as(y))
    assert hidden.grad is not None and probs.grad is not None
    expected = dense(case, group.rank)
    for ours, dense_one in zip((y.detach(), hidden.grad), expected, strict=False):
        assert same_bits(ours.flatten(0, 1).double().numpy(), dense_one)
    assert same_bits(probs.grad.gather(1, one.idx).double().numpy(), expected[2])
    # One rank's mistake is told to all; a rank without tokens takes the others' number of experts.
    wrong = routing_map.clone()
    wrong[0, one.idx[0, 0]] = group.rank != 1
    text = "rank 1: token 0 has 2 experts, token 1 has 3"
    refuses(group, text, lambda: dispatcher.dispatch_preprocess(hidden, wrong, probs))
    few = probs[:, :7] if group.rank == 2 else probs
    refuses(group, "rank 2: routing_map is", lambda: dispatcher.dispatch_preprocess(hidden, routing_map, few))
    n = 0 if group.rank == 3 else 2
    free = MegatronDispatcher(ExpertParallel(group, 8))
    states, weights = free.dispatch_preprocess(hidden.flatten(0, 1)[:n], routing_map[:n], probs[:n])
    assert weights.shape == (n, 3) and len(free.token_dispatch(states, weights)[0]) >= 0


@check
def existing_code_with_all_to_all_single(group: Any) -> None:
    sends = [(group.rank + peer) % 3 for peer in range(4)]
    receives = [(peer + group.rank) % 3 for peer in range(4)]
    rows = torch.full((sum(sends), 2), float(group.rank), requires_grad=True)
    out = all_to_all_single(rows, receives, sends, group)
    assert out[:, 0].tolist() == [float(peer) for peer in range(4) for _ in range(receives[peer])]
    (out * (group.rank + 1)).sum().backward()
    assert rows.grad is not None
    assert rows.grad[:, 0].tolist() == [peer + 1.0 for peer in range(4) for _ in range(sends[peer])]
    bad = group.rank == 1
    parts = [1, 2] if bad else receives
    refuses(group, "rank 1: .* give a part for each rank", lambda: all_to_all_single(rows, parts, sends, group))
    more = [receives[0], receives[1], receives[2] + 1, receives[3]] if bad else receives
    text = "rank 1 is to receive 1 rows from rank 2, which sends it 0"
    refuses(group, text, lambda: all_to_all_single(rows, more, sends, group))
    wide = torch.ones(sum(sends), 3 if bad else 2)
    refuses(group, "the rows' type and shape", lambda: all_to_all_single(wide, receives, sends, group))
    alone = torch.ones(sum(sends), 2, requires_grad=bad)  # all meet in backward
    all_to_all_single(alone, receives, sends, group).sum().backward()
    assert (alone.grad is not None) == bad


# Bad input.


@check
def one_ranks_bad_input_is_refused_on_all(group: Any) -> None:
    one = batch(Case((2, 2, 2, 2), 4, 2, 5), group.rank)
    ep = ExpertParallel(group, 4, 5, 2)
    bad = group.rank == 1

    def dispatch(x: Tensor = one.x, idx: Tensor = one.idx, weights: Tensor = one.weights, plan: Any = None) -> Any:
        return ep.dispatch(x, idx, weights, plan)

    far = torch.tensor([[0, 1], [2, 4]]) if bad else one.idx
    refuses(group, "rank 1: topk_idx names experts 0 to 4; there are 0 to 3", lambda: dispatch(idx=far))
    twice = torch.tensor([[0, 1], [3, 3]]) if bad else one.idx
    refuses(group, r"rank 1: .* twice for token 1: \[3, 3\]", lambda: ep.plan(twice))
    few = one.weights[:, :1] if bad else one.weights
    refuses(group, r"rank 1: x is \[2, 5\], topk_idx \[2, 2\], topk_weights \[2, 1\]", lambda: dispatch(weights=few))
    wide = torch.ones(2, 6) if bad else one.x
    refuses(group, r"rank 1: x is \[2, 6\], hidden is 5", lambda: dispatch(x=wide))
    narrow = one.x.bfloat16() if bad else one.x
    refuses(group, "width, type and kind of device", lambda: dispatch(x=narrow))
    as_wide = one.x.half() if bad else one.x.bfloat16()
    refuses(group, "width, type and kind of device", lambda: dispatch(x=as_wide))
    refuses(group, "require a gradient", lambda: dispatch(x=one.x.clone().requires_grad_(bad)))
    plan = ep.plan(one.idx)
    other = one.idx.flip(0) if bad else one.idx
    refuses(group, "rank 1: the plan is of another batch: token 0", lambda: dispatch(idx=other, plan=plan))
    foreign = ExpertParallel(group, 4, 5, 2).plan(one.idx)
    refuses(group, "rank 1: the plan is of another ExpertParallel", lambda: dispatch(plan=foreign if bad else plan))
    dispatched = dispatch()
    short = torch.ones(99, 5) if bad else dispatched.rows
    refuses(group, r"rank 1: expert_out is \[99, 5\], dispatched.rows had", lambda: ep.combine(short, dispatched))
    free = ExpertParallel(group, 4)
    fewer = one.idx[:, :1] if bad else one.idx
    refuses(group, "K, the experts of a token: rank 0 has 2, rank 1 has 1", lambda: free.plan(fewer))
    differing = ExpertParallel(group, 4, align=2 if bad else 1)
    refuses(group, "settings, placement or mask", lambda: differing.plan(one.idx))
    assert same_bits(ep.combine(dispatched.rows, dispatched).numpy(), _plain_sum(one).numpy())  # it still works


def _plain_sum(one: Batch) -> Tensor:
    return one.x * one.weights.sum(-1, keepdim=True)


@check
def an_error_of_the_group_names_rank_and_stage(group: Any) -> None:
    """Last: it breaks a group. Rank 3 stays away."""
    lonely = group.new_group([0, 1, 2, 3])
    assert lonely is not None
    ep = ExpertParallel(lonely, 4, dedup="rank")
    lonely.timeout_s = 0.5
    if group.rank == 3:
        group.barrier()
        return
    one = batch(Case((2, 2, 2, 2), 4, 2, 5), group.rank)
    with pytest.raises(PycommError, match=f"moe: rank {group.rank} of 4, plan: "):
        ep.plan(one.idx)
    group.barrier()


@pytest.mark.parametrize("name", list(CHECKS))
def test_on_four_ranks(results: list[dict[str, str | None]], name: str) -> None:
    problems = [f"rank {rank}:\n{found[name]}" for rank, found in enumerate(results) if found[name] is not None]
    assert not problems, "\n".join(problems)
