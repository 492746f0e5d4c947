#include "cpu/direct.h"

#include <algorithm>
#include <memory>

#include "cpu/copy.h"
#include "cpu/reduce.h"

namespace pycomm::cpu {
namespace {

constexpr uint64_t kReduceBlock = 128 * 1024;  // operands and result of one stay in a core's cache
constexpr uint64_t kCopyBlock = 512 * 1024;
constexpr uint64_t kCut = 4096;        // pieces of a reduction begin at multiples of it
constexpr uint64_t kBudget = 2 << 20;  // bytes moved before the engine's lock is let go

// Room for partial results that have no place yet, and for operands that cannot be mapped; the
// caller's thread keeps it.
enum Room : int { kPartial, kLeft, kRight };
std::byte* room(Room which) {
  struct alignas(64) Rooms {
    std::byte data[3][kReduceBlock];
  };
  static thread_local std::unique_ptr<Rooms> rooms;
  if (!rooms) rooms.reset(new Rooms);
  return rooms->data[which];
}

}  // namespace

Direct::Direct(const Segment& segment, Board& board, Reach& reach, Endpoint& endpoint,
               const std::vector<int>& ranks, int rank)
    : segment_(segment),
      board_(board),
      reach_(reach),
      endpoint_(endpoint),
      ranks_(ranks),
      rank_(rank),
      n_(static_cast<int>(ranks.size())) {}

bool Direct::lacks(const Launch& launch, int rank, const Offer& offer) {
  const bool at_root = rank == launch.fingerprint.root;
  const bool input = !offer.input.in_heap, output = !offer.output.in_heap;
  switch (launch.fingerprint.collective) {
    case Collective::all_reduce:
      return input || output;
    case Collective::reduce:
      return input || (at_root && output);
    case Collective::broadcast:
    case Collective::scatter:
      return at_root && input;
    case Collective::gather:
      return !at_root && input;
    default:
      return input;
  }
}

void Direct::begin(const Launch& launch, const std::byte* input, const std::vector<Offer>& offers,
                   const std::vector<uint64_t>& starts, bool everywhere) {
  const Fingerprint& print = launch.fingerprint;
  const Layout& layout = launch.layout;
  const bool even = !print.has_counts;
  const int root = print.root;
  const auto n = static_cast<uint64_t>(n_), me = static_cast<uint64_t>(rank_);
  auto* out = static_cast<std::byte*>(launch.output);
  done_ = false;
  input_ = input;
  offers_ = offers;
  copies_.clear();
  next_copy_ = 0;
  targets_.clear();
  reduces_ = false;
  reduced_ = nullptr;
  piece_offset_ = piece_nbytes_ = piece_moved_ = 0;
  streams_ = exceeds_cache(n * (launch.input_nbytes + launch.output_nbytes));
  waits_for_.assign(static_cast<size_t>(n_), true);
  const auto pull = [&](int rank, uint64_t offset, uint64_t nbytes, std::byte* to) {
    if (nbytes > 0) copies_.push_back({rank, false, false, offset, nbytes, to, 0});
  };
  const auto wait_only_for = [&](int reader) {
    waits_for_.assign(static_cast<size_t>(n_), false);
    if (reader >= 0) waits_for_[static_cast<size_t>(reader)] = true;
  };
  // Every rank starts with its neighbour, so that not all read from one at a time.
  const auto others_from_next = [&](const auto& visit) {
    for (int i = 1; i < n_; ++i) visit((rank_ + i) % n_);
  };
  switch (print.collective) {
    case Collective::all_reduce:
    case Collective::reduce: {
      const uint64_t element = size_of(launch.dtype), total = launch.input_nbytes;
      uint64_t unit = ((total + n - 1) / n + kCut - 1) / kCut * kCut;
      if (unit * (n - 1) >= total)  // small: page-sized pieces would leave ranks without work
        unit = (total / element + n - 1) / n * element;
      const bool to_all = print.collective == Collective::all_reduce;
      reduces_ = true;
      piece_offset_ = std::min(me * unit, total);
      piece_nbytes_ = std::min((me + 1) * unit, total) - piece_offset_;
      if (to_all || rank_ == root) reduced_ = out + piece_offset_;
      others_from_next([&](int i) {
        if (to_all || i == root) targets_.push_back(i);
      });
      break;
    }
    case Collective::reduce_scatter:
      reduces_ = true;
      piece_nbytes_ = launch.output_nbytes;
      piece_offset_ = even ? me * piece_nbytes_ : layout.input_offset(rank_);
      reduced_ = out;
      break;
    case Collective::all_gather:
    case Collective::gather: {
      const bool to_all = print.collective == Collective::all_gather;
      if (!to_all) wait_only_for(rank_ == root ? -1 : root);
      if (!to_all && rank_ != root) break;
      const auto place = [&](int i) {
        return even ? static_cast<uint64_t>(i) * launch.input_nbytes : layout.output_offset(i);
      };
      const auto size = [&](int i) { return even ? launch.input_nbytes : layout.nbytes(i); };
      others_from_next([&](int i) { pull(i, 0, size(i), out + place(i)); });
      pull(rank_, 0, size(rank_), out + place(rank_));
      break;
    }
    case Collective::broadcast: {
      const uint64_t nbytes = launch.input_nbytes;
      const auto shared = [&](int i) { return everywhere || offer(i).output.in_heap; };
      if (rank_ != root) {
        wait_only_for(root);
        copies_.push_back({root, false, shared(rank_), 0, nbytes, out, 0});
      } else {
        others_from_next([&](int i) {
          if (shared(i))
            copies_.push_back({i, true, true, 0, nbytes, const_cast<std::byte*>(input_), 0});
        });
      }
      break;
    }
    case Collective::scatter: {
      const uint64_t offset = even ? me * launch.output_nbytes : layout.input_offset(rank_);
      if (rank_ != root) wait_only_for(-1);
      pull(root, offset, launch.output_nbytes, out);
      break;
    }
    case Collective::all_to_all: {
      const uint64_t piece = launch.input_nbytes / n;
      const auto from = [&](int i) {
        const int chunk = i * n_ + rank_;
        if (even)
          pull(i, me * piece, piece, out + static_cast<uint64_t>(i) * piece);
        else
          pull(i, starts[static_cast<size_t>(i)], layout.nbytes(chunk),
               out + layout.output_offset(chunk));
      };
      others_from_next(from);
      from(rank_);
      break;
    }
    case Collective::barrier:
      break;  // the board's
  }
}

bool Direct::done(int rank) const {
  const uint32_t last = segment_.board(rank).direct_done.load(
      std::memory_order_acquire);  // what it wrote here has arrived, what it read here is read
  return static_cast<int32_t>(last - board_.sequence()) >= 0;
}

void Direct::publish_done() {
  segment_.board(rank_).direct_done.store(
      board_.sequence(), std::memory_order_release);  // after this rank's last block; see done()
  endpoint_.ring_others(ranks_);
}

const std::byte* Direct::operand(int rank, uint64_t offset, uint64_t nbytes, int to) const {
  if (rank == rank_) return input_ + offset;
  const Place from = offer(rank).input.at(offset);
  if (from.in_heap) return reach_.mapped(rank, from.address, nbytes);
  std::byte* here = room(static_cast<Room>(to));
  reach_.read(rank, from, here, nbytes, false);
  return here;
}

void Direct::reduce_block(const Launch& launch) {
  const uint64_t nbytes = std::min(kReduceBlock, piece_nbytes_ - piece_moved_);
  const uint64_t offset = piece_offset_ + piece_moved_;
  const size_t numel = nbytes / size_of(launch.dtype);
  std::byte* result = reduced_ != nullptr ? reduced_ + piece_moved_ : room(kPartial);
  const std::byte* left = operand(0, offset, nbytes, kLeft);
  for (int i = 1; i < n_; ++i) {
    // The result may lie where this rank's own operand does: not before that is taken in.
    std::byte* to = i >= rank_ ? result : room(kPartial);
    reduce(to, left, operand(i, offset, nbytes, kRight), numel, launch.dtype, launch.op);
    left = to;
  }
  if (launch.op == ReduceOp::avg) divide(result, numel, launch.dtype, n_);
  for (const int target : targets_)
    reach_.write(target, offer(target).output.at(offset), result, nbytes, false);
  piece_moved_ += nbytes;
}

bool Direct::copy_block(Copy& copy) {
  uint64_t begin = copy.begin, size = kCopyBlock;
  if (copy.shared) {
    // The receiver's word: a collective's sequence number, then blocks taken. Whoever comes first
    // sets it; takers of an earlier collective are done before this one's are.
    size = shared_block(copy.nbytes);
    const uint64_t first = static_cast<uint64_t>(board_.sequence()) << 32;
    auto& word = segment_.board(copy.push ? copy.rank : rank_).shared;
    const auto next = [&](uint64_t last) { return last >> 32 == first >> 32 ? last : first; };
    uint64_t was = word.load(std::memory_order_relaxed);
    while (!word.compare_exchange_weak(was, next(was) + 1, std::memory_order_relaxed)) {
    }
    begin = size * static_cast<uint32_t>(next(was));
  }
  if (begin >= copy.nbytes) return false;
  const uint64_t nbytes = std::min(copy.nbytes - begin, size);
  std::byte* here = copy.here + begin;
  const uint64_t there = copy.offset + begin;
  if (copy.push)
    reach_.write(copy.rank, offer(copy.rank).output.at(there), here, nbytes, streams_);
  else if (copy.rank != rank_)
    reach_.read(copy.rank, offer(copy.rank).input.at(there), here, nbytes, streams_);
  else if (input_ + there != here)
    cpu::copy(here, input_ + there, nbytes, streams_);
  copy.begin = begin + nbytes;
  return true;
}

bool Direct::advance(const Launch& launch, bool* moved) {
  for (uint64_t spent = 0; !done_;) {
    *moved = true;
    if (piece_moved_ < piece_nbytes_) {
      reduce_block(launch);
      spent += static_cast<uint64_t>(n_) * kReduceBlock;
    } else if (next_copy_ < copies_.size()) {
      next_copy_ += !copy_block(copies_[next_copy_]);
      spent += kCopyBlock;
    } else {
      for (int i = 0; i < n_; ++i) {
        const bool used = reduces_ || std::any_of(copies_.begin(), copies_.end(),
                                                  [i](const Copy& c) { return c.rank == i; });
        if (used && i != rank_) reach_.require_sound(i);
      }
      publish_done();
      done_ = true;
    }
    if (!done_ && spent >= kBudget) return false;
  }
  for (int i = 0; i < n_; ++i)
    if (i != rank_ && waits_for_[static_cast<size_t>(i)] && !done(i)) return false;
  return true;
}

std::vector<int> Direct::blocked_on() const {
  std::vector<int> ranks;
  for (int i = 0; i < n_; ++i)
    if (done_ && i != rank_ && waits_for_[static_cast<size_t>(i)] && !done(i)) ranks.push_back(i);
  return ranks;
}

}  // namespace pycomm::cpu
