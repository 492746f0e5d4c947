// What runs a block of the peer kernel (cuda/peer_protocol.h) on the host: one thread, whose flags
// are atomics of memory that ranks share.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <type_traits>

#include "cuda/peer_protocol.h"
#include "fake_nccl/arithmetic.h"

namespace fake {

struct Half {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};

struct PeerMachine {
  int jitter = 0;  // microseconds
  template <class Function>
  void each(pycomm::cuda::Range range, Function&& function) {
    for (int64_t i = range.begin; i < range.end; ++i) function(i);
  }
  template <class T>
  pycomm::cuda::PeerVector<T> load(const char* area, int64_t i) const {
    return reinterpret_cast<const pycomm::cuda::PeerVector<T>*>(area)[i];
  }
  float widen(float x) const { return x; }
  float widen(Half x) const { return static_cast<float>(fake::widen(x.bits, 5)); }
  float widen(Bf16 x) const { return static_cast<float>(fake::widen(x.bits, 8)); }
  template <class T>
  T narrow(float x) const {
    if constexpr (std::is_same_v<T, float>)
      return x;
    else
      return {fake::narrow(x, std::is_same_v<T, Half> ? 5 : 8)};
  }
  uint32_t exchange(const pycomm::cuda::PeerArguments& args, int block, int which) {
    using namespace pycomm::cuda;
    const auto deadline =
        std::chrono::steady_clock::now() + std::chrono::nanoseconds(args.timeout_ns);
    if (jitter > 0) std::this_thread::sleep_for(std::chrono::microseconds(jitter));
    for (int peer = 0; peer < args.n_ranks; ++peer)
      std::atomic_ref(args.control(peer)->flags[which][block][args.rank])
          .store(peer_flag(args.tag, args.epoch), std::memory_order_release);
    PeerControl* const mine = args.control(args.rank);
    for (int peer = 0; peer < args.n_ranks; ++peer)
      for (;;) {
        const PeerState state = peer_state(
            std::atomic_ref(mine->flags[which][block][peer]).load(std::memory_order_acquire), args);
        if (state == PeerState::present) break;
        if (const uint32_t error = std::atomic_ref(mine->error).load(); error != 0) return error;
        const bool late = std::chrono::steady_clock::now() > deadline;
        if (state == PeerState::absent && !late) {
          std::this_thread::yield();
          continue;
        }
        const uint32_t error = state == PeerState::mistaken ? kPeerMismatch : kPeerTimedOut;
        for (int rank = 0; rank < args.n_ranks; ++rank)
          std::atomic_ref(args.control(rank)->error).store(error);
        return error;
      }
    return 0;
  }
};

}  // namespace fake
