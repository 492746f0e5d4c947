// Board: native collectives of one host for small messages. Each rank puts its contribution beside
// a flag, waits for every flag, and takes what it needs: one cache line moves per rank for up to 48
// bytes. Every rank ends with the same bits: contributions are combined in rank order.
//
// Two slots per rank, used in turn, are enough: a rank writes slot k mod 2 for collective k+2 only
// after it finished k+1, for which every rank had published k+1, hence had finished reading k.
#pragma once

#include <vector>

#include "core/engine.h"
#include "cpu/endpoint.h"
#include "cpu/segment.h"

namespace pycomm::cpu {

class Board {
 public:
  Board(const Segment& segment, Endpoint& endpoint, const std::vector<int>& ranks, int rank);
  // Publishes this rank's contribution to launch. REQUIRES: at most kBoardBytes; the previous
  // native collective is done.
  void begin(const Launch& launch);
  // True once the result is in launch.output. `moved` is set when a rank was newly seen.
  // Throws Error(mismatch) where a rank published another call.
  bool advance(const Launch& launch, bool* moved);
  std::vector<int> blocked_on() const;  // group ranks not yet seen

  // Its steps, for a native collective that brings a payload of its own (direct.h): prepare(), fill
  // payload(rank, ..), publish(), then ask all_entered().
  void prepare();
  // large: kBoardBytes of room, else kInlineBytes beside the flag.
  std::byte* payload(int rank, bool large) const;
  void publish(const Launch& launch);
  bool all_entered(const Launch& launch, bool* moved);
  uint32_t sequence() const { return sequence_; }  // of the collective prepared last

 private:
  const std::byte* contribution(int rank, uint64_t nbytes) const {
    return payload(rank, nbytes > kInlineBytes);
  }
  bool entered(int rank) const;  // the collective prepared last
  void finish(const Launch& launch) const;

  const Segment& segment_;
  Endpoint& endpoint_;
  const std::vector<int>& ranks_;  // group rank -> endpoint rank
  const int rank_;
  const int n_;
  uint32_t sequence_ = 0;
  uint64_t hash_ = 0;  // of the fingerprint published last
  int seen_ = 0;       // ranks below it are in, this one counted
};

// The latest announcement of a rank of this host for collective `sequence`; false where it has not
// entered it (or left it).
bool read_announcement(const BoardEntry& entry, uint64_t sequence, Fingerprint* out);
void announce(BoardEntry& entry, const Fingerprint& fingerprint);

}  // namespace pycomm::cpu
