// Direct: native collectives of one host for what is too large for the board. Each rank publishes
// where its memory lies; the others read it there (peer_memory.h), so that a byte is copied once.
//
// Reductions are cut into a piece per rank. A rank reduces its piece in blocks that stay in its
// cache, in rank order (every rank ends with the same bits), and writes each block where it belongs
// at once: Rabenseifner's reduce-scatter and all-gather (ICCS 2004) fused, each byte read once and
// written once a rank. Everything else is copied by the rank that wants it. docs/performance.md has
// what was measured against this.
//
// A broadcast is a large copy per receiver: root and receiver share it, each taking the next block
// that nobody has taken, one writing and one reading.
//
// No rank returns before everyone who is at work in its memory is done with it; reach.h has the
// rest: who gives up, and who is overtaken by that.
#pragma once

#include <memory>
#include <vector>

#include "core/engine.h"
#include "cpu/board.h"
#include "cpu/reach.h"
#include "cpu/segment.h"

namespace pycomm::cpu {

class Direct {
 public:
  Direct(const Segment& segment, Board& board, Reach& reach, Endpoint& endpoint,
         const std::vector<int>& ranks, int rank);
  // Publishes where this rank's memory lies. REQUIRES: the previous native collective is done.
  void begin(const Launch& launch);
  // Moves some blocks; true once the result is in launch.output and nobody reads this rank's memory
  // any more. Throws Error(mismatch), and Error(peer_lost) where a rank's memory is gone.
  bool advance(const Launch& launch, bool* moved);
  std::vector<int> blocked_on() const;  // group ranks whose word is missing
  bool all_entered() const { return entered_; }
  uint64_t sent_nbytes() const { return sent_nbytes_; }  // what others get from this rank

 private:
  // Where a rank's contribution and its result lie, in its own address space.
  struct Offer {
    uint64_t input = 0;
    uint64_t output = 0;
  };
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
  void plan(const Launch& launch);
  void resolve(const Launch& launch);
  void reduce_block(const Launch& launch);
  const std::byte* operand(int rank, uint64_t offset, uint64_t nbytes, std::byte* room) const;
  bool copy_block(Copy& copy);  // false: none is left
  bool done(int rank) const;
  void publish_done();
  std::byte* scratch(uint64_t nbytes);

  const Segment& segment_;
  Board& board_;
  Reach& reach_;
  Endpoint& endpoint_;
  const std::vector<int>& ranks_;  // group rank -> endpoint rank
  const int rank_;
  const int n_;

  bool entered_ = false;
  bool done_ = false;  // with this rank's own part
  const std::byte* input_ = nullptr;
  std::vector<Offer> offers_;
  std::vector<Copy> copies_;
  size_t next_copy_ = 0;         // those before it are done
  std::vector<bool> waits_for_;  // ranks at work in this rank's memory
  bool reduces_ = false;
  uint64_t piece_offset_ = 0;  // of what this rank reduces, in every rank's input
  uint64_t piece_nbytes_ = 0;
  uint64_t piece_moved_ = 0;
  std::byte* reduced_ = nullptr;  // where this rank itself wants its piece; nullptr: it does not
  std::vector<int> targets_;      // other ranks that want it, at piece_offset_ of their output
  uint64_t sent_nbytes_ = 0;
  std::unique_ptr<std::byte[]> scratch_;
  uint64_t scratch_nbytes_ = 0;
};

}  // namespace pycomm::cpu
