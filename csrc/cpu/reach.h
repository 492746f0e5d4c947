// Reach: a group's ranks of one host at work in each other's heaps (heap.h). Reading is harmless:
// what a reader got from a rank that gave up meanwhile is thrown away (require_sound). Writing is
// not: a rank that returns early, because it failed or closes the group, may use its memory for
// other things at once. So it says so first (it poisons the segment, or marks its entry closed),
// then waits in retire() for those who are in the middle of a block; and a writer looks before each
// block. Thread safety: none; the engine's lock guards it.
#pragma once

#include <chrono>
#include <vector>

#include "cpu/endpoint.h"
#include "cpu/segment.h"

namespace pycomm::cpu {

class Reach {
 public:
  // ranks: group rank -> endpoint rank, all on this host. Members take group ranks.
  Reach(const Segment& segment, Endpoint& endpoint, const std::vector<int>& ranks, int rank);

  // The address of this rank's memory as others are told it; 0 outside its heap.
  uint64_t in_heap(const void* data) const;
  // Where memory of the heap of `rank` lies here.
  std::byte* mapped(int rank, uint64_t address, size_t nbytes) const;
  // Copies to it. Error(peer_lost) naming the rank where it, or the group, has given up.
  void write(int rank, uint64_t address, const void* from, size_t nbytes, bool streams) const;
  // Whether what was read from `rank` before this call is good. Error(peer_lost) where it is not.
  void require_sound(int rank) const;
  // Ends the other ranks' writing into this rank's memory. REQUIRES: the segment is poisoned, or
  // this rank's entry closed. Returns the rank that stands still in the middle of a block for
  // longer than `patience`, else -1.
  int retire(std::chrono::milliseconds patience) const;

 private:
  const Segment& segment_;
  Endpoint& endpoint_;
  const std::vector<int>& ranks_;
  const int rank_;
};

}  // namespace pycomm::cpu
