// Fingerprint: what a rank says it called; one cache line. It travels ahead of the first bytes of
// every collective on every link, and stands on the host's board, so that two ranks that called
// different things find out at once, by name.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "core/dtype.h"
#include "core/wire.h"

namespace pycomm {

struct alignas(64) Fingerprint {
  static constexpr uint32_t kMagic = 0x70636d31;  // "pcm1"

  uint32_t magic = kMagic;
  int32_t rank = 0;  // who says so; the only field that may differ
  uint64_t sequence = 0;
  Collective collective = Collective::barrier;
  DType dtype = DType::bytes;
  ReduceOp op = ReduceOp::sum;
  uint8_t has_counts : 1 = 0;
  Wire wire : 7 = Wire::none;
  int32_t root = 0;
  uint64_t numel = 0;  // elements of the whole tensor; in all_to_all, of what goes over this link
  uint64_t counts_hash = 0;  // of uneven counts that all ranks must give alike
  uint64_t algorithm_hash = 0;
  char algorithm[16] = {};  // for people; cut to fit

  bool matches(const Fingerprint& other) const {
    return hash() == other.hash() && magic == other.magic;
  }
  // Of everything but `rank`; what the board compares, since it fits beside the sequence number.
  uint64_t hash() const;
  // "all_reduce #12 (sum, float32, 1024 elements)"
  std::string describe() const;
};
static_assert(sizeof(Fingerprint) == 64);
static_assert(std::is_trivially_copyable_v<Fingerprint>);

// FNV-1a; for equality of small descriptions, not for secrets.
uint64_t fnv1a(const void* data, size_t nbytes, uint64_t seed = 0xcbf29ce484222325ull);

// The message every rank of the group raises. `mine` and `theirs` differ.
std::string describe_mismatch(const Fingerprint& mine, const Fingerprint& theirs);

}  // namespace pycomm
