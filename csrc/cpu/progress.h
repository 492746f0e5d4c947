// ProgressThread: moves asynchronous operations while their caller computes. One per rank; started
// by the first such operation, parked while there is none, so that an idle library costs nothing.
#pragma once

#include <poll.h>

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace pycomm::cpu {

class Endpoint;

// What the thread drives: an engine. No lock of the thread is held during these calls.
class Driven {
 public:
  virtual ~Driven() = default;
  virtual bool drive_background() = 0;  // one round of progress and its callbacks, without
                                        // blocking; true if anything moved
  virtual bool has_background() = 0;    // whether an operation is under way that nobody else drives
  virtual void check_background() = 0;  // the slow look: deadlines, lost peers, mismatches
  virtual void add_waits(std::vector<pollfd>& sockets) = 0;  // what to sleep on
};

class ProgressThread {
 public:
  explicit ProgressThread(Endpoint& endpoint);
  ~ProgressThread();
  // Drives `driven` until it has nothing in the background. Waking the thread costs the caller a
  // system call, and where ranks fill the cores a rank its core: `soon` leaves that to a thread
  // that has not been parked yet, and looks for what has come by itself: after 100 us, then less
  // often, down to every 400 us, since callers so far have driven it themselves; every 1.6 ms where
  // none came for a while.
  enum class When { now, soon };
  void add(std::shared_ptr<Driven> driven, When when = When::now);
  // Rounds that begin after it leave `driven` alone. It does not wait for one under way: that one
  // may be in a callback that needs a lock of the caller's (Python's), and keeps `driven` alive.
  void remove(Driven* driven);
  bool idle() const;  // it has nothing to drive, and will not begin by itself

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<std::shared_ptr<Driven>> active;
    uint64_t n_soon = 0;      // what came `soon`, ever
    bool in_earnest = false;  // something in `active` did not
    bool dozing = false;      // looks by itself
    bool stopping = false;
  };
  static void loop(std::shared_ptr<State> state, Endpoint* endpoint);

  Endpoint& endpoint_;
  std::shared_ptr<State>
      state_;  // the thread's own share: an engine's last owner may be a callback on the thread
  std::thread thread_;
};

}  // namespace pycomm::cpu
