#include "torch/work.h"

#include <ATen/core/ivalue.h>

#include <algorithm>
#include <thread>

#include "torch/blocking.h"

namespace pycomm::torch_layer {
namespace {

constexpr auto kForever = std::chrono::milliseconds(std::chrono::hours(24 * 365));
constexpr auto kIdle = std::chrono::seconds(10);  // then a thread ends

bool all_done(const BackendWork::Works& works) {
  return std::all_of(works.begin(), works.end(), [](const auto& work) { return work->done(); });
}

std::exception_ptr first_error(const BackendWork::Works& works) {
  for (const auto& work : works)
    if (const Status status = work->status(); !status.ok())
      return std::make_exception_ptr(Error(status));
  return nullptr;
}

}  // namespace

void FutureThreads::run(std::function<void()> task) {
  std::lock_guard lock(mutex_);
  tasks_.push_back(std::move(task));
  if (n_idle_ >= tasks_.size())
    changed_.notify_all();
  else
    std::thread(loop, shared_from_this()).detach();  // its last owner may be a task on it
}

void FutureThreads::loop(const std::shared_ptr<FutureThreads>& self) {
  std::unique_lock lock(self->mutex_);
  for (;;) {
    ++self->n_idle_;
    const bool any = self->changed_.wait_for(lock, kIdle, [&] { return !self->tasks_.empty(); });
    --self->n_idle_;
    if (!any) return;
    auto task = std::move(self->tasks_.front());
    self->tasks_.pop_front();
    ++self->n_busy_;
    lock.unlock();
    task();
    task = nullptr;
    lock.lock();
    --self->n_busy_;
    self->changed_.notify_all();
  }
}

void FutureThreads::settle(std::chrono::milliseconds limit) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, limit, [&] { return tasks_.empty() && n_busy_ == 0; });
}

void BackendWork::set(Works works, Tensors results) {
  works_ = std::move(works);
  results_ = std::move(results);
  if (recordFunctionEndCallback_) on_done(std::exchange(recordFunctionEndCallback_, nullptr));
}

void BackendWork::end_event() {
  if (recordFunctionEndCallback_) std::exchange(recordFunctionEndCallback_, nullptr)();
}

bool BackendWork::isCompleted() { return all_done(works_); }

bool BackendWork::isSuccess() const { return all_done(works_) && first_error(works_) == nullptr; }

std::exception_ptr BackendWork::exception() const { return first_error(works_); }

int BackendWork::sourceRank() const { return works_.empty() ? -1 : works_.front()->source(); }

bool BackendWork::wait(std::chrono::milliseconds timeout) {
  const bool limited = timeout > kNoTimeout && timeout < kForever;
  std::function<void*()> stream;
  if (side_) stream = [this] { return side_->current_stream(); };
  const InterruptScope interruptible(check_signals, is_only_thread);
  wait_for(works_, stream, limited ? std::optional(timeout) : std::nullopt);
  return true;
}

float BackendWork::getDuration() const {
  double longest = 0;
  for (const auto& work : works_) longest = std::max(longest, work->duration_s());
  return static_cast<float>(longest * 1e3);
}

// Called by whoever ends the last of the operations.
void BackendWork::on_done(std::function<void()> callback) const {
  if (works_.empty()) return callback();
  const auto left = std::make_shared<std::atomic<size_t>>(works_.size());
  for (const auto& work : works_)
    work->on_done([left, callback] {
      if (left->fetch_sub(1) == 1) callback();
    });
}

// Complete at once: who waits for it, or hangs something on it, gets streams that are behind the
// operations.
c10::intrusive_ptr<c10::ivalue::Future> BackendWork::future_on_device() const {
  auto future = c10::make_intrusive<c10::ivalue::Future>(
      c10::ListType::create(c10::TensorType::get()), std::vector<c10::Device>{side_->device()});
  side_->on_own_stream([&] {
    for (const auto& work : works_) work->order_before(side_->own_stream());
    future->markCompleted(c10::IValue(results_));
  });
  return future;
}

c10::intrusive_ptr<c10::ivalue::Future> BackendWork::getFuture() {
  std::lock_guard lock(mutex_);
  if (future_) return future_;
  if (side_ && side_->has_streams()) return future_ = future_on_device();
  future_ = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
  const auto complete = [future = future_, works = works_, results = results_] {
    if (const auto error = first_error(works))
      future->setError(error);
    else
      future->markCompleted(c10::IValue(results));
  };
  if (all_done(works_))
    complete();
  else
    on_done([complete, works = works_, threads = future_threads_] {
      // A failure may come from closing the group as Python ends: no thread may want Python later.
      if (first_error(works))
        complete();
      else
        threads->run(complete);
    });
  return future_;
}

}  // namespace pycomm::torch_layer
