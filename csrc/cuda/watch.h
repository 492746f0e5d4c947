// Watch: the operations of one engine that are on their way on the device, and the thread that
// looks after them: it completes those whose end has passed, asks NCCL for errors, and reports the
// first that is past its deadline. It never blocks on the device or on NCCL. Thread safety: all.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/engine.h"
#include "cuda/device.h"

namespace pycomm::cuda {

// One operation. What stands above the line is set before it is watched and not changed after.
struct Operation {
  std::string what;  // "all_reduce #12 (sum, float32, 1024 elements)"
  uint64_t sequence = 0;
  int peer = -1;  // of a message
  Clock::time_point deadline;
  Device::Event begin = nullptr, end = nullptr;
  std::vector<Device::Event> inner;  // between its parts
  bool on_own_stream = false;        // the caller's stream has not been made to wait for it yet
  Clock::time_point since;           // when it came to the watch
  std::function<Status()> verdict;   // asked at its end, where that may be a failure's
  // ----
  std::atomic<bool> done{false};
  Status status;                 // under the watch's lock until done
  double duration_s = 0;         // likewise
  std::shared_ptr<void> memory;  // likewise; kept until done, or until a caller's stream
                                 // was made to wait
  std::vector<std::function<void()>> callbacks;  // likewise
};

class Watch {
 public:
  struct Owner {
    std::function<Status()> look;                      // NCCL's own errors; ok() where none
    std::function<void(const Operation&)> slow;        // has been under way for a while; again and
                                                       // again, some times a second
    std::function<Status(const Operation&)> too_late;  // why, for the operation past its deadline
    std::function<void(const Status&)> broken;         // after an error: abort what is under way
  };
  Watch(std::shared_ptr<Device> device, Owner owner);
  ~Watch();

  Device::Event event();  // from the pool
  // REQUIRES: both events are recorded.
  void add(std::shared_ptr<Operation> operation);
  // Counts as done: nobody can ask for what a graph has captured, or for what was begun in part.
  // Its events live as long as the watch.
  void abandon(const std::shared_ptr<Operation>& operation);
  // Returns when it is done; throws its error, or Error(timeout) after `limit`.
  void wait(const std::shared_ptr<Operation>& operation, std::chrono::milliseconds limit);
  void on_done(const std::shared_ptr<Operation>& operation, std::function<void()> callback);
  void let_go(const std::shared_ptr<Operation>& operation);  // of its memory
  Status status(const Operation& operation) const;
  double duration_s(const Operation& operation) const;
  // All operations under way end with this error, and all that come.
  void fail(const Status& why);
  Status broken() const;
  Stats stats() const;
  bool is_own_thread() const { return std::this_thread::get_id() == thread_.get_id(); }
  // Ends the thread, after what is under way or `patience`: false where that was not enough.
  bool close(std::chrono::milliseconds patience);

 private:
  void loop();
  bool sweep(std::unique_lock<std::mutex>& lock);  // true where something was under way
  void finish(const std::shared_ptr<Operation>& operation, Status status);
  void run_callbacks(std::unique_lock<std::mutex>& lock);

  const std::shared_ptr<Device> device_;
  const Owner owner_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;  // something to watch, something done, or the end
  std::deque<std::shared_ptr<Operation>> under_way_;
  std::vector<std::function<void()>> callbacks_;
  std::vector<std::shared_ptr<void>> released_;  // memory whose last owner this may be: freed
                                                 // without the lock
  std::vector<Device::Event> free_events_;
  std::vector<std::shared_ptr<Operation>> dropped_;  // their events the device or a graph may hold
  Status broken_;
  Status ended_badly_;  // of an operation; the thread then breaks the group
  Stats stats_;
  Clock::time_point looked_{};
  bool closing_ = false;
  std::thread thread_;
};

}  // namespace pycomm::cuda
