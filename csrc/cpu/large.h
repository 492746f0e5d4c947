// Large: native collectives of one host for what is too large for the board, and uneven ones. Ranks
// enter over the board, each saying where in its heap its memory lies; then all take one way: in
// place, where all memory that the collective needs is in heaps (direct.h), else over the stages
// (staged.h). Who gave ordinary memory knows at once that it will be the latter, and begins.
#pragma once

#include <memory>
#include <vector>

#include "cpu/board.h"
#include "cpu/direct.h"
#include "cpu/reach.h"
#include "cpu/segment.h"
#include "cpu/staged.h"

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
  bool offer(const Launch& launch);
  void enter(const Launch& launch);

  Board& board_;
  Reach& reach_;
  Direct direct_;
  Staged staged_;
  const int rank_;
  const int n_;

  bool offered_ = false;
  bool entered_ = false;
  bool in_place_ = false;
  bool begun_ = false;  // with what is moved over the stages
  const std::byte* input_ = nullptr;
  std::vector<Offer> offers_;
  uint64_t sent_nbytes_ = 0;
  std::unique_ptr<std::byte[]> scratch_;
  uint64_t scratch_nbytes_ = 0;
};

}  // namespace pycomm::cpu
