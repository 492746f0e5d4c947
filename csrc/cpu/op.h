// Op: one operation under way in an engine, a collective or a message. The engine's lock guards all
// but `state`.
#pragma once

#include <atomic>
#include <functional>
#include <memory>

#include "core/engine.h"

namespace pycomm::cpu {

struct Op {
  enum State : int { queued, running, finished };
  std::atomic<int> state{queued};
  Status status;  // set before `state` becomes finished
  Clock::time_point deadline;
  Clock::time_point submitted;
  Clock::time_point started;
  Clock::time_point ended;
  bool timed = true;        // by Clock, else by coarse_now(): right on average, not each time
  int source = -1;          // recv from any rank: who sent it
  bool sizeable = false;    // takes much longer than waking up
  bool background = false;  // started without a caller who waits: the progress thread drives it
  std::shared_ptr<void> keep_alive;
  std::function<void()> callback;
  bool done() const { return state.load(std::memory_order_acquire) == finished; }
};

// What runs a collective; in one group all ranks take the same.
enum class Path { board, large, program };

struct CollectiveOp : Op {
  CollectiveOp(Launch launch, Path path) : launch(std::move(launch)), path(path) {}
  Launch launch;
  const Path path;
};

struct MessageOp : Op {
  MessageOp(bool is_send, int peer, int64_t tag, std::byte* data, uint64_t nbytes,
            Clock::time_point due)
      : is_send(is_send), peer(peer), tag(tag), data(data), nbytes(nbytes) {
    deadline = due;
  }
  const bool is_send;
  const int peer;  // -1: from any rank
  const int64_t tag;
  std::byte* const data;
  const uint64_t nbytes;
  uint64_t moved = 0;
  uint64_t nth = 0;  // send to its peer with its tag (asked.h)
};

}  // namespace pycomm::cpu
