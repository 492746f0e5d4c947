"""The wire in numpy, for the tests: its formats value by value, and collectives replayed round by round with every
value that crosses hosts put through them. Shares no code with the engine."""

import numpy as np
import torch

from pycomm.schedule import COLLECTIVES

WIRES = ("bf16", "fp8", "int8", "int4")
BLOCK = 128
LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
# e4m3 without its NaN, by code: 4 bits of exponent with bias 7, 3 of mantissa
E4M3 = np.array(
    [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127]
)
CODE_NBYTES = {"fp8": 128, "int8": 128, "int4": 64}


def coded_nbytes(wire, numel):
    return 2 * numel if wire == "bf16" else -(-numel // BLOCK) * (CODE_NBYTES[wire] + 4)


def nearest_e4m3(x):
    """To the nearest of E4M3, between two to the one with the even code."""
    middles = (E4M3[1:] + E4M3[:-1]) / 2
    magnitude = np.abs(x).astype(np.float64)
    code = np.searchsorted(middles, magnitude)
    tie = (code < 126) & (magnitude == middles[np.minimum(code, 125)]) & (code % 2 == 1)
    return np.copysign(E4M3[code + tie], x)


def round_trip(x, wire):
    """What a rank reads that is sent the fp32 values x."""
    if wire == "bf16":
        return torch.from_numpy(x).bfloat16().float().numpy()
    blocks = np.zeros((-(-len(x) // BLOCK), BLOCK), np.float32)  # filled up with zeros, which change nothing
    blocks.ravel()[: len(x)] = x
    finite = np.isfinite(blocks).all(axis=1)
    blocks[~finite] = 0
    largest = np.float32(LARGEST[wire])
    most = np.maximum(np.abs(blocks).max(axis=1, keepdims=True), np.float32(2.0**-100))
    scaled = blocks * (largest / most)
    codes = nearest_e4m3(scaled) if wire == "fp8" else np.rint(scaled).astype(np.int32)  # which know no -0
    out = codes.astype(np.float32) * (most / largest)
    out[~finite] = np.nan
    return out.ravel()[: len(x)]


def error_bound(x, wire):
    """By value, what round_trip() may be off by (docs/wire.md)."""
    if wire == "bf16":
        return np.abs(x) * 2.0**-8 + 2.0**-134
    bound = np.empty(len(x))
    for begin in range(0, len(x), BLOCK):
        block = np.abs(x[begin : begin + BLOCK]).astype(np.float64)
        most = max(block.max(), 2.0**-100)
        step = np.maximum(block / 16, most / 448 / 1024) if wire == "fp8" else most / LARGEST[wire] / 2
        bound[begin : begin + BLOCK] = step * (1 + 2.0**-20) + most * 2.0**-22
    return bound


def replay(schedule, host, inputs, wire, op="sum"):
    """inputs: per rank {chunk: fp32 array}. Per rank {chunk: array} as the schedule leaves them. A rank that shares a
    value with other hosts holds what they read from the moment on at which it has it."""
    combine = {"sum": np.add, "avg": np.add, "min": np.minimum, "max": np.maximum}[op]
    held = [dict(chunks) for chunks in inputs]
    rows = schedule.transfers
    shares = schedule.collective in ("all_reduce", "all_gather")
    crosses = host[rows["src"]] != host[rows["dst"]]
    unsealed = {(int(r["src"]), int(r["chunk"])) for r in rows[crosses & ~rows["reduce"]]} if shares else set()
    for number in range(schedule.n_rounds):
        arrived = []
        for row, across in zip(rows[rows["round"] == number], crosses[rows["round"] == number], strict=True):
            src, dst, chunk = int(row["src"]), int(row["dst"]), int(row["chunk"])
            if not row["reduce"] and (src, chunk) in unsealed:
                held[src][chunk] = round_trip(held[src][chunk], wire)
                unsealed.discard((src, chunk))
            value = held[src][chunk]
            if across and (row["reduce"] or not shares):
                value = round_trip(value, wire)
            arrived.append((dst, chunk, bool(row["reduce"]), value))
        for dst, chunk, reduces, value in arrived:
            held[dst][chunk] = combine(held[dst][chunk], value) if reduces else value
    return held


def pieces(schedule, counts):
    """Bounds of the chunks in one flat array. counts: elements of each where the caller says, else of all."""
    if np.ndim(counts):
        return np.concatenate([[0], np.cumsum(counts)])
    whole, rest = divmod(int(counts), schedule.n_chunks)
    return np.concatenate([[0], np.cumsum([whole + (i < rest) for i in range(schedule.n_chunks)])])


def expected(schedule, host, xs, wire, op="sum", counts=None):
    """The outputs of all ranks, flat fp32. xs: all ranks' inputs, flat fp32. counts: of pieces, in all_to_all
    counts[i][j] from i to j."""
    n, collective = schedule.n_ranks, schedule.collective
    if collective == "all_to_all":
        bounds = [np.concatenate([[0], np.cumsum(counts[i])]) for i in range(n)]
        inputs = [{i * n + j: xs[i][bounds[i][j] : bounds[i][j + 1]] for j in range(n)} for i in range(n)]
    elif collective == "all_gather":
        inputs = [{i: xs[i]} for i in range(n)]
    else:
        cut = pieces(schedule, len(xs[0]) if counts is None else counts)
        inputs = [{c: x[cut[c] : cut[c + 1]] for c in range(schedule.n_chunks)} for x in xs]
    held = replay(schedule, host, inputs, wire, op)
    end = COLLECTIVES[collective].end(n, schedule.n_chunks, 0)
    outputs = [np.concatenate([held[rank][int(c)] for c in np.flatnonzero(end[rank])]) for rank in range(n)]
    return [out / np.float32(n) for out in outputs] if op == "avg" else outputs
