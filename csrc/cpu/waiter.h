// Waiter: how a thread that can do nothing waits. Spin while a peer on another core may answer
// within microseconds, then yield the core, then sleep until rung. Where a peer waits for the same
// core spinning only keeps the answer from being computed: yield at once. Waking a sleeper on
// another core costs some 80 us, sched_yield 2 us, a spinning flag 0.2 us. So a waiter stays awake
// for about the price of a wake-up: it never waits much longer than the best choice would have, and
// a core that another program wants, maybe our own peer, is free again soon (Karlin et al.,
// "Competitive randomized algorithms for nonuniform problems", SODA 1990). The price is measured,
// from the bell to the end of the sleep (Endpoint::awake()): in a virtual machine it may be ten
// times as high, and two ranks that answer each other in less than it would fall asleep at each
// turn. Where the last waits were much longer than that, since the peer computes for milliseconds
// between its messages, being awake was in vain, and on a shared core it was the peer's time: then
// the next wait falls asleep almost at once, until one is short again (Patience).
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "core/engine.h"

namespace pycomm::cpu {

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A store-load barrier. ThreadSanitizer knows no fences; there a locked instruction does the same,
// and what is shared stays atomic.
inline void full_fence() {
#if defined(__SANITIZE_THREAD__)
  std::atomic<int> local{0};
  local.fetch_add(1, std::memory_order_seq_cst);
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

// What was read before it stays before it. ThreadSanitizer moves no reads.
inline void acquire_fence() {
#if !defined(__SANITIZE_THREAD__)
  std::atomic_thread_fence(std::memory_order_acquire);
#endif
}

// How long waits for the same peers took, for the next one to know. Thread safety: any thread; all
// relaxed, for a hint that got lost costs one wake-up.
class Patience {
 public:
  bool spent() const { return n_long_.load(std::memory_order_relaxed) >= 2; }
  void waited(bool much_longer_than_awake) {
    const int before = n_long_.load(std::memory_order_relaxed);
    const int now = much_longer_than_awake ? std::min(before + 1, 2) : 0;
    if (now != before) n_long_.store(now, std::memory_order_relaxed);
  }

 private:
  std::atomic<int> n_long_{0};  // of the last waits, in a row, up to two
};

class Waiter {
 public:
  static constexpr std::chrono::microseconds kBriefly{20};  // where being awake is in vain

  enum class Next {
    again,
    look,
    sleep
  };  // try again; take the slow look at deadlines and peers first; go to sleep

  // patience: outlives the waiter; null where each wait is for itself.
  Waiter(int spins, std::chrono::microseconds awake, Patience* patience = nullptr)
      : spins_(spins), awake_(awake), patience_(patience) {}

  // What was waited for came.
  void moved() {
    if (patience_ != nullptr && count_ > spins_)
      patience_->waited(slept_ && Clock::now() - since_ > 4 * awake_);
    count_ = 0;
    slept_ = false;
  }
  Next idle() {
    ++count_;
    if (count_ <= spins_) {
      cpu_relax();
      return Next::again;
    }
    const auto now = Clock::now();
    if (count_ == spins_ + 1) {
      since_ = now;
      looked_ = now;
      brief_ = patience_ != nullptr && patience_->spent();
    }
    if (now - looked_ >= std::chrono::milliseconds(1)) {
      looked_ = now;
      return Next::look;
    }
    if (now - since_ >= (brief_ ? std::min(kBriefly, awake_) : awake_)) {
      slept_ = true;
      return Next::sleep;
    }
    ::sched_yield();
    return Next::again;
  }

 private:
  const int spins_;
  const std::chrono::microseconds awake_;
  Patience* const patience_;
  int count_ = 0;
  bool brief_ = false;
  bool slept_ = false;
  Clock::time_point since_{};
  Clock::time_point looked_{};
};

}  // namespace pycomm::cpu
