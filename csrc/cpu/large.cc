#include "cpu/large.h"

#include <algorithm>
#include <cstring>

namespace pycomm::cpu {
namespace {

constexpr uint64_t kKeptScratch = 4 << 20;

// What an uneven all_to_all says of itself beside its Offer, per rank: where what it is to take
// lies in the input, and how much it is. Only the two ends of each exchange know.
struct Row {
  uint64_t offset;
  uint64_t nbytes;
};

bool is_uneven_exchange(const Launch& launch) {
  return launch.fingerprint.collective == Collective::all_to_all && launch.fingerprint.has_counts;
}

// Bytes of the largest piece of any rank; of the whole tensor where each rank has all of it.
uint64_t largest_piece(const Launch& launch, int n) {
  switch (launch.fingerprint.collective) {
    case Collective::all_reduce:
    case Collective::reduce:
    case Collective::broadcast:
      return launch.input_nbytes;
    default:
      return launch.fingerprint.has_counts
                 ? launch.layout.max_nbytes()
                 : std::max(launch.input_nbytes, launch.output_nbytes) / static_cast<uint64_t>(n);
  }
}

bool overlap(const std::byte* a, uint64_t a_nbytes, const std::byte* b, uint64_t b_nbytes) {
  return a < b + b_nbytes && b < a + a_nbytes;
}

}  // namespace

Large::Large(const Segment& segment, Board& board, Reach& reach, Endpoint& endpoint,
             const std::vector<int>& ranks, int rank)
    : board_(board),
      reach_(reach),
      direct_(segment, board, reach, endpoint, ranks, rank),
      staged_(segment, endpoint, ranks, rank),
      rank_(rank),
      n_(static_cast<int>(ranks.size())) {
  static_assert(sizeof(Offer) <= kInlineBytes);
}

// The input, or a copy of it: in place means one exact place, other overlaps would be read after
// they are written.
const std::byte* Large::input_apart(const Launch& launch) {
  const auto* in = static_cast<const std::byte*>(launch.input);
  const auto* out = static_cast<const std::byte*>(launch.output);
  if (in == nullptr || out == nullptr) return in;
  const bool even = !launch.fingerprint.has_counts;
  const auto n = static_cast<uint64_t>(n_), me = static_cast<uint64_t>(rank_);
  const std::byte* place = nullptr;
  switch (launch.fingerprint.collective) {
    case Collective::reduce_scatter:
    case Collective::scatter:
      place = out - (even ? me * (launch.input_nbytes / n) : launch.layout.input_offset(rank_));
      break;
    case Collective::all_gather:
    case Collective::gather:
      place = out + (even ? me * (launch.output_nbytes / n) : launch.layout.output_offset(rank_));
      break;
    case Collective::all_to_all:
      break;
    default:
      place = out;
  }
  if (in == place || !overlap(in, launch.input_nbytes, out, launch.output_nbytes)) return in;
  if (launch.input_nbytes > scratch_nbytes_) {
    scratch_.reset();
    scratch_.reset(new std::byte[launch.input_nbytes]);
    scratch_nbytes_ = launch.input_nbytes;
  }
  std::memcpy(scratch_.get(), in, launch.input_nbytes);
  return scratch_.get();
}

uint64_t Large::bytes_for_others(const Launch& launch) const {
  const uint64_t in = launch.input_nbytes, others = static_cast<uint64_t>(n_) - 1;
  const uint64_t share = in / static_cast<uint64_t>(n_);
  const bool at_root = rank_ == launch.fingerprint.root;
  switch (launch.fingerprint.collective) {
    case Collective::all_reduce:
      return 2 * others * share;
    case Collective::reduce:
      return others * share + (at_root ? 0 : share);
    case Collective::broadcast:
      return at_root ? others * in : 0;
    case Collective::all_gather:
      return others * in;
    case Collective::gather:
      return at_root ? 0 : in;
    case Collective::reduce_scatter:
      return in - launch.output_nbytes;
    case Collective::scatter:
      return at_root ? in - launch.output_nbytes : 0;
    case Collective::all_to_all:
      return in - (is_uneven_exchange(launch) ? launch.layout.nbytes(rank_ * n_ + rank_) : share);
    case Collective::barrier:
      break;
  }
  return 0;
}

void Large::begin(const Launch& launch) {
  offered_ = entered_ = begun_ = false;
  board_.prepare();
  input_ = input_apart(launch);
  sent_nbytes_ = bytes_for_others(launch);
}

bool Large::offer(const Launch& launch) {
  const bool uneven = is_uneven_exchange(launch);
  if (!board_.has_room(launch, uneven ? kBoardBytes : sizeof(Offer))) return false;
  offered_ = true;
  const Offer offer{reach_.in_heap(input_), reach_.in_heap(launch.output)};
  std::memcpy(board_.payload(rank_, sizeof(offer)), &offer, sizeof(offer));
  if (uneven) {
    auto* rows = reinterpret_cast<Row*>(board_.payload(rank_, kBoardBytes));
    for (int i = 0; i < n_; ++i)
      rows[i] = {launch.layout.input_offset(rank_ * n_ + i), launch.layout.nbytes(rank_ * n_ + i)};
  } else if (Direct::lacks(launch, rank_, offer)) {
    staged_.begin(launch, input_, largest_piece(launch, n_));
    begun_ = true;
  }
  board_.publish(launch);
  return true;
}

// All ranks have entered: all choose alike.
void Large::enter(const Launch& launch) {
  entered_ = true;
  offers_.resize(static_cast<size_t>(n_));
  in_place_ = true;
  for (int i = 0; i < n_; ++i) {
    Offer& offer = offers_[static_cast<size_t>(i)];
    std::memcpy(&offer, board_.payload(i, sizeof(offer)), sizeof(offer));
    in_place_ = in_place_ && !Direct::lacks(launch, i, offer);
  }
  uint64_t largest = 0;
  std::vector<uint64_t> starts;
  if (is_uneven_exchange(launch)) {
    for (int i = 0; i < n_; ++i) {
      const auto* rows = reinterpret_cast<const Row*>(board_.payload(i, kBoardBytes));
      for (int j = 0; j < n_; ++j) largest = std::max(largest, rows[j].nbytes);
      starts.push_back(rows[rank_].offset);
      const uint64_t expected = launch.layout.nbytes(i * n_ + rank_);
      if (rows[rank_].nbytes == expected) continue;
      Fingerprint mine = launch.fingerprint, theirs = launch.fingerprint;
      theirs.rank = i;
      mine.numel = expected / size_of(launch.dtype);
      theirs.numel = rows[rank_].nbytes / size_of(launch.dtype);
      throw Error(Code::mismatch, describe_mismatch(mine, theirs));
    }
  } else {
    largest = largest_piece(launch, n_);
  }
  if (in_place_)
    direct_.begin(launch, input_, offers_, starts);
  else if (!begun_)
    staged_.begin(launch, input_, largest);
  begun_ = true;
}

bool Large::advance(const Launch& launch, bool* moved) {
  if (!offered_ && !offer(launch)) return false;
  if (!entered_ && board_.all_entered(launch, moved)) enter(launch);
  if (!begun_) return false;
  if (!(entered_ && in_place_ ? direct_.advance(launch, moved)
                              : staged_.advance(launch, entered_, moved)))
    return false;
  if (scratch_nbytes_ > kKeptScratch) {
    scratch_.reset();
    scratch_nbytes_ = 0;
  }
  return true;
}

std::vector<int> Large::blocked_on() const {
  if (!entered_) return board_.blocked_on();
  return in_place_ ? direct_.blocked_on() : staged_.blocked_on();
}

}  // namespace pycomm::cpu
