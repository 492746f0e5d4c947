// All-reduce of small tensors by ranks that read each other's memory: the arithmetic and the order
// of flags, which the kernel (peer_all_reduce.cu) and the CPU's test both run; a Machine is what
// they do differently.
//
// Every rank has a symmetric buffer: a control block, then twice two areas of `capacity` bytes.
// Launch `epoch` (1, 2, ..) uses the areas of its parity. Each block of threads works on its own
// range of 16-byte vectors, and on no other block's: it stages the rank's input, tells the same
// block of every rank (a flag gets the epoch), waits for theirs, and reads what they staged.
//   one-shot: every rank sums all staged inputs, in rank order.
//   two-shot: each rank sums its slice of the range into its second area; after a second exchange
//             of flags everyone reads all slices.
// An area is written again two launches later. A rank is then past the flags of the launch between,
// which every rank sets after its kernel before has ended: so nobody still reads it. REQUIRES: the
// launches of a rank are in the order of one stream, and all ranks make the same ones.
//
// No wait is for ever: whoever waits past the deadline, or meets another call, writes the error
// word of every rank, and who reads it in its own control block leaves; the host may write it too.
// A launch that failed leaves undefined output, and the buffers must not be used again.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cuda/indexing.h"

namespace pycomm::cuda {

constexpr int kMaxPeers = 8;
constexpr int kMaxPeerBlocks = 64;
constexpr uint32_t kPeerTimedOut = 1, kPeerMismatch = 2, kPeerEnded = 3;

struct PeerControl {
  uint64_t flags[2][kMaxPeerBlocks][kMaxPeers];  // [exchange][block][rank]: its last peer_flag()
  uint32_t error;
};
constexpr int64_t kPeerControlBytes = (sizeof(PeerControl) + 255) / 256 * 256;
PYCOMM_HD constexpr int64_t peer_buffer_nbytes(int64_t capacity) {
  return kPeerControlBytes + 4 * capacity;
}

struct PeerArguments {
  char* buffers[kMaxPeers];  // by rank
  int rank, n_ranks, n_blocks;
  uint32_t epoch;
  uint32_t tag;      // of the call: who meets another one in its epoch says so
  int64_t capacity;  // bytes of an area, a multiple of 16
  const void* input;
  void* output;
  int64_t numel;
  ReduceOp op;
  uint64_t timeout_ns;
  uint32_t* failed;  // gets the error where there is one; the host reads it

  PYCOMM_HD PeerControl* control(int of) const {
    return reinterpret_cast<PeerControl*>(buffers[of]);
  }
  PYCOMM_HD char* area(int of, int which) const {
    return buffers[of] + kPeerControlBytes + ((epoch & 1) * 2 + which) * capacity;
  }
};

// Ranks on one device wait for each other's blocks, so all must be on it at once: whether they fit
// into its `places`. Of other kernels that hold places nothing is known here: the deadline ends a
// wait for those.
constexpr bool peers_fit(int n_ranks_on_device, int n_blocks, int places) {
  return n_ranks_on_device * n_blocks <= places;
}

PYCOMM_HD constexpr uint64_t peer_flag(uint32_t tag, uint32_t epoch) {
  return uint64_t{tag} << 32 | epoch;
}
// What a flag of another rank says to one that waits in `args`: not there yet, or there; or there
// with another call. One that is further has seen this rank's flag, and found it right.
enum class PeerState { absent, present, mistaken };
PYCOMM_HD PeerState peer_state(uint64_t flag, const PeerArguments& args) {
  const auto epoch = static_cast<uint32_t>(flag);
  if (static_cast<int32_t>(epoch - args.epoch) < 0) return PeerState::absent;
  return epoch == args.epoch && flag != peer_flag(args.tag, epoch) ? PeerState::mistaken
                                                                   : PeerState::present;
}

struct Range {
  int64_t begin, end;
};
// Part i of n near-equal parts of a range; parts have whole vectors, and the last may be empty.
PYCOMM_HD Range part_of(Range whole, int n, int i) {
  const int64_t each = ceil_div(whole.end - whole.begin, n);
  const int64_t begin = whole.begin + i * each, end = begin + each;
  return {begin < whole.end ? begin : whole.end, end < whole.end ? end : whole.end};
}

PYCOMM_HD float combine(float a, float b, ReduceOp op) {
  switch (op) {
    case ReduceOp::product:
      return a * b;
    case ReduceOp::min:
      return a < b || a != a ? a : b;
    case ReduceOp::max:
      return a > b || a != a ? a : b;
    default:
      return a + b;
  }
}

// One 16-byte vector of T, and its place in an array of numel elements, which may end inside it.
template <class T>
struct alignas(kVectorBytes) PeerVector {
  static constexpr int n = kVectorBytes / sizeof(T);
  T x[n];
};
template <class T>
PYCOMM_HD PeerVector<T> load_vector(const void* array, int64_t i, int64_t numel, bool aligned) {
  constexpr int n = PeerVector<T>::n;
  if (aligned && (i + 1) * n <= numel) return static_cast<const PeerVector<T>*>(array)[i];
  PeerVector<T> vector{};
  for (int k = 0; k < n && i * n + k < numel; ++k)
    vector.x[k] = static_cast<const T*>(array)[i * n + k];
  return vector;
}
template <class T>
PYCOMM_HD void store_vector(void* array, int64_t i, int64_t numel, bool aligned,
                            const PeerVector<T>& vector) {
  constexpr int n = PeerVector<T>::n;
  if (aligned && (i + 1) * n <= numel) {
    static_cast<PeerVector<T>*>(array)[i] = vector;
    return;
  }
  for (int k = 0; k < n && i * n + k < numel; ++k) static_cast<T*>(array)[i * n + k] = vector.x[k];
}

template <class T, class Machine>
PYCOMM_HD PeerVector<T> sum_staged(const PeerArguments& args, int64_t i, Machine& machine) {
  PeerVector<T> result;
  float sum[PeerVector<T>::n];
  for (int rank = 0; rank < args.n_ranks; ++rank) {
    const PeerVector<T> staged = machine.template load<T>(args.area(rank, 0), i);
    for (int k = 0; k < PeerVector<T>::n; ++k) {
      const float value = machine.widen(staged.x[k]);
      sum[k] = rank == 0 ? value : combine(sum[k], value, args.op);
    }
  }
  for (int k = 0; k < PeerVector<T>::n; ++k) result.x[k] = machine.template narrow<T>(sum[k]);
  return result;
}

// What one block of one rank does. Machine: each(range, f) calls f(i) for every i of the range,
// over the block's threads; exchange(args, block, which) sets flags and waits for all ranks', with
// everything that was stored before visible after it; load<T>(area, i) reads a peer's vector.
// Gives 0, or the error, as exchange() does.
template <class T, class Machine>
PYCOMM_HD uint32_t peer_all_reduce_block(const PeerArguments& args, int block, bool two_shot,
                                         Machine& machine) {
  const int64_t n_vectors = ceil_div(args.numel, PeerVector<T>::n);
  const Range range = part_of({0, n_vectors}, args.n_blocks, block);
  const bool in_aligned = reinterpret_cast<uintptr_t>(args.input) % kVectorBytes == 0;
  const bool out_aligned = reinterpret_cast<uintptr_t>(args.output) % kVectorBytes == 0;
  auto* const staged = reinterpret_cast<PeerVector<T>*>(args.area(args.rank, 0));
  machine.each(
      range, [&](int64_t i) { staged[i] = load_vector<T>(args.input, i, args.numel, in_aligned); });
  if (const uint32_t error = machine.exchange(args, block, 0); error != 0) return error;
  if (!two_shot) {
    machine.each(range, [&](int64_t i) {
      store_vector<T>(args.output, i, args.numel, out_aligned, sum_staged<T>(args, i, machine));
    });
    return 0;
  }
  auto* const sums = reinterpret_cast<PeerVector<T>*>(args.area(args.rank, 1));
  machine.each(part_of(range, args.n_ranks, args.rank),
               [&](int64_t i) { sums[i] = sum_staged<T>(args, i, machine); });
  if (const uint32_t error = machine.exchange(args, block, 1); error != 0) return error;
  for (int rank = 0; rank < args.n_ranks; ++rank)
    machine.each(part_of(range, args.n_ranks, rank), [&](int64_t i) {
      store_vector<T>(args.output, i, args.numel, out_aligned,
                      machine.template load<T>(args.area(rank, 1), i));
    });
  return 0;
}

}  // namespace pycomm::cuda
