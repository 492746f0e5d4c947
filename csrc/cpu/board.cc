#include "cpu/board.h"

#include <algorithm>
#include <cstddef>
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

Board::Waits Board::waits(const Fingerprint& print) const {
  const bool at_root = rank_ == print.root;
  switch (print.collective) {
    case Collective::broadcast:
    case Collective::scatter:
      return at_root ? Waits::for_nobody : Waits::for_root;
    case Collective::reduce:
    case Collective::gather:
      return at_root ? Waits::for_all : Waits::for_nobody;
    default:
      return Waits::for_all;
  }
}

std::byte* Board::payload(int rank, uint64_t nbytes) const {
  BoardEntry& entry = segment_.board(rank);
  const uint32_t slot = sequence_ % kBoardSlots;
  if (nbytes <= kInlineBytes) return entry.lines[slot].payload;
  return nbytes <= kSmallBytes ? entry.small[slot] : segment_.large_slot(rank, sequence_, nbytes);
}

void Board::prepare() {
  ++sequence_;
  seen_ = 0;
  published_ = false;
}

bool Board::has_room(const Launch& launch, uint64_t payload_nbytes) {
  const uint32_t n_slots =
      payload_nbytes > kSmallBytes ? std::min(kBoardSlots, segment_.n_large_slots()) : kBoardSlots;
  awaited_ = sequence_ - n_slots + 1;
  return all_entered(awaited_) &&
         all_agree(sequence_ - kBoardSlots, launch.fingerprint.sequence - kBoardSlots);
}

bool Board::settled(uint64_t launch_sequence) {
  awaited_ = sequence_;
  waits_ = Waits::for_all;
  return all_entered(sequence_) && all_agree(sequence_, launch_sequence);
}

void Board::publish(const Launch& launch) {
  const uint32_t slot = sequence_ % kBoardSlots;
  BoardLine& line = segment_.board(rank_).lines[slot];
  hashes_[slot] = launch.fingerprint.hash();
  line.hash.store(hashes_[slot], std::memory_order_relaxed);
  line.sequence.store(sequence_, std::memory_order_release);  // publishes hash and payload; pairs
                                                              // with entered()
  published_ = true;
  awaited_ = sequence_;
  waits_ = waits(launch.fingerprint);
  root_ = launch.fingerprint.root;
  // A root for whom the others wait wakes them. All else that a rank may wait for here has happened
  // once all have entered, so the last one wakes all: n bells, not n squared. Of two that come at
  // once, each with a fence between its line and its look, one sees the other's.
  full_fence();
  if (waits_ != Waits::for_nobody || root_ != rank_)
    for (int i = 0; i < n_; ++i)
      if (i != rank_ && !entered(i, sequence_)) return;
  endpoint_.ring_others(ranks_);
}

// Acquire: pairs with publish(). Who has entered a later one has entered this.
bool Board::entered(int rank, uint32_t sequence) const {
  const auto& line = segment_.board(rank).lines[sequence % kBoardSlots];
  const uint32_t last = line.sequence.load(std::memory_order_acquire);
  return static_cast<int32_t>(last - sequence) >= 0;
}

bool Board::all_entered(uint32_t sequence) {
  if (static_cast<int32_t>(entered_ - sequence) >= 0) return true;
  // Half a turn further, where they are that far: a line that is just being written costs more to
  // look at than all else here.
  for (const uint32_t at : {sequence + kBoardSlots / 2 - 1, sequence}) {
    if (static_cast<int32_t>(sequence_ - at) < 0) continue;
    int i = 0;
    while (i < n_ && (i == rank_ || entered(i, at))) ++i;
    if (i < n_) continue;
    entered_ = at;
    return true;
  }
  return false;
}

// Whether all ranks called what this one did, up to `sequence`, which they have entered.
// launch_sequence: that collective's number among all of the group; native ones between two that
// are not native follow each other.
bool Board::all_agree(uint32_t sequence, uint64_t launch_sequence) {
  while (static_cast<int32_t>(agreed_ - sequence) < 0) {
    const uint32_t next = agreed_ + 1;
    for (int i = 0; i < n_; ++i)
      if (i != rank_ && !agrees(i, next, launch_sequence - (sequence - next))) return false;
    agreed_ = next;
  }
  return true;
}

// False: not known yet.
bool Board::agrees(int rank, uint32_t sequence, uint64_t launch_sequence) const {
  const BoardEntry& entry = segment_.board(rank);
  const BoardLine& line = entry.lines[sequence % kBoardSlots];
  // In use again: then that rank has compared all with its own.
  if (line.sequence.load(std::memory_order_acquire) != sequence) return true;
  // A hash that is overwritten after this belongs to such a use, too.
  if (line.hash.load(std::memory_order_relaxed) == hashes_[sequence % kBoardSlots]) return true;
  refuse_difference(rank, launch_sequence);
  return false;
}

// Throws where that rank's announcement differs from this one's, for the first collective up to
// launch_sequence where it does: an earlier one that was native on one side only sets the numbers
// here apart, not those.
void Board::refuse_difference(int rank, uint64_t launch_sequence) const {
  uint64_t at = launch_sequence - std::min<uint64_t>(launch_sequence, kAnnouncements - 1);
  for (; at <= launch_sequence; ++at) {
    Fingerprint mine, theirs;
    if (read_announcement(segment_.board(rank_), at, &mine) &&
        read_announcement(segment_.board(rank), at, &theirs) && !theirs.matches(mine))
      throw Error(Code::mismatch, describe_mismatch(mine, theirs));
  }
}

bool Board::all_entered(const Launch& launch, bool* moved) {
  for (; seen_ < n_; ++seen_) {
    if (seen_ == rank_) continue;
    // Not progress where it is not known yet: the rank must look at what else may be wrong.
    if (!entered(seen_, sequence_) || !calls_the_same(seen_, launch)) return false;
    *moved = true;
  }
  entered_ = sequence_;
  if (!all_agree(sequence_ - 1, launch.fingerprint.sequence - 1)) return false;
  agreed_ = sequence_;
  return true;
}

bool Board::root_entered(const Launch& launch, bool* moved) const {
  const int root = launch.fingerprint.root;
  if (!entered(root, sequence_) || !calls_the_same(root, launch)) return false;
  *moved = true;
  return true;
}

// What it called is in its slot while this rank is in the collective too. False: not known yet.
bool Board::calls_the_same(int rank, const Launch& launch) const {
  const BoardEntry& entry = segment_.board(rank);
  const uint32_t slot = sequence_ % kBoardSlots;
  if (entry.lines[slot].hash.load(std::memory_order_relaxed) == hashes_[slot]) return true;
  // Announced before its line was published, unless that is an older native call: then its own look
  // finds ours.
  refuse_difference(rank, launch.fingerprint.sequence);
  return false;
}

bool Board::advance(const Launch& launch, bool* moved) {
  if (!published_) {
    const uint64_t nbytes = contributes(launch.fingerprint, rank_) ? launch.input_nbytes : 0;
    if (!has_room(launch, nbytes)) return false;
    if (nbytes > 0) copy(payload(rank_, nbytes), launch.input, nbytes);
    publish(launch);
    *moved = true;
  }
  switch (waits_) {
    case Waits::for_all:
      if (!all_entered(launch, moved)) return false;
      break;
    case Waits::for_root:
      if (!root_entered(launch, moved)) return false;
      break;
    case Waits::for_nobody:
      break;
  }
  finish(launch);
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
  for (int i = 0; i < n_; ++i) {
    const bool needed = !published_ || waits_ == Waits::for_all || i == root_;
    if (i != rank_ && needed && !entered(i, awaited_)) ranks.push_back(i);
  }
  return ranks;
}

// A sequence lock (Boehm, "Can seqlocks get along with programming language memory models?", MSPC
// 2012).
void announce(BoardEntry& entry, const Fingerprint& fingerprint) {
  Announcement& at = entry.announcements[fingerprint.sequence % kAnnouncements];
  uint64_t words[sizeof(Fingerprint) / sizeof(uint64_t)];
  std::memcpy(words, &fingerprint, sizeof(words));
  const uint64_t version = at.version.load(std::memory_order_relaxed);
  at.version.store(version + 1, std::memory_order_relaxed);
  // release: a reader that sees one of these words sees the odd version too, and gives up
  for (size_t i = 0; i < std::size(words); ++i)
    at.words[i].store(words[i], std::memory_order_release);
  at.version.store(version + 2, std::memory_order_release);
}

bool may_have_entered(const BoardEntry& entry, uint64_t sequence) {
  for (const Announcement& at : entry.announcements) {
    const uint64_t version = at.version.load(std::memory_order_acquire);
    if (version == 0) continue;
    if ((version & 1) != 0) return true;
    const uint64_t entered = at.words[offsetof(Fingerprint, sequence) / sizeof(uint64_t)].load(
        std::memory_order_acquire);
    if (entered >= sequence) return true;
  }
  return false;
}

bool read_announcement(const BoardEntry& entry, uint64_t sequence, Fingerprint* out) {
  const Announcement& at = entry.announcements[sequence % kAnnouncements];
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
