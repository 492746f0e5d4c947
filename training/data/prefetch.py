"""Reads the next step's batches in a thread while this step computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from training.data.corpus import Batch, Corpus
from training.device import HOST, Device


class Prefetcher:
    """at(position) gives a step's batches and begins those of position + stride. One thread reads, so that a corpus,
    which is not thread safe, has one reader."""

    def __init__(
        self, corpus: Corpus, plan: Callable[[int], Sequence[Sequence[int]]], stride: int, device: Device = HOST
    ) -> None:
        """plan: the windows of each batch of the step that begins at a position. device: where they will go."""
        self._corpus, self._plan, self._stride, self._device = corpus, plan, stride, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def at(self, position: int) -> list[Batch]:
        """Raises what reading raised."""
        if self._ahead is None or self._ahead[0] != position:
            self._ahead = (position, self._thread.submit(self._read, position))
        batches = self._ahead[1].result()
        following = position + self._stride
        self._ahead = (following, self._thread.submit(self._read, following))
        return batches

    def _read(self, position: int) -> list[Batch]:
        return [Batch(*map(self._device.staged, self._corpus.batch(w))) for w in self._plan(position)]

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
