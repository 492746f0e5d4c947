#include "cpu/progress.h"

#include <algorithm>

#include "cpu/endpoint.h"
#include "cpu/waiter.h"

namespace pycomm::cpu {

ProgressThread::ProgressThread(Endpoint& endpoint) : endpoint_(endpoint), state_(std::make_shared<State>()) {}

ProgressThread::~ProgressThread() {
  {
    std::lock_guard lock(state_->mutex);
    state_->stopping = true;
  }
  state_->changed.notify_all();
  if (!thread_.joinable()) return;
  if (thread_.get_id() == std::this_thread::get_id())
    thread_.detach();
  else
    thread_.join();
}

void ProgressThread::add(std::shared_ptr<Driven> driven) {
  {
    std::lock_guard lock(state_->mutex);
    if (!thread_.joinable()) thread_ = std::thread(loop, state_, &endpoint_);
    auto& active = state_->active;
    if (std::find(active.begin(), active.end(), driven) == active.end()) active.push_back(std::move(driven));
  }
  state_->changed.notify_all();
  endpoint_.ring_self();  // it may sleep on behalf of another engine
}

void ProgressThread::remove(Driven* driven) {
  std::unique_lock lock(state_->mutex);
  std::erase_if(state_->active, [&](const auto& other) { return other.get() == driven; });
  if (!thread_.joinable() || thread_.get_id() == std::this_thread::get_id()) return;
  lock.unlock();
  endpoint_.ring_self();
  lock.lock();
  state_->changed.wait(lock, [&] { return !state_->driving; });
}

void ProgressThread::loop(std::shared_ptr<State> state, Endpoint* endpoint) {
  // Behind a computing caller the thread takes little of its core: it goes to sleep after 50 us of nothing.
  Waiter waiter(true, std::chrono::microseconds(50));
  std::vector<std::shared_ptr<Driven>> round;
  std::vector<int> sockets;
  std::unique_lock lock(state->mutex);
  for (;;) {
    std::erase_if(state->active, [](const auto& driven) { return !driven->has_background(); });
    state->changed.wait(lock, [&] { return state->stopping || !state->active.empty(); });
    if (state->stopping) return;
    round = state->active;
    state->driving = true;
    lock.unlock();
    const auto drive = [&] {
      bool moved = false;
      for (const auto& driven : round) moved |= driven->drive_background();
      return moved;
    };
    if (drive()) {
      waiter.moved();
    } else {
      switch (waiter.idle()) {
        case Waiter::Next::again:
          break;
        case Waiter::Next::look:
          for (const auto& driven : round) driven->check_background();
          break;
        case Waiter::Next::sleep:
          endpoint->prepare_sleep();
          sockets.clear();
          for (const auto& driven : round) driven->add_sockets(sockets);
          endpoint->sleep(sockets, drive() ? std::chrono::milliseconds(0) : std::chrono::milliseconds(2));
          for (const auto& driven : round) driven->check_background();
          break;
      }
    }
    round.clear();
    lock.lock();
    state->driving = false;
    if (state->stopping) return;
    state->changed.notify_all();
  }
}

}  // namespace pycomm::cpu
