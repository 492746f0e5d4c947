// Rendezvous: a large message from the heap of a rank of this host (heap.h) goes to the receiver's
// memory in one copy, which both sides work on where that is in a heap too: each takes the next
// block that nobody has taken. So does one from ordinary memory, where both reach the other's
// memory, that the ring does not hold or whose receive is posted already (asked.h). The receiver
// measures whether that or reading it from the ring is faster (ways.h) and tells the sender. The
// message lane carries only the offer; what follows goes over a few transfer records per ordered
// pair in the segment. Thread safety: none; the engine's lock guards it.
//
//   sender    offered ------------------> sees accepted, moves blocks, says sent   -> done
//   receiver           accepts: address, moves blocks, says received               -> done
//   sender    offered -> withdrawn (its deadline): the receiver drops the message
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/asked.h"
#include "cpu/reach.h"
#include "cpu/segment.h"
#include "cpu/ways.h"

namespace pycomm::cpu {

// A message under way, as one side holds it.
struct Transit {
  int peer = -1;
  uint32_t slot = 0;
  uint64_t use = 0;  // which use of the slot; 0: none
  uint64_t nbytes = 0;
  std::byte* here = nullptr;
  Place there;         // the other side's memory
  bool moved = false;  // this side finds no block left, and has said so
  Clock::time_point accepted{};
};

class Rendezvous {
 public:
  // ranks, places: by group rank; endpoint rank and index in the segment.
  Rendezvous(const Segment& segment, Reach& reach, Endpoint& endpoint,
             const std::vector<int>& ranks, const std::vector<int>& places, int rank);

  Place place(const void* data) const { return reach_.place(data); }
  // A receive from `peer`, or from there a send, begins; a receive ends that nothing came for.
  void count_receive(int peer, int64_t tag) {
    asked_of(peer).posted(record(peer, rank_, 0).posted, tag);
  }
  void uncount_receive(int peer, int64_t tag) {
    asked_of(peer).withdrawn(record(peer, rank_, 0).posted, tag);
  }
  uint64_t count_send(int peer, int64_t tag) { return asked_of(peer).count(tag); }
  // Whether that message to `peer` from there goes this way.
  bool offers(int peer, const Place& from, uint64_t nbytes, int64_t tag, uint64_t nth) const;
  // Now and then, before a large message: this rank writes lines that the receiver times (probe.h).
  bool writes_probe(uint64_t nbytes);
  void read_probe(int peer);
  // A message from `peer` came over the ring, first byte to last, since then.
  void came_over_ring(int peer, const Place& from, uint64_t nbytes, Clock::time_point since);
  // Takes a free record for a message to `peer`; nullopt while all are in use.
  std::optional<Transit> offer(int peer, const void* data, uint64_t nbytes);
  // Gives the record back where the offer did not go out.
  void unmake(const Transit& transit);
  // Takes a message back that no receive has accepted; false where one has.
  bool withdraw(const Transit& transit);
  // The receiver's side. data nullptr: the message is refused, which ends the send. False where it
  // was withdrawn.
  bool accept(const Transit& transit, void* data);
  // Moves some blocks; true once both sides are done. *moved is set when anything happened.
  // Throws Error(peer_lost).
  bool advance_send(Transit& transit, bool* moved);
  bool advance_recv(Transit& transit, bool* moved);

  uint64_t sent_nbytes() const { return sent_nbytes_; }

 private:
  TransferRecord& record(int from, int to, uint32_t slot) const;
  bool has_choice(int peer, const Place& from, uint64_t nbytes) const;
  void learn(int peer, const Place& from, uint64_t nbytes, Way way, Clock::time_point since);
  bool move_block(TransferRecord& record, const Transit& transit, bool is_send);
  void ring(int peer) { endpoint_.ring(ranks_[static_cast<size_t>(peer)]); }

  const Segment& segment_;
  Reach& reach_;
  Endpoint& endpoint_;
  const std::vector<int>& ranks_;
  const std::vector<int>& places_;
  const int rank_;
  Asked& asked_of(int peer) { return asked_[static_cast<size_t>(peer)]; }

  std::vector<Asked> asked_;    // by peer
  std::vector<uint64_t> uses_;  // of this rank's own records, by peer and slot
  std::vector<Ways> ways_;      // of messages by peer, from ordinary memory and from a heap
  uint64_t n_large_ = 0;        // messages sent that are worth a probe
  uint64_t sent_nbytes_ = 0;
};

}  // namespace pycomm::cpu
