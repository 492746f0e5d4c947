#include "cpu/rendezvous.h"

#include <algorithm>

#include "cpu/copy.h"

namespace pycomm::cpu {
namespace {

constexpr uint64_t kBlock = 64 * 1024;
constexpr int kBlocksAtOnce = 16;  // before the engine's lock is let go
constexpr uint64_t kNone = uint64_t{1} << 40;

enum State : uint64_t { offered = 0, accepted = 1, withdrawn = 2 };
constexpr uint64_t word(uint64_t use, State state) { return use << 2 | state; }

}  // namespace

Rendezvous::Rendezvous(const Segment& segment, Reach& reach, Endpoint& endpoint,
                       const std::vector<int>& ranks, const std::vector<int>& places, int rank)
    : segment_(segment),
      reach_(reach),
      endpoint_(endpoint),
      ranks_(ranks),
      places_(places),
      rank_(rank),
      uses_(ranks.size() * kTransfers) {}

TransferRecord& Rendezvous::record(int from, int to, uint32_t slot) const {
  return segment_.transfer(places_[static_cast<size_t>(from)], places_[static_cast<size_t>(to)],
                           slot);
}

std::optional<Transit> Rendezvous::offer(int peer, const void* data, uint64_t nbytes) {
  for (uint32_t slot = 0; slot < kTransfers; ++slot) {
    uint64_t& use = uses_[static_cast<size_t>(peer) * kTransfers + slot];
    TransferRecord& record = this->record(rank_, peer, slot);
    if (record.received.load(std::memory_order_acquire) != use) continue;  // of the last use
    ++use;
    // Relaxed: the offer that names this use goes over the channel, which publishes it.
    record.taken.store(0, std::memory_order_relaxed);
    record.state.store(word(use, offered), std::memory_order_relaxed);
    sent_nbytes_ += nbytes;
    return Transit{peer, slot, use, nbytes, static_cast<std::byte*>(const_cast<void*>(data)),
                   0,    false};
  }
  return std::nullopt;
}

bool Rendezvous::withdraw(const Transit& transit) {
  TransferRecord& record = this->record(rank_, transit.peer, transit.slot);
  uint64_t was = word(transit.use, offered);
  return record.state.compare_exchange_strong(was, word(transit.use, withdrawn),
                                              std::memory_order_acq_rel);
}

bool Rendezvous::accept(const Transit& transit, void* data) {
  TransferRecord& record = this->record(transit.peer, rank_, transit.slot);
  if (data == nullptr) record.taken.store(kNone, std::memory_order_relaxed);
  record.address = reach_.in_heap(data);
  uint64_t was = word(transit.use, offered);
  const bool mine =  // publishes the address
      record.state.compare_exchange_strong(was, word(transit.use, accepted),
                                           std::memory_order_acq_rel);
  if (!mine || data == nullptr) record.received.store(transit.use, std::memory_order_release);
  ring(transit.peer);
  return mine;
}

bool Rendezvous::move_block(TransferRecord& record, const Transit& transit, bool is_send) {
  // Relaxed: who takes a block needs nothing of who took the one before.
  const uint64_t begin = record.taken.fetch_add(1, std::memory_order_relaxed) * kBlock;
  if (begin >= transit.nbytes) return false;
  const uint64_t nbytes = std::min(transit.nbytes - begin, kBlock);
  // Most likely the host's others send as much.
  const bool streams = exceeds_cache(2 * ranks_.size() * transit.nbytes);
  if (is_send)
    reach_.write(transit.peer, transit.there + begin, transit.here + begin, nbytes, streams);
  else
    copy(transit.here + begin, reach_.mapped(transit.peer, transit.there + begin, nbytes), nbytes,
         streams);
  return true;
}

bool Rendezvous::advance_send(Transit& transit, bool* moved) {
  TransferRecord& record = this->record(rank_, transit.peer, transit.slot);
  if (!transit.moved) {
    if (record.state.load(std::memory_order_acquire) != word(transit.use, accepted)) return false;
    *moved = true;
    transit.there = record.address;
    transit.moved = transit.there == 0;  // only the receiver reaches both
    for (int i = 0; i < kBlocksAtOnce && !transit.moved; ++i)
      transit.moved = !move_block(record, transit, true);
    if (!transit.moved) return false;
    record.sent.store(transit.use, std::memory_order_release);  // after this side's blocks
    ring(transit.peer);
  }
  // Acquire: the receiver is done reading.
  if (record.received.load(std::memory_order_acquire) != transit.use) return false;
  return *moved = true;
}

bool Rendezvous::advance_recv(Transit& transit, bool* moved) {
  TransferRecord& record = this->record(transit.peer, rank_, transit.slot);
  if (!transit.moved) {
    *moved = true;
    for (int i = 0; i < kBlocksAtOnce && !transit.moved; ++i)
      transit.moved = !move_block(record, transit, false);
    if (!transit.moved) return false;
  }
  // Acquire: what the sender wrote has arrived.
  if (record.sent.load(std::memory_order_acquire) != transit.use) return false;
  reach_.require_sound(transit.peer);
  record.received.store(transit.use, std::memory_order_release);
  ring(transit.peer);
  return *moved = true;
}

}  // namespace pycomm::cpu
