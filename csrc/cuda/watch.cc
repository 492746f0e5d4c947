#include "cuda/watch.h"

#include <algorithm>

namespace pycomm::cuda {
namespace {

constexpr auto kPoll = std::chrono::milliseconds(1);
constexpr auto kWaitersPoll = std::chrono::microseconds(50);
constexpr auto kSay = std::chrono::milliseconds(20), kTell = std::chrono::milliseconds(1000);
constexpr auto kLook = std::chrono::milliseconds(250);  // between two looks at slow operations

}  // namespace

Watch::Watch(std::shared_ptr<Device> device, Owner owner)
    : device_(std::move(device)), owner_(std::move(owner)) {
  thread_ = std::thread([this] { loop(); });
}

Watch::~Watch() {
  close(std::chrono::milliseconds(0));
  for (const auto& operation : dropped_) {
    free_events_.insert(free_events_.end(), {operation->begin, operation->end});
    free_events_.insert(free_events_.end(), operation->inner.begin(), operation->inner.end());
  }
  for (const auto event : free_events_) device_->free_event(event);
}

Device::Event Watch::event() {
  {
    const std::lock_guard lock(mutex_);
    if (!free_events_.empty()) {
      const auto event = free_events_.back();
      free_events_.pop_back();
      return event;
    }
  }
  return device_->new_event();
}

void Watch::add(std::shared_ptr<Operation> operation) {
  std::unique_lock lock(mutex_);
  if (!broken_.ok()) {
    finish(operation, broken_);
    return run_callbacks(lock);
  }
  operation->since = Clock::now();
  under_way_.push_back(std::move(operation));
  if (under_way_.size() == 1) changed_.notify_all();  // else the thread looks within kPoll
}

void Watch::abandon(const std::shared_ptr<Operation>& operation) {
  const std::lock_guard lock(mutex_);
  dropped_.push_back(operation);
  operation->done = true;
}

void Watch::wait(const std::shared_ptr<Operation>& operation, std::chrono::milliseconds limit) {
  const auto until = Clock::now() + limit;
  InterruptCheck interrupted;
  while (!operation->done) {
    {
      // The caller sweeps too: it need not wait for the thread's next turn.
      std::unique_lock lock(mutex_);
      sweep(lock);
      if (operation->done) break;
      changed_.wait_for(lock, kWaitersPoll);
    }
    const auto now = Clock::now();
    if (now >= until && !operation->done)
      throw Error(Code::timeout, operation->what + ": not done within " +
                                     std::to_string(limit.count()) + " ms; it goes on");
    interrupted(now);
  }
  if (const Status found = status(*operation); !found.ok()) throw Error(found);
}

void Watch::on_done(const std::shared_ptr<Operation>& operation, std::function<void()> callback) {
  {
    const std::lock_guard lock(mutex_);
    if (!operation->done) return operation->callbacks.push_back(std::move(callback));
  }
  callback();
}

void Watch::let_go(const std::shared_ptr<Operation>& operation) {
  std::shared_ptr<void> memory;  // freed without the lock
  const std::lock_guard lock(mutex_);
  memory.swap(operation->memory);
}

Status Watch::status(const Operation& operation) const {
  const std::lock_guard lock(mutex_);
  return operation.status;
}

double Watch::duration_s(const Operation& operation) const {
  const std::lock_guard lock(mutex_);
  return operation.duration_s;
}

Status Watch::broken() const {
  const std::lock_guard lock(mutex_);
  return broken_;
}

Stats Watch::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void Watch::fail(const Status& why) {
  std::unique_lock lock(mutex_);
  if (!broken_.ok()) return;
  broken_ = why;
  lock.unlock();
  owner_.broken(why);  // may take a while; new operations are refused meanwhile
  lock.lock();
  for (const auto& operation : std::exchange(under_way_, {})) finish(operation, why);
  run_callbacks(lock);
}

bool Watch::close(std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, patience, [&] { return under_way_.empty() || closing_; });
  const bool ended = under_way_.empty();
  closing_ = true;
  changed_.notify_all();
  lock.unlock();
  if (is_own_thread()) return ended;  // a callback closes; whoever destroys this waits for the end
  if (thread_.joinable()) thread_.join();
  lock.lock();
  const Status why =
      broken_.ok() ? Status{Code::closed, "the group was closed before this was done"} : broken_;
  for (const auto& operation : std::exchange(under_way_, {})) finish(operation, why);
  run_callbacks(lock);
  return ended;
}

void Watch::loop() {
  device_->adopt_thread();
  std::unique_lock lock(mutex_);
  while (!closing_) {
    const bool any = sweep(lock);
    if (!ended_badly_.ok() && broken_.ok()) {
      Status why = ended_badly_;
      const std::shared_ptr<Operation> first = under_way_.empty() ? nullptr : under_way_.front();
      lock.unlock();
      try {  // what others have called they say soon
        for (auto left = kTell; why.code == Code::mismatch && first && left.count() > 0;
             left -= kSay) {
          owner_.slow(*first);
          std::this_thread::sleep_for(kSay);
        }
      } catch (const Error& error) {
        why = error.status();
      }
      fail(why);
      lock.lock();
      continue;
    }
    if (!any) {
      changed_.wait(lock, [&] {
        return closing_ || !under_way_.empty() || (!ended_badly_.ok() && broken_.ok());
      });
      continue;
    }
    changed_.wait_for(lock, kPoll);
    const auto now = Clock::now();
    if (closing_ || under_way_.empty()) continue;
    const auto late =
        std::min_element(under_way_.begin(), under_way_.end(),
                         [](const auto& a, const auto& b) { return a->deadline < b->deadline; });
    const std::shared_ptr<Operation> first = under_way_.front();
    const std::shared_ptr<Operation> overdue = (*late)->deadline <= now ? *late : nullptr;
    const bool looks = now - std::max(looked_, first->since) >= kLook;
    if (looks) looked_ = now;
    if (!looks && overdue == nullptr) continue;
    lock.unlock();
    Status why = owner_.look();
    try {
      if (why.ok()) owner_.slow(*first);
    } catch (const Error& error) {
      why = error.status();
    }
    if (why.ok() && overdue != nullptr && !overdue->done) why = owner_.too_late(*overdue);
    if (!why.ok()) fail(why);
    lock.lock();
  }
}

bool Watch::sweep(std::unique_lock<std::mutex>& lock) {
  // What ends now was aborted.
  if (!broken_.ok()) return !under_way_.empty();
  // Streams differ, so an operation may be done before one that was added earlier.
  for (size_t i = 0; i < under_way_.size();) {
    const std::shared_ptr<Operation> operation = under_way_[i];
    Status status;
    try {
      if (!device_->passed(operation->end)) {
        ++i;
        continue;
      }
      if (operation->verdict) {
        if (Status verdict = operation->verdict(); !verdict.ok()) {
          ended_badly_ = std::move(verdict);  // it ends with all others, when the group breaks
          ++i;
          continue;
        }
      }
      operation->duration_s = device_->elapsed_s(operation->begin, operation->end);
    } catch (const Error& error) {
      status = {error.code(), operation->what + ": " + error.what()};
    }
    under_way_.erase(under_way_.begin() + static_cast<std::ptrdiff_t>(i));
    if (!status.ok() && ended_badly_.ok()) ended_badly_ = status;
    if (status.ok()) {
      ++stats_.ops;
      stats_.busy_s += operation->duration_s;
      free_events_.insert(free_events_.end(), {operation->begin, operation->end});
      free_events_.insert(free_events_.end(), operation->inner.begin(), operation->inner.end());
    }
    finish(operation, std::move(status));
  }
  run_callbacks(lock);
  return !under_way_.empty();
}

void Watch::finish(const std::shared_ptr<Operation>& operation, Status status) {
  if (operation->done) return;
  if (!status.ok()) dropped_.push_back(operation);  // the device may be at work on it still
  operation->status = std::move(status);
  released_.push_back(std::move(operation->memory));
  callbacks_.insert(callbacks_.end(), operation->callbacks.begin(), operation->callbacks.end());
  operation->callbacks.clear();
  operation->done = true;
  changed_.notify_all();
}

void Watch::run_callbacks(std::unique_lock<std::mutex>& lock) {
  if (callbacks_.empty() && released_.empty()) return;
  auto released = std::exchange(released_, {});
  auto callbacks = std::exchange(callbacks_, {});
  lock.unlock();
  released.clear();
  for (const auto& callback : callbacks) callback();
  lock.lock();
}

}  // namespace pycomm::cuda
