"""A rank that fails inside a step but outside of the exchange, on 4 ranks of 2 hosts whose deadline is far away: the
others raise GroupClosed with its rank and stage. What nobody waits for breaks nothing."""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from spawn import run_ranks
from torch import Tensor

from pycomm.errors import GroupClosed, InvalidArgument, PycommError
from pycomm.moe import ExpertParallel, StaticExpertParallel

HOSTS = ["a", "b", "a", "a"]
N_EXPERTS = 6
TOPK = torch.tensor([[0, 5], [2, 3], [4, 1], [1, 0]])
WEIGHTS = torch.tensor([[1.0, 2.0]]).repeat(4, 1)


class Failing(torch.autograd.Function):
    """x; raises in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise OSError("no more memory")


def failing(x: Tensor, fails: bool) -> Tensor:
    return Failing.apply(x) if fails else x.clone()  # type: ignore[no-any-return, no-untyped-call]


def exchanged(ep: ExpertParallel, x: Tensor, fails: bool = False) -> Tensor:
    """x through the experts, of which one fails in its backward."""
    dispatched = ep.dispatch(x, TOPK, WEIGHTS)
    return ep.combine(failing(dispatched.rows * 2, fails), dispatched)


def streamed(ep: ExpertParallel, x: Tensor, fails: bool = False) -> Tensor:
    stream = ep.stream(x, TOPK, WEIGHTS, n_chunks=2)
    for chunk in stream:
        chunk.output = failing(chunk.rows * 2, fails and chunk.index == 2)
    return stream.output


def start() -> Tensor:
    return torch.arange(4 * 6.0).view(4, 6).requires_grad_()


# What ranks do, of which the failing one has fails = True; and after which stage the others hear of it.


def expert_of_the_first_layer(ep: ExpertParallel, fails: bool) -> None:
    exchanged(ep, exchanged(ep, start(), fails)).sum().backward()


def between_two_layers(ep: ExpertParallel, fails: bool) -> None:
    exchanged(ep, failing(exchanged(ep, start()), fails)).sum().backward()


def expert_in_a_stream(ep: ExpertParallel, fails: bool) -> None:
    streamed(ep, start(), fails).sum().backward()


def expert_forward(ep: ExpertParallel, fails: bool) -> None:
    with ep.failing_together():
        dispatched = ep.dispatch(start(), TOPK, WEIGHTS)
        if fails:
            raise OSError("no more memory")
        ep.combine(dispatched.rows, dispatched)


def loss_backward(ep: ExpertParallel, fails: bool) -> None:
    with ep.failing_together():
        failing(exchanged(ep, start()), fails).sum().backward()


NOTICED = "its backward ended there, by an exception"
FAILURES: tuple[tuple[Callable[[ExpertParallel, bool], None], str], ...] = (
    (expert_of_the_first_layer, f"after backward of combine[^:]*: {NOTICED}"),
    (between_two_layers, f"after backward of dispatch[^:]*: {NOTICED}"),
    (expert_in_a_stream, f"after backward of stream, [^:]*: {NOTICED}"),
    (expert_forward, "after dispatch[^:]*: OSError: no more memory"),
    (loss_backward, "after combine[^:]*: OSError: no more memory"),
)


@contextmanager
def exchange_of_its_own(group: Any, **settings: Any) -> Any:
    inner = group.new_group(range(group.size))
    ep = ExpertParallel(inner, N_EXPERTS, **settings)
    yield ep
    ep.close()
    inner.close()


def check_failures(group: Any) -> None:
    for dedup, (number, (step, text)) in itertools.product(("rank", "host"), enumerate(FAILURES)):
        leaver = number % group.size
        fails = group.rank == leaver
        with exchange_of_its_own(group, dedup=dedup, chunks=2) as ep:
            text = f"moe: rank {leaver} of {group.size}, {text}"
            with pytest.raises(OSError if fails else GroupClosed, match=None if fails else text):
                step(ep, fails)
            with pytest.raises(GroupClosed, match=text):  # the one that failed, too, lives and is told
                ep.plan(TOPK)
        group.barrier()


def check_static_failure(group: Any) -> None:
    inner = group.new_group(range(group.size))
    ep = StaticExpertParallel(inner, N_EXPERTS, 16)
    dispatched = ep.dispatch(start(), TOPK, WEIGHTS)
    y = ep.combine(failing(dispatched.rows * 2, group.rank == 3), dispatched)
    text = f"moe: rank 3 of {group.size}, after backward of static combine: {NOTICED}"
    with pytest.raises(OSError if group.rank == 3 else GroupClosed, match=None if group.rank == 3 else text):
        y.sum().backward()
    group.barrier()


def check_what_breaks_nothing(group: Any) -> None:
    me = group.rank
    with exchange_of_its_own(group, dedup="host") as ep:
        # Graphs that are dropped, on all ranks, before a backward and after one that could be repeated.
        loss = streamed(ep, exchanged(ep, start())).sum()
        del loss
        loss = exchanged(ep, start()).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        del loss
        ep.dispatch(start(), TOPK, WEIGHTS)
        # A failure where the exchange has had its part, and one in a backward that does not reach it.
        for x in (failing(start(), me == 1), start()):
            y = exchanged(ep, streamed(ep, x))
            loss = y.sum() if x.grad_fn else failing(start(), me == 1).sum()
            with pytest.raises(OSError, match="no more memory") if me == 1 else nullcontext():
                loss.backward()
        # A backward to a value in the middle, and what all ranks refuse.
        h = exchanged(ep, start())
        torch.autograd.grad(exchanged(ep, h).sum(), h)
        with pytest.raises(InvalidArgument, match="names experts 0 to 6"), ep.failing_together():
            ep.plan(torch.tensor([[0, N_EXPERTS if me == 2 else 1]]))
        x = start()
        with ep.failing_together():
            exchanged(ep, x).sum().backward()
        assert x.grad is not None and torch.equal(x.grad, torch.full((4, 6), 6.0))


def check_ranks_in_different_calls(group: Any) -> None:
    """One left its batch after the dispatch, and began another with the plan."""
    with exchange_of_its_own(group, dedup="rank") as ep:
        dispatched = ep.dispatch(start(), TOPK, WEIGHTS)
        text = re.escape("rank 1 in combine, rank 2 in dispatch, rank 3 in combine; all must make the same")
        with pytest.raises(InvalidArgument, match=text):
            if group.rank == 2:
                ep.dispatch(start(), TOPK, WEIGHTS, dispatched.plan)
            else:
                ep.combine(dispatched.rows, dispatched)
        ep.combine(dispatched.rows, dispatched)


def killed_and_rebuilt(group: Any) -> bool:
    """Rank 1 is killed in an expert's forward; the others mask it and go on without its experts."""
    ep = ExpertParallel(group, 8, dedup="host")  # two experts a rank
    x, dispatched = start(), ep.dispatch(start(), TOPK, WEIGHTS)
    if group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PycommError, match=rf"moe: rank {group.rank} of 4, combine.*rank 1\b"):
        ep.combine(dispatched.rows, dispatched)
    with pytest.raises(InvalidArgument, match=r"mask\(1\): experts \[2, 3\] are on no other rank"):
        ep.mask(1)
    rest = group.new_group([0, 2, 3])
    # A group that shrank, of which nobody has said which ranks it lost, or what becomes of their experts.
    with pytest.raises(InvalidArgument, match=r"the new group has 3 ranks, said to have been \[0, 1, 2, 3\] of 4"):
        ep.rebuild(rest)
    with pytest.raises(InvalidArgument, match=r"rebuild: experts \[2, 3\] are on no rank of the new group"):
        ep.rebuild(rest, (0, 2, 3))
    ep.mask(1, allow_lost=True)
    rebuilt = ep.rebuild(rest)
    ep.close()
    dispatched = rebuilt.dispatch(x, TOPK, WEIGHTS)
    assert dispatched.plan.dropped == 6  # of each of three ranks experts 2 and 3
    y = rebuilt.combine(dispatched.rows * 2, dispatched)
    y.sum().backward()
    left = (WEIGHTS * ((TOPK < 2) | (TOPK > 3))).sum(1, keepdim=True)
    assert torch.equal(y.detach(), 2 * left * x.detach())
    assert x.grad is not None and torch.equal(x.grad, 2 * left.expand(4, 6))
    rebuilt.close()
    return True


def test_others_go_on_when_a_rank_is_killed() -> None:
    found = run_ranks(killed_and_rebuilt, len(HOSTS), hosts=HOSTS, op_timeout_s=45, may_die=[1])
    assert found == [True, None, True, True]


def every_check(group: Any) -> None:
    check_failures(group)
    check_static_failure(group)
    check_what_breaks_nothing(group)
    check_ranks_in_different_calls(group)


def test_on_four_ranks_of_two_hosts() -> None:
    run_ranks(every_check, len(HOSTS), hosts=HOSTS, op_timeout_s=45)
