#include "cpu/peer_memory.h"

#include <algorithm>

namespace pycomm::cpu {

size_t PeerMemory::memory_of_machine() {
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  return std::min(static_cast<size_t>(::sysconf(_SC_PHYS_PAGES)), file_size_limit() / page) * page;
}

void PeerMemory::attach(int index, std::vector<Peer> peers) {
  index_ = index;
  peers_ = std::move(peers);
  mappings_.resize(peers_.size());
  bases_ = std::vector<std::atomic<std::byte*>>(peers_.size());
}

std::byte* PeerMemory::allocate(size_t nbytes) {
  std::byte* data = heap_.allocate(nbytes);
  peers_[static_cast<size_t>(index_)].line->heap_base.store(
      reinterpret_cast<uint64_t>(heap_.base()), std::memory_order_release);
  return data;
}

std::byte* PeerMemory::mapped(int index, uint64_t address, size_t nbytes) {
  Peer& peer = peers_[static_cast<size_t>(index)];
  // Written before the rank had an address in its heap to tell us, hence seen here.
  const uint64_t base = peer.line->heap_base.load(std::memory_order_acquire);
  if (base == 0 || address < base || address - base + nbytes > peer.heap_nbytes) return nullptr;
  auto& here = bases_[static_cast<size_t>(index)];
  std::byte* data = here.load(std::memory_order_acquire);
  if (data == nullptr) {
    std::lock_guard lock(mutex_);
    Mapping& mapping = mappings_[static_cast<size_t>(index)];
    if (mapping.data() == nullptr) mapping = map_shared(peer.heap.get(), peer.heap_nbytes);
    data = mapping.data();
    here.store(data, std::memory_order_release);
  }
  return data + (address - base);
}

}  // namespace pycomm::cpu
