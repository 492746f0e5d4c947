"""Overlapped operations over real ranks, each against the same computed whole: one set of processes checks them all."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spawn import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pycomm.errors import GroupClosed, InvalidArgument
from pycomm.moe import ExpertParallel
from pycomm.overlap import (
    Cut,
    GradientBuckets,
    InMemory,
    LinkCost,
    MatmulPlan,
    ShardedModules,
    WeightGradients,
    all_gather_matmul,
    all_gather_matmuls,
    matmul_reduce_scatter,
    measure,
    plan_all_gather_matmul,
    plan_matmul_reduce_scatter,
)

HOSTS = ["a", "a", "b"]
WIDTHS = (6, 11, 7, 5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(WIDTHS)))


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, WIDTHS[0], generator=torch.Generator().manual_seed(100 * step + rank))


def seeded(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact_gradients(step: int, size: int, model: nn.Module) -> list[Tensor]:
    loss = sum(model(batch(step, rank)).square().sum() for rank in range(size))
    return list(torch.autograd.grad(loss, list(model.parameters())))


def check_buckets(group: Any) -> None:
    for collective, link in (("all_reduce", "predicted"), ("all_reduce", "measured"), ("reduce_scatter", "predicted")):
        for bucket_nbytes in (None, 100):
            model = network()
            parameters = list(model.parameters())
            buckets = GradientBuckets(parameters, group, bucket_nbytes=bucket_nbytes, link=link, collective=collective)
            for step in range(3):
                with buckets.no_sync():
                    model(batch(2 * step, group.rank)).square().sum().backward()
                model(batch(2 * step + 1, group.rank)).square().sum().backward()
                buckets.wait()
                pairs = zip(*(exact_gradients(2 * step + at, group.size, model) for at in (0, 1)), strict=True)
                exact = dict(zip(parameters, (a + b for a, b in pairs), strict=True))
                seen = 0
                for parameter, begin, values in buckets.owned():
                    expected = exact[parameter].flatten()[begin : begin + len(values)]
                    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
                    seen += len(values)
                total = torch.tensor([seen])
                group.all_reduce(total)
                whole = sum(p.numel() for p in parameters)
                assert int(total) == (whole if collective == "reduce_scatter" else whole * group.size)
            if collective == "all_reduce":  # on every rank the same bits
                mine = torch.cat([buckets.gradient(p).flatten() for p in parameters])
                firsts = mine.clone()
                group.broadcast(firsts, 0)
                assert torch.equal(mine, firsts)
            assert ("100 B each" if bucket_nbytes else f"{collective}, {link}") in buckets.explain()


def check_buckets_that_differ(group: Any) -> None:
    shapes: list[tuple[list[int], str]] = [
        ([3] if group.rank == 1 else [3, 2], r"rank 1 has other parameters \(1, not 2\)"),
        ([3, 1] if group.rank == 2 else [3, 2], r"rank 2 has other elements \(4, not 5\)"),
        ([2, 3] if group.rank else [3, 2], r"rank 1 has other shapes"),
    ]
    for sizes, message in shapes:
        weights = [nn.Parameter(torch.ones(n)) for n in sizes]
        buckets = GradientBuckets(weights, group)
        sum(w.sum() for w in weights).backward()
        with pytest.raises(InvalidArgument, match=message):
            buckets.wait()
    weights = [nn.Parameter(torch.ones(2))]
    with pytest.raises(InvalidArgument, match="rank 1 has other settings than rank 0"):
        GradientBuckets(weights, group, bucket_nbytes=8 if group.rank == 0 else 16).wait()
    x = torch.ones(1)
    group.all_reduce(x)  # nothing was sent: the group is sound
    assert float(x) == group.size


def n_whole(model: nn.Module) -> int:
    """Blocks whose parameters take memory."""
    return sum(any(p.untyped_storage().nbytes() for p in block.parameters()) for block in model.children())


def check_sharded_modules(group: Any) -> None:
    for depth in (0, 1, 2):
        model, whole = network(), network()
        sharded = ShardedModules(list(model), group, depth=depth)
        assert sum(s.numel() for s in sharded.shards()) < sum(p.numel() for p in whole.parameters()) / 2
        ours, exact = (
            torch.optim.AdamW(parameters, lr=0.05) for parameters in (sharded.shards(), list(whole.parameters()))
        )
        for step in range(3):
            for micro in range(2):
                h = batch(2 * step + micro, group.rank)
                for block in model:  # once with activations recomputed in backward
                    h = checkpoint(block, h, use_reentrant=False) if step == 1 else block(h)
                # Freed after forward: but what runs backward next stays, and what is expected then is on its way.
                assert n_whole(model) <= (0 if step == micro == 0 else 1 + depth)
                h.square().sum().backward()
                sharded.wait()
                assert n_whole(model) == 0 and all(p.grad is None for p in model.parameters())
                for parameter, gradient in zip(
                    whole.parameters(), exact_gradients(2 * step + micro, group.size, whole), strict=True
                ):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            for optimizer in (ours, exact):
                optimizer.step()
                optimizer.zero_grad()
            sharded.publish()
            with torch.no_grad():  # an evaluation is no part of the order
                torch.testing.assert_close(model(batch(7, 0)), whole(batch(7, 0)), rtol=1e-4, atol=1e-5)
        with sharded.whole():
            for a, b in zip(model.parameters(), whole.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        model[0](batch(0, group.rank)).sum().backward()  # the others are not reached: their gradient is 0
        sharded.wait()
        grads = [shard.grad for shard in sharded.shards()]
        assert all(grad is not None for grad in grads) and not grads[2].any()
        sharded.gather()
        sharded.close()
        torch.testing.assert_close(model(batch(9, 0)), whole(batch(9, 0)), rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidArgument, match="module 1 has no parameters"):
        ShardedModules([nn.Linear(2, 2), nn.Tanh()], group)
    with pytest.raises(InvalidArgument, match="rank 1 has other elements"):
        ShardedModules([nn.Linear(2, 2 + (group.rank == 1))], group)
    with pytest.raises(InvalidArgument, match="give one, or a Cut of each"):
        ShardedModules([nn.Linear(2, 2)])
    with pytest.raises(InvalidArgument, match="reduce is 'never'"):
        ShardedModules([Cut([nn.Parameter(torch.ones(2))], group, reduce="never")])


class LoggingMemory(InMemory):
    """Ordinary memory that keeps what it was told."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []

    def prefetch(self, x: Tensor) -> None:
        self.log.append(("prefetch", x.data_ptr()))

    def release(self, x: Tensor) -> None:
        self.log.append(("release", x.data_ptr()))


class CountingCopies:
    """A group that counts its sums."""

    def __init__(self, group: Any) -> None:
        self._group, self.rank, self.size, self.n_sums = group, group.rank, group.size, 0

    def all_reduce(self, x: Tensor, op: str = "sum", **options: Any) -> Any:
        self.n_sums += 1
        return self._group.all_reduce(x, op, **options)


def check_cuts(group: Any) -> None:
    """ZeRO's stages with micro-batches, over all ranks and over one with copies, with and without fp32 masters."""
    alone = group.split(group.rank)
    kinds: list[tuple[Any, Any, str, bool]] = [
        (group, None, "last", False),
        (group, None, "each", False),
        (group, alone, "each", True),
        (alone, group, "each", True),
        (alone, group, "last", False),
        (group, None, "wait", False),
    ]
    for (shards, copies, reduce, gathers), dtype in itertools.product(kinds, (None, torch.bfloat16)):
        model, whole = network(), network()
        memory, filled = LoggingMemory(), []
        counted = CountingCopies(group)
        copies = counted if copies is group else copies
        cuts = [Cut(list(b.parameters()), shards, b if gathers else None, copies, reduce) for b in model]  # type: ignore[arg-type]
        sharded = ShardedModules(cuts, dtype=dtype, memory=memory, before_cut=lambda p, f=filled: f.append(p.shape))
        assert filled == [p.shape for p in model.parameters()]
        ours, exact = (torch.optim.SGD(each, lr=0.01) for each in (sharded.shards(), list(whole.parameters())))
        for step in range(3):
            began = len(memory.log)
            for micro in range(3):
                x = batch(3 * step + micro, group.rank)
                with sharded.no_sync() if micro < 2 else nullcontext():
                    model(x if dtype is None else x.to(dtype)).float().square().sum().backward()
                if micro != 1:  # without it, the next backward adds to what is on its way
                    sharded.end_backward()
            if copies is counted and reduce == "each":  # but what is still in flight was added up beside backward
                assert counted.n_sums == len(model) * (step + 1) - 1
            sharded.wait()
            assert counted.n_sums == (len(model) * (step + 1) if copies is counted else 0)
            for p, *grads in zip(
                whole.parameters(), *(exact_gradients(3 * step + m, group.size, whole) for m in range(3)), strict=True
            ):
                p.grad = sum(grads)
            ours.step()
            exact.step()
            ours.zero_grad()
            sharded.publish()
            with sharded.whole():
                for a, b in zip(model.parameters(), whole.parameters(), strict=True):
                    tolerance = 1e-5 if dtype is None else 0.05
                    torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance)
            if dtype is not None:  # small updates are not lost
                assert all(shard.dtype == torch.float32 for shard in sharded.shards())
                assert any((s != s.bfloat16()).any() for s in sharded.shards())
            if gathers and step:  # memory is told before a module is needed, and after
                told = memory.log[began:]
                assert [what for what, _ in told[:3]] == ["prefetch"] * 3
                for shard in {where for _, where in told}:
                    assert [what for what, where in told if where == shard][-1] == "release"
        sharded.close()
    alone.close()


def check_matmuls(group: Any) -> None:
    n, rank = group.size, group.rank
    for n_rows, dtype, n_pieces in itertools.product((0, 1, 5), (torch.float64, torch.bfloat16), (0, 1, 3)):
        plan = MatmulPlan(n_pieces, "of the test")
        tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.3}
        weight = seeded(1, 4, 6, dtype=dtype).requires_grad_()
        parts = [seeded(10 + r, n_rows, 2, 6, dtype=dtype) for r in range(n)]
        x = parts[rank].clone().requires_grad_()
        y = all_gather_matmul(x, weight, group, plan)
        whole = torch.cat(parts).requires_grad_()
        other = weight.detach().clone().requires_grad_()
        expected = F.linear(whole, other)
        torch.testing.assert_close(y, expected, **tolerance)
        grads = [seeded(20 + r, *y.shape, dtype=dtype) for r in range(n)]
        y.backward(grads[rank])
        torch.autograd.backward([expected], [sum(grads)])
        torch.testing.assert_close(x.grad, whole.grad[rank * n_rows : (rank + 1) * n_rows], **tolerance)
        own = grads[rank].flatten(0, 1).T @ whole.detach().flatten(0, 1)
        torch.testing.assert_close(weight.grad, own, **tolerance)

        wholes = [seeded(30 + r, n_rows * n, 2, 6, dtype=dtype) for r in range(n)]
        weights = [seeded(40 + r, 4, 6, dtype=dtype) for r in range(n)]
        x, weight = wholes[rank].clone().requires_grad_(), weights[rank].clone().requires_grad_()
        z = matmul_reduce_scatter(x, weight, group, plan)
        total = sum(F.linear(a, w) for a, w in zip(wholes, weights, strict=True))
        torch.testing.assert_close(z, total[rank * n_rows : (rank + 1) * n_rows], **tolerance)
        if n_pieces and dtype == torch.float64 and n_rows:  # added up in the ring's order, whatever the timing
            rows = slice(rank * n_rows, (rank + 1) * n_rows)
            replay = [F.linear(wholes[r % n], weights[r % n])[rows] for r in range(rank + 1, rank + 1 + n)]
            torch.testing.assert_close(z, sum(replay[1:], replay[0]), rtol=1e-14, atol=1e-14)
        grads = [seeded(50 + r, *z.shape, dtype=dtype) for r in range(n)]
        z.backward(grads[rank])
        everyone = torch.cat(grads)
        torch.testing.assert_close(x.grad, everyone @ weights[rank], **tolerance)
        torch.testing.assert_close(weight.grad, everyone.flatten(0, 1).T @ wholes[rank].flatten(0, 1), **tolerance)
    x, weight = torch.ones(4, 6), torch.ones(3, 6)
    for make, product in (
        (plan_all_gather_matmul, all_gather_matmul),
        (plan_matmul_reduce_scatter, matmul_reduce_scatter),
    ):
        found = make(x.repeat(3, 1), weight, group)
        plans = torch.tensor([found.n_pieces, -found.n_pieces])
        group.all_reduce(plans, "max")
        assert plans[0] == -plans[1] and "unsplit" in found.why  # equal on all ranks
        product(x.repeat(3, 1), weight, group, found)
    several = [seeded(60, 4, 6), seeded(61, 2, 6)]
    parts = [seeded(70 + r, 5, 6) for r in range(n)]
    for n_pieces, keep, puts_off in itertools.product((0, 2), (False, True), (False, True)):
        later = WeightGradients() if puts_off else None
        plan = MatmulPlan(n_pieces, "of the test")
        own, others = parts[rank].clone().requires_grad_(), [w.clone().requires_grad_() for w in several]
        ys = all_gather_matmuls(own, others, group, plan, keep=keep, later=later)
        whole, exact = torch.cat(parts).requires_grad_(), [w.clone().requires_grad_() for w in several]
        expected = [F.linear(whole, w) for w in exact]
        for y, other in zip(ys, expected, strict=True):
            torch.testing.assert_close(y, other)
        z = matmul_reduce_scatter(torch.cat(ys, -1), seeded(80, 3, 6).requires_grad_(), group, plan, later=later)
        z.sum().backward()
        torch.autograd.backward(F.linear(torch.cat(expected, -1), seeded(80, 3, 6)).sum())
        if later is not None:
            assert len(later) == 3 and all(w.grad is None for w in others)
            later.flush()
        torch.testing.assert_close(own.grad, whole.grad[rank * 5 : rank * 5 + 5] * n)
        for ours, theirs in zip(others, exact, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    with pytest.raises(InvalidArgument, match="not a leaf"):
        all_gather_matmuls(own, [others[0] * 2], group, later=WeightGradients())
    never = LinkCost(1e9, 1e15, "of the test")  # a hop takes years, so one piece
    found = plan_matmul_reduce_scatter(torch.ones(6, 64), torch.ones(4, 64), group, never)
    assert found.n_pieces == 0 and "overlapping would not gain" in found.why and "of the test" in found.why
    with pytest.raises(InvalidArgument, match=r"4 rows, which 3 ranks cannot share"):
        matmul_reduce_scatter(x, weight, group)
    with pytest.raises(InvalidArgument, match=r"weight \[3, 5\]"):
        all_gather_matmul(x, torch.ones(3, 5), group)
    with pytest.raises(InvalidArgument, match="give one type"):
        all_gather_matmul(x, weight.double(), group)


BATCHES = ((7, torch.float32, True), (8, torch.bfloat16, False), (2, torch.float32, True))


def check_stream(group: Any) -> None:
    """Against dispatch() and combine(): of experts cut as bits, matrix products included; of tokens with experts that
    work value by value as bits, with products within rounding."""
    n_experts, hidden, top_k = 6, 5, 2
    for dedup, cut, n_chunks in itertools.product(("none", "rank", "host"), ("tokens", "experts"), (1, 3)):
        ep = ExpertParallel(group, n_experts, dedup=dedup)
        for n_tokens, dtype, products in BATCHES:
            tokens = 0 if n_tokens == 2 and group.rank == 2 else n_tokens + 2 * (group.rank == 1)
            random = torch.Generator().manual_seed(group.rank)
            topk = torch.rand(tokens, n_experts, generator=random).argsort(1)[:, :top_k]
            if n_tokens == 2:
                topk = torch.arange(top_k).repeat(tokens, 1)  # all to rank 0
            found = []
            for streamed in (True, False):
                x = seeded(group.rank, tokens, hidden, dtype=dtype).requires_grad_()
                weights = seeded(9 + group.rank, tokens, top_k).requires_grad_()
                experts = [seeded(e + 100 * group.rank, hidden, hidden, dtype=dtype).requires_grad_() for e in range(2)]

                def run(rows: Tensor, sizes: Any, experts: list[Tensor] = experts, products: bool = products) -> Tensor:
                    parts = zip(rows.split(sizes), experts, strict=True)
                    return torch.cat([rows[:0], *(torch.tanh(r @ w if products else r * w[0]) for r, w in parts)])

                if streamed:
                    stream = ep.stream(x, topk, weights, n_chunks=n_chunks, cut=cut)
                    for chunk in stream:
                        assert chunk.expert_counts.tolist() == list(chunk.sizes)
                        of_chunk = experts[chunk.experts.start : chunk.experts.stop]
                        chunk.output = run(chunk.rows, chunk.sizes, of_chunk)
                    y = stream.output
                else:
                    dispatched = ep.dispatch(x, topk, weights)
                    y = ep.combine(run(dispatched.rows, dispatched.sizes), dispatched)
                (y * seeded(77 + group.rank, tokens, hidden)).sum().backward()
                found.append([y.detach(), x.grad, weights.grad, *(e.grad for e in experts)])
            for number, (ours, plain) in enumerate(zip(*found, strict=True)):
                if cut == "experts" or (not products and number < 3):
                    assert torch.equal(ours, plain), (dedup, cut, n_chunks, n_tokens, number)
                else:
                    close = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
                    torch.testing.assert_close(ours, plain, **close)
    check_stream_corners(group, ep)


def check_stream_corners(group: Any, ep: Any) -> None:
    hidden, topk = 4, torch.tensor([[0, 5]]).repeat(6, 1)
    # Experts whose result does not depend on their rows: no gradient comes for them, on some ranks alone.
    x = seeded(group.rank, 6, hidden, dtype=torch.float32).requires_grad_()
    for n_chunks in (1, 2):
        stream = ep.stream(x, topk, torch.ones(6, 2), n_chunks=n_chunks)
        scale = torch.ones(1, requires_grad=True)
        for chunk in stream:
            chunk.output = chunk.rows * scale if group.rank == 0 else torch.zeros_like(chunk.rows) + 0 * scale
        x.grad = None
        stream.output.sum().backward()
        torch.testing.assert_close(x.grad, torch.ones_like(x))
    # Weights' gradients put off: backward has flushed them, those of all chunks as one.
    weight = seeded(1, hidden, hidden, dtype=torch.float32).requires_grad_()
    of_weight = []
    later = WeightGradients(together=True)
    for linear in (later.linear, F.linear):
        stream = ep.stream(x, topk, torch.ones(6, 2), n_chunks=2, later=later)
        for chunk in stream:
            chunk.output = linear(chunk.rows, weight)
        weight.grad = None
        stream.output.square().sum().backward()
        assert stream.n_chunks == 2 and len(later) == 0
        of_weight.append(weight.grad)
    torch.testing.assert_close(*of_weight, rtol=1e-4, atol=1e-4)
    # Computed again in backward, which then has its own exchange in the middle of the stream's.
    grads = []
    for again in (False, True):
        scale = torch.full((1,), 3.0, requires_grad=True)
        y = checkpoint(_doubled, x, topk, ep, scale, use_reentrant=False) if again else _doubled(x, topk, ep, scale)
        x.grad = None
        y.square().sum().backward()
        grads.append((x.grad, scale.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    # Cut off in backward: the next exchange ends what was left, on all ranks alike.
    scale = torch.ones(1, requires_grad=True)
    (of_scale,) = torch.autograd.grad(_doubled(x, topk, ep, scale).sum(), [scale])
    with torch.no_grad():
        assert torch.equal(_doubled(x, topk, ep, scale), 2 * x)
        rows = ep.dispatch(x, topk, torch.ones(6, 2)).rows
    torch.testing.assert_close(of_scale, rows.sum().view(1), rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidArgument, match="n_chunks is 0"):
        ep.stream(x, topk, torch.ones(6, 2), n_chunks=0)
    with pytest.raises(InvalidArgument, match=r"rank 2: .*topk_weights \[6, 1\]"):
        ep.stream(x, topk, torch.ones(6, 1 + (group.rank != 2)))
    with pytest.raises(InvalidArgument, match="chunks"):
        ep.stream(x, topk, torch.ones(6, 2), n_chunks=1 + group.rank)
    with pytest.raises(InvalidArgument, match="layout is 'token'"):
        ExpertParallel(group, 6, layout="token", dedup="rank").stream(x, topk, torch.ones(6, 2))


class PutsOff(WeightGradients):
    """Has time only in forward's waits, or only in backward's, or never, whatever the links do."""

    def __init__(self, when: str) -> None:
        super().__init__(together=True)
        self.when, self.n_beside = when, 0

    def run_beside(self, work: Any) -> None:
        now = "forward" if torch._C._current_graph_task_id() == -1 else "backward"
        if now == self.when:
            before = len(self)
            super().run_beside(NotYet())
            self.n_beside += before - len(self)


class NotYet:
    def is_completed(self) -> bool:
        return False

    def wait(self) -> None: ...


def check_streams_of_micro_batches(group: Any) -> None:
    """Weights' gradients that wait for the next micro-batch: the bits of those that do not, whatever waits had time
    for, and with experts cut those of plain products."""
    topk = torch.tensor([[0, 2], [1, 5], [3, 4], [5, 0], [2, 4], [3, 1]])
    for dedup, cut in (("rank", "tokens"), ("host", "experts")):
        ep = ExpertParallel(group, 6, dedup=dedup)
        found: dict[str, list[Tensor]] = {}
        for when in ("at once", "never", "forward", "backward", "plain"):
            later = None if when == "plain" else PutsOff(when)
            experts = [seeded(e + 2 * group.rank, 4, 4, dtype=torch.float32).requires_grad_() for e in range(2)]
            found[when] = []
            for micro in range(3):
                x = seeded(100 * micro + group.rank, 6, 4, dtype=torch.float32).requires_grad_()
                flush = micro == 2 or when == "at once"
                stream = ep.stream(x, topk, torch.ones(6, 2), n_chunks=2, cut=cut, later=later, flush=flush)
                linear = F.linear if later is None else later.linear
                for chunk in stream:
                    parts = zip(chunk.rows.split(chunk.sizes), experts[chunk.experts.start :], strict=False)
                    chunk.output = torch.cat([linear(rows, expert) for rows, expert in parts])
                stream.output.square().sum().backward()
                found[when].append(x.grad)
                if later is not None:
                    assert len(later) == (0 if flush or when == "backward" else 2), (dedup, when, micro)
            if later is not None:
                assert later.n_beside == (4 if when in ("forward", "backward") else 0), (dedup, when)
            found[when] += [expert.grad for expert in experts]
        for when in ("never", "forward", "backward", *(["plain"] if cut == "experts" else [])):
            for ours, due in zip(found[when], found["at once"], strict=True):
                assert torch.equal(ours, due), (dedup, cut, when)


def check_streams_into_buckets(group: Any) -> None:
    """What the last micro-batch's forward still computes of the others belongs before the end of no_sync()."""
    topk = torch.tensor([[0, 2], [1, 5], [3, 4], [5, 0], [2, 4], [3, 1]])
    ep, weight, plain = ExpertParallel(group, 6), torch.ones(4, 4), torch.zeros(4, 4)
    weight.requires_grad_()
    buckets, later = GradientBuckets([weight], group), PutsOff("never")

    def forward(micro: int, flush: bool) -> Tensor:
        x = torch.full((6, 4), 1.0 + micro)
        stream = ep.stream(x, topk, torch.ones(6, 2), n_chunks=2, later=later, flush=flush)
        for chunk in stream:
            chunk.output = later.linear(chunk.rows, weight)
        return stream.output.sum()

    for step in range(2):
        with buckets.no_sync():
            forward(3 * step, False).backward()
            forward(3 * step + 1, False).backward()
            loss = forward(3 * step + 2, True)
            assert len(later) == 1
            later.flush()
        loss.backward()
        buckets.wait()
        plain.fill_(group.size * 12 * sum(1.0 + 3 * step + micro for micro in range(3)))
        assert torch.equal(buckets.gradient(weight), plain), step


def check_streams_that_end_early(group: Any) -> None:
    """A rank that leaves, in whichever way: the others, also those that wait for others of their host, name it."""
    x, topk = torch.ones(6, 4), torch.tensor([[0, 5]]).repeat(6, 1)
    weights = torch.ones(6, 2)

    def run(ep: Any, leaver: int, how: str) -> None:
        for chunk in ep.stream(x, topk, weights, n_chunks=2):
            if group.rank == leaver and chunk.index == 1:
                if how == "raises":
                    raise OSError("no more experts")
                if how == "breaks":
                    break
                continue  # sets no output
            chunk.output = chunk.rows

    cases = (
        (0, "raises", OSError, "no more experts", "it left its stream's loop"),
        (1, "breaks", None, "", "it left its stream's loop"),
        (2, "forgets", InvalidArgument, "nothing as output; set chunk", "it failed in its stream, InvalidArgument"),
    )
    for dedup, (leaver, how, own, own_text, text) in itertools.product(("rank", "host"), cases):
        inner = group.new_group(range(group.size))
        ep = ExpertParallel(inner, 6, dedup=dedup)
        if group.rank == leaver:
            with pytest.raises(own, match=own_text) if own else nullcontext():
                run(ep, leaver, how)
        else:
            with pytest.raises(GroupClosed, match=f"moe: rank {leaver} of {group.size}, chunk 2 of 4: {text}"):
                run(ep, leaver, how)
        with pytest.raises(GroupClosed, match=f"moe: rank {leaver} of {group.size}, chunk 2 of 4: {text}"):
            ep.plan(topk)
        ep.close()
        inner.close()
    inner = group.new_group(range(group.size))
    ep = ExpertParallel(inner, 6, dedup="host")
    with pytest.raises((InvalidArgument, GroupClosed), match="another exchange of this ExpertParallel began before"):
        for chunk in ep.stream(x, topk, weights, n_chunks=2):
            chunk.output = ep.dispatch(x, topk, weights).rows[: len(chunk.rows)]
    inner.close()


def _doubled(x: Tensor, topk: Tensor, ep: Any, scale: Tensor) -> Tensor:
    stream = ep.stream(x, topk, torch.ones(len(x), 2), n_chunks=2)
    for chunk in stream:
        chunk.output = torch.sigmoid(chunk.rows * 0) * 2 * chunk.rows * scale
    output: Tensor = stream.output
    return output


def check_delayed_gradients(group: Any) -> None:
    plain, later = network(), WeightGradients()
    model = network()
    buckets = GradientBuckets(model.parameters(), group, bucket_nbytes=100)
    for step in range(2):
        x = batch(step, group.rank).requires_grad_()
        h = x
        for block in model:
            h = torch.tanh(later.linear(h, block[0].weight, block[0].bias))
        h.square().sum().backward()
        assert len(later) == 6 and all(p.grad is None for p in model.parameters())
        own = batch(step, group.rank).requires_grad_()
        torch.testing.assert_close(x.grad, torch.autograd.grad(plain(own).square().sum(), own)[0])
        later.fill(group.all_reduce(torch.ones(1 << 16), async_op=True))
        later.flush()
        assert len(later) == 0
        buckets.wait()
        for p, exact in zip(model.parameters(), exact_gradients(step, group.size, plain), strict=True):
            torch.testing.assert_close(buckets.gradient(p), exact, rtol=1e-5, atol=1e-5)
    order: list[int] = []  # of gradients given together: each of a leaf comes alone, in the order of the queue
    leaves = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    for index, leaf in enumerate(leaves):
        leaf.register_post_accumulate_grad_hook(lambda each, index=index: order.append(index * 10 + int(each.grad[0])))
    for value, index in enumerate((2, 0, 0, 1, 2, 0), 1):
        later.put(leaves[index], lambda value=value: torch.full((2,), float(value)))
    later.flush()
    assert [sorted(order[:2]), sorted(order[2:5]), order[5:]] == [[2, 21], [5, 14, 26], [11]]
    together = WeightGradients(together=True)
    weight = torch.arange(6.0).view(2, 3).requires_grad_()
    pieces = torch.arange(12.0).view(4, 3)
    for piece in pieces.split(1):
        together.linear(piece, weight).sum().backward()
    assert len(together) == 1
    together.flush()
    assert torch.equal(weight.grad, pieces.sum(0).expand(2, 3))
    with pytest.raises(InvalidArgument, match="not a leaf"):
        later.linear(x, model[0][0].weight * 2)
    with pytest.raises(InvalidArgument, match="last sizes"):
        later.linear(x, model[1][0].weight)


def check_scorecard(group: Any) -> None:
    ran: list[str] = []
    card = measure(group, n_rounds=2, **{name: lambda name=name: ran.append(name) for name in RUNS})
    assert ran == [*RUNS] * 3
    assert card.compute_s > 0 and str(card)
    figures = torch.tensor([card.compute_s, card.together_s], dtype=torch.float64)
    firsts = figures.clone()
    group.broadcast(firsts, 0)
    assert torch.equal(figures, firsts)


RUNS = ("compute", "communicate", "serial", "together")


CHECKS = (
    check_buckets,
    check_buckets_that_differ,
    check_sharded_modules,
    check_cuts,
    check_matmuls,
    check_stream,
    check_streams_of_micro_batches,
    check_streams_into_buckets,
    check_streams_that_end_early,
    check_delayed_gradients,
    check_scorecard,
)


def every_check(group: Any) -> None:
    torch.set_num_threads(1)
    for check in CHECKS:
        check(group)


def test_overlapped_equals_whole_on_ranks_of_two_hosts() -> None:
    run_ranks(every_check, len(HOSTS), hosts=HOSTS)


def test_overlapped_equals_whole_on_one_rank() -> None:
    run_ranks(alone, 1)


def alone(group: Any) -> None:
    model = network()
    buckets = GradientBuckets(model.parameters(), group)
    sharded_model = network()
    sharded = ShardedModules(list(sharded_model), group)
    for step in range(2):
        model(batch(step, 0)).square().sum().backward()
        buckets.wait()
        sharded_model(batch(step, 0)).square().sum().backward()
        sharded.wait()
        exact = exact_gradients(step, 1, model)
        for p, expected in zip(model.parameters(), exact, strict=True):
            torch.testing.assert_close(buckets.gradient(p), expected)
        flat = torch.cat([shard.grad for shard in sharded.shards()])
        torch.testing.assert_close(flat, torch.cat([e.flatten() for e in exact]))
        for shard in sharded.shards():
            shard.grad = None
    weight = torch.ones(3, 6)
    x = seeded(1, 4, 6, dtype=torch.float32)
    torch.testing.assert_close(all_gather_matmul(x, weight, group), F.linear(x, weight))
    torch.testing.assert_close(matmul_reduce_scatter(x, weight, group), F.linear(x, weight))
    assert plan_all_gather_matmul(x, weight, group).n_pieces == 0
