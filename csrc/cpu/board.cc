#include "cpu/board.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "cpu/copy.h"
#include "cpu/reduce.h"
#include "cpu/waiter.h"

namespace pycomm::cpu {
namespace {

bool contributes(const Fingerprint& print, int rank) {
  switch (print.collective) {
    case Collective::broadcast:
    case Collective::scatter:
      return rank == print.root;
    case Collective::barrier:
      return false;
    default:
      return true;
  }
}

}  // namespace

Board::Board(const Segment& segment, Endpoint& endpoint, const std::vector<int>& ranks, int rank)
    : segment_(segment),
      endpoint_(endpoint),
      ranks_(ranks),
      rank_(rank),
      n_(static_cast<int>(ranks.size())) {}

std::byte* Board::payload(int rank, bool large) const {
  BoardEntry& entry = segment_.board(rank);
  const uint32_t slot = sequence_ & 1;
  return large ? entry.payload[slot] : entry.lines[slot].payload;
}

void Board::begin(const Launch& launch) {
  prepare();
  if (contributes(launch.fingerprint, rank_) && launch.input_nbytes > 0)
    copy(payload(rank_, launch.input_nbytes > kInlineBytes), launch.input, launch.input_nbytes);
  publish(launch);
}

void Board::prepare() {
  ++sequence_;
  seen_ = 0;
}

void Board::publish(const Launch& launch) {
  BoardLine& line = segment_.board(rank_).lines[sequence_ & 1];
  hash_ = launch.fingerprint.hash();
  line.hash = hash_;
  line.sequence.store(sequence_, std::memory_order_release);  // publishes hash and payload; pairs
                                                              // with all_entered()
  // Nobody can go on before all are in, so the last one wakes all: n bells, not n squared. Of two
  // that come at once, each with a fence between its line and its look, one sees the other's.
  full_fence();
  for (int i = 0; i < n_; ++i)
    if (i != rank_ && !entered(i)) return;
  endpoint_.ring_others(ranks_);
}

bool Board::entered(int rank) const {
  // Acquire: pairs with publish().
  return segment_.board(rank).lines[sequence_ & 1].sequence.load(std::memory_order_acquire) ==
         sequence_;
}

bool Board::advance(const Launch& launch, bool* moved) {
  if (!all_entered(launch, moved)) return false;
  finish(launch);
  return true;
}

bool Board::all_entered(const Launch& launch, bool* moved) {
  for (; seen_ < n_; ++seen_) {
    if (seen_ == rank_) continue;
    const BoardEntry& entry = segment_.board(seen_);
    const BoardLine& line = entry.lines[sequence_ & 1];
    if (!entered(seen_)) return false;
    *moved = true;
    if (line.hash == hash_) continue;
    Fingerprint theirs;
    theirs.rank = seen_;
    // Written before its line was published, unless it is an older native call: then its own look
    // finds ours.
    if (!read_announcement(entry, launch.fingerprint.sequence, &theirs)) return false;
    throw Error(Code::mismatch, describe_mismatch(launch.fingerprint, theirs));
  }
  return true;
}

void Board::finish(const Launch& launch) const {
  const Fingerprint& print = launch.fingerprint;
  auto* out = static_cast<std::byte*>(launch.output);
  const uint64_t in_bytes = launch.input_nbytes, out_bytes = launch.output_nbytes;
  const size_t element = size_of(launch.dtype);
  // dst = the sum of all contributions from byte `offset` on.
  const auto combine = [&](std::byte* dst, uint64_t offset, uint64_t nbytes) {
    if (nbytes == 0) return;
    const std::byte* first = contribution(0, in_bytes) + offset;
    for (int i = 1; i < n_; ++i, first = dst)
      reduce(dst, first, contribution(i, in_bytes) + offset, nbytes / element, launch.dtype,
             launch.op);
    if (launch.op == ReduceOp::avg) divide(dst, nbytes / element, launch.dtype, n_);
  };
  const auto me = static_cast<uint64_t>(rank_);
  switch (print.collective) {
    case Collective::all_reduce:
      return combine(out, 0, out_bytes);
    case Collective::reduce:
      if (rank_ == print.root) combine(out, 0, out_bytes);
      return;
    case Collective::broadcast:
      if (rank_ != print.root) copy(out, contribution(print.root, out_bytes), out_bytes);
      return;
    case Collective::reduce_scatter:
      return combine(out, me * out_bytes, out_bytes);
    case Collective::scatter:
      return copy(out,
                  contribution(print.root, out_bytes * static_cast<uint64_t>(n_)) + me * out_bytes,
                  out_bytes);
    case Collective::gather:
      if (rank_ != print.root) return;
      [[fallthrough]];
    case Collective::all_gather:
      for (int i = 0; i < n_; ++i)
        copy(out + static_cast<uint64_t>(i) * in_bytes, contribution(i, in_bytes), in_bytes);
      return;
    case Collective::all_to_all: {
      const uint64_t piece = in_bytes / static_cast<uint64_t>(n_);
      for (int i = 0; i < n_; ++i)
        copy(out + static_cast<uint64_t>(i) * piece, contribution(i, in_bytes) + me * piece, piece);
      return;
    }
    case Collective::barrier:
      return;
  }
}

std::vector<int> Board::blocked_on() const {
  std::vector<int> ranks;
  for (int i = seen_; i < n_; ++i)
    if (i != rank_ && !entered(i)) ranks.push_back(i);
  return ranks;
}

// A sequence lock (Boehm, "Can seqlocks get along with programming language memory models?", MSPC
// 2012).
void announce(BoardEntry& entry, const Fingerprint& fingerprint) {
  Announcement& at = entry.announcements[fingerprint.sequence & 1];
  uint64_t words[sizeof(Fingerprint) / sizeof(uint64_t)];
  std::memcpy(words, &fingerprint, sizeof(words));
  const uint64_t version = at.version.load(std::memory_order_relaxed);
  at.version.store(version + 1, std::memory_order_relaxed);
  // release: a reader that sees one of these words sees the odd version too, and gives up
  for (size_t i = 0; i < std::size(words); ++i)
    at.words[i].store(words[i], std::memory_order_release);
  at.version.store(version + 2, std::memory_order_release);
}

bool read_announcement(const BoardEntry& entry, uint64_t sequence, Fingerprint* out) {
  const Announcement& at = entry.announcements[sequence & 1];
  uint64_t words[sizeof(Fingerprint) / sizeof(uint64_t)];
  const uint64_t before = at.version.load(std::memory_order_acquire);
  for (size_t i = 0; i < std::size(words); ++i)
    words[i] = at.words[i].load(std::memory_order_acquire);
  if (before == 0 || (before & 1) != 0 || at.version.load(std::memory_order_relaxed) != before)
    return false;
  Fingerprint copy;
  std::memcpy(&copy, words, sizeof(copy));
  if (copy.sequence != sequence) return false;
  *out = copy;
  return true;
}

}  // namespace pycomm::cpu
