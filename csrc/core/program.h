// Program: what one rank does in a collective; made by pycomm/project.py, whose two arrays have
// this very layout. Chunk ids only: buffers, byte bounds, dtype and op bind at launch (Layout), so
// one program serves every size. Immutable once installed; shared by every launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/status.h"

namespace pycomm {

enum class StepKind : uint8_t { send, recv, recv_reduce, copy, call };
enum class Buffer : uint8_t { input, output, scratch };

// Flags of a step, only in programs that are planned for a wire (core/wire.h).
constexpr uint8_t kCoded = 1;  // what it sends or receives crosses hosts, in the launch's wire form
// A write: it makes a value that goes to other hosts, and puts what they will decode in its place
// before any step reads it. A send: of the coded bytes that this gave, the same to all.
constexpr uint8_t kSealed = 2;

struct Step {
  StepKind kind;
  Buffer source;  // what a send reads; what recv_reduce combines the incoming bytes with; what a
                  // copy reads
  Buffer destination;  // what a recv, recv_reduce or copy writes
  uint8_t flags;
  int32_t peer;
  int32_t chunk;
  int32_t scratch_slot;
  int32_t round;
  int32_t dep_begin;  // deps[dep_begin, dep_begin + dep_count): earlier steps on this chunk whose
                      // bytes this one stays behind
  int32_t dep_count;
  int32_t call;
};
static_assert(sizeof(Step) == 32, "pycomm/project.py writes 32-byte steps");

// What one peer and this rank exchange: indices into Program::steps, in the order both sides
// follow.
struct PeerSteps {
  int peer;
  std::vector<int32_t> sends;
  std::vector<int32_t> recvs;
};

// A whole collective over some of the ranks, on some of the chunks; pycomm/calls.py says what each
// promises. Of a device's engine. REQUIRES: chunks.size() is a multiple of ranks.size(), in
// all_to_all of its square, in all_reduce any.
struct SubCall {
  Collective collective;
  int partition;               // index into Program::partitions
  std::vector<int32_t> ranks;  // this rank's part, in order; this rank is in it
  std::vector<int32_t> chunks;
};
using Partition = std::vector<std::vector<int32_t>>;  // of the group's ranks

struct Program {
  Collective collective;
  std::string algorithm;
  int n_ranks = 1;
  int rank = 0;
  int root = 0;
  int n_chunks = 1;
  int n_scratch = 0;
  int n_rounds = 0;
  std::vector<Step> steps;
  std::vector<int32_t> deps;
  std::vector<SubCall> calls;         // by Step::call; then all steps are calls
  std::vector<Partition> partitions;  // the same on all ranks
  std::vector<PeerSteps> peers;       // derived by finish(), ascending peer
  std::vector<int32_t> copies;        // derived by finish()

  // Derives the per-peer lists and refuses what would read or write out of bounds.
  // Errors: Code::internal, since only project() makes programs.
  void finish();
};

// Where each chunk of one launch lies, in bytes. Chunks of a cut tensor differ by at most one
// element; `counts` cut it as told.
class Layout {
 public:
  // all_reduce, reduce, broadcast: n_chunks near-equal pieces of numel elements, input and output
  // indexed alike.
  static Layout cut(uint64_t numel, size_t element_bytes, int n_chunks);
  // The same in pieces of one size, a multiple of 16 bytes, but the last ones: shorter, or empty.
  static Layout cut_alike(uint64_t numel, size_t element_bytes, int n_chunks);
  // reduce_scatter, all_gather, gather, scatter: counts[i] elements belong to rank i.
  // `whole_input`: the input holds all pieces (reduce_scatter, scatter), else only this rank's;
  // `whole_output` likewise (all_gather, gather).
  static Layout pieces(const std::vector<uint64_t>& counts, size_t element_bytes, int rank,
                       bool whole_input, bool whole_output);
  // all_to_all: chunk i*n+j goes from i to j. Chunks in transit (i, j != rank) are taken to be as
  // large as transit_bytes.
  static Layout exchange(const std::vector<uint64_t>& send_counts,
                         const std::vector<uint64_t>& recv_counts, size_t element_bytes, int rank);

  uint64_t nbytes(int chunk) const {
    if (n_ == 0) return starts_[chunk + 1] - starts_[chunk];
    const int from = chunk / n_, to = chunk % n_;
    if (from == rank_) return starts_[to + 1] - starts_[to];
    if (to == rank_) return ends_[from + 1] - ends_[from];
    return transit_bytes_;
  }
  uint64_t input_offset(int chunk) const {
    return n_ ? starts_[chunk % n_] : whole_input_ ? starts_[chunk] : 0;
  }
  uint64_t output_offset(int chunk) const {
    return n_ ? ends_[chunk / n_] : whole_output_ ? starts_[chunk] : 0;
  }
  uint64_t max_nbytes() const { return max_nbytes_; }

 private:
  std::vector<uint64_t>
      starts_;                  // prefix sums of what is cut (all_to_all: of what this rank sends)
  std::vector<uint64_t> ends_;  // all_to_all: prefix sums of what this rank receives
  uint64_t max_nbytes_ = 0;
  uint64_t transit_bytes_ = 0;
  int n_ = 0;  // all_to_all: ranks
  int rank_ = 0;
  bool whole_input_ = true;
  bool whole_output_ = true;
};

}  // namespace pycomm
