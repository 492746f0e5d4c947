// Reach: a group's ranks of one host at work in each other's memory: in heaps (heap.h), which they
// map, and in ordinary memory through process_vm_readv(2), where that is allowed. Reading is
// harmless: what a reader got from a rank that gave up meanwhile is thrown away (require_sound).
// Writing is not: a rank that returns early, because it failed or closes the group, may use its
// memory for other things at once. So it says so first (it poisons the segment, or marks its entry
// closed), then waits in retire() for those who are in the middle of a block; and a writer looks
// before each block. Thread safety: none; the engine's lock guards it.
#pragma once

#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/endpoint.h"
#include "cpu/segment.h"

namespace pycomm::cpu {

// What two sides who share the work take of a copy at a time. Each block is a system call where the
// memory is ordinary: a quarter of the time with 64 KiB of 2 MiB (docs/performance.md).
constexpr uint64_t shared_block(uint64_t nbytes) {
  constexpr uint64_t kLeast = 64 << 10, kMost = 512 << 10;
  return std::clamp(nbytes / 8 / kLeast * kLeast, kLeast, kMost);
}

class Reach {
 public:
  // ranks: group rank -> endpoint rank, all on this host. Members take group ranks.
  Reach(const Segment& segment, Endpoint& endpoint, const std::vector<int>& ranks, int rank);

  // This rank's memory as others are told of it.
  Place place(const void* data) const;
  // Whether this rank gets at ordinary memory of `rank`, or of every other rank.
  bool reaches(int rank) const { return reaches_[static_cast<size_t>(rank)]; }
  bool reaches_all() const { return reaches_all_; }
  // Where memory of the heap of `rank` lies here.
  std::byte* mapped(int rank, uint64_t address, size_t nbytes) const;
  // Copies from it, and to it. Error(peer_lost) naming the rank where it is gone; where it, or the
  // group, has given up, write() alone says so.
  void read(int rank, Place from, void* to, size_t nbytes, bool streams) const;
  void write(int rank, Place to, const void* from, size_t nbytes, bool streams) const;
  // Whether what was read from `rank` before this call is good. Error(peer_lost) where it is not.
  void require_sound(int rank) const;
  // Ends the other ranks' writing into this rank's memory. REQUIRES: the segment is poisoned, or
  // this rank's entry closed. Returns the rank that stands still in the middle of a block for
  // longer than `patience`, else -1.
  int retire(std::chrono::milliseconds patience) const;

 private:
  [[noreturn]] void throw_gone(int rank) const;  // from errno

  const Segment& segment_;
  Endpoint& endpoint_;
  const std::vector<int>& ranks_;
  const int rank_;
  std::vector<bool> reaches_;
  bool reaches_all_ = true;
};

}  // namespace pycomm::cpu
