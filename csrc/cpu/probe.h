// The price of a line between cores: a rank writes some lines of its board entry, the rank that it
// is about to exchange something with times how long they take to read. Relaxed, all of it: only
// the time matters.
#pragma once

#include "cpu/endpoint.h"
#include "cpu/segment.h"

namespace pycomm::cpu {

// In one exchange of eight, and in all that take so long that it costs nothing. Both sides decide.
inline bool probes(uint64_t nth, uint64_t nbytes) { return nth % 8 == 0 || nbytes >= 1 << 20; }

inline void write_lines(BoardEntry& mine, uint64_t value) {
  for (size_t i = 0; i < kProbeLines; ++i)
    mine.probe[i * kWordsPerLine].store(value, std::memory_order_relaxed);
}

// Nanoseconds that the lines of endpoint rank `beside` take; 0 where it waits on this core, whose
// own cache has them.
inline uint64_t time_lines(const BoardEntry& theirs, Endpoint& endpoint,
                           const std::vector<int>& beside) {
  if (endpoint.shares_core(beside)) return 0;
  const auto begin = Clock::now();
  uint64_t sum = 0;
  for (size_t i = 0; i < kProbeLines; ++i)
    sum += theirs.probe[i * kWordsPerLine].load(std::memory_order_relaxed);
  asm volatile("" : : "r"(sum));  // read before the clock is
  return static_cast<uint64_t>((Clock::now() - begin).count());
}

}  // namespace pycomm::cpu
