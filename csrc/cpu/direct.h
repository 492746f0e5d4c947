// Direct: large native collectives of one host on memory that the ranks map of each other
// (heap.h): a byte is copied once, or not at all.
//
// Reductions are cut into a piece per rank. A rank reduces its piece in blocks that stay in its
// cache, in rank order (every rank ends with the same bits), and writes each block where it belongs
// at once: Rabenseifner's reduce-scatter and all-gather (ICCS 2004) fused, each byte read once and
// written once a rank. Everything else is copied by the rank that wants it.
//
// A broadcast is a large copy per receiver: root and receiver share it where both map the other's
// memory, each taking the next block that nobody has taken, one writing and one reading.
//
// No rank returns before everyone who is at work in its memory is done with it; reach.h has the
// rest: who gives up, and who is overtaken by that.
#pragma once

#include <vector>

#include "core/engine.h"
#include "cpu/board.h"
#include "cpu/reach.h"
#include "cpu/segment.h"

namespace pycomm::cpu {

// Where a rank's contribution and its result lie.
struct Offer {
  Place input;
  Place output;
};

class Direct {
 public:
  Direct(const Segment& segment, Board& board, Reach& reach, Endpoint& endpoint,
         const std::vector<int>& ranks, int rank);
  // Whether others must work in memory of `rank` that is not in its heap.
  static bool lacks(const Launch& launch, int rank, const Offer& offer);

  // starts: all_to_all with uneven counts: where in each rank's input this rank's piece lies.
  // everywhere: all ranks reach each other's ordinary memory. REQUIRES: all ranks have entered, and
  // that or none lacks().
  void begin(const Launch& launch, const std::byte* input, const std::vector<Offer>& offers,
             const std::vector<uint64_t>& starts, bool everywhere);
  // Moves some blocks; true once the result is in launch.output and nobody works in this rank's
  // memory any more. Error(peer_lost) where a rank's memory is gone.
  bool advance(const Launch& launch, bool* moved);
  std::vector<int> blocked_on() const;  // group ranks still at work in this rank's memory

 private:
  // A copy between another rank's memory and this one's.
  struct Copy {
    int rank = 0;
    bool push = false;    // to the rank's output, else from its input
    bool shared = false;  // the other side takes blocks of it too
    uint64_t offset = 0;  // in that rank's input or output
    uint64_t nbytes = 0;
    std::byte* here = nullptr;
    uint64_t begin = 0;  // the next block, where it is not shared
  };
  const Offer& offer(int rank) const { return offers_[static_cast<size_t>(rank)]; }
  const std::byte* operand(int rank, uint64_t offset, uint64_t nbytes, int room) const;
  void reduce_block(const Launch& launch);
  bool copy_block(Copy& copy);  // false: none is left
  bool done(int rank) const;
  void publish_done();

  const Segment& segment_;
  Board& board_;
  Reach& reach_;
  Endpoint& endpoint_;
  const std::vector<int>& ranks_;  // group rank -> endpoint rank
  const int rank_;
  const int n_;

  bool done_ = false;  // with this rank's own part
  const std::byte* input_ = nullptr;
  std::vector<Offer> offers_;
  std::vector<Copy> copies_;
  size_t next_copy_ = 0;         // those before it are done
  std::vector<bool> waits_for_;  // ranks at work in this rank's memory
  bool reduces_ = false;
  bool streams_ = false;
  uint64_t piece_offset_ = 0;  // of what this rank reduces, in every rank's input
  uint64_t piece_nbytes_ = 0;
  uint64_t piece_moved_ = 0;
  std::byte* reduced_ = nullptr;  // where this rank itself wants its piece; nullptr: it does not
  std::vector<int> targets_;      // other ranks that want it, at piece_offset_ of their output
};

}  // namespace pycomm::cpu
