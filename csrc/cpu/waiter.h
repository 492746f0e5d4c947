// Waiter: how a thread that can do nothing waits. Spin while a peer on another core may answer
// within microseconds, then yield the core, then sleep until rung. Where a peer waits for the same
// core spinning only keeps the answer from being computed: yield at once. Waking a sleeper on
// another core costs some 80 us, sched_yield 2 us, a spinning flag 0.2 us. So a waiter stays awake
// for about the price of a wake-up: it never waits much longer than the best choice would have, and
// a core that another program wants, maybe our own peer, is free again soon (Karlin et al.,
// "Competitive randomized algorithms for nonuniform problems", SODA 1990). The price is measured,
// from the bell to the end of the sleep (Endpoint::awake()): in a virtual machine it may be ten
// times as high, and two ranks that answer each other in less than it would fall asleep at each
// turn.
#pragma once

#include <sched.h>

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

class Waiter {
 public:
  enum class Next {
    again,
    look,
    sleep
  };  // try again; take the slow look at deadlines and peers first; go to sleep

  Waiter(int spins, std::chrono::microseconds awake) : spins_(spins), awake_(awake) {}

  void moved() { count_ = 0; }
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
    }
    if (now - looked_ >= std::chrono::milliseconds(1)) {
      looked_ = now;
      return Next::look;
    }
    if (now - since_ >= awake_) return Next::sleep;
    ::sched_yield();
    return Next::again;
  }

 private:
  const int spins_;
  const std::chrono::microseconds awake_;
  int count_ = 0;
  Clock::time_point since_{};
  Clock::time_point looked_{};
};

}  // namespace pycomm::cpu
