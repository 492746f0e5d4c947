// PeerMemory: how a rank reads and writes memory of other ranks of its host where it lies, so that
// a byte is copied once. A rank's heap is mapped and used in place; all other memory goes through
// process_vm_readv(2) and process_vm_writev(2), which the system may refuse (Yama, seccomp, another
// user or pid namespace): that is tried once at set-up. Thread safety: all members.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/heap.h"
#include "cpu/posix.h"

namespace pycomm::cpu {

// A rank's line in the page that the ranks of a host share.
struct alignas(64) PeerMemoryLine {
  std::atomic<uint64_t> heap_base{0};  // where the rank itself maps its heap; 0 before it does
  std::atomic<uint32_t> reads{0};      // 0 not tried yet, kReads, kRefused
};
constexpr uint32_t kReads = 1, kRefused = 2;

class PeerMemory {
 public:
  struct Peer {
    int pid = 0;         // 0: in a pid namespace that means nothing here
    uint64_t probe = 0;  // address of that process's probe()
    UniqueFd heap;       // its Heap::fd()
    PeerMemoryLine* line = nullptr;
  };
  // The word whose address each rank gives to the others.
  static const uint64_t& probe();

  // Tries every peer's probe and writes the verdict into this rank's line. By index on the host.
  void attach(int index, std::vector<Peer> peers);
  // Whether rank `index` of the host reads all others. REQUIRES: it has attached.
  bool reads(int index) const;
  // Why this rank does not; empty where it does.
  const std::string& problem() const { return problem_; }

  Heap& heap() { return heap_; }
  // Memory of this rank's heap, which the others can map.
  std::byte* allocate(size_t nbytes);

  bool in_heap(const void* data) const { return heap_.holds(data); }  // of this rank
  // Where [address, address + nbytes) of the heap of rank `index` lies here; nullptr elsewhere.
  std::byte* mapped(int index, uint64_t address, size_t nbytes);

 private:
  enum class Way { read, write };
  void copy(Way way, int index, void* here, uint64_t address, size_t nbytes) const;

  Heap heap_{memory_of_machine()};
  static size_t memory_of_machine();
  int index_ = 0;
  std::vector<Peer> peers_;
  std::string problem_;
  std::mutex mutex_;
  std::vector<Mapping> mappings_;               // of the peers' heaps, made when first met
  std::vector<std::atomic<std::byte*>> bases_;  // likewise; what readers look at
};

}  // namespace pycomm::cpu
