// Large: native collectives of one host for what is too large for the board, and uneven ones. Ranks
// enter over the board, each saying where its memory lies; then all take one way: in place
// (direct.h), where all memory that the collective needs is in heaps, or is better pulled from
// where it is (ways.h); else over the stages (staged.h). Who gave ordinary memory that is not
// pulled knows at once that it will be the latter, and begins. Now and then each rank writes some
// lines as it enters and times how long the next rank's take to read: the price of a line between
// cores, which tells which way is the faster (ways.h).
#pragma once

#include <memory>
#include <vector>

#include "cpu/board.h"
#include "cpu/direct.h"
#include "cpu/reach.h"
#include "cpu/segment.h"
#include "cpu/staged.h"
#include "cpu/ways.h"

namespace pycomm::cpu {

class Large {
 public:
  Large(const Segment& segment, Board& board, Reach& reach, Endpoint& endpoint,
        const std::vector<int>& ranks, int rank);
  // REQUIRES: the previous native collective is done.
  void begin(const Launch& launch);
  // Moves some blocks; true once the result is in launch.output and nobody reads this rank's memory
  // any more. Throws Error(mismatch), and Error(peer_lost) where a rank's memory is gone.
  bool advance(const Launch& launch, bool* moved);
  std::vector<int> blocked_on() const;  // group ranks whose word is missing
  bool all_entered() const { return entered_; }
  uint64_t sent_nbytes() const { return sent_nbytes_; }  // what others get from this rank

 private:
  const std::byte* input_apart(const Launch& launch);
  uint64_t bytes_for_others(const Launch& launch) const;
  void choose_way(const Launch& launch, uint64_t largest);
  bool offer(const Launch& launch);
  void enter(const Launch& launch);

  const Segment& segment_;
  Endpoint& endpoint_;
  Board& board_;
  Reach& reach_;
  Direct direct_;
  Staged staged_;
  const int rank_;
  const int n_;
  const int next_;                 // the rank whose lines this one reads
  const std::vector<int> beside_;  // its endpoint rank

  bool offered_ = false;
  bool entered_ = false;
  bool probes_ = false;
  bool in_place_ = false;
  bool begun_ = false;  // with what is moved over the stages
  const std::byte* input_ = nullptr;
  std::vector<Offer> offers_;
  uint64_t sent_nbytes_ = 0;
  // Of ordinary memory: how it goes, and what that took. Every rank keeps the same account.
  struct Measured {
    int kind = 0;
    uint64_t nbytes = 0;
    Way way = Way::shared;
    uint64_t ns = 0;        // this rank's; 0: nothing to learn from it
    uint32_t probe_ns = 0;  // likewise
  };
  Ways ways_{kCollectives};
  bool all_reach_ = false;  // each other's ordinary memory; known from the first collective on
  Way way_ = Way::shared;
  uint64_t nbytes_ = 0;  // of the largest piece
  Measured measured_;    // the collective before
  bool measures_ = false;
  Clock::time_point entered_at_;
  std::unique_ptr<std::byte[]> scratch_;
  uint64_t scratch_nbytes_ = 0;
};

}  // namespace pycomm::cpu
