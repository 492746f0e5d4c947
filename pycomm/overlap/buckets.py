"""Gradients summed over a group bucket by bucket, while backward still computes the rest.

    buckets = GradientBuckets(model.parameters(), group)
    with buckets.no_sync():
        loss(first_micro_batch).backward()       # adds up locally
    loss(last_micro_batch).backward()            # each bucket is reduced as soon as its last gradient is there
    buckets.wait()
    buckets.gradient(parameter)                  # a view of the bucket, on every rank the same bits

The first step reduces nothing before wait(): it learns in which order backward reaches the parameters. Rank 0's order
counts for all; from then on buckets start strictly in it, so every rank starts the same collectives in the same order.
Source of the order: Li et al., PyTorch Distributed, arXiv:2006.15704, section 3.2.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from pycomm.errors import InvalidArgument
from pycomm.explain import format_nbytes
from pycomm.overlap import cost
from pycomm.overlap.bucket import Bucket, BucketGroup, Hook, Slot
from pycomm.overlap.cost import LinkCost
from pycomm.overlap.layout import agreed_order, pack, require_alike, require_leaves

LOSS: Final = 0.05  # of the link, to latency, in a bucket that backward hides
LAST_LOSS: Final = 1.0  # in the last one, which nothing hides: half of its time is latency
START_S: Final = 50e-6  # of the computing thread, to start one more collective


class GradientBuckets:
    """Takes each parameter's gradient out of backward, adds it to a flat bucket of dtype, and reduces full buckets.

    The parameters' own .grad is None again after each backward: a micro-batch in bf16 adds up in fp32, and nothing is
    held twice. Not thread safe; several instances may share one backward.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        group: BucketGroup,
        *,
        bucket_nbytes: int | None = None,
        link: str | LinkCost = "predicted",
        collective: str = "all_reduce",
        dtype: torch.dtype = torch.float32,
        op: str = "sum",
        wire: str | None = None,
        error_feedback: bool = True,
        hook: Hook | None = None,
        set_grad: bool = False,
    ) -> None:
        """parameters: leaves that require a gradient, equal on every rank.

        bucket_nbytes: what a bucket holds at most, unless one parameter is more. None: what loses LOSS of the link to
        latency, by `link`: "predicted" from the group's topology and tuning table; "measured" in the first step, which
        fits links that nobody described, but sizes may differ from run to run, and with them, across 3 hosts or more,
        the last bits of sums. The last bucket is smaller.
        collective: "all_reduce"; or "reduce_scatter", after which each rank has owned() alone (ZeRO-2).
        op, wire: as in Group.all_reduce. error_feedback: with a wire, what coding loses in a step is added to the next
        step's gradients, at the price of as much memory again; it needs dtype float32 and op sum or avg.
        hook: reduces a bucket in the place of all_reduce: hook(bucket, group) starts what it likes and returns
        something to wait() for, after which bucket.flat has the result (Landed helps); every rank the same.
        set_grad: wait() makes gradient(p) each parameter's .grad, for torch's optimizers."""
        self._group = group
        self._op = op
        self._wire = wire
        self._hook = hook
        self._dtype = dtype
        self._most = bucket_nbytes
        self._link = link
        self._collective = collective
        self._set_grad = set_grad
        self._feeds_back = wire is not None and error_feedback and group.size > 1
        self.parameters = list(parameters)
        self._check()
        self._sync = True
        self._next = 0  # the bucket to start next
        self._buckets: list[Bucket] = []  # none before the first wait()
        self._ready: list[int] = []  # parameters as the first synchronising backward brings them
        self._why = "not decided before the first wait()"
        self._slots = {
            p: Slot(index, torch.zeros(p.shape, dtype=dtype, device=p.device))
            for index, p in enumerate(self.parameters)
        }
        if self._feeds_back:
            for slot in self._slots.values():
                slot.residual = torch.zeros_like(slot.gradient)
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for p in self._slots]  # type: ignore[no-untyped-call]

    def _check(self) -> None:
        require_leaves(self.parameters)
        cost.require_source(self._link)
        if self._most is not None and self._most < 1:
            raise InvalidArgument(f"bucket_nbytes is {self._most}; give at least 1, or None for what the link asks for")
        if self._collective not in ("all_reduce", "reduce_scatter"):
            raise InvalidArgument(f"collective is {self._collective!r}; give 'all_reduce' or 'reduce_scatter'")
        if self._feeds_back and (self._dtype != torch.float32 or self._op not in ("sum", "avg")):
            raise InvalidArgument(
                f"error feedback takes float32 buckets and op sum or avg, got {self._dtype} and {self._op}; "
                "set error_feedback=False"
            )
        scatters = self._collective == "reduce_scatter"
        if scatters and self._feeds_back:
            raise InvalidArgument("error feedback needs all_reduce: a reduce_scatter keeps no residual")
        if self._hook is not None and (self._wire is not None or scatters):
            raise InvalidArgument("a hook reduces in its own way: give no wire and no other collective beside it")
        if self._set_grad and (scatters or any(p.dtype != self._dtype for p in self.parameters)):
            raise InvalidArgument(
                f"set_grad needs all_reduce and buckets of the parameters' type, got {self._collective} and "
                f"{self._dtype}; take gradient() or owned() instead"
            )

    @property
    def flats(self) -> list[Tensor]:
        """The buckets' memory, each 1-D; together they hold every gradient once. For norms and scaling."""
        if not self._buckets:
            return [slot.gradient.view(-1) for slot in self._slots.values()]
        return [bucket.flat for bucket in self._buckets]

    def gradient(self, parameter: Tensor) -> Tensor:
        """The parameter's summed gradient: always the same Tensor object, and after the first wait() the same memory.
        With reduce_scatter only what owned() names of it is reduced."""
        return self._slots[parameter].gradient

    def residual(self, parameter: Tensor) -> Tensor | None:
        """What coding lost of the parameter's gradient on this rank in the last step, to be added in the next; None
        without error feedback. Always the same Tensor object, so that a checkpoint can read it and write it back."""
        return self._slots[parameter].residual

    def owned(self) -> Iterator[tuple[Tensor, int, Tensor]]:
        """(parameter, begin, values) for what this rank holds of each after a reduce_scatter's wait(): values, 1-D, is
        the summed gradient of parameter.flatten()[begin : begin + len(values)]. The same from step to step. With
        all_reduce, everything."""
        for bucket in self._buckets:
            low, high = self._range(bucket)
            at = 0
            for parameter in bucket.parameters:
                begin, end = max(low, at), min(high, at + parameter.numel())
                if begin < end:
                    yield parameter, begin - at, bucket.flat[begin:end]
                at += parameter.numel()

    def _range(self, bucket: Bucket) -> tuple[int, int]:
        if self._collective == "all_reduce":
            return 0, bucket.flat.numel()
        each = bucket.flat.numel() // self._group.size
        return self._group.rank * each, (self._group.rank + 1) * each

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, backward only adds up: for all micro-batches of a step but the last."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def wait(self) -> None:
        """Returns when every bucket is reduced; then gradient() holds the sums, until the next backward begins.

        A parameter that no backward of this step reached has gradient 0. Raises what the collectives raise, and in the
        first step, on every rank, InvalidArgument where ranks have different parameters or settings."""
        if not self._buckets:
            self._lay_out()
        for slot in self._slots.values():
            if not slot.written:
                slot.gradient.zero_()
        while self._next < len(self._buckets):
            self._start_next()
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
        self._reset()

    def explain(self) -> str:
        """How many buckets of which sizes there are, and why."""
        sizes = [bucket.flat.nbytes for bucket in self._buckets]
        if not sizes:
            return f"gradient buckets: {self._why}"
        return (
            f"gradient buckets: {len(sizes)} of {format_nbytes(min(sizes))} to {format_nbytes(max(sizes))}, the last "
            f"{format_nbytes(sizes[-1])}, by {self._collective}; {self._why}"
        )

    def close(self) -> None:
        """Takes the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _lay_out(self) -> None:
        """Agrees on order and sizes, and moves what the first step added up into the buckets."""
        group, itemsize = self._group, self._dtype.itemsize
        if group.size > 1:
            require_alike(group, self.parameters, self._settings())
        order = agreed_order(group, self._ready, len(self.parameters))
        sizes = [self.parameters[index].numel() * itemsize for index in order]
        most, last = self._sizes(sum(sizes))
        begin = 0
        for count in pack(sizes, most, last):
            members = [self.parameters[index] for index in order[begin : begin + count]]
            begin += count
            numel = sum(p.numel() for p in members)
            if self._collective == "reduce_scatter":
                numel += -numel % group.size
            flat = torch.zeros(numel, dtype=self._dtype, device=members[0].device)
            residual = torch.zeros_like(flat) if self._feeds_back else None
            bucket = Bucket(len(self._buckets), flat, members, residual)
            self._buckets.append(bucket)
            at = 0
            for parameter in members:
                slot = self._slots[parameter]
                view = flat[at : at + parameter.numel()].view(parameter.shape)
                view.copy_(slot.gradient)
                slot.gradient.data = view  # who holds the tensor sees the bucket from here on
                if slot.residual is not None:
                    assert residual is not None
                    lost = residual[at : at + parameter.numel()].view(parameter.shape)
                    slot.residual.data = lost.copy_(slot.residual)
                slot.bucket = bucket
                at += parameter.numel()

    def _sizes(self, total: int) -> tuple[int, int]:
        """(what a bucket holds at most, what the last one holds at most), and in _why the reason."""
        if self._most is not None:
            self._why = f"at most {format_nbytes(self._most)} each, as given"
            return self._most, self._most // 8
        if self._group.size == 1:
            self._why = "one rank has nobody to reduce with"
            return max(1, total), max(1, total)
        link = cost.found(
            self._group,
            self._link,
            self._collective,
            total,
            lambda x: self._reduce(x, None).wait(),
            self.parameters[0],
        )
        if self._link == "predicted":
            link = LinkCost(link.latency_s + START_S, link.bytes_per_s, link.source)
        most, last = link.efficient_nbytes(LOSS), link.efficient_nbytes(LAST_LOSS)
        self._why = f"{format_nbytes(most)} lose {LOSS:.0%} of the link to latency: n bytes take {link}"
        return most, last

    def _settings(self) -> str:
        hook = "no hook" if self._hook is None else "a hook"
        link = self._link if isinstance(self._link, str) else str(self._link)
        return (
            f"{self._collective} {self._op} of {self._dtype}, buckets of {self._most} bytes by {link}, "
            f"wire {self._wire}, {hook}"
        )

    def _reset(self) -> None:
        self._next = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
            bucket.work = None
        for parameter, slot in self._slots.items():
            slot.written = slot.counted = False
            if self._set_grad:
                parameter.grad = slot.gradient

    def _take(self, parameter: Tensor) -> None:
        slot = self._slots[parameter]
        if slot.counted:
            raise RuntimeError(
                f"a gradient {list(parameter.shape)} came for a bucket that is already being reduced; call wait() "
                "after each synchronising backward, or run the earlier ones in no_sync()"
            )
        gradient = parameter.grad
        if gradient is None:  # put off (WeightGradients): it comes later
            return
        if gradient.is_sparse:
            raise InvalidArgument(
                f"parameter {slot.index} {list(parameter.shape)} has a sparse gradient; buckets hold dense ones "
                "(torch.nn.Embedding(sparse=False))"
            )
        if gradient is not slot.gradient:  # else set_grad, and backward added to it
            if slot.written:
                slot.gradient.add_(gradient)
            else:
                slot.gradient.copy_(gradient)
        slot.written = True
        parameter.grad = None
        if not self._sync:
            return
        slot.counted = True
        if slot.bucket is None:
            self._ready.append(slot.index)
            return
        slot.bucket.missing -= 1
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        if self._group.size == 1:
            return
        if self._hook is not None:
            bucket.work = self._hook(bucket, self._group)
            return
        if bucket.residual is not None:
            bucket.flat.add_(bucket.residual)
        bucket.work = self._reduce(bucket.flat, bucket.residual)

    def _reduce(self, flat: Tensor, residual: Tensor | None) -> Any:
        options: dict[str, Any] = {"async_op": True}
        if self._wire is not None:
            options["wire"] = self._wire
        if self._collective == "reduce_scatter":
            each = flat.numel() // self._group.size
            mine = flat[self._group.rank * each : (self._group.rank + 1) * each]
            return self._group.reduce_scatter(mine, flat[: each * self._group.size], self._op, **options)
        if self._wire is not None:
            options["wire_residual"] = residual
        return self._group.all_reduce(flat, self._op, **options)
