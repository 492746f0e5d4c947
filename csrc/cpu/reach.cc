#include "cpu/reach.h"

#include <sched.h>

#include "core/engine.h"
#include "cpu/copy.h"
#include "cpu/waiter.h"

namespace pycomm::cpu {

Reach::Reach(const Segment& segment, Endpoint& endpoint, const std::vector<int>& ranks, int rank)
    : segment_(segment), endpoint_(endpoint), ranks_(ranks), rank_(rank) {}

uint64_t Reach::in_heap(const void* data) const {
  return endpoint_.peer_memory().in_heap(data) ? reinterpret_cast<uint64_t>(data) : 0;
}

std::byte* Reach::mapped(int rank, uint64_t address, size_t nbytes) const {
  std::byte* data = endpoint_.peer_memory().mapped(
      endpoint_.place(ranks_[static_cast<size_t>(rank)]), address, nbytes);
  PYCOMM_CHECK(data != nullptr, "a rank named memory that is not in its heap");
  return data;
}

void Reach::require_sound(int rank) const {
  acquire_fence();  // after the caller's reads
  if (segment_.header().poisoned.load(std::memory_order_acquire) != 0 ||
      segment_.board(rank).closed.load(std::memory_order_acquire) != 0)
    throw Error(Code::peer_lost, "rank " + std::to_string(rank) + " (" +
                                     endpoint_.whereabouts(ranks_[static_cast<size_t>(rank)]) +
                                     ") left the group while its memory was in use");
}

// A store of the flag, a fence, a look at whether the owner still waits. In retire() the owner has
// said that it does not; a fence, a look at the flag. One of the two sees the other (Dekker).
void Reach::write(int rank, uint64_t address, const void* from, size_t nbytes, bool streams) const {
  struct Flag {
    explicit Flag(std::atomic<uint32_t>& writing) : writing(writing) {
      writing.store(1, std::memory_order_relaxed);
      full_fence();
    }
    ~Flag() { writing.store(0, std::memory_order_release); }  // after the block; see retire()
    std::atomic<uint32_t>& writing;
  } flag(segment_.board(rank_).writing);
  require_sound(rank);
  copy(mapped(rank, address, nbytes), from, nbytes, streams);
}

int Reach::retire(std::chrono::milliseconds patience) const {
  full_fence();
  const auto until = Clock::now() + patience;
  for (int i = 0; i < static_cast<int>(ranks_.size()); ++i) {
    if (i == rank_) continue;
    while (segment_.board(i).writing.load(std::memory_order_acquire) != 0 &&
           !endpoint_.ended(ranks_[static_cast<size_t>(i)])) {
      if (Clock::now() >= until) return i;
      ::sched_yield();
    }
  }
  return -1;
}

}  // namespace pycomm::cpu
