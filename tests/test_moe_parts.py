"""The exchange's parts that need one process: kernels, costs, routing, placements, static sizes under fake tensors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from moe_cases import Case, batch
from torch._subclasses.fake_tensor import FakeTensorMode

from pycomm import _C
from pycomm.errors import InvalidArgument
from pycomm.moe import (
    ExpertParallel,
    Placement,
    RouterBias,
    StaticExpertParallel,
    balance_loss,
    balanced_placement,
    choose_experts,
    expert_loads,
)
from pycomm.moe import rows as rows_module
from pycomm.moe.balance import rank_loads
from pycomm.moe.cost import Dedup, Links, estimates, rows_between_hosts
from pycomm.moe.placement import Geometry, Places
from pycomm.moe.plan import Request, make_plan
from pycomm.moe.router import imbalance
from pycomm.moe.rows import Terms, combine_rows, copy_rows, decode_fp8, encode_fp8, row_dots


class OneRank:
    """A group of one, which must never be asked to communicate."""

    rank = 0
    size = 1

    def all_to_all(self, *arguments: Any) -> None:
        raise AssertionError("one rank has nobody to exchange with")

    all_gather = all_to_all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_give_the_bits_of_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    for width in (1, 127, 128, 129, 2048, 5000):
        sources = [torch.from_numpy(random.standard_normal((n, width))).to(dtype) for n in (3, 0, 5)]
        lengths = torch.tensor([0, 1, 4, 0, 7, 2])
        source = torch.from_numpy(random.choice([0, 2], int(lengths.sum())))
        rows = torch.from_numpy(random.integers(0, 3, len(source)))
        terms = Terms(source, rows, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), 7)
        weights = torch.from_numpy(random.standard_normal(len(source)).astype(np.float32))
        index = torch.where(torch.arange(len(rows)) % 5 == 4, -1, rows)
        to = torch.from_numpy(random.permutation(len(rows) + 2)[: len(rows)])
        x = sources[2] * torch.tensor(10.0) ** torch.arange(5).unsqueeze(1)
        overflown = x.clone()
        overflown[1, 0] = float("inf")

        def results() -> list[torch.Tensor]:
            sums = [
                combine_rows(torch.empty(6, width, dtype=out), sources, terms, factors)  # noqa: B023
                for out in (torch.float32, dtype)
                for factors in (weights, None)  # noqa: B023
            ]
            copied = copy_rows(torch.ones(len(rows) + 2, width, dtype=dtype), sources, source, index, to)  # noqa: B023
            coded, far = encode_fp8(x), encode_fp8(overflown)  # noqa: B023
            return [*sums, copied, coded, *(decode_fp8(each, width, dtype) for each in (coded, far))]  # noqa: B023

        native = results()
        monkeypatch.setattr(rows_module, "_native", lambda *tensors: False)
        for ours, torchs in zip(native, results(), strict=True):
            assert torch.equal(ours.nan_to_num(), torchs.nan_to_num()) and torch.equal(ours.isnan(), torchs.isnan())
        monkeypatch.undo()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dot_products_are_those_of_double_within_fp32s_rounding(dtype: torch.dtype) -> None:
    random = np.random.default_rng(2)
    for width in (0, 1, 127, 129, 256, 2500):
        a, b = (torch.from_numpy(random.standard_normal((n, width))).to(dtype) for n in (5, 7))
        for b_rows in (torch.tensor([6, 0, 3, 3, 1]), None):
            of_b = b[:5] if b_rows is None else b[b_rows]
            ours = row_dots(a, b[:5] if b_rows is None else b, b_rows)
            products = a.double() * of_b.double()
            bound = products.abs().sum(-1) * width * 2.0**-23
            assert ours.dtype == torch.float32 and ((ours - products.sum(-1)).abs() <= bound).all()
            again = row_dots(a, of_b.clone())
            assert torch.equal(ours, again)


def test_kernels_refuse_indices_out_of_range() -> None:
    x, zero = torch.ones(2, 3), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InvalidArgument, match="row 2 at 0; source 0 has 2"):
        copy_rows(torch.empty(1, 3), [x], zero, zero + 2)
    with pytest.raises(InvalidArgument, match="source 1 at 0; there are 1"):
        copy_rows(torch.empty(1, 3), [x], zero + 1, zero)
    with pytest.raises(InvalidArgument, match="output row 1 at 0; there are 1"):
        copy_rows(torch.empty(1, 3), [x], zero, zero, zero + 1)
    with pytest.raises(InvalidArgument, match="row -1 at 0"):
        combine_rows(torch.empty(1, 3), [x], Terms(zero, zero - 1, torch.tensor([0, 1]), 1))
    with pytest.raises(InvalidArgument, match="offsets go from 0 to 0, there are 1 terms"):
        combine_rows(torch.empty(1, 3), [x], Terms(zero, zero, torch.tensor([0, 0]), 1))
    with pytest.raises(InvalidArgument, match="row 2 at 0; there are 2"):
        row_dots(x[:1], x, zero + 2)
    with pytest.raises(InvalidArgument, match="2 products of 1 rows"):
        row_dots(x, x[:1])


def test_ids_that_other_ranks_tell_are_not_trusted() -> None:
    """A rank checks its own ids in words; what comes from others is checked where it is used."""
    geometry = Geometry.of(1, "ab")
    places = Places(Placement.even(4, 2), geometry)
    request = Request((), geometry, places, "rank", "expert", 1, "tokens", 1, None, False)
    mine, theirs = torch.tensor([[0, 3]]), torch.tensor([[1, 2], [2, 4]])
    for wrong, text in ((4, "rank 0 names expert 4; there are 0 to 3"), (-1, "rank 0 names expert -1")):
        theirs[1, 1] = wrong
        with pytest.raises(InvalidArgument, match=text):
            make_plan(request, mine, torch.cat([theirs, mine]).to(torch.int16), (2, 1))
    theirs[1, 1] = 3
    plan = make_plan(request, mine, torch.cat([theirs, mine]).to(torch.int16), (2, 1))
    assert plan.expert_counts.tolist() == [2, 2] and plan.out.leg.receives == ((2, 0),)
    with pytest.raises(InvalidArgument, match="ids are uint8, int16 or int32, not int64"):
        make_plan(request, mine, torch.cat([theirs, mine]), (2, 1))


@pytest.mark.parametrize(("num_experts", "top_k", "n_ranks", "n_hosts"), [(256, 8, 8, 2), (16, 2, 4, 4), (8, 8, 8, 2)])
def test_formulae_are_what_uniform_routing_gives(num_experts: int, top_k: int, n_ranks: int, n_hosts: int) -> None:
    random = torch.Generator().manual_seed(1)
    n = 20000
    topk_idx = torch.rand(n, num_experts, generator=random).topk(top_k).indices
    geometry = Geometry(0, tuple(rank * n_hosts // n_ranks for rank in range(n_ranks)))
    places = Places(Placement.even(num_experts, n_ranks), geometry)
    place, _ = places.route(topk_idx, torch.zeros(n, dtype=torch.int64))
    home = torch.arange(n) % n_hosts
    of_mode: dict[Dedup, torch.Tensor] = {"none": place, "rank": places.rank[place], "host": places.host[place]}
    for mode, key in of_mode.items():
        first = torch.ones_like(key, dtype=torch.bool)
        first[:, 1:] = key[:, 1:] != key[:, :-1]
        crossing = (first & (places.host[place] != home.unsqueeze(1))).sum() / n
        assert float(crossing) == pytest.approx(
            rows_between_hosts(mode, num_experts, top_k, n_ranks, n_hosts), rel=0.02
        )


def test_auto_goes_by_the_links() -> None:
    from pycomm.hosts import Link

    def chosen(n_ranks: int, n_hosts: int, rate: float, num_experts: int = 256, top_k: int = 8) -> str:
        links = Links(n_ranks, n_hosts, Link(1e-4, rate), Link(1e-6, 6e9))
        possible: tuple[Dedup, ...] = ("none", "rank", "host")
        return estimates(links, num_experts, 2048, top_k, 256, 4096, 2, possible, "auto").mode

    assert chosen(8, 2, 25e6) == "host"
    assert chosen(4, 1, 1e9) == "host"  # rows are read where they lie
    assert chosen(8, 8, 25e6, top_k=1) == "none"  # one rank a host, one expert a token: nothing is there twice
    text = ExpertParallel(OneRank(), 8, 64, 2).explain(128)
    assert "8 experts, top 2, 1 ranks on 1 host(s), 128 tokens a rank" in text
    assert "dedup='none'" in text and "host" in text and "(not possible here)" in text


def test_loads_loss_and_bias() -> None:
    topk_idx = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 1]])
    loads = expert_loads(topk_idx, 5)
    assert loads.tolist() == [4, 2, 1, 1, 0] and float(imbalance(loads)) == 2.5
    even = torch.arange(8).view(4, 2)
    uniform = torch.full((4, 8), 1 / 8)
    assert float(balance_loss(uniform, even)) == pytest.approx(1)
    probabilities = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).softmax(-1).requires_grad_()
    loss = balance_loss(probabilities, topk_idx)
    loss.backward()
    assert probabilities.grad is not None
    np.testing.assert_allclose(probabilities.grad[0], np.array([4, 2, 1, 1, 0]) / 8 * 5 / 4, rtol=1e-6)

    # Scores that prefer expert 0: the bias evens the loads, and leaves the weights alone.
    scores = (torch.randn(400, 8, generator=torch.Generator().manual_seed(2)) + torch.arange(8, 0, -1) / 3).sigmoid()
    bias = RouterBias(8, rate=0.01)
    before = imbalance(expert_loads(choose_experts(scores, 2)[1], 8))
    for _ in range(200):
        bias.update(expert_loads(choose_experts(scores, 2, bias.bias)[1], 8))
    weights, chosen = choose_experts(scores, 2, bias.bias)
    assert float(before) > 2 and float(imbalance(expert_loads(chosen, 8))) < 1.3
    picked = scores.gather(1, chosen)
    torch.testing.assert_close(weights, picked / picked.sum(-1, keepdim=True))


def test_a_tokens_experts_stay_on_few_hosts() -> None:
    scores = torch.rand(200, 12, generator=torch.Generator().manual_seed(3))
    host = torch.arange(12) // 3
    for most in (1, 2, 4):
        top_k = min(3 * most, 4)
        weights, chosen = choose_experts(scores, top_k, host_of_expert=host, max_hosts=most)
        assert all(len(set(host[row].tolist())) <= most and len(set(row.tolist())) == top_k for row in chosen)
        torch.testing.assert_close(weights.sum(-1), torch.ones(200))
    assert torch.equal(choose_experts(scores, 4, host_of_expert=host, max_hosts=4)[1], choose_experts(scores, 4)[1])
    with pytest.raises(InvalidArgument, match="1 of 4 hosts may have fewer than 4 experts"):
        choose_experts(scores, 4, host_of_expert=host, max_hosts=1)


def test_balanced_placements_hold_every_expert_and_even_the_loads() -> None:
    random = np.random.default_rng(4)
    for n, n_ranks, per_rank in [(8, 4, 2), (8, 4, 3), (7, 3, 3), (256, 8, 36), (1, 3, 1), (3, 3, 3)]:
        loads = (random.pareto(1.2, n) + 0.01).tolist()
        placement = balanced_placement(loads, n_ranks, per_rank)
        assert placement.num_experts == n and max(map(len, placement.experts)) <= per_rank
        even, ours = rank_loads(Placement.even(n, n_ranks), loads), rank_loads(placement, loads)
        assert sum(ours) == pytest.approx(sum(loads)) and max(ours) <= max(even) + 1e-9
    spread = rank_loads(balanced_placement([100.0] + [1.0] * 7, 4, 3), [100.0] + [1.0] * 7)
    assert max(spread) < 1.1 * min(spread)  # four replicas of the hot one
    with pytest.raises(InvalidArgument, match="9 experts do not fit on 2 ranks of 4 places"):
        balanced_placement([1.0] * 9, 2, 4)


def test_devices_choose_by_their_own_links() -> None:
    """Not by those of their hosts' memory: an all_to_all there, an all_to_all back, each way's rows."""

    class Eight(OneRank):
        size, device_seconds = 8, staticmethod(lambda collective, nbytes: (1e-5 + nbytes / 1e9, "of the test"))

    for num_experts, top_k, itemsize, reached, mode in (
        (8, 2, 2, 2.0, "none"),  # 2 rows of 2 + 2 bytes a value, or as many of 2 + 4
        (64, 8, 4, 8 * (1 - np.prod([(56 - k) / (64 - k) for k in range(8)])), "rank"),
        (8, 2, 4, 2.0, "none"),  # the same: the simpler one
    ):
        ep = ExpertParallel(Eight(), num_experts, 1024, top_k)
        choice = ep.choice(1000, itemsize=itemsize, device="cuda")
        assert [each.mode for each in choice.estimates] == ["none", "rank"] and choice.mode == mode
        for estimate, rows, back in zip(choice.estimates, (top_k, reached), (itemsize, 4), strict=True):
            expected = 2e-5 + 1000 * rows * 1024 * (itemsize + back) / 1e9
            assert estimate.seconds == pytest.approx(expected, rel=1e-2)
        assert "of the test" in choice.reason and "of the test" not in ep.choice(1000).reason
    assert "in 1 chunk(s)" in ep.explain(1000, device="cuda:0")


def test_static_sizes_read_nothing_from_the_device() -> None:
    """Under fake tensors any read raises, and all sizes are known from arguments alone."""
    ep = StaticExpertParallel(OneRank(), 6, 10, 16, 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weights = torch.empty(7, 16, requires_grad=True), torch.empty(7, 2, requires_grad=True)
        dispatched = ep.dispatch(x, torch.empty(7, 2, dtype=torch.int64), weights)
        assert dispatched.rows.shape == (6, 10, 16) and dispatched.expert_counts.shape == (6,)
        y = ep.combine(dispatched.rows * 2, dispatched)
        y.sum().backward()
        assert y.shape == (7, 16) and x.grad is not None and weights.grad is not None
    one = batch(Case((3,), 4, 2, 5), 0)
    strange = torch.tensor([[0, 9], [1, -1], [2, 3]])
    plan = StaticExpertParallel(OneRank(), 4, 3, drop=True).plan(strange)
    assert int(plan.dropped) == 2 and plan.expert_counts.tolist() == [1, 1, 1, 1]
    with pytest.raises(InvalidArgument, match="2 slots found no room"):
        plan.check()
    with pytest.raises(InvalidArgument, match=r"topk_weights \[3, 1\]"):
        StaticExpertParallel(OneRank(), 4, 3).dispatch(one.x, one.idx, one.weights[:, :1])


def test_output_rows_take_memory_again_that_nobody_holds() -> None:
    memory = _C.RowMemory(1 << 20)
    first = memory.empty(64, 128, torch.float32)
    kept, address = first[3:4], first.data_ptr()
    kept.fill_(7)
    del first
    second = memory.empty(64, 128, torch.float32)  # the view still holds the first one's memory
    second.fill_(1)
    assert second.data_ptr() != address and bool((kept == 7).all())
    del kept
    third = memory.empty(128, 130, torch.bfloat16)  # another type and size that fit
    assert third.data_ptr() == address and third.shape == (128, 130) and third.dtype == torch.bfloat16
    assert memory.empty(64, 20, torch.float32).data_ptr() != address  # held
    del third
    assert memory.empty(1, 8, torch.float32).data_ptr() != address  # too small for so much
    assert memory.empty(0, 8, torch.float16).shape == (0, 8)
    weight = torch.ones(64, 128, requires_grad=True)
    product = second * weight  # which keeps second for backward
    address = second.data_ptr()
    del second
    memory.empty(64, 128, torch.float32).fill_(9)
    assert bool((torch.autograd.grad(product.sum(), [weight])[0] == 1).all())
    del product
    both = [memory.empty(64, 128, torch.float32) for _ in range(2)]
    assert address in [each.data_ptr() for each in both]


def test_batches_of_any_size_follow_each_other_on_one_rank() -> None:
    ep = ExpertParallel(OneRank(), 5)
    for n_tokens, top_k in ((3, 2), (3, 2), (1, 3), (0, 2), (9, 1)):
        one = batch(Case((n_tokens,), 5, top_k, 4), 0)
        dispatched = ep.dispatch(one.x, one.idx, one.weights)
        expected = [one.x[t] for e in range(5) for t in range(n_tokens) if e in one.idx[t]]
        assert torch.equal(dispatched.rows, torch.stack(expected) if expected else one.x)
        y = ep.combine(dispatched.rows, dispatched)
        torch.testing.assert_close(y, one.x * one.weights.float().sum(1, keepdim=True).to(y.dtype))
        for cut in ("tokens", "experts"):
            stream = ep.stream(one.x, one.idx, one.weights, n_chunks=2, cut=cut)
            for chunk in stream:
                chunk.output = chunk.rows
            assert torch.equal(stream.output, y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"top_k": 5}, "top_k is 5; it is 1 to 4 of 4 experts"),
        ({"num_experts": 64, "top_k": 33}, "top_k is 33; it is 1 to 32"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"layout": "column"}, "layout 'column' is none of"),
        ({"wire": "int8"}, "wire 'int8' is none of"),
        ({"dedup": "node"}, "dedup 'node' is none of"),
        ({"dedup": "host"}, "needs a pycomm.Group"),
        ({"chunks": 0}, "chunks is 0"),
        ({"align": 0}, "align is 0"),
        ({"drop": True}, "give max_tokens"),
        ({"layout": "rank", "dedup": "none"}, "one row for a token"),
        ({"placement": Placement(((0, 1),))}, "placement puts 2 experts on 1 ranks; there are 4 experts"),
        ({"placement": Placement(((0, 1), (2, 3)))}, "4 experts on 2 ranks"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        ExpertParallel(OneRank(), **{"num_experts": 4, **settings})


def test_placements_are_checked() -> None:
    assert Placement.even(7, 3).experts == ((0, 1, 2), (3, 4), (5, 6))
    assert [len(held) for held in Placement.even(2, 3).experts] == [1, 1, 0]
    assert all(a[-1] + 1 == b[0] for a, b in pairwise(Placement.even(256, 8).experts))
    with pytest.raises(InvalidArgument, match="rank 1 holds an expert twice"):
        Placement(((0,), (1, 1)))
    with pytest.raises(InvalidArgument, match="must be 0 to their number - 1"):
        Placement(((0,), (2,)))
