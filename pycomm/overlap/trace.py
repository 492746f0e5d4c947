"""In which order a step uses its modules: learnt in the first step, followed in those after it.

With micro-batches, pipeline chunks and recomputation one step is a long sequence of forwards and backwards, and the
next one in the model is often not the next one to run. Source: the parameter trace of DeepSpeed's ZeRO-3 (Rajbhandari
et al., ZeRO-Infinity, arXiv:2104.07857, section 6.2)."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

Module = TypeVar("Module")
Phase = Literal["forward", "backward"]


class Trace(Generic[Module]):
    """A sequence of (module, phase); one that comes twice in a row counts once (backward that computes forward again).
    Every rank that runs the same step has the same trace."""

    def __init__(self) -> None:
        self._events: list[tuple[Module, Phase]] = []
        self._at = 0  # of the event that should come next
        self._learning = True

    def use(self, module: Module, phase: Phase, n: int) -> list[Module]:
        """Notes a use; the next n modules other than it, fewer where the trace ends or is not known."""
        event = (module, phase)
        if self._learning:
            if self._events[-1:] != [event]:
                self._events.append(event)
            return []
        if self._at == 0 or self._events[self._at - 1] != event:
            self._at = self._find(event, self._at) or self._find(event, 0) or self._at
        return [each for each in self.upcoming(n + 1) if each is not module][:n]

    def _find(self, event: tuple[Module, Phase], begin: int) -> int | None:
        """The place behind the first such event from a place on."""
        try:
            return self._events.index(event, begin) + 1
        except ValueError:
            return None

    def upcoming(self, n: int) -> list[Module]:
        """The next n distinct modules after the last use."""
        found: list[Module] = []
        for module, _ in self._events[self._at :] if not self._learning else []:
            if len(found) == n:
                break
            if module not in found:
                found.append(module)
        return found

    def after_forward(self, module: Module, n: int) -> list[Module]:
        """The n modules that follow a forward outside the steps, an evaluation's say. Notes nothing."""
        at = self._find((module, "forward"), 0)
        found: list[Module] = []
        for other, phase in self._events[at:] if at is not None and not self._learning else []:
            if phase != "forward" or other in found or len(found) == n:
                break
            found.append(other)
        return found

    def restart(self) -> None:
        """A step has ended: the next one begins at the trace's beginning."""
        self._learning = self._learning and not self._events
        self._at = 0
