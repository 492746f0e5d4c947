#include "cpu/peer_memory.h"

#include <sys/uio.h>

#include <cstdlib>
#include <cstring>

namespace pycomm::cpu {

const uint64_t& PeerMemory::probe() {
  static const uint64_t word = 0x70636d2d70726f62ull;
  return word;
}

size_t PeerMemory::memory_of_machine() {
  return static_cast<size_t>(::sysconf(_SC_PHYS_PAGES)) *
         static_cast<size_t>(::sysconf(_SC_PAGESIZE));
}

void PeerMemory::attach(int index, std::vector<Peer> peers) {
  index_ = index;
  peers_ = std::move(peers);
  mappings_.resize(peers_.size());
  bases_ = std::vector<std::atomic<std::byte*>>(peers_.size());
  const char* wanted = std::getenv("PYCOMM_PEER_MEMORY");
  if (wanted != nullptr && std::string(wanted) == "0") {
    problem_ = "PYCOMM_PEER_MEMORY=0";
  } else {
    for (size_t i = 0; i < peers_.size() && problem_.empty(); ++i) {
      uint64_t word = 0;
      if (peers_[i].pid == 0) {
        problem_ = "a rank of this host runs in another pid namespace";
        break;
      }
      try {
        copy(Way::read, static_cast<int>(i), &word, peers_[i].probe, sizeof(word));
        if (word != probe()) problem_ = "process_vm_readv returned other bytes than were written";
      } catch (const Error&) {
        problem_ = errno_text("process_vm_readv");
      }
    }
  }
  peers_[static_cast<size_t>(index)].line->reads.store(problem_.empty() ? kReads : kRefused,
                                                       std::memory_order_release);
}

bool PeerMemory::reads(int index) const {
  const uint32_t verdict =
      peers_[static_cast<size_t>(index)].line->reads.load(std::memory_order_acquire);
  PYCOMM_CHECK(verdict != 0, "a rank of the group has not attached to its host");
  return verdict == kReads;
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
  if (base == 0 || address < base || address - base + nbytes > heap_.capacity()) return nullptr;
  auto& here = bases_[static_cast<size_t>(index)];
  std::byte* data = here.load(std::memory_order_acquire);
  if (data == nullptr) {
    std::lock_guard lock(mutex_);
    Mapping& mapping = mappings_[static_cast<size_t>(index)];
    if (mapping.data() == nullptr) mapping = map_shared(peer.heap.get(), heap_.capacity());
    data = mapping.data();
    here.store(data, std::memory_order_release);
  }
  return data + (address - base);
}

void PeerMemory::copy(Way way, int index, void* here, uint64_t address, size_t nbytes) const {
  const int pid = peers_[static_cast<size_t>(index)].pid;
#if defined(__SANITIZE_THREAD__)
  // A system call hides from ThreadSanitizer what this path is to be checked for.
  if (pid == ::getpid()) {
    void* there = reinterpret_cast<void*>(address);
    way == Way::read ? std::memcpy(here, there, nbytes) : std::memcpy(there, here, nbytes);
    return;
  }
#endif
  auto* at = static_cast<std::byte*>(here);
  while (nbytes > 0) {
    const iovec local{at, nbytes}, remote{reinterpret_cast<void*>(address), nbytes};
    const ssize_t n = way == Way::read ? ::process_vm_readv(pid, &local, 1, &remote, 1, 0)
                                       : ::process_vm_writev(pid, &local, 1, &remote, 1, 0);
    if (n <= 0)
      throw_errno(Code::peer_lost,
                  std::string(way == Way::read ? "process_vm_readv of" : "process_vm_writev to") +
                      " memory of process " + std::to_string(pid));
    at += n;
    address += static_cast<uint64_t>(n);
    nbytes -= static_cast<size_t>(n);
  }
}

}  // namespace pycomm::cpu
