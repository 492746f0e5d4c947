// Board: native collectives of one host for small messages. Each rank puts its contribution beside
// a flag, waits for the flags it depends on, and takes what it needs: one cache line moves per rank
// for up to 48 bytes. Every rank ends with the same bits: contributions are combined in rank order.
//
// Who only gives (a broadcast's root, a gather's others) does not wait: it may be some collectives
// ahead. A rank's slots are used in turn; it writes one again for collective k once
//   - every rank has entered the collective after the one that the slot was used for, and so has
//     taken what it wanted there, and
//   - it has seen that every rank called the same in that one.
// So no mismatch is overlooked: a rank compares with those it waits for at once, with the others
// when it next waits for them, and no later than that. Where it then finds a slot in use again, its
// owner had compared.
#pragma once

#include <vector>

#include "core/engine.h"
#include "cpu/endpoint.h"
#include "cpu/segment.h"

namespace pycomm::cpu {

class Board {
 public:
  Board(const Segment& segment, Endpoint& endpoint, const std::vector<int>& ranks, int rank);
  // A native collective begins. REQUIRES: this rank's previous one is done.
  void prepare();
  // REQUIRES: at most kBoardBytes. Publishes this rank's contribution, where there is room; true
  // once the result is in launch.output. `moved` is set when a rank was newly seen. Throws
  // Error(mismatch) where a rank published another call.
  bool advance(const Launch& launch, bool* moved);
  std::vector<int> blocked_on() const;  // group ranks that have not entered what this one needs

  // Its steps, for a native collective that brings a payload of its own and waits for all
  // (large.h): prepare(), then has_room(), fill payload(rank, ..), publish(), then ask
  // all_entered().
  bool has_room(const Launch& launch, uint64_t payload_nbytes);
  std::byte* payload(int rank, uint64_t nbytes) const;  // room for nbytes
  void publish(const Launch& launch);
  bool all_entered(const Launch& launch, bool* moved);
  uint32_t sequence() const { return sequence_; }  // of the collective prepared last
  // Whether all ranks have entered what this rank has, and called the same.
  bool settled(uint64_t launch_sequence);

 private:
  enum class Waits { for_nobody, for_root, for_all };
  Waits waits(const Fingerprint& print) const;
  const std::byte* contribution(int rank, uint64_t nbytes) const { return payload(rank, nbytes); }
  bool entered(int rank, uint32_t sequence) const;
  bool all_entered(uint32_t sequence);
  bool all_agree(uint32_t sequence, uint64_t launch_sequence);
  bool agrees(int rank, uint32_t sequence, uint64_t launch_sequence) const;
  bool root_entered(const Launch& launch, bool* moved) const;
  bool calls_the_same(int rank, const Launch& launch) const;
  void refuse_difference(int rank, uint64_t launch_sequence) const;
  void finish(const Launch& launch) const;

  const Segment& segment_;
  Endpoint& endpoint_;
  const std::vector<int>& ranks_;  // group rank -> endpoint rank
  const int rank_;
  const int n_;
  uint32_t sequence_ = 0;
  bool published_ = true;         // this rank's part of it
  uint32_t awaited_ = 0;          // what others must have entered for this rank to go on;
  Waits waits_ = Waits::for_all;  // which others, once published
  int root_ = 0;
  uint32_t entered_ = 0;               // all ranks are known to have entered up to here,
  uint32_t agreed_ = 0;                // and to have called the same up to here
  uint64_t hashes_[kBoardSlots] = {};  // of the fingerprints published last
  int seen_ = 0;                       // ranks below it are in, this one counted
};

// The announcement of a rank of this host for collective `sequence`; false where it has not entered
// it (or is far ahead).
bool read_announcement(const BoardEntry& entry, uint64_t sequence, Fingerprint* out);
// False where that rank has entered neither `sequence` nor a later one.
bool may_have_entered(const BoardEntry& entry, uint64_t sequence);
void announce(BoardEntry& entry, const Fingerprint& fingerprint);

}  // namespace pycomm::cpu
