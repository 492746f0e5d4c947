"""What can be measured: collectives, types and operations, with nccl-tests' sizes and factors. Numpy alone.

Size S is nccl-tests': the longest buffer a rank passes in or gets; count is in elements of one rank's call argument, a
piece where there is one for each rank. Source of the bandwidths: NVIDIA nccl-tests, doc/PERFORMANCE.md and src/*.cu."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pycomm.errors import InvalidArgument
from pycomm.explain import format_nbytes

OUT_OF_PLACE, IN_PLACE = "out_of_place", "in_place"
WINDOW: Final = 16  # messages in flight of a bandwidth measurement


@dataclass(frozen=True)
class DType:
    """exact: 0 .. exact are all represented. raw: numpy's type of that width that holds the bits. fraction_bits and
    exponent_bias: of a floating type that numpy lacks."""

    name: str  # torch's
    raw: str
    exact: int
    floating: bool
    fraction_bits: int = 0
    exponent_bias: int = 0

    @property
    def nbytes(self) -> int:
        return np.dtype(self.raw).itemsize

    def encode(self, values: Any) -> NDArray[Any]:
        """Whole numbers from 0 to `exact`, as elements of `raw`."""
        values = np.asarray(values)
        bits: NDArray[Any]
        if not self.fraction_bits:
            bits = values.astype(self.raw)
            return bits
        fraction, exponent = np.frexp(values.astype(np.float64))  # 0.5 <= fraction < 1
        fraction_field = ((2 * fraction - 1) * (1 << self.fraction_bits)).astype(np.int64)
        field = ((exponent - 1 + self.exponent_bias) << self.fraction_bits) + fraction_field
        bits = np.where(values == 0, 0, field).astype(self.raw)
        return bits


DTYPES: Final = {
    dtype.name: dtype
    for dtype in (
        DType("float32", "float32", 1 << 24, True),
        DType("float64", "float64", 1 << 53, True),
        DType("float16", "float16", 1 << 11, True),
        DType("bfloat16", "uint16", 1 << 8, True, 7, 127),
        DType("float8_e4m3fn", "uint8", 1 << 4, True, 3, 7),
        DType("float8_e5m2", "uint8", 1 << 3, True, 2, 15),
        DType("int8", "int8", (1 << 7) - 1, False),
        DType("uint8", "uint8", (1 << 8) - 1, False),
        DType("int32", "int32", (1 << 31) - 1, False),
        DType("int64", "int64", (1 << 63) - 1, False),
    )
}
DTYPE_ALIASES: Final = {
    "fp32": "float32", "float": "float32", "fp64": "float64", "double": "float64", "fp16": "float16",
    "half": "float16", "bf16": "bfloat16", "fp8e4m3": "float8_e4m3fn", "fp8e5m2": "float8_e5m2",
}  # fmt: skip
BITWISE: Final = ("band", "bor", "bxor")
OPS: Final = ("sum", "product", "min", "max", "avg", *BITWISE)
OP_ALIASES: Final = {"prod": "product"}


@dataclass(frozen=True)
class Collective:
    """splits: the size is cut into a piece for each rank. busbw: times algbw. touched: tensors of S bytes that all n
    ranks together must read and write at least, every input once and every output once."""

    busbw: Callable[[int], float]
    touched: Callable[[int], float]
    splits: bool = False
    reduces: bool = False
    rooted: bool = False
    placements: tuple[str, ...] = (OUT_OF_PLACE, IN_PLACE)
    native: str = OUT_OF_PLACE  # the placement that torch's call of this name has; ratios and percentiles are its

    def __post_init__(self) -> None:
        assert self.native in self.placements


def _one(n: int) -> float:
    return 1.0


def _others(n: int) -> float:
    return (n - 1) / n


COLLECTIVES: Final[dict[str, Collective]] = {
    "all_reduce": Collective(lambda n: 2 * (n - 1) / n, lambda n: 2 * n, reduces=True, native=IN_PLACE),
    "reduce": Collective(_one, lambda n: n + 1, reduces=True, rooted=True, native=IN_PLACE),
    "reduce_scatter": Collective(_others, lambda n: n + 1, splits=True, reduces=True),
    "all_gather": Collective(_others, lambda n: n + 1, splits=True),
    "broadcast": Collective(_one, lambda n: n, rooted=True, native=IN_PLACE),
    "gather": Collective(_others, lambda n: 2, splits=True, rooted=True),
    "scatter": Collective(_others, lambda n: 2, splits=True, rooted=True),
    "all_to_all": Collective(_others, lambda n: 2 * n, splits=True, placements=(OUT_OF_PLACE,)),
    "sendrecv": Collective(_one, lambda n: 2 * n, placements=(OUT_OF_PLACE,)),
    "barrier": Collective(_one, lambda n: 0, placements=(OUT_OF_PLACE,)),
}
# Beyond nccl-tests: two ranks' messages, the MoE exchange, and a collective beside which something is computed.
PAIRS: Final[dict[str, Collective]] = {
    name: Collective(_one, lambda n: 2, placements=(OUT_OF_PLACE,)) for name in ("latency", "bandwidth")
}
MOE: Final[dict[str, Collective]] = {
    name: Collective(_others, lambda n: 2 * n, placements=(OUT_OF_PLACE,)) for name in ("moe_dispatch", "moe_combine")
}
ALONE, COMPUTE, SERIAL, TOGETHER = "alone", "compute", "serial", "together"
OVERLAP: Final[dict[str, Collective]] = {
    f"overlap_{name}": Collective(
        COLLECTIVES[name].busbw,
        COLLECTIVES[name].touched,
        COLLECTIVES[name].splits,
        COLLECTIVES[name].reduces,
        placements=(ALONE, COMPUTE, SERIAL, TOGETHER),
        native=ALONE,
    )
    for name in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
}
EVERY: Final = COLLECTIVES | PAIRS | MOE | OVERLAP
WORDS: Final = {"all": tuple(COLLECTIVES), "moe": tuple(MOE), "overlap": ("overlap_all_reduce",)}


@dataclass(frozen=True)
class Moe:
    """An exchange: experts over all ranks, experts of a token, elements of a token."""

    experts: int
    top_k: int
    hidden: int


@dataclass(frozen=True)
class Case:
    """One row: a collective of one size and type. root: of a rooted collective. pair: the two ranks of a PAIRS entry.
    moe: of a MOE entry, whose size is what one rank dispatches, top_k copies of each token."""

    collective: str
    dtype: str
    nbytes: int
    n_ranks: int
    op: str = "sum"
    root: int = 0
    pair: tuple[int, int] | None = None
    moe: Moe | None = None

    @property
    def kind(self) -> Collective:
        return EVERY[self.collective]

    @property
    def element(self) -> DType:
        return DTYPES[self.dtype]

    @property
    def numel(self) -> int:
        """Of the longest buffer."""
        return self.nbytes // self.element.nbytes

    @property
    def count(self) -> int:
        """nccl-tests' count: elements of a piece where there are pieces, else of the buffer."""
        return self.numel // self.n_ranks if self.kind.splits else self.numel

    @property
    def calls_per_run(self) -> int:
        """What the time of one run is divided by: a round trip is two messages, a bandwidth window WINDOW of them."""
        return {"latency": 2, "bandwidth": WINDOW}.get(self.collective, 1)

    @property
    def label(self) -> str:
        words = [self.collective]
        if self.collective != "barrier":
            words += [self.dtype, format_nbytes(self.nbytes)]
        if self.kind.reduces:
            words.append(self.op)
        if self.pair is not None:
            words.append(f"ranks {self.pair[0]}-{self.pair[1]}")
        return " ".join(words)

    def algbw(self, seconds: float) -> float:
        """GB/s, 10^9 bytes."""
        return self.nbytes / seconds / 1e9

    def busbw(self, seconds: float) -> float:
        return self.algbw(seconds) * self.kind.busbw(self.n_ranks)


def chosen(words: str, known: Sequence[str], aliases: dict[str, str], what: str, every: Sequence[str]) -> list[str]:
    """A comma list's names, "all" being `every`. Raises InvalidArgument for a word that is not known."""
    names: list[str] = []
    for word in (word.strip() for word in words.split(",")):
        name = aliases.get(word, word)
        if word == "all":
            names += every
        elif name in known:
            names.append(name)
        else:
            also = f" (also {', '.join(aliases)})" if aliases else ""
            raise InvalidArgument(f"no {what} {word!r}; choose from {', '.join(known)}{also}, or all")
    return list(dict.fromkeys(names))


def ladder(begin: int, end: int, factor: int | None, step: int | None) -> list[int]:
    """Sizes from begin to end: times factor, or plus step where one is given."""
    if begin < 1 or begin > end:
        raise InvalidArgument(f"sizes begin at {begin} and end at {end} bytes; give 1 <= -b <= -e")
    if factor is not None and step is not None:
        raise InvalidArgument("give either -f, a factor between sizes, or -i, a step in bytes")
    if step is not None:
        if step < 1:
            raise InvalidArgument(f"the step between sizes is {step} bytes; give 1 or more")
        return list(range(begin, end + 1, step))
    factor = 2 if factor is None else factor
    if factor < 2:
        raise InvalidArgument(f"the factor between sizes is {factor}; give 2 or more")
    sizes = [begin]
    while sizes[-1] * factor <= end:
        sizes.append(sizes[-1] * factor)
    return sizes


def unit_nbytes(name: str, dtype: str, n_ranks: int, moe: Moe) -> int:
    """What a size must be a multiple of: an element, one for each rank where the size is split, a token's copies."""
    element = DTYPES[dtype].nbytes
    if name in MOE:
        return element * moe.top_k * moe.hidden
    return element * n_ranks if EVERY[name].splits else element


def cases(
    names: Sequence[str],
    dtypes: Sequence[str],
    ops: Sequence[str],
    sizes: Sequence[int],
    n_ranks: int,
    root: int,
    pairs: Sequence[tuple[int, int]],
    moe: Moe,
) -> list[Case]:
    """Every row to measure. Raises InvalidArgument where a size does not divide, a root is no rank, an operation or an
    exchange does not go with a type, or there are too few ranks."""
    if not 0 <= root < n_ranks:
        raise InvalidArgument(f"root {root} is not among ranks 0 .. {n_ranks - 1}")
    found = []
    for name in names:
        kind = EVERY[name]
        if name == "barrier":
            found.append(Case(name, dtypes[0], 0, n_ranks))
            continue
        if n_ranks < 2 and (name in PAIRS or name == "sendrecv"):
            raise InvalidArgument(f"{name} needs at least 2 ranks, there is 1; give --ranks 2 or more")
        if name in MOE:
            _require_moe(moe, dtypes, n_ranks)
        for dtype in dtypes:
            for op in ops if kind.reduces else ("sum",):
                if op in BITWISE and DTYPES[dtype].floating:
                    raise InvalidArgument(f"{name}: {op} needs a type of whole numbers, not {dtype}; give -d int32")
                for pair in pairs if name in PAIRS else (None,):
                    for nbytes in sizes:
                        _require_division(name, dtype, nbytes, n_ranks, moe)
                        with_root = root if kind.rooted else 0
                        with_moe = moe if name in MOE else None
                        found.append(Case(name, dtype, nbytes, n_ranks, op, with_root, pair, with_moe))
    return found


def _require_division(name: str, dtype: str, nbytes: int, n_ranks: int, moe: Moe) -> None:
    unit = unit_nbytes(name, dtype, n_ranks, moe)
    if nbytes % unit == 0:
        return
    parts = [f"{DTYPES[dtype].nbytes} bytes an element"]
    if name in MOE:
        parts += [f"--hidden {moe.hidden}", f"--top-k {moe.top_k}"]
    elif EVERY[name].splits:
        parts.append(f"{n_ranks} ranks")
    raise InvalidArgument(
        f"{name} of {nbytes} bytes in {dtype} does not divide: sizes are multiples of {unit} ({' × '.join(parts)}); "
        f"give for example -b {-(-nbytes // unit) * unit}, and to -i a multiple of {unit}"
    )


def _require_moe(moe: Moe, dtypes: Sequence[str], n_ranks: int) -> None:
    if moe.experts < 1 or moe.experts % n_ranks:
        raise InvalidArgument(
            f"{moe.experts} experts do not spread evenly over {n_ranks} ranks; give --experts {2 * n_ranks}"
        )
    if not 1 <= moe.top_k <= min(moe.experts, 4) or moe.hidden < 1:
        raise InvalidArgument(
            f"--top-k {moe.top_k} --hidden {moe.hidden}: a token has 1 to 4 of {moe.experts} experts, and elements"
        )
    for dtype in dtypes:
        if dtype not in ("float32", "float64", "float16", "bfloat16"):
            raise InvalidArgument(f"the MoE exchange is of float32, float64, float16 or bfloat16, not {dtype}")
