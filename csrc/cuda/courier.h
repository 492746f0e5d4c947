// Courier: exchanges on a stream that the host makes, where NCCL cannot. A thread takes one job
// after another: it waits until the device has reached it, copies what goes out to pinned memory,
// has it exchanged by a group of host memory, and copies back what came. The job's stream waits for
// that (Device::wait_value), its caller does not.
//
// A job that fails ends the courier: `failed` is told, and streams that wait go on. Thread safety:
// all members. Jobs are done in the order of put(), so all ranks put those of a group in one order.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/status.h"
#include "cuda/device.h"

namespace pycomm::cuda {

class Courier {
 public:
  struct Piece {
    void* data = nullptr;
    uint64_t nbytes = 0;
  };
  struct Job {
    std::vector<Piece> in, out;  // of the device; on the host each list lies in one run
    bool one_buffer = false;     // and both in the same
    Piece lost;                  // comes back too, and does not go out
    // Runs on the courier's thread. Throws Error; must end by itself, at its deadline or when what
    // it waits for is revoked.
    std::function<void(std::byte* in, std::byte* out, std::byte* lost)> exchange;
  };

  // failed: called on the courier's thread, once, without its lock.
  Courier(std::shared_ptr<Device> device, std::function<void(const Status&)> failed);
  ~Courier();  // waits for the job under way, and for streams to go on

  // Errors: Error(closed) after the end; what the device says.
  void put(Job job, Device::Stream stream);
  // Jobs that are left are dropped, and their streams go on; returns when none is under way, or
  // after `patience`.
  void end(std::chrono::milliseconds patience);
  bool is_own_thread() const { return std::this_thread::get_id() == thread_.get_id(); }

 private:
  struct Numbered {
    Job job;
    uint32_t number;
    Device::Event begin;
  };
  void loop();
  void run(const Numbered& numbered);
  void wait_for_copies();
  Device::Event event();  // REQUIRES: mutex_ is held.
  void forget_waits();    // that are over. REQUIRES: mutex_ is held.
  std::byte* pinned(uint64_t nbytes);
  void release(uint32_t number);  // REQUIRES: mutex_ is held.

  const std::shared_ptr<Device> device_;
  const std::function<void(const Status&)> failed_;
  uint32_t* const done_;         // pinned: the number of the last job that is done
  const Device::Stream stream_;  // of copies
  const Device::Event copied_;
  std::byte* pinned_ = nullptr;
  uint64_t pinned_nbytes_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Numbered> jobs_;
  std::vector<Device::Event> free_events_;
  std::vector<Device::Event> waits_;  // pass when the jobs' streams no longer read *done_
  uint32_t n_put_ = 0;
  bool busy_ = false, ended_ = false, closing_ = false;
  std::thread thread_;
};

}  // namespace pycomm::cuda
