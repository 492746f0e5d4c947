"""The code in docs/moe.md and docs/overlap.md runs as it stands, in order, on 2 ranks, and does what it says there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from spawn import run_ranks
from torch import Tensor, nn

import pycomm.moe
import pycomm.overlap

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCKS = {
    name: re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)
    for name in ("moe.md", "overlap.md")
}
HIDDEN, N_EXPERTS, TOP_K = 2048, 256, 8


class Doubling:
    """This rank's experts: one by one, or called with the parts, the chunk's experts and a linear of weights' own."""

    def __init__(self, n: int) -> None:
        self.weights = [torch.full((4, 4), 0.0).fill_diagonal_(2.0).requires_grad_() for _ in range(n)]

    def __iter__(self) -> Any:
        return iter([lambda rows: 2 * rows] * len(self.weights))

    def __call__(self, parts: tuple[Tensor, ...], experts: range, linear: Callable[..., Tensor]) -> Tensor:
        of_chunk = self.weights[experts.start : experts.stop]
        return torch.cat([linear(rows, weight) for rows, weight in zip(parts, of_chunk, strict=True)])


def names(group: Any) -> dict[str, Any]:
    """What the blocks take as given, and all that the two packages export."""
    given: dict[str, Any] = {"torch": torch, "group": group}
    for package in (pycomm.moe, pycomm.overlap):
        given |= {name: getattr(package, name) for name in package.__all__}
    return given


def routed(group: Any, hidden: int, n_experts: int, top_k: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(group.rank)
    return {
        "x": torch.randint(-2, 3, (5, hidden), generator=generator).float().requires_grad_(),
        "topk_idx": torch.rand(5, n_experts, generator=generator).argsort(1)[:, :top_k],
        "topk_weights": torch.randint(-2, 3, (5, top_k), generator=generator).float(),
    }


def doubled(given: dict[str, Any]) -> Tensor:
    result: Tensor = 2 * given["x"] * given["topk_weights"].sum(1, keepdim=True)
    return result


def run_moe(group: Any) -> None:
    exchange, torchtitan = BLOCKS["moe.md"]
    given = names(group) | routed(group, HIDDEN, N_EXPERTS, TOP_K) | {"my_experts": Doubling(N_EXPERTS // group.size)}
    for block in (exchange, torchtitan):
        exec(block, given)
        assert torch.equal(given.pop("y"), doubled(given)), block


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

    def loss(self, batch: Tensor) -> Tensor:
        for block in self.blocks:
            batch = block(batch)
        return F.mse_loss(batch, torch.ones(()).expand_as(batch))


def alone(group: Any, batches: list[list[Tensor]]) -> list[Tensor]:
    """The parameters after AdamW's steps over the sum of all ranks' gradients; batches: of a rank, [its number]."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(2):
        for rank in range(group.size):
            for batch in batches[2 * rank + step]:
                model.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [each.detach() for each in model.parameters()]


def run_overlap(group: Any) -> None:
    gradients, hook, parameters, stream, micro = BLOCKS["overlap.md"]
    generator = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(3, 4, generator=generator) for _ in range(2)] for _ in range(2 * group.size)]
    mine = pairs[2 * group.rank : 2 * group.rank + 2]
    expected = alone(group, pairs)

    model = Model()
    exec(gradients, names(group) | {"model": model, "loss": model.loss, "batches": mine})
    torch.testing.assert_close([each.detach() for each in model.parameters()], expected)

    given = names(group)
    exec(hook, given)
    model = Model()
    buckets = pycomm.overlap.GradientBuckets(model.parameters(), group, hook=given["in_bf16"], set_grad=True)
    model.loss(mine[0][0]).backward()
    buckets.wait()
    assert all(each.grad is not None for each in model.parameters())
    buckets.close()

    singles = [[pair[0]] for pair in pairs]
    model = Model()
    own = [each for (each,) in singles[2 * group.rank : 2 * group.rank + 2]]
    given = names(group) | {"model": model, "loss": model.loss, "batches": own}
    exec(parameters, given)
    with given["sharded"].whole():
        torch.testing.assert_close([each.detach() for each in model.parameters()], alone(group, singles))
    given["sharded"].close()

    given = names(group) | routed(group, 4, 6, 2) | {"my_experts": Doubling(3)}
    given["ep"] = pycomm.moe.ExpertParallel(group, 6)
    exec(stream, given)
    assert torch.equal(given["y"], doubled(given))
    given["y"].sum().backward()
    assert any(each.grad is not None for each in given["my_experts"].weights)
    ep, batches, weights = given["ep"], [[given[name] for name in ("x", "topk_idx", "topk_weights")]] * 2, []
    for streamed in (True, False):
        mine = given["my_experts"] = Doubling(3)
        given["optimizer"] = torch.optim.SGD(mine.weights, 0.5)
        given |= {"micro_batches": batches, "loss": lambda y: y.square().sum()}
        if streamed:
            exec(micro, given)
        else:
            for x, topk_idx, topk_weights in batches:
                sent = ep.dispatch(x, topk_idx, topk_weights)
                y = ep.combine(mine(sent.rows.split(sent.sizes), range(3), F.linear), sent)
                given["loss"](y).backward()
            given["optimizer"].step()
        weights.append([each.detach() for each in mine.weights])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*weights, strict=True))


def test_of_the_moe_page() -> None:
    run_ranks(run_moe, 2)


def test_of_the_overlap_page() -> None:
    run_ranks(run_overlap, 2)
