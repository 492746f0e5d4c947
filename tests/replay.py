"""An engine in numpy for the tests: runs the programs of all ranks over FIFO channels, a few elements at a time, in an
order it draws at random, and holds to nothing but channel order and `deps`.

It knows programs only, no schedule, and shares no code with the package."""

import numpy as np

SEND, RECV, RECV_REDUCE, COPY = range(4)
INPUT, OUTPUT, SCRATCH = range(3)


class Deadlock(AssertionError):
    pass


def run(programs, inputs, outputs, sizes, rng, capacity):
    """Runs to the end. `inputs` and `outputs`: per rank {chunk: array}, arrays shared where a call is in place;
    `sizes`: elements of each chunk; `capacity`: elements a channel holds, 0 for a rendezvous (the receiver reads the
    sender's buffer)."""
    dtype = next(array.dtype for chunks in [*inputs, *outputs] for array in chunks.values())
    ranks = [_Rank(program, inputs[i], outputs[i], sizes, dtype) for i, program in enumerate(programs)]
    channels = {(rank, peer): [] for rank, program in enumerate(programs) for peer in program.peers}
    while any(rank.unfinished for rank in ranks):
        queues = [(rank, key) for rank in range(len(ranks)) for key in ranks[rank].unfinished]
        moved = [_advance(ranks, channels, *queues[index], rng, capacity) for index in rng.permutation(len(queues))]
        if not any(moved):
            stuck = {rank: [r.head(key) for key in r.unfinished] for rank, r in enumerate(ranks) if r.unfinished}
            raise Deadlock(f"no step can go on: {stuck}")
    assert not any(channels.values()), "bytes left in a channel"


class _Rank:
    """One program and how many elements each step has done. `unfinished`: its queues by (is it a send, peer)."""

    def __init__(self, program, inputs, outputs, sizes, dtype):
        self.steps, self.deps = program.steps, program.deps
        self.size = [int(sizes[step["chunk"]]) for step in self.steps]
        self.done = [0] * len(self.steps)
        self.scratch = {}
        self.buffers = {INPUT: inputs, OUTPUT: outputs, SCRATCH: self.scratch}
        for step in self.steps:
            if SCRATCH in (step["src_buffer"], step["dst_buffer"]):
                assert 0 <= step["scratch_slot"] < program.n_scratch
                self.scratch.setdefault(int(step["scratch_slot"]), np.full(sizes[step["chunk"]], 77, dtype))
        self.unfinished = {}
        for index, step in enumerate(self.steps):
            key = ("copy", index) if step["kind"] == COPY else (bool(step["kind"] == SEND), int(step["peer"]))
            self.unfinished.setdefault(key, []).append(index)

    def head(self, key):
        return self.unfinished[key][0]

    def array(self, index, which):
        step = self.steps[index]
        buffer = int(step[which])
        return self.buffers[buffer][int(step["scratch_slot"] if buffer == SCRATCH else step["chunk"])]

    def allowed(self, index):
        """How far the step may have come: no further than any dependency has."""
        begin, count = int(self.steps[index]["dep_begin"]), int(self.steps[index]["dep_count"])
        return min([self.done[dep] for dep in self.deps[begin : begin + count]], default=self.size[index])

    def advance(self, key, count):
        index = self.head(key)
        self.done[index] += count
        if self.done[index] == self.size[index]:
            self.unfinished[key].pop(0)
            if not self.unfinished[key]:
                del self.unfinished[key]


def _advance(ranks, channels, rank, key, rng, capacity):
    """Moves some elements of the first unfinished step of one queue; whether that was possible."""
    me = ranks[rank]
    if key not in me.unfinished:
        return False
    index = me.head(key)
    begin, kind = me.done[index], int(me.steps[index]["kind"])
    if me.size[index] == 0:
        me.advance(key, 0)
        return True
    room = me.allowed(index) - begin
    if kind == COPY:
        count = _some(rng, room)
        me.array(index, "dst_buffer")[begin : begin + count] = me.array(index, "src_buffer")[begin : begin + count]
    elif kind == SEND:
        channel = channels[rank, int(me.steps[index]["peer"])]
        count = _some(rng, min(room, capacity - len(channel)))
        channel.extend(me.array(index, "src_buffer")[begin : begin + count].tolist())
    else:
        peer = int(me.steps[index]["peer"])
        count, incoming = _receive(ranks[peer], channels[peer, rank], (True, rank), room, rng, capacity)
        target = me.array(index, "dst_buffer")
        if kind == RECV_REDUCE and count:
            incoming = me.array(index, "src_buffer")[begin : begin + count] + np.array(incoming, target.dtype)
        target[begin : begin + count] = incoming
    if count:
        me.advance(key, count)
    return count > 0


def _receive(sender, channel, send_key, room, rng, capacity):
    """(count, elements) out of the channel, or straight from the sender's buffer."""
    if capacity:
        count = _some(rng, min(room, len(channel)))
        incoming = channel[:count]
        del channel[:count]
        return count, incoming
    while send_key in sender.unfinished and sender.size[sender.head(send_key)] == 0:
        sender.advance(send_key, 0)
    if send_key not in sender.unfinished:
        return 0, []
    index = sender.head(send_key)
    begin = sender.done[index]
    count = _some(rng, min(room, sender.allowed(index) - begin))
    incoming = sender.array(index, "src_buffer")[begin : begin + count].tolist()
    if count:
        sender.advance(send_key, count)
    return count, incoming


def _some(rng, most):
    return int(rng.integers(1, most + 1)) if most > 0 else 0
