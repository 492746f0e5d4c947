// Copies of memory that do not depend on how the two ends are aligned. memcpy's choice for more
// than some KiB, "rep movsb", is ten times slower than this on Zen 3 where they are aligned
// differently (docs/performance.md).
#pragma once

#include <cstddef>
#include <cstdint>

namespace pycomm::cpu {

// streams: with stores that go past the caches, where the machine has them. What is written is not
// read first: a third less traffic, where it would not have been in a cache anyway. Ordered before
// the caller's later stores. REQUIRES: no overlap.
void copy(void* to, const void* from, size_t nbytes, bool streams = false);

// Whether so much memory, of all ranks of a host together, is too large for the caches.
bool exceeds_cache(uint64_t nbytes);

}  // namespace pycomm::cpu
