#include "cpu/reach.h"

#include <sched.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>

#include "core/engine.h"
#include "cpu/copy.h"
#include "cpu/waiter.h"

namespace pycomm::cpu {

Reach::Reach(const Segment& segment, Endpoint& endpoint, const std::vector<int>& ranks, int rank)
    : segment_(segment), endpoint_(endpoint), ranks_(ranks), rank_(rank) {
  for (const int i : ranks) {
    reaches_.push_back(endpoint.reaches_memory_of(i));
    reaches_all_ = reaches_all_ && reaches_.back();
  }
}

Place Reach::place(const void* data) const {
  return {reinterpret_cast<uint64_t>(data), endpoint_.peer_memory().in_heap(data) ? 1u : 0u};
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

namespace {
// All of it, in as many calls as it takes; false where that memory, or its process, is gone.
bool move_all(ssize_t (*move)(pid_t, const iovec*, unsigned long, const iovec*, unsigned long,
                              unsigned long),
              int pid, void* here, uint64_t there, size_t nbytes) {
  while (nbytes > 0) {
    const iovec mine{here, nbytes}, theirs{reinterpret_cast<void*>(there), nbytes};
    const ssize_t n = move(pid, &mine, 1, &theirs, 1, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    here = static_cast<std::byte*>(here) + n;
    there += static_cast<uint64_t>(n);
    nbytes -= static_cast<size_t>(n);
  }
  return true;
}
}  // namespace

void Reach::throw_gone(int rank) const {
  const int of_endpoint = ranks_[static_cast<size_t>(rank)];
  throw Error(Code::peer_lost,
              "rank " + std::to_string(rank) + " (" + endpoint_.whereabouts(of_endpoint) +
                  ") ended, or freed memory while a collective used it: " + std::strerror(errno));
}

void Reach::read(int rank, Place from, void* to, size_t nbytes, bool streams) const {
  if (from.in_heap) return copy(to, mapped(rank, from.address, nbytes), nbytes, streams);
  const int pid = endpoint_.member(ranks_[static_cast<size_t>(rank)]).pid;
  if (!move_all(::process_vm_readv, pid, to, from.address, nbytes)) throw_gone(rank);
}

// A store of the flag, a fence, a look at whether the owner still waits. In retire() the owner has
// said that it does not; a fence, a look at the flag. One of the two sees the other (Dekker).
void Reach::write(int rank, Place to, const void* from, size_t nbytes, bool streams) const {
  struct Flag {
    explicit Flag(std::atomic<uint32_t>& writing) : writing(writing) {
      writing.store(1, std::memory_order_relaxed);
      full_fence();
    }
    ~Flag() { writing.store(0, std::memory_order_release); }  // after the block; see retire()
    std::atomic<uint32_t>& writing;
  } flag(segment_.board(rank_).writing);
  require_sound(rank);
  if (to.in_heap) return copy(mapped(rank, to.address, nbytes), from, nbytes, streams);
  const int pid = endpoint_.member(ranks_[static_cast<size_t>(rank)]).pid;
  if (!move_all(::process_vm_writev, pid, const_cast<void*>(from), to.address, nbytes))
    throw_gone(rank);
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
