"""How long a product takes whose operand or result goes around a ring beside it: arithmetic alone, for who decides
whether to overlap (matmul.py) and for who plans without ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pycomm.overlap.cost import LinkCost

MAX_PIECES: Final = 8
PIECE_LOSS: Final = 0.1  # of the link, to latency
START_S: Final = 2e-5  # of the computing thread, to send and receive one more piece
MARGIN: Final = 0.95  # of the unsplit time that the split one must be predicted to stay below


@dataclass(frozen=True)
class RingTime:
    """Of n_ranks (at least 2), along n_rows and nbytes of the whole operand or result; link: of the collective that the
    ring replaces."""

    n_ranks: int
    n_rows: int
    nbytes: int
    link: LinkCost

    # Of a ring each rank sends n-1 parts, as of the collective, whose n-1 latencies are in link.latency_s.

    @property
    def _hop_s(self) -> float:
        return self.link.latency_s / (self.n_ranks - 1) + START_S

    @property
    def _part_s(self) -> float:
        return self.nbytes / (self.n_ranks - 1) / self.link.bytes_per_s

    @property
    def n_pieces(self) -> int:
        """Of each rank's part: as many as lose no more than PIECE_LOSS of the link."""
        return max(1, min(MAX_PIECES, int(self._part_s * PIECE_LOSS / self._hop_s), self.n_rows // self.n_ranks))

    def split_s(self, n_pieces: int, piece_s: float) -> float:
        """Around the ring, with products of piece_s for each piece."""
        return ring_s(self.n_ranks, n_pieces, piece_s, self._part_s / n_pieces + self._hop_s)

    def unsplit_s(self, product_s: float) -> float:
        """The collective and the product, one after the other."""
        return self.link.seconds(self.nbytes) + product_s

    def gains(self, n_pieces: int, piece_s: float, product_s: float) -> bool:
        """Whether the ring is predicted to be worth it."""
        return self.split_s(n_pieces, piece_s) <= MARGIN * self.unsplit_s(product_s)


def ring_s(n_ranks: int, n_pieces: int, product_s: float, hop_s: float) -> float:
    """A ring of n_ranks parts in n_pieces each: all products and the last piece's way, or all ways and one product."""
    return max(n_ranks * n_pieces * product_s + hop_s, (n_ranks - 1) * n_pieces * hop_s + product_s)
