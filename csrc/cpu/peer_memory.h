// PeerMemory: the heaps of a host's ranks (heap.h), as one rank maps them, so that collectives read
// and write what lies there in place. Thread safety: all members.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu/heap.h"
#include "cpu/posix.h"

namespace pycomm::cpu {

// A rank's line in the page that the ranks of a host share.
struct alignas(64) PeerMemoryLine {
  std::atomic<uint64_t> heap_base{0};  // where the rank itself maps its heap; 0 before it does
};

class PeerMemory {
 public:
  struct Peer {
    UniqueFd heap;  // its Heap::fd()
    size_t heap_nbytes = 0;
    PeerMemoryLine* line = nullptr;
  };
  // By index on the host.
  void attach(int index, std::vector<Peer> peers);

  Heap& heap() { return heap_; }
  // Memory of this rank's heap, which the others can map.
  std::byte* allocate(size_t nbytes);

  bool in_heap(const void* data) const { return heap_.holds(data); }  // of this rank
  // Where [address, address + nbytes) of the heap of rank `index` lies here; nullptr elsewhere.
  std::byte* mapped(int index, uint64_t address, size_t nbytes);

 private:
  Heap heap_{memory_of_machine()};
  static size_t memory_of_machine();
  int index_ = 0;
  std::vector<Peer> peers_;
  std::mutex mutex_;
  std::vector<Mapping> mappings_;               // of the peers' heaps, made when first met
  std::vector<std::atomic<std::byte*>> bases_;  // likewise; what readers look at
};

}  // namespace pycomm::cpu
