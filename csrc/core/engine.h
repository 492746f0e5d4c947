// Engine: runs collectives and point-to-point for one rank of one group. core/group.h plans; an
// engine moves. Thread safety: all members may be called from any thread; an engine numbers
// collectives as they are submitted and runs them in that order.
#pragma once

#include <time.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/fingerprint.h"
#include "core/program.h"
#include "core/status.h"
#include "core/wire.h"

namespace pycomm {

using Clock = std::chrono::steady_clock;

// Clock, up to coarse_lag() behind: enough for deadlines, and 5 ns where Clock::now() takes 30.
inline Clock::time_point coarse_now() {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
  return Clock::time_point(std::chrono::seconds(now.tv_sec) +
                           std::chrono::nanoseconds(now.tv_nsec));
}

inline Clock::duration coarse_lag() {
  static const Clock::duration lag = [] {
    timespec tick{};
    ::clock_getres(CLOCK_MONOTONIC_COARSE, &tick);
    return std::chrono::seconds(tick.tv_sec) + std::chrono::nanoseconds(tick.tv_nsec);
  }();
  return lag;
}

// What a thread that waits calls about every 100 ms; it may throw, which ends the wait. A
// collective that its caller leaves that way breaks its group, since its memory is the caller's
// again. Per thread, for as long as the scope lasts.
using Interrupt = void (*)();
inline constinit thread_local Interrupt interrupt = nullptr;
// Whether no other thread of the process is known that might call; asked by a thread that waits.
using Alone = bool (*)();
inline constinit thread_local Alone alone = nullptr;
class InterruptScope {
 public:
  InterruptScope(Interrupt check, Alone is_alone) : before_(interrupt), alone_before_(alone) {
    interrupt = check;
    alone = is_alone;
  }
  ~InterruptScope() {
    interrupt = before_;
    alone = alone_before_;
  }
  InterruptScope(const InterruptScope&) = delete;
  InterruptScope& operator=(const InterruptScope&) = delete;

 private:
  const Interrupt before_;
  const Alone alone_before_;
};
// Calls it now and then, for a loop that waits.
class InterruptCheck {
 public:
  void operator()(Clock::time_point now) {
    if (interrupt == nullptr || now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    interrupt();
  }

 private:
  Clock::time_point last_ = Clock::now();
};

// One collective, bound: what to run on which memory. The memory stays valid until the Work is
// done.
struct Launch {
  const Program* program = nullptr;  // nullptr: the engine's native path
  Layout layout;
  Fingerprint fingerprint;
  DType dtype = DType::bytes;  // what all sizes here count. In a reduction of fp8, and with a wire,
                               // it is fp32, while input and output hold fingerprint.dtype: the
                               // engine converts
  Wire wire = Wire::none;      // of the program's coded steps
  float* residual = nullptr;   // as long as the output: gets what this rank's coding lost. On a
                               // device also without a wire, where it becomes zero
  const void* must_be_finite = nullptr;  // the caller's output, where the operation is to fail with
                                         // Code::nonfinite if that holds NaN or infinity
  ReduceOp op = ReduceOp::sum;
  const void* input = nullptr;
  void* output = nullptr;
  uint64_t input_nbytes = 0;
  uint64_t output_nbytes = 0;
  std::vector<uint64_t> link_send_counts;  // all_to_all with uneven counts: elements to and from
                                           // each rank, announced per link
  std::vector<uint64_t> link_recv_counts;
  void* stream = nullptr;  // on a device: the caller's, in whose order input and output stand
  Clock::time_point deadline;
  std::function<void()> finish;  // run once when the output stands, before the operation counts as
                                 // done; does not throw. On a device: puts its work on the
                                 // operation's stream
};

// A send or a receive, as one of those that start together.
struct Message {
  bool is_send = false;
  void* data = nullptr;  // of a send: only read
  uint64_t nbytes = 0;
  int peer = 0;
  void* stream = nullptr;  // as Launch's
  Clock::time_point deadline;
  bool alone = false;  // on a device: its two ranks meet for it, and no other's order matters
};

// A started operation. wait() drives it; dropping the Work neither cancels nor blocks it.
class Work {
 public:
  virtual ~Work() = default;
  // Returns when done. Throws the operation's Error, or Error(timeout) where `timeout` passes first
  // (the operation goes on).
  virtual void wait(std::chrono::milliseconds timeout) = 0;
  // What comes next on this stream of the operation's device comes after the operation; the caller
  // does not wait. On CPU memory there are no streams: it waits.
  virtual void order_before(void* stream) {
    (void)stream;
    wait(std::chrono::hours(24 * 365));
  }
  virtual bool done() const = 0;
  virtual Status status() const = 0;         // ok() while not done
  virtual double duration_s() const = 0;     // from its first byte to its end; 0 before that
  virtual int source() const { return -1; }  // recv from any rank: who sent it
  // Called once, from whichever thread completes the operation, or at once when it is done already;
  // several are called in the order they came. REQUIRES: does not throw.
  virtual void on_done(std::function<void()> callback) = 0;
};

struct Stats {
  uint64_t ops = 0;
  uint64_t bytes_inside_hosts = 0;   // payload this rank sent to ranks of its host
  uint64_t bytes_between_hosts = 0;  // payload this rank sent to other hosts
  double busy_s = 0;                 // time in which an operation was under way
};

class Engine {
 public:
  virtual ~Engine() = default;
  // The largest tensor for which the native path is taken, in bytes; 0 where there is none. With
  // uneven counts only a limit of 0 or UINT64_MAX has meaning: ranks need not know one size.
  virtual uint64_t native_nbytes(Collective collective, bool even) const = 0;
  virtual bool on_device() const { return false; }  // memory that the host cannot touch, in streams
  virtual bool spans_hosts() const = 0;  // whether the group's ranks stand on several hosts
  virtual void run(Launch launch) = 0;   // blocks, driven by the caller
  virtual std::shared_ptr<Work> start(Launch launch, std::shared_ptr<void> keep_alive) = 0;
  virtual std::shared_ptr<Work> send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                                     Clock::time_point deadline,
                                     std::shared_ptr<void> keep_alive) = 0;
  // peer -1: from whoever comes first.
  virtual std::shared_ptr<Work> recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                                     Clock::time_point deadline,
                                     std::shared_ptr<void> keep_alive) = 0;
  // All as one operation that fails or succeeds as a whole; on a device, one launch in which none
  // waits for another. Of engines that have streams.
  virtual std::shared_ptr<Work> start_together(std::vector<Launch> launches,
                                               std::vector<Message> messages,
                                               std::shared_ptr<void> keep_alive) {
    (void)launches, (void)messages, (void)keep_alive;
    throw Error(Code::internal, "this engine starts its operations one by one");
  }
  // send() and recv() that block, driven by the caller; run_recv() returns who sent it.
  virtual void run_send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                        Clock::time_point deadline) = 0;
  virtual int run_recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                       Clock::time_point deadline) = 0;
  virtual Stats stats() const = 0;
  virtual uint64_t sequence() const = 0;  // collectives submitted so far; the next one's number
  virtual Status broken() const = 0;      // why no operation can succeed any more; ok() before that
  virtual void revoke(
      const Status& why) = 0;  // every pending and later operation, on every rank, fails with `why`
  virtual void close() = 0;
};

}  // namespace pycomm
