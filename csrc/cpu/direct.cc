#include "cpu/direct.h"

#include <algorithm>
#include <cstring>

#include "cpu/reduce.h"
#include "cpu/waiter.h"

namespace pycomm::cpu {
namespace {

constexpr uint64_t kReduceBlock = 256 * 1024;  // operands and result of one stay in a core's cache
constexpr uint64_t kCopyBlock = 512 * 1024;
constexpr uint64_t kSharedBlock = 64 * 1024;  // the two ends meet within one
constexpr uint64_t kCut = 4096;               // pieces of a reduction begin at multiples of it
constexpr uint64_t kKeptScratch = 4 << 20;
constexpr uint64_t kBudget = 2 << 20;  // bytes moved before the engine's lock is let go

// Room for operands that cannot be read in place; the caller's thread keeps it.
std::byte* room(int which) {
  struct alignas(64) Rooms {
    std::byte data[2][kReduceBlock];
  };
  static thread_local std::unique_ptr<Rooms> rooms;
  if (!rooms) rooms.reset(new Rooms);
  return rooms->data[which];
}

bool overlap(const void* a, uint64_t a_nbytes, const void* b, uint64_t b_nbytes) {
  const auto x = reinterpret_cast<uint64_t>(a), y = reinterpret_cast<uint64_t>(b);
  return x < y + b_nbytes && y < x + a_nbytes;
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

std::byte* Direct::scratch(uint64_t nbytes) {
  if (nbytes > scratch_nbytes_) {
    scratch_.reset();
    scratch_.reset(new std::byte[nbytes]);
    scratch_nbytes_ = nbytes;
  }
  return scratch_.get();
}

// What this rank does in the collective, as far as it knows without the others' addresses.
void Direct::plan(const Launch& launch) {
  const Fingerprint& print = launch.fingerprint;
  const Layout& layout = launch.layout;
  const bool even = !print.has_counts;
  const int root = print.root;
  const auto n = static_cast<uint64_t>(n_), me = static_cast<uint64_t>(rank_);
  input_ = static_cast<const std::byte*>(launch.input);
  auto* out = static_cast<std::byte*>(launch.output);
  copies_.clear();
  next_copy_ = 0;
  targets_.clear();
  reduces_ = false;
  reduced_ = nullptr;
  piece_offset_ = piece_nbytes_ = piece_moved_ = 0;
  sent_nbytes_ = 0;
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
  const auto stage_input = [&] {
    std::byte* copy = scratch(launch.input_nbytes);
    std::memcpy(copy, input_, launch.input_nbytes);
    input_ = copy;
  };
  // In place means one exact place; other overlaps work on a copy of the input.
  const auto stage_unless_at = [&](const std::byte* in, const std::byte* place) {
    if (in != place && input_ != nullptr && out != nullptr &&
        overlap(input_, launch.input_nbytes, out, launch.output_nbytes))
      stage_input();
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
      if (to_all || rank_ == root) {
        stage_unless_at(input_, out);
        reduced_ = out + piece_offset_;
      }
      others_from_next([&](int i) {
        if (to_all || i == root) targets_.push_back(i);
      });
      sent_nbytes_ = total - piece_nbytes_ + targets_.size() * piece_nbytes_;
      break;
    }
    case Collective::reduce_scatter:
      reduces_ = true;
      piece_nbytes_ = launch.output_nbytes;
      piece_offset_ = even ? me * piece_nbytes_ : layout.input_offset(rank_);
      stage_unless_at(input_ + piece_offset_, out);
      reduced_ = out;
      sent_nbytes_ = launch.input_nbytes - piece_nbytes_;
      break;
    case Collective::all_gather:
    case Collective::gather: {
      const bool to_all = print.collective == Collective::all_gather;
      sent_nbytes_ = launch.input_nbytes * (to_all ? n - 1 : rank_ == root ? 0 : 1);
      if (!to_all) wait_only_for(rank_ == root ? -1 : root);
      if (!to_all && rank_ != root) break;
      const auto place = [&](int i) {
        return even ? static_cast<uint64_t>(i) * launch.input_nbytes : layout.output_offset(i);
      };
      const auto size = [&](int i) { return even ? launch.input_nbytes : layout.nbytes(i); };
      stage_unless_at(input_, out + place(rank_));
      others_from_next([&](int i) { pull(i, 0, size(i), out + place(i)); });
      pull(rank_, 0, size(rank_), out + place(rank_));
      break;
    }
    case Collective::broadcast: {
      const uint64_t nbytes = launch.input_nbytes;
      if (rank_ != root) {
        wait_only_for(root);
        copies_.push_back({root, false, true, 0, nbytes, out, 0});
        segment_.board(rank_).taken.store(static_cast<uint64_t>(board_.sequence()) << 32,
                                          std::memory_order_relaxed);  // published with the entry
      } else {
        sent_nbytes_ = (n - 1) * nbytes;
        others_from_next([&](int i) {
          copies_.push_back({i, true, true, 0, nbytes, const_cast<std::byte*>(input_), 0});
        });
      }
      break;
    }
    case Collective::scatter: {
      const uint64_t offset = even ? me * launch.output_nbytes : layout.input_offset(rank_);
      if (rank_ == root) {
        stage_unless_at(input_ + offset, out);
        sent_nbytes_ = launch.input_nbytes - launch.output_nbytes;
      } else {
        wait_only_for(-1);
      }
      pull(root, offset, launch.output_nbytes, out);
      break;
    }
    case Collective::all_to_all: {
      if (overlap(input_, launch.input_nbytes, out, launch.output_nbytes)) stage_input();
      const uint64_t piece = launch.input_nbytes / n;
      const auto chunk = [&](int from, int to) { return from * n_ + to; };
      sent_nbytes_ = launch.input_nbytes - (even ? piece : layout.nbytes(chunk(rank_, rank_)));
      const auto from =
          [&](int i) {  // where it lies there: resolve() learns it from an uneven peer
            const uint64_t nbytes = even ? piece : layout.nbytes(chunk(i, rank_));
            pull(i, even ? me * piece : layout.input_offset(chunk(rank_, rank_)), nbytes,
                 out + (even ? static_cast<uint64_t>(i) * piece
                             : layout.output_offset(chunk(i, rank_))));
          };
      others_from_next(from);
      from(rank_);
      break;
    }
    case Collective::barrier:
      break;  // the board's
  }
}

void Direct::begin(const Launch& launch) {
  entered_ = done_ = false;
  board_.prepare();
  plan(launch);
  Offer offer;
  offer.input = reinterpret_cast<uint64_t>(input_);
  offer.output = reinterpret_cast<uint64_t>(launch.output);
  if (launch.fingerprint.collective == Collective::all_to_all && launch.fingerprint.has_counts) {
    // What lies where only this rank knows: offset and size of what each rank is to take.
    auto* table = reinterpret_cast<uint64_t*>(board_.payload(rank_, true));
    for (int i = 0; i < n_; ++i) {
      table[2 * i] = launch.layout.input_offset(rank_ * n_ + i);
      table[2 * i + 1] = launch.layout.nbytes(rank_ * n_ + i);
    }
  }
  std::memcpy(board_.payload(rank_, false), &offer, sizeof(offer));
  board_.publish(launch);
}

// All ranks have entered: takes up their addresses.
void Direct::resolve(const Launch& launch) {
  offers_.resize(static_cast<size_t>(n_));
  for (int i = 0; i < n_; ++i)
    std::memcpy(&offers_[static_cast<size_t>(i)], board_.payload(i, false), sizeof(Offer));
  if (launch.fingerprint.collective != Collective::all_to_all || !launch.fingerprint.has_counts)
    return;
  for (int i = 0; i < n_; ++i) {
    const auto* table = reinterpret_cast<const uint64_t*>(board_.payload(i, true));
    const uint64_t expected = launch.layout.nbytes(i * n_ + rank_);
    if (table[2 * rank_ + 1] == expected) continue;
    Fingerprint mine = launch.fingerprint, theirs = launch.fingerprint;
    theirs.rank = i;
    mine.numel = expected / size_of(launch.dtype);
    theirs.numel = table[2 * rank_ + 1] / size_of(launch.dtype);
    throw Error(Code::mismatch, describe_mismatch(mine, theirs));
  }
  for (Copy& copy : copies_)
    copy.offset = reinterpret_cast<const uint64_t*>(board_.payload(copy.rank, true))[2 * rank_];
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

const std::byte* Direct::operand(int rank, uint64_t offset, uint64_t nbytes, std::byte* to) const {
  if (rank == rank_) return input_ + offset;
  const uint64_t address = offers_[static_cast<size_t>(rank)].input + offset;
  if (const std::byte* data = reach_.mapped(rank, address, nbytes)) return data;
  reach_.read(rank, to, address, nbytes);
  return to;
}

void Direct::reduce_block(const Launch& launch) {
  const uint64_t nbytes = std::min(kReduceBlock, piece_nbytes_ - piece_moved_);
  const uint64_t offset = piece_offset_ + piece_moved_;
  const size_t numel = nbytes / size_of(launch.dtype);
  std::byte* result = reduced_ != nullptr ? reduced_ + piece_moved_ : room(0);
  const std::byte* left = operand(0, offset, nbytes, room(0));
  for (int i = 1; i < n_; ++i) {
    const std::byte* right = operand(i, offset, nbytes, room(1));
    // The result may lie where this rank's own operand does: not before that is taken in.
    std::byte* to = i >= rank_ ? result : room(0);
    reduce(to, left, right, numel, launch.dtype, launch.op);
    left = to;
  }
  if (launch.op == ReduceOp::avg) divide(result, numel, launch.dtype, n_);
  for (const int target : targets_)
    reach_.write(target, offers_[static_cast<size_t>(target)].output + offset, result, nbytes);
  piece_moved_ += nbytes;
}

bool Direct::copy_block(Copy& copy) {
  uint64_t begin = copy.begin, size = kCopyBlock;
  if (copy.shared) {
    // The receiver's word: a collective's sequence number, then blocks taken. Only takers of this
    // collective touch it: it is set before the receiver's entry and done with before its end.
    size = kSharedBlock;
    begin = size * static_cast<uint32_t>(segment_.board(copy.push ? copy.rank : rank_)
                                             .taken.fetch_add(1, std::memory_order_relaxed));
  }
  if (begin >= copy.nbytes) return false;
  const uint64_t nbytes = std::min(copy.nbytes - begin, size);
  const Offer& offer = offers_[static_cast<size_t>(copy.rank)];
  std::byte* here = copy.here + begin;
  const uint64_t there = copy.offset + begin;
  if (copy.push)
    reach_.write(copy.rank, offer.output + there, here, nbytes);
  else if (copy.rank != rank_)
    reach_.read(copy.rank, here, offer.input + there, nbytes);
  else if (here != input_ + there)
    std::memcpy(here, input_ + there, nbytes);
  copy.begin = begin + nbytes;
  return true;
}

bool Direct::advance(const Launch& launch, bool* moved) {
  if (!entered_) {
    if (!board_.all_entered(launch, moved)) return false;
    resolve(launch);
    entered_ = true;
  }
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
  if (scratch_nbytes_ > kKeptScratch) {
    scratch_.reset();
    scratch_nbytes_ = 0;
  }
  return true;
}

std::vector<int> Direct::blocked_on() const {
  if (!entered_) return board_.blocked_on();
  std::vector<int> ranks;
  for (int i = 0; i < n_; ++i)
    if (done_ && i != rank_ && waits_for_[static_cast<size_t>(i)] && !done(i)) ranks.push_back(i);
  return ranks;
}

}  // namespace pycomm::cpu
