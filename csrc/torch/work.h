// BackendWork: one c10d operation, made of one or several of the engine's. It is also what the
// profiler sees: an event from here to the end of the last of them, under Gloo's names for it.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "core/engine.h"
#include "torch/device_side.h"

namespace pycomm::torch_layer {

// FutureThreads: completes futures, and so runs what users hung on them. That may wait for another
// future (PowerSGD's hook does), so it must not run on a thread that moves bytes, and one that
// waits must not hold up the next: there are as many threads as have something to do. Thread
// safety: all.
class FutureThreads : public std::enable_shared_from_this<FutureThreads> {
 public:
  void run(std::function<void()> task);
  // Returns once nothing runs, at the latest after `limit`.
  void settle(std::chrono::milliseconds limit);

 private:
  static void loop(const std::shared_ptr<FutureThreads>& self);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  size_t n_idle_ = 0, n_busy_ = 0;
};

class BackendWork final : public c10d::Work {
 public:
  using Tensors = std::vector<at::Tensor>;
  using Works = std::vector<std::shared_ptr<pycomm::Work>>;

  // The event begins here. title: its name, or nullptr for none; inputs: whose shapes it shows.
  BackendWork(int rank, c10d::OpType type, const char* title, const Tensors& inputs,
              std::shared_ptr<FutureThreads> future_threads)
      : c10d::Work(rank, type, title, inputs), future_threads_(std::move(future_threads)) {}
  // What it is made of, once that has started, and what it gives. Called once.
  void set(Works works, Tensors results);
  // Of operations on a device: waiting makes the caller's stream wait.
  void set_side(std::shared_ptr<DeviceSide> side) { side_ = std::move(side); }
  // Ends the event of an operation that has run already.
  void end_event();

  const Works& works() const { return works_; }
  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  int sourceRank() const override;
  Tensors result() override { return results_; }
  void synchronize() override { wait(kNoTimeout); }
  bool wait(std::chrono::milliseconds timeout) override;
  void abort() override {}  // that of the backend ends all of the group's
  float getDuration() const override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;

 private:
  void on_done(std::function<void()> callback) const;
  c10::intrusive_ptr<c10::ivalue::Future> future_on_device() const;

  std::shared_ptr<DeviceSide> side_;
  const std::shared_ptr<FutureThreads> future_threads_;
  Works works_;
  Tensors results_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;  // under mutex_
};

}  // namespace pycomm::torch_layer
