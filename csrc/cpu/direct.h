// Direct: native collectives of one host for what is too large for the board. Each rank publishes
// where its memory lies; the others read it there (peer_memory.h), so that a byte is copied once.
//
// Reductions are cut into a piece per rank. A rank reduces its piece in blocks that stay in its
// cache, in rank order (every rank ends with the same bits), and writes each block where it belongs
// at once: Rabenseifner's reduce-scatter and all-gather (ICCS 2004) fused, each byte read once and
// written once a rank. Everything else is copied by the rank that wants it. docs/performance.md has
// what was measured against this.
//
// No rank returns before everyone who reads or writes its memory is done with it. A rank that must
// return early (it failed, or closes) says so first (poisoned, closed), then waits out those who
// are in the middle of a block: see write() and retire(). A reader that was overtaken by such a
// return notices before it calls its part done.
#pragma once

#include <memory>
#include <vector>

#include "core/engine.h"
#include "cpu/board.h"
#include "cpu/peer_memory.h"
#include "cpu/segment.h"

namespace pycomm::cpu {

class Direct {
 public:
  Direct(const Segment& segment, Board& board, Endpoint& endpoint, const std::vector<int>& ranks,
         int rank);
  // Publishes where this rank's memory lies. REQUIRES: the previous native collective is done.
  void begin(const Launch& launch);
  // Moves some blocks; true once the result is in launch.output and nobody reads this rank's memory
  // any more. Throws Error(mismatch), and Error(peer_lost) where a rank's memory is gone.
  bool advance(const Launch& launch, bool* moved);
  std::vector<int> blocked_on() const;  // group ranks whose word is missing
  bool all_entered() const { return entered_; }
  uint64_t sent_nbytes() const { return sent_nbytes_; }  // what others get from this rank
  // Ends the other ranks' writing into this rank's memory, before it returns with the collective
  // unfinished. REQUIRES: the segment is poisoned, or this rank's entry closed. Returns the group
  // rank that stands still in the middle of a block for longer than `patience`, else -1.
  int retire(std::chrono::milliseconds patience) const;

 private:
  // Where a rank's contribution and its result lie, in its own address space.
  struct Offer {
    uint64_t input = 0;
    uint64_t output = 0;
  };
  // What this rank copies from another's input.
  struct Pull {
    int rank = 0;
    uint64_t offset = 0;
    uint64_t nbytes = 0;
    std::byte* to = nullptr;
    uint64_t moved = 0;
  };
  void plan(const Launch& launch);
  void resolve(const Launch& launch);
  void reduce_block(const Launch& launch);
  const std::byte* operand(int rank, uint64_t offset, uint64_t nbytes, std::byte* room) const;
  void pull_block(Pull& pull);
  void write(int rank, uint64_t address, const std::byte* from, uint64_t nbytes);
  bool done(int rank) const;
  void publish_done();
  void require_sound(int rank) const;
  // Runs `access` to the memory of `rank`; Error(peer_lost) naming it where that fails.
  template <class Access>
  void reach(int rank, Access access) const;
  std::byte* scratch(uint64_t nbytes);

  const Segment& segment_;
  Board& board_;
  Endpoint& endpoint_;
  const std::vector<int>& ranks_;  // group rank -> endpoint rank
  const int rank_;
  const int n_;
  std::vector<int> places_;  // group rank -> index on the host, as PeerMemory counts

  bool entered_ = false;
  bool done_ = false;  // with this rank's own part
  const std::byte* input_ = nullptr;
  std::vector<Offer> offers_;
  std::vector<Pull> pulls_;
  size_t next_pull_ = 0;         // those before it are done
  std::vector<bool> waits_for_;  // ranks that read or write this rank's memory
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
