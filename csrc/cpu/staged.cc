#include "cpu/staged.h"

#include <algorithm>
#include <utility>

#include "cpu/copy.h"
#include "cpu/reduce.h"

namespace pycomm::cpu {
namespace {

constexpr uint64_t kLine = 64;
constexpr uint64_t kLeastWidth = 16384;
constexpr uint64_t kStepsAhead = 2;    // a small tensor is cut into as many blocks
constexpr uint64_t kBudget = 2 << 20;  // bytes moved before the engine's lock is let go

constexpr uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }
constexpr uint64_t align(uint64_t x) { return ceil_div(x, kLine) * kLine; }

}  // namespace

Staged::Staged(const Segment& segment, Endpoint& endpoint, const std::vector<int>& ranks, int rank)
    : segment_(segment),
      endpoint_(endpoint),
      ranks_(ranks),
      rank_(rank),
      n_(static_cast<int>(ranks.size())),
      n_slots_(Segment::stage_bytes(n_) / kStageSlot),
      seen_given_(ranks.size()),
      seen_reduced_(ranks.size()),
      seen_taken_(ranks.size()) {}

void Staged::begin(const Launch& launch, const std::byte* input, uint64_t largest) {
  const Collective what = launch.fingerprint.collective;
  const int root = launch.fingerprint.root;
  const auto n = static_cast<uint64_t>(n_);
  base_ += n_blocks_;
  input_ = input;
  given_ = reduced_ = taken_ = 0;
  const bool at_root = rank_ == root;
  sliced_ = what == Collective::all_reduce || what == Collective::reduce;
  one_for_all_ =
      what == Collective::all_gather || what == Collective::gather || what == Collective::broadcast;
  reduces_ = sliced_ || what == Collective::reduce_scatter;
  shares_ = what == Collective::all_reduce || (what == Collective::reduce && !at_root);
  switch (what) {
    case Collective::broadcast:
    case Collective::scatter:
      gives_ = at_root;
      takes_ = !at_root;
      break;
    case Collective::gather:
      gives_ = !at_root;
      takes_ = at_root;
      break;
    case Collective::reduce:
      gives_ = true;
      takes_ = at_root;
      break;
    case Collective::reduce_scatter:
      gives_ = true;
      takes_ = false;
      break;
    default:
      gives_ = takes_ = true;
  }
  sources_.clear();
  for (int i = 1; takes_ && i < n_; ++i)
    if (const int from = (rank_ + i) % n_;
        from == root || (what != Collective::broadcast && what != Collective::scatter))
      sources_.push_back(from);
  const uint64_t most = one_for_all_ ? kStageSlot : kStageSlot / n / kLine * kLine;
  if (sliced_) largest = ceil_div(largest, n);
  width_ = std::clamp(align(ceil_div(largest, kStepsAhead)), std::min(kLeastWidth, most), most);
  n_blocks_ = ceil_div(largest, width_);
  // Where the input lies at the output and was given a moment ago, that is in a cache.
  streams_ = !(sliced_ && launch.input == launch.output) &&
             exceeds_cache(n * (launch.input_nbytes + launch.output_nbytes));
  const auto skip = [&](std::atomic<uint64_t> BoardEntry::* count) {
    (segment_.board(rank_).*count).store(base_ + n_blocks_, std::memory_order_release);
  };
  if (!gives_) skip(&BoardEntry::given);
  if (!reduces_) skip(&BoardEntry::reduced);
  if (!takes_ && !reduces_) skip(&BoardEntry::taken);
}

// Where a piece's part of a block lies in the whole tensor, or in this rank's own where it has only
// a piece.
Staged::Part Staged::part(const Launch& launch, int piece, uint64_t block, bool of_input) const {
  const auto n = static_cast<uint64_t>(n_), i = static_cast<uint64_t>(piece);
  if (sliced_) {
    const uint64_t total = launch.input_nbytes, begin = block * n * width_;
    const uint64_t width = std::min(width_, align(ceil_div(total - begin, n)));
    const uint64_t offset = std::min(begin + i * width, total);
    return {offset, std::min(width, total - offset)};
  }
  uint64_t offset = 0, nbytes = 0;
  const bool even = !launch.fingerprint.has_counts;
  switch (launch.fingerprint.collective) {
    case Collective::broadcast:
      nbytes = launch.input_nbytes;
      break;
    case Collective::all_to_all:
      nbytes = launch.input_nbytes / n;
      offset = i * nbytes;
      if (!even) {
        const int chunk = of_input ? rank_ * n_ + piece : piece * n_ + rank_;
        nbytes = launch.layout.nbytes(chunk);
        offset = of_input ? launch.layout.input_offset(chunk) : launch.layout.output_offset(chunk);
      }
      break;
    default: {
      const bool whole = of_input == (launch.fingerprint.collective == Collective::scatter ||
                                      launch.fingerprint.collective == Collective::reduce_scatter);
      nbytes = even ? std::max(launch.input_nbytes, launch.output_nbytes) / n
                    : launch.layout.nbytes(piece);
      if (whole)
        offset = even       ? i * nbytes
                 : of_input ? launch.layout.input_offset(piece)
                            : launch.layout.output_offset(piece);
    }
  }
  const uint64_t begin = std::min(block * width_, nbytes);
  return {offset + begin, std::min(width_, nbytes - begin)};
}

std::byte* Staged::slot(int rank, uint64_t block, int piece) const {
  const uint64_t used = width_ * (one_for_all_ ? 1 : static_cast<uint64_t>(n_));
  // A small block lies elsewhere in its slot each time round, so that all of the stage is used.
  const uint64_t round = (base_ + block) / n_slots_ % (kStageSlot / used);
  return segment_.stage(rank) + (base_ + block) % n_slots_ * kStageSlot + round * used +
         (one_for_all_ ? 0 : static_cast<uint64_t>(piece) * width_);
}

// Whether `rank` has counted to `value`. Acquire: what it wrote, or read, up to there is done.
bool Staged::reached(std::atomic<uint64_t> BoardEntry::* count, std::vector<uint64_t>& seen,
                     int rank, uint64_t value) const {
  uint64_t& last = seen[static_cast<size_t>(rank)];
  if (last < value) last = (segment_.board(rank).*count).load(std::memory_order_acquire);
  return last >= value;
}

bool Staged::may_give() {
  if (!gives_ || given_ == n_blocks_) return false;
  const uint64_t block = base_ + given_;
  if (block < n_slots_) return true;  // a slot's first use
  for (int i = 0; i < n_; ++i)
    if (i != rank_ && !reached(&BoardEntry::taken, seen_taken_, i, block - n_slots_ + 1))
      return false;
  return true;
}

bool Staged::may_reduce() {
  if (!reduces_ || reduced_ == n_blocks_ || given_ <= reduced_) return false;
  for (int i = 0; i < n_; ++i)
    if (i != rank_ && !reached(&BoardEntry::given, seen_given_, i, base_ + reduced_ + 1))
      return false;
  return true;
}

bool Staged::may_take() {
  if (!takes_ || taken_ == n_blocks_) return false;
  for (const int i : sources_)
    if (!(reduces_ ? reached(&BoardEntry::reduced, seen_reduced_, i, base_ + taken_ + 1)
                   : reached(&BoardEntry::given, seen_given_, i, base_ + taken_ + 1)))
      return false;
  return !reduces_ || reduced_ > taken_;  // its own slot may be given again after this
}

void Staged::publish(std::atomic<uint64_t> BoardEntry::* count, uint64_t blocks) {
  // Release: this rank's reads and writes of the block are done; see reached().
  (segment_.board(rank_).*count).store(base_ + blocks, std::memory_order_release);
  // Where ranks outnumber cores who sleeps is woken once a turn: it could not run before this rank
  // stops, and waking all for each block took longer than the blocks.
  if (endpoint_.oversubscribed())
    unrung_ = true;
  else
    endpoint_.ring_others(ranks_);
}

void Staged::give(const Launch& launch) {
  auto* out = static_cast<std::byte*>(launch.output);
  if (one_for_all_) {
    const Part mine = part(launch, rank_, given_, true);
    copy(slot(rank_, given_, 0), input_ + mine.offset, mine.nbytes, false);
  } else {
    for (int i = 0; i < n_; ++i) {
      if (i == rank_) continue;
      const Part theirs = part(launch, i, given_, true);
      copy(slot(rank_, given_, i), input_ + theirs.offset, theirs.nbytes, false);
    }
  }
  const uint64_t block = given_++;
  publish(&BoardEntry::given, given_);
  // What this rank has for itself, while it is near.
  if (reduces_ || launch.fingerprint.collective == Collective::broadcast || out == nullptr) return;
  if (launch.fingerprint.collective == Collective::gather) return;
  const Part from = part(launch, rank_, block, true), to = part(launch, rank_, block, false);
  if (out + to.offset != input_ + from.offset)
    copy(out + to.offset, input_ + from.offset, from.nbytes, streams_);
}

void Staged::reduce(const Launch& launch) {
  const Part mine = part(launch, rank_, reduced_, true);
  const size_t numel = mine.nbytes / size_of(launch.dtype);
  auto* out = static_cast<std::byte*>(launch.output);
  std::byte* shared = slot(rank_, reduced_, rank_);
  std::byte* result = shared;
  if (takes_ || launch.fingerprint.collective == Collective::reduce_scatter)
    result = out + (sliced_ ? mine.offset : part(launch, rank_, reduced_, false).offset);
  const auto operand = [&](int i) -> const std::byte* {
    return i == rank_ ? input_ + mine.offset : slot(i, reduced_, rank_);
  };
  if (numel > 0) {
    const std::byte* left = operand(0);
    for (int i = 1; i < n_; ++i) {
      // The result may lie where this rank's own operand does: not before that is taken in.
      std::byte* to = i >= rank_ ? result : shared;
      cpu::reduce(to, left, operand(i), numel, launch.dtype, launch.op);
      left = to;
    }
    if (launch.op == ReduceOp::avg) divide(result, numel, launch.dtype, n_);
    if (shares_ && result != shared) copy(shared, result, mine.nbytes, false);
  }
  ++reduced_;
  publish(&BoardEntry::reduced, reduced_);
  if (!takes_) publish(&BoardEntry::taken, reduced_);
}

void Staged::take(const Launch& launch) {
  auto* out = static_cast<std::byte*>(launch.output);
  for (const int i : sources_) {
    // From a rank's slot: its own piece, or what it has put there for this one.
    const bool theirs =
        sliced_ || one_for_all_ || launch.fingerprint.collective == Collective::all_to_all;
    const Part to = part(launch, theirs ? i : rank_, taken_, false);
    copy(out + to.offset, slot(i, taken_, sliced_ ? i : rank_), to.nbytes, streams_);
  }
  if (launch.fingerprint.collective == Collective::gather) {  // the root gives nothing
    const Part from = part(launch, rank_, taken_, true), to = part(launch, rank_, taken_, false);
    if (out + to.offset != input_ + from.offset)
      copy(out + to.offset, input_ + from.offset, from.nbytes, streams_);
  }
  ++taken_;
  publish(&BoardEntry::taken, taken_);
}

bool Staged::advance(const Launch& launch, bool all_entered, bool* moved) {
  const bool done = move(launch, all_entered, moved);
  if (std::exchange(unrung_, false)) endpoint_.ring_others(ranks_);
  return done;
}

bool Staged::move(const Launch& launch, bool all_entered, bool* moved) {
  const uint64_t block_nbytes = width_ * (one_for_all_ ? 1 : static_cast<uint64_t>(n_));
  for (uint64_t spent = 0; spent < kBudget; spent += block_nbytes) {
    if (all_entered && may_take())
      take(launch);
    else if (all_entered && may_reduce())
      reduce(launch);
    else if (may_give())
      give(launch);
    else
      return all_entered && (!gives_ || given_ == n_blocks_) &&
             (!reduces_ || reduced_ == n_blocks_) && (!takes_ || taken_ == n_blocks_);
    *moved = true;
  }
  return false;
}

std::vector<int> Staged::blocked_on() const {
  std::vector<int> ranks;
  for (int i = 0; i < n_; ++i) {
    if (i == rank_) continue;
    const auto count = [&](std::atomic<uint64_t> BoardEntry::* which) {
      return (segment_.board(i).*which).load(std::memory_order_acquire);
    };
    const bool is_source = std::find(sources_.begin(), sources_.end(), i) != sources_.end();
    const bool lacks =
        (reduces_ && reduced_ < n_blocks_ && count(&BoardEntry::given) <= base_ + reduced_) ||
        (is_source && taken_ < n_blocks_ &&
         count(reduces_ ? &BoardEntry::reduced : &BoardEntry::given) <= base_ + taken_) ||
        (gives_ && given_ < n_blocks_ && base_ + given_ >= n_slots_ &&
         count(&BoardEntry::taken) <= base_ + given_ - n_slots_);
    if (lacks) ranks.push_back(i);
  }
  return ranks;
}

}  // namespace pycomm::cpu
