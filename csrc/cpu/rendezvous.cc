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
      uses_(ranks.size() * kTransfers),
      ways_(ranks.size(), Ways(1)) {}

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
    return Transit{peer, slot,  use, nbytes, static_cast<std::byte*>(const_cast<void*>(data)),
                   {},   false, 0,   0};
  }
  return std::nullopt;
}

bool Rendezvous::offers(int peer, const void* data, uint64_t nbytes) const {
  if (reach_.place(data).in_heap) return true;
  // What the ring holds goes on its way before it is asked for, and stays so.
  if (nbytes <= segment_.ring_bytes() || !reach_.reaches(peer)) return false;
  const uint64_t wanted = record(rank_, peer, 0).pulls.load(std::memory_order_relaxed);
  return wanted >> Ways::class_of(nbytes) & 1;
}

void Rendezvous::read_from_ring(int peer, uint64_t nbytes, uint64_t ns) {
  if (nbytes > segment_.ring_bytes() && reach_.reaches(peer)) learn(peer, nbytes, Way::shared, ns);
}

// Tells the sender, too, how the next message of this size is wanted.
void Rendezvous::learn(int peer, uint64_t nbytes, Way way, uint64_t ns) {
  Ways& ways = ways_[static_cast<size_t>(peer)];
  ways.record(0, nbytes, way, ns);
  auto& wanted = record(peer, rank_, 0).pulls;
  const uint64_t bit = uint64_t{1} << Ways::class_of(nbytes);
  const uint64_t was = wanted.load(std::memory_order_relaxed);  // this rank alone writes it
  const bool pulls = ways.choose(0, nbytes) == Way::pulled;
  wanted.store(pulls ? was | bit : was & ~bit, std::memory_order_relaxed);
}

void Rendezvous::unmake(const Transit& transit) {
  sent_nbytes_ -= transit.nbytes;
  // In the receiver's place, who has not heard of it.
  record(rank_, transit.peer, transit.slot).received.store(transit.use, std::memory_order_release);
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
  record.place = data == nullptr ? Place{} : reach_.place(data);
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
    reach_.write(transit.peer, transit.there.at(begin), transit.here + begin, nbytes, streams);
  else
    reach_.read(transit.peer, transit.there.at(begin), transit.here + begin, nbytes, streams);
  return true;
}

bool Rendezvous::advance_send(Transit& transit, bool* moved) {
  TransferRecord& record = this->record(rank_, transit.peer, transit.slot);
  if (!transit.moved) {
    if (record.state.load(std::memory_order_acquire) != word(transit.use, accepted)) return false;
    *moved = true;
    transit.there = record.place;
    // Else only the receiver reaches both.
    transit.moved = !transit.there.in_heap && !reach_.reaches(transit.peer);
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
    const bool measures = !transit.there.in_heap && transit.nbytes >= Ways::kLeast;
    const auto begin = measures ? Clock::now() : Clock::time_point();
    for (int i = 0; i < kBlocksAtOnce && !transit.moved; ++i) {
      transit.moved = !move_block(record, transit, false);
      transit.blocks += !transit.moved;
    }
    if (measures) transit.ns += static_cast<uint64_t>((Clock::now() - begin).count());
    if (!transit.moved) return false;
  }
  // Acquire: what the sender wrote has arrived.
  if (record.sent.load(std::memory_order_acquire) != transit.use) return false;
  reach_.require_sound(transit.peer);
  record.received.store(transit.use, std::memory_order_release);
  ring(transit.peer);
  // The two sides shared the work, as far as each came to it.
  if (!transit.there.in_heap && transit.nbytes >= Ways::kLeast && transit.blocks > 0)
    learn(transit.peer, transit.nbytes, Way::pulled, transit.ns);
  return *moved = true;
}

}  // namespace pycomm::cpu
