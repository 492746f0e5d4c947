#include "cpu/interpreter.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/reduce.h"

namespace pycomm::cpu {
namespace {
// What is received between two looks at other links. Small enough to stay in the second-level cache
// between its arrival and our reduction.
constexpr uint64_t kSegmentBytes = 64 * 1024;
static_assert(kCodedSegmentBytes % kSegmentBytes == 0);
constexpr uint64_t kCopyBytes = 256 * 1024;
constexpr uint64_t kAlign = 64;
}  // namespace

void Interpreter::begin(const Launch& launch, const ChannelOf& channel_of, uint64_t tile_nbytes) {
  const Program& program = *launch.program;
  tile_nbytes_ = tile_nbytes > 0 ? tile_nbytes : UINT64_MAX;
  tile_begin_ = 0;
  const uint64_t largest = std::min(launch.layout.max_nbytes(), tile_nbytes_);
  scratch_stride_ = (largest + kAlign - 1) & ~(kAlign - 1);
  const uint64_t needed = scratch_stride_ * static_cast<uint64_t>(program.n_scratch);
  if (needed > scratch_nbytes_) {
    scratch_ = std::make_unique_for_overwrite<std::byte[]>(needed);
    scratch_nbytes_ = needed;
  }
  links_.clear();
  for (const PeerSteps& steps : program.peers) {
    Link& link = links_.emplace_back();
    link.steps = &steps;
    link.channel = &channel_of(steps.peer);
    link.mine = launch.fingerprint;
    if (!launch.link_send_counts.empty())
      link.mine.numel = launch.link_send_counts[static_cast<size_t>(steps.peer)];
  }
  if (launch.wire != Wire::none) {
    PYCOMM_CHECK(tile_nbytes == 0, "coded steps know no tiles");
    coded_.begin(launch, links_.size());
  }
  begin_tile(launch);
}

void Interpreter::begin_tile(const Launch& launch) {
  done_.assign(launch.program->steps.size(), 0);
  copies_left_ = launch.program->copies.size();
  for (Link& link : links_) link.send = link.recv = 0;
}

uint64_t Interpreter::nbytes_of(const Launch& launch, const Step& step) const {
  const uint64_t whole = launch.layout.nbytes(step.chunk);
  return whole <= tile_begin_ ? 0 : std::min(whole - tile_begin_, tile_nbytes_);
}

const std::byte* Interpreter::source(const Launch& launch, const Step& step) const {
  switch (step.source) {
    case Buffer::input:
      return static_cast<const std::byte*>(launch.input) + launch.layout.input_offset(step.chunk) +
             tile_begin_;
    case Buffer::output:
      return static_cast<const std::byte*>(launch.output) +
             launch.layout.output_offset(step.chunk) + tile_begin_;
    case Buffer::scratch:
      break;
  }
  return scratch_.get() + scratch_stride_ * static_cast<uint64_t>(step.scratch_slot);
}

std::byte* Interpreter::destination(const Launch& launch, const Step& step) {
  switch (step.destination) {
    case Buffer::output:
      return static_cast<std::byte*>(launch.output) + launch.layout.output_offset(step.chunk) +
             tile_begin_;
    case Buffer::scratch:
      return scratch_.get() + scratch_stride_ * static_cast<uint64_t>(step.scratch_slot);
    case Buffer::input:
      break;
  }
  throw Error(Code::internal, "a step writes the input");
}

uint64_t Interpreter::allowed(const Program& program, const Step& step, uint64_t nbytes) const {
  uint64_t limit = nbytes;
  for (int32_t d = 0; d < step.dep_count; ++d)
    limit = std::min(
        limit, done_[static_cast<size_t>(program.deps[static_cast<size_t>(step.dep_begin + d)])]);
  // Whole cache lines: elements never straddle two writes. Of what is coded, whole segments.
  return limit == nbytes   ? limit
         : step.flags != 0 ? limit / kCodedSegmentBytes * kCodedSegmentBytes
                           : limit & ~(kAlign - 1);
}

bool Interpreter::advance_copies(const Launch& launch) {
  if (copies_left_ == 0) return false;
  const Program& program = *launch.program;
  bool moved = false;
  for (const int32_t index : program.copies) {
    const Step& step = program.steps[static_cast<size_t>(index)];
    const uint64_t nbytes = nbytes_of(launch, step);
    uint64_t& done = done_[static_cast<size_t>(index)];
    if (done == nbytes) continue;
    // A piece at a time: links stay busy meanwhile.
    const uint64_t n = std::min(allowed(program, step, nbytes) - done, kCopyBytes);
    if (n == 0) continue;
    const std::byte* from = source(launch, step);
    std::byte* to = destination(launch, step);
    if (step.flags != 0)
      coded_.seal(launch, step, from + done, to + done, done, n);
    else if (from != to)
      std::memmove(to + done, from + done, n);
    done += n;
    moved = true;
  }
  copies_left_ = static_cast<size_t>(
      std::count_if(program.copies.begin(), program.copies.end(), [&](int32_t index) {
        const Step& step = program.steps[static_cast<size_t>(index)];
        return done_[static_cast<size_t>(index)] < nbytes_of(launch, step);
      }));
  return moved;
}

bool Interpreter::advance_send(const Launch& launch, Link& link) {
  const Program& program = *launch.program;
  bool moved = false;
  if (link.said < sizeof(Fingerprint)) {
    const size_t n = link.channel->write(reinterpret_cast<const std::byte*>(&link.mine) + link.said,
                                         sizeof(Fingerprint) - link.said);
    link.said += n;
    moved = n > 0;
    if (link.said < sizeof(Fingerprint)) return moved;
  }
  while (link.send < link.steps->sends.size()) {
    const auto index = static_cast<size_t>(link.steps->sends[link.send]);
    const Step& step = program.steps[index];
    const uint64_t nbytes = nbytes_of(launch, step);
    uint64_t& done = done_[index];
    if (done < nbytes) {
      const uint64_t limit = allowed(program, step, nbytes);
      if (limit <= done) break;
      size_t n = 0;
      if (step.flags != 0) {
        n = coded_.send(launch, static_cast<size_t>(&link - links_.data()), *link.channel, step,
                        source(launch, step), limit, &done);
      } else {
        n = link.channel->write(source(launch, step) + done,
                                std::min<uint64_t>(limit - done, link.channel->segment_nbytes()));
        done += n;
      }
      if (n == 0) break;
      moved = true;
    }
    if (done == nbytes) {
      link.channel->align_write();
      ++link.send;
    }
  }
  return moved;
}

// Up to a segment of a step that is not coded; returns the bytes taken from the channel. What a
// step seals counts as done a whole segment at a time.
size_t Interpreter::receive(const Launch& launch, Link& link, const Step& step, uint64_t limit,
                            uint64_t nbytes, uint64_t* done) {
  const uint64_t begin = *done + link.unsealed;
  const uint64_t most = std::min(limit - begin, kSegmentBytes - begin % kSegmentBytes);
  size_t n = 0;
  if (step.kind == StepKind::recv) {
    n = link.channel->read(destination(launch, step) + begin, most);
  } else {
    const size_t element = size_of(launch.dtype);
    const auto here = link.channel->readable(element);
    n = std::min<size_t>(here.size(), most) / element * element;
    if (n == 0) return 0;
    // The lower rank's value first: where two ranks combine the same values, in either's memory,
    // they get the same bits (zeros of two signs, NaNs).
    const std::byte* first = source(launch, step) + begin;
    const std::byte* second = here.data();
    if (step.peer < launch.program->rank) std::swap(first, second);
    reduce(destination(launch, step) + begin, first, second, n / element, launch.dtype, launch.op);
    link.channel->consume(n);
  }
  if (step.flags == 0) {
    *done += n;
    return n;
  }
  link.unsealed += n;
  if (begin + n == nbytes || (begin + n) % kCodedSegmentBytes == 0) {
    std::byte* values = destination(launch, step) + *done;
    coded_.seal(launch, step, values, values, *done, link.unsealed);
    *done += std::exchange(link.unsealed, 0);
  }
  return n;
}

bool Interpreter::advance_recv(const Launch& launch, Link& link) {
  const Program& program = *launch.program;
  bool moved = false;
  if (link.heard < sizeof(Fingerprint)) {
    const size_t n = link.channel->read(reinterpret_cast<std::byte*>(&link.theirs) + link.heard,
                                        sizeof(Fingerprint) - link.heard);
    link.heard += n;
    moved = n > 0;
    if (link.heard < sizeof(Fingerprint)) return moved;
    Fingerprint expected = launch.fingerprint;
    if (!launch.link_recv_counts.empty())
      expected.numel = launch.link_recv_counts[static_cast<size_t>(link.steps->peer)];
    link.theirs.rank = link.steps->peer;
    if (!link.theirs.matches(expected))
      throw Error(Code::mismatch, describe_mismatch(expected, link.theirs));
  }
  while (link.recv < link.steps->recvs.size()) {
    const auto index = static_cast<size_t>(link.steps->recvs[link.recv]);
    const Step& step = program.steps[index];
    const uint64_t nbytes = nbytes_of(launch, step);
    uint64_t& done = done_[index];
    if (done < nbytes) {
      const uint64_t limit = allowed(program, step, nbytes);
      if (limit <= done) break;
      const size_t n =
          (step.flags & kCoded) != 0
              ? coded_.receive(launch, static_cast<size_t>(&link - links_.data()), *link.channel,
                               step, source(launch, step), destination(launch, step), nbytes, &done)
              : receive(launch, link, step, limit, nbytes, &done);
      if (n == 0) break;
      moved = true;
    }
    if (done == nbytes) {
      link.channel->align_read();
      ++link.recv;
    }
  }
  return moved;
}

bool Interpreter::advance(const Launch& launch, bool* moved) {
  while (advance_tile(launch, moved)) {
    if (launch.layout.max_nbytes() - tile_begin_ > tile_nbytes_) {
      tile_begin_ += tile_nbytes_;
      begin_tile(launch);
      continue;
    }
    if (launch.op == ReduceOp::avg && reduces(launch.fingerprint.collective) &&
        launch.output_nbytes > 0 &&
        (launch.fingerprint.collective != Collective::reduce ||
         launch.program->rank == launch.fingerprint.root))
      divide(launch.output, launch.output_nbytes / size_of(launch.dtype), launch.dtype,
             launch.program->n_ranks);
    return true;
  }
  return false;
}

bool Interpreter::advance_tile(const Launch& launch, bool* moved) {
  bool any = false;
  bool finished = true;
  for (Link& link : links_) {
    if (advance_send(launch, link)) {
      any = true;
      link.channel->flush();  // before a look at what came: the peer waits for this
    }
    if (advance_recv(launch, link)) {
      any = true;
      advance_send(launch, link);  // what just arrived may go on at once
    }
    link.channel->flush();
    finished = finished && link.done();
  }
  any |= advance_copies(launch);
  *moved |= any;
  return finished && copies_left_ == 0;
}

bool Interpreter::all_entered() const {
  return std::all_of(links_.begin(), links_.end(),
                     [](const Link& link) { return link.heard == sizeof(Fingerprint); });
}

bool Interpreter::talks_to(int peer) const {
  return std::any_of(links_.begin(), links_.end(),
                     [peer](const Link& link) { return link.steps->peer == peer; });
}

int32_t Interpreter::blocked_step(const Launch& launch, const std::vector<int32_t>& list,
                                  size_t cursor) const {
  if (cursor == list.size()) return -1;
  const auto index = static_cast<size_t>(list[cursor]);
  const Step& step = launch.program->steps[index];
  const uint64_t nbytes = nbytes_of(launch, step);
  return done_[index] < nbytes && allowed(*launch.program, step, nbytes) > done_[index]
             ? list[cursor]
             : -1;
}

std::vector<int> Interpreter::blocked_on(const Launch& launch) const {
  std::vector<int> peers;
  for (const Link& link : links_)
    if (link.heard < sizeof(Fingerprint) || link.said < sizeof(Fingerprint) ||
        !link.channel->flushed() || blocked_step(launch, link.steps->recvs, link.recv) >= 0 ||
        blocked_step(launch, link.steps->sends, link.send) >= 0)
      peers.push_back(link.steps->peer);
  return peers;
}

std::string Interpreter::describe_wait(const Launch& launch) const {
  const Program& program = *launch.program;
  for (const Link& link : links_) {
    const std::string who =
        "rank " + std::to_string(link.steps->peer) + " (" + link.channel->describe() + ")";
    if (link.heard < sizeof(Fingerprint)) return who + ", which has not entered this collective";
    for (const auto& [list, cursor, verb] :
         {std::make_tuple(&link.steps->recvs, link.recv, "received"),
          std::make_tuple(&link.steps->sends, link.send, "sent")}) {
      const int32_t index = blocked_step(launch, *list, cursor);
      if (index < 0) continue;  // done, or it waits for another link
      const Step& step = program.steps[static_cast<size_t>(index)];
      return who + ", round " + std::to_string(step.round + 1) + " of " +
             std::to_string(program.n_rounds) + ", chunk " + std::to_string(step.chunk) + ", " +
             std::to_string(done_[static_cast<size_t>(index)]) + " of " +
             std::to_string(nbytes_of(launch, step)) + " bytes " + verb;
    }
  }
  return "nobody";
}

}  // namespace pycomm::cpu
