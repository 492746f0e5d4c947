"""pycomm.overlap and the expert stream on tensors of any device: part(group, device) gives what it computed, in the
CPU's memory. Values are small whole numbers and powers of two, so that a device has the CPU's bits whatever the order
in which it adds up; gpu_group_bodies.py compares the two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pycomm.moe import ExpertParallel
from pycomm.overlap import (
    Cut,
    GradientBuckets,
    LinkCost,
    MatmulPlan,
    ShardedModules,
    WeightGradients,
    all_gather_matmuls,
    matmul_reduce_scatter,
    plan_all_gather_matmul,
    plan_matmul_reduce_scatter,
)


def whole_numbers(seed: int, *shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small ones: sums are exact, in whichever order they are made."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def network(device: str) -> nn.Sequential:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in ((6, 5), (5, 7), (7, 3))))
    with torch.no_grad():
        for index, p in enumerate(model.parameters()):
            p.copy_(whole_numbers(index, *p.shape, device="cpu").clamp(-1, 1))  # bfloat16 has no 257
    return model.to(device)


def buckets(group: Any, device: str) -> list[Tensor]:
    found = []
    for collective, nbytes, link in (
        ("all_reduce", None, "predicted"),
        ("all_reduce", 100, "predicted"),
        ("all_reduce", None, "measured"),
        ("reduce_scatter", 60, LinkCost(1e-3, 1e5, "of the test")),
    ):
        model = network(device)
        gradients = GradientBuckets(
            model.parameters(),
            group,
            collective=collective,
            bucket_nbytes=nbytes,
            link=link,
            set_grad=collective == "all_reduce" and nbytes is None,
        )
        for step in range(3):
            with gradients.no_sync():
                model(whole_numbers(10 * step + group.rank, 4, 6, device=device)).sum().backward()
            model(whole_numbers(20 * step + group.rank, 4, 6, device=device)).sum().backward()
            gradients.wait()
            found += [values.cpu() for _, _, values in sorted(gradients.owned(), key=lambda each: each[2].numel())]
            found += [p.grad.cpu() for p in model.parameters() if p.grad is not None]
            model.zero_grad()
        gradients.close()
    return [each.clone() for each in found]


def products(group: Any, device: str) -> list[Tensor]:
    n, rank = group.size, group.rank
    found = []

    def leaf(seed: int, *shape: int) -> Tensor:
        return whole_numbers(seed, *shape, device=device).requires_grad_()

    for n_pieces, keep, n_rows, puts_off in (
        (0, False, 5, False),
        (1, True, 1, True),
        (3, False, 5, True),
        (2, True, 0, False),
    ):
        plan, later = MatmulPlan(n_pieces, "of the test"), WeightGradients() if puts_off else None
        x, weights, last = leaf(rank, n_rows, 2, 6), [leaf(5, 4, 6), leaf(6, 2, 6)], leaf(7, 3, 6)
        ys = all_gather_matmuls(x, weights, group, plan, keep=keep, later=later)
        z = matmul_reduce_scatter(torch.cat(ys, -1), last, group, plan, later=later)
        (z * whole_numbers(8 + rank, *z.shape, device=device)).sum().backward()
        if later is not None:
            later.flush()
        found += [*ys, z, *(each.grad for each in (x, *weights, last))]
    x, weight = torch.ones(3 * n, 6, device=device), torch.ones(4, 6, device=device)
    for make in (plan_all_gather_matmul, plan_matmul_reduce_scatter):
        assert make(x, weight, group, "measured").why
    return [each.detach().cpu() for each in found]


def sharded(group: Any, device: str) -> list[Tensor]:
    alone = group.split(group.rank)
    found = []
    for depth, copies, dtype in ((0, False, None), (2, False, None), (1, True, torch.bfloat16)):
        model = network(device)
        blocks: list[Any] = list(model)
        if copies:
            blocks = [Cut(list(block.parameters()), alone, block, group, "last") for block in model]
        modules = ShardedModules(blocks, group, depth=depth, dtype=dtype)
        for step in range(3):
            for micro in range(2):
                x = whole_numbers(10 * step + micro + group.rank, 4, 6, device=device)
                model(x.to(dtype or x.dtype)).sum().backward()
                modules.end_backward()
            modules.wait()
            with torch.no_grad():
                for shard in modules.shards():
                    assert shard.grad is not None
                    found.append(shard.grad.cpu().clone())
                    shard += shard.grad.sign()
                    shard.grad = None
            modules.publish()
        with modules.whole():
            found += [p.detach().cpu().clone() for p in model.parameters()]
        modules.close()
    alone.close()
    return found


def stream(group: Any, device: str) -> list[Tensor]:
    n_experts, hidden, top_k = 2 * group.size, 4, 2
    found = []
    for dedup, cut, n_chunks, wire, dtype in (
        ("none", "tokens", 1, None, torch.float32),
        ("rank", "tokens", 3, None, torch.bfloat16),
        ("none", "experts", 2, None, torch.float32),
        ("rank", "experts", 2, "fp8", torch.float32),
        ("host", "tokens", 2, "fp8", torch.bfloat16),
    ):
        ep = ExpertParallel(group, n_experts, dedup=dedup, wire=wire)
        unit = 112 if wire == "fp8" else 1  # e4m3's largest is 448: scales are powers of two
        for n_tokens in (7, 0 if group.rank == 2 else 3):
            random = torch.Generator().manual_seed(group.rank)
            topk = torch.rand(n_tokens, n_experts, generator=random).argsort(1)[:, :top_k].to(device)
            x = (whole_numbers(group.rank, n_tokens, hidden, device=device, dtype=dtype) * unit).requires_grad_()
            weights = whole_numbers(9 + group.rank, n_tokens, top_k, device=device).requires_grad_()
            experts = [
                whole_numbers(e + 100 * group.rank, hidden, hidden, device=device, dtype=dtype).requires_grad_()
                for e in range(2)
            ]
            later = WeightGradients(together=True)
            for flush in (False, True):  # the first one's weight gradients are computed in the second's waits
                parts = ep.stream(x, topk, weights, n_chunks=n_chunks, cut=cut, later=later, flush=flush)
                for chunk in parts:
                    of_chunk = experts[chunk.experts.start : chunk.experts.stop]
                    rows = [
                        later.linear(each, expert)
                        for each, expert in zip(chunk.rows.split(chunk.sizes), of_chunk, strict=True)
                    ]
                    chunk.output = torch.cat([chunk.rows[:0], *rows])
                (parts.output * whole_numbers(77 + group.rank, n_tokens, hidden, device=device) * unit).sum().backward()
            found += [parts.output, x.grad, weights.grad, *(e.grad for e in experts if e.grad is not None)]
            dispatched = ep.dispatch(x, topk, weights)
            again = ep.dispatch(x, topk, weights, plan=dispatched.plan)
            found += [dispatched.rows, again.rows, ep.combine(again.rows, again)]
        ep.close()
    return [each.detach().cpu() for each in found]
