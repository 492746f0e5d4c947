#include "cpu/large.h"

#include <algorithm>
#include <cstring>

#include "cpu/probe.h"

namespace pycomm::cpu {
namespace {

constexpr uint64_t kKeptScratch = 4 << 20;

// What a rank says as it enters.
struct Entry {
  Offer offer;
  uint64_t previous_ns = 0;  // what the collective before took it, from when all had entered
  uint32_t probe_ns = 0;     // of that, too; 0: it had none
  uint32_t reaches = 0;      // 1: it gets at ordinary memory of all the others
};

// What an uneven all_to_all says of itself beside its Entry, per rank: where what it is to take
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
    : segment_(segment),
      endpoint_(endpoint),
      board_(board),
      reach_(reach),
      direct_(segment, board, reach, endpoint, ranks, rank),
      staged_(segment, endpoint, ranks, rank),
      rank_(rank),
      n_(static_cast<int>(ranks.size())),
      next_((rank + 1) % n_),
      beside_{ranks[static_cast<size_t>(next_)]} {
  static_assert(sizeof(Entry) <= kInlineBytes);
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
  way_ = Way::shared;
  probes_ = probes(board_.sequence(), largest_piece(launch, n_));
  if (!is_uneven_exchange(launch)) choose_way(launch, largest_piece(launch, n_));
}

// Alike on all ranks: each was told what the collectives before took all of them.
void Large::choose_way(const Launch& launch, uint64_t largest) {
  nbytes_ = largest;
  if (all_reach_ && nbytes_ >= Ways::kLeast)
    way_ = ways_.choose(static_cast<int>(launch.fingerprint.collective), nbytes_);
}

bool Large::offer(const Launch& launch) {
  const bool uneven = is_uneven_exchange(launch);
  if (!board_.has_room(launch, uneven ? kBoardBytes : sizeof(Entry))) return false;
  offered_ = true;
  if (probes_) write_lines(segment_.board(rank_), board_.sequence());
  const Entry entry{{reach_.place(input_), reach_.place(launch.output)},
                    measured_.ns,
                    measured_.probe_ns,
                    reach_.reaches_all()};
  std::memcpy(board_.payload(rank_, sizeof(entry)), &entry, sizeof(entry));
  if (uneven) {
    auto* rows = reinterpret_cast<Row*>(board_.payload(rank_, kBoardBytes));
    for (int i = 0; i < n_; ++i)
      rows[i] = {launch.layout.input_offset(rank_ * n_ + i), launch.layout.nbytes(rank_ * n_ + i)};
  } else if (way_ == Way::shared && Direct::lacks(launch, rank_, entry.offer)) {
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
  bool all_in_heaps = true;
  uint64_t slowest_ns = 0;
  uint32_t dearest_ns = 0;
  all_reach_ = true;
  for (int i = 0; i < n_; ++i) {
    Entry entry;
    std::memcpy(&entry, board_.payload(i, sizeof(entry)), sizeof(entry));
    offers_[static_cast<size_t>(i)] = entry.offer;
    all_in_heaps = all_in_heaps && !Direct::lacks(launch, i, entry.offer);
    slowest_ns = std::max(slowest_ns, entry.previous_ns);
    dearest_ns = std::max(dearest_ns, entry.probe_ns);
    all_reach_ = all_reach_ && entry.reaches;
  }
  if (slowest_ns > 0) ways_.record(measured_.kind, measured_.nbytes, measured_.way, slowest_ns);
  if (dearest_ns > 0) ways_.probed(dearest_ns);
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
  if (is_uneven_exchange(launch)) choose_way(launch, largest);
  in_place_ = all_in_heaps || way_ == Way::pulled;
  measured_ = {static_cast<int>(launch.fingerprint.collective), nbytes_, way_, 0, 0};
  if (probes_)
    measured_.probe_ns = static_cast<uint32_t>(
        std::min<uint64_t>(time_lines(segment_.board(next_), endpoint_, beside_), UINT32_MAX));
  measures_ = all_reach_ && !all_in_heaps && nbytes_ >= Ways::kLeast;
  if (measures_) entered_at_ = Clock::now();
  if (in_place_)
    direct_.begin(launch, input_, offers_, starts, way_ == Way::pulled);
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
  if (measures_)
    measured_.ns =
        static_cast<uint64_t>(std::max<int64_t>((Clock::now() - entered_at_).count(), 1));
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
