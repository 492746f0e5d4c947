#include "cpu/rendezvous.h"

#include <algorithm>

#include "cpu/copy.h"
#include "cpu/probe.h"

namespace pycomm::cpu {
namespace {

constexpr uint64_t kLeastPulled = 64
                                  << 10;  // less is read from the ring before an answer could come
constexpr int kBlocksAtOnce = 4;          // before the engine's lock is let go
constexpr uint64_t kNone = uint64_t{1} << 40;

enum State : uint64_t { offered = 0, accepted = 1, withdrawn = 2 };
constexpr uint64_t word(uint64_t use, State state) { return use << 2 | state; }

// A bit of TransferRecord::unusual: the receiver wants messages like it from a heap over the ring,
// from ordinary memory pulled.
uint64_t bit(const Place& from, uint64_t nbytes) {
  return uint64_t{1} << (Ways::class_of(nbytes) + (from.in_heap ? 32 : 0));
}

}  // namespace

Rendezvous::Rendezvous(const Segment& segment, Reach& reach, Endpoint& endpoint,
                       const std::vector<int>& ranks, const std::vector<int>& places, int rank)
    : segment_(segment),
      reach_(reach),
      endpoint_(endpoint),
      ranks_(ranks),
      places_(places),
      rank_(rank),
      asked_(ranks.size()),
      uses_(ranks.size() * kTransfers),
      ways_(ranks.size(), Ways(2)) {}

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
    auto* here = static_cast<std::byte*>(const_cast<void*>(data));
    return Transit{peer, slot, use, nbytes, here, {}, false, {}};
  }
  return std::nullopt;
}

bool Rendezvous::writes_probe(uint64_t nbytes) {
  if (nbytes < kLeastPulled || !probes(++n_large_, nbytes)) return false;
  write_lines(segment_.board(places_[static_cast<size_t>(rank_)]), n_large_);
  return true;
}

void Rendezvous::read_probe(int peer) {
  const auto at = static_cast<size_t>(peer);
  const uint64_t ns = time_lines(segment_.board(places_[at]), endpoint_, {ranks_[at]});
  if (ns > 0) ways_[at].probed(ns);
}

bool Rendezvous::has_choice(int peer, const Place& from, uint64_t nbytes) const {
  if (nbytes < Ways::kLeast) return false;
  return from.in_heap || (nbytes >= kLeastPulled && reach_.reaches(peer));
}

bool Rendezvous::offers(int peer, const Place& from, uint64_t nbytes, int64_t tag,
                        uint64_t nth) const {
  if (!has_choice(peer, from, nbytes)) return false;
  // What the ring holds goes on its way before it is asked for, and from ordinary memory stays so.
  const TransferRecord& told = record(rank_, peer, 0);
  if (!from.in_heap && nbytes <= segment_.ring_bytes() && !Asked::asked(told.posted, tag, nth))
    return false;
  const uint64_t unusual = told.unusual.load(std::memory_order_relaxed);
  return ((unusual & bit(from, nbytes)) != 0) != from.in_heap;
}

void Rendezvous::came_over_ring(int peer, const Place& from, uint64_t nbytes,
                                Clock::time_point since) {
  learn(peer, from, nbytes, Way::shared, since);
}

// Tells the sender, too, how the next message of this size is wanted.
void Rendezvous::learn(int peer, const Place& from, uint64_t nbytes, Way way,
                       Clock::time_point since) {
  if (!has_choice(peer, from, nbytes)) return;
  const int kind = from.in_heap ? 1 : 0;
  const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - since);
  Ways& ways = ways_[static_cast<size_t>(peer)];
  ways.record(kind, nbytes, way, static_cast<uint64_t>(ns.count()));
  auto& unusual = record(peer, rank_, 0).unusual;
  const uint64_t was = unusual.load(std::memory_order_relaxed);  // this rank alone writes it
  const bool is = (ways.choose(kind, nbytes) == Way::pulled) != from.in_heap;
  unusual.store(is ? was | bit(from, nbytes) : was & ~bit(from, nbytes), std::memory_order_relaxed);
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
  const uint64_t block = shared_block(transit.nbytes);
  const uint64_t begin = record.taken.fetch_add(1, std::memory_order_relaxed) * block;
  if (begin >= transit.nbytes) return false;
  const uint64_t nbytes = std::min(transit.nbytes - begin, block);
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
    for (int i = 0; i < kBlocksAtOnce && !transit.moved; ++i)
      transit.moved = !move_block(record, transit, false);
    if (!transit.moved) return false;
  }
  // Acquire: what the sender wrote has arrived.
  if (record.sent.load(std::memory_order_acquire) != transit.use) return false;
  reach_.require_sound(transit.peer);
  record.received.store(transit.use, std::memory_order_release);
  ring(transit.peer);
  learn(transit.peer, transit.there, transit.nbytes, Way::pulled, transit.accepted);
  return *moved = true;
}

}  // namespace pycomm::cpu
