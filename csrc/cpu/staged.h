// Staged: native collectives of one host on ordinary memory. Each rank has a stage in the segment,
// a ring of slots that the others read. A tensor passes through it block by block, in up to three
// steps that follow each other through the blocks, so that all of them are in flight at once:
//   give    copy what others need of my input into my slot
//   reduce  combine my piece of the block, from the others' slots and my input, in rank order
//   (every
//           rank ends with the same bits); leave the result in my slot
//   take    copy what is mine out of the others' slots
// An all_reduce is Rabenseifner's reduce-scatter and all-gather (ICCS 2004), fused by the block.
//
// Between cores that share a cache two copies by user code beat the one of process_vm_readv, which
// pays for each page; between others they do not, which ways.h finds out. A stage larger than a
// core's own cache beats a small one, whose lines go back and forth between two such caches
// (docs/performance.md has the figures).
//
// Each rank counts the blocks of its steps, over all collectives: given, reduced, taken. A step
// waits for counts of others, a slot is written again when all have taken what was in it. A rank
// that has no part in a step counts it at the start.
#pragma once

#include <vector>

#include "core/engine.h"
#include "cpu/endpoint.h"
#include "cpu/segment.h"

namespace pycomm::cpu {

class Staged {
 public:
  Staged(const Segment& segment, Endpoint& endpoint, const std::vector<int>& ranks, int rank);
  // input: launch.input, or a copy of it. largest: bytes of the largest piece of any rank, which
  // all ranks must know alike. REQUIRES: the previous collective is done.
  void begin(const Launch& launch, const std::byte* input, uint64_t largest);
  // Moves some blocks; true once the result is in launch.output. Gives alone while not all ranks
  // have entered: what others write is not read before it is known what they called.
  bool advance(const Launch& launch, bool all_entered, bool* moved);
  std::vector<int> blocked_on() const;  // group ranks whose blocks are missing

 private:
  struct Part {
    uint64_t offset;
    uint64_t nbytes;
  };
  Part part(const Launch& launch, int piece, uint64_t block, bool of_input) const;
  std::byte* slot(int rank, uint64_t block, int piece) const;
  bool reached(std::atomic<uint64_t> BoardEntry::* count, std::vector<uint64_t>& seen, int rank,
               uint64_t value) const;
  bool may_give();
  bool may_reduce();
  bool may_take();
  void give(const Launch& launch);
  void reduce(const Launch& launch);
  void take(const Launch& launch);
  bool move(const Launch& launch, bool all_entered, bool* moved);
  void publish(std::atomic<uint64_t> BoardEntry::* count, uint64_t blocks);

  const Segment& segment_;
  Endpoint& endpoint_;
  const std::vector<int>& ranks_;  // group rank -> endpoint rank
  const int rank_;
  const int n_;
  const uint64_t n_slots_;

  uint64_t base_ = 0;  // blocks of all collectives before this one
  uint64_t n_blocks_ = 0;
  uint64_t width_ = 0;   // of a piece's part of a block
  bool sliced_ = false;  // blocks cut the tensor, pieces cut blocks; else the other way round
  const std::byte* input_ = nullptr;
  std::vector<int> sources_;  // ranks whose slots this one takes from
  bool gives_ = false, reduces_ = false, takes_ = false;
  bool shares_ = false;       // the reduced piece is for others too
  bool one_for_all_ = false;  // what is given is the same for all
  bool streams_ = false;
  bool unrung_ = false;  // counts were published since sleepers were last rung
  uint64_t given_ = 0, reduced_ = 0, taken_ = 0;                  // blocks done
  std::vector<uint64_t> seen_given_, seen_reduced_, seen_taken_;  // the others' counts
};

}  // namespace pycomm::cpu
