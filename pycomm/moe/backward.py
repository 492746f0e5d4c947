"""Notices a backward that an exception ended before the exchange had its part in it, where the process lives on.

Autograd calls no node of ours after an exception elsewhere. But it lets go of what waits for a backward's end, called
or not: so the first node of ours that a backward reaches leaves a _Watch there, which knows the nodes still to come. A
graph that is dropped, on one rank or on all, reaches no node, and nothing happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
from torch.autograd import Variable

from pycomm.moe.waits import Waits


class Backwards:
    """Of one exchange: all its nodes in graphs that are alive, and the backwards that are under way."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        self._nodes: WeakSet[Any] = WeakSet()
        self._under_way: WeakValueDictionary[int, _Watch] = WeakValueDictionary()

    def expect(self, node: Any) -> None:
        """In a node's forward: the other ranks wait for its backward."""
        self._nodes.add(node)

    @contextmanager
    def reached(self, node: Any) -> Iterator[None]:
        """Around a node's backward."""
        task = torch._C._current_graph_task_id()
        watch = self._under_way.get(task)
        if watch is None:
            owed = {id(each) for each in self._nodes if torch._C._will_engine_execute_node(each)}
            watch = self._under_way[task] = _Watch(self._waits, owed)
            Variable._execution_engine.queue_callback(watch)
        yield
        watch.owed.discard(id(node))


class _Watch:
    """Held by one backward of autograd alone, which calls it at its end and lets it go, or, if it fails, only that."""

    def __init__(self, waits: Waits, owed: set[int]) -> None:
        self.waits, self.owed = waits, owed

    def __call__(self) -> None:
        self.owed.clear()

    def __del__(self) -> None:
        if self.owed:
            self.waits.abandon_after("its backward ended there, by an exception; see that rank's output for why")
