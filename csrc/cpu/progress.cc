#include "cpu/progress.h"

#include <algorithm>
#include <iterator>

#include "cpu/endpoint.h"
#include "cpu/waiter.h"

namespace pycomm::cpu {

ProgressThread::ProgressThread(Endpoint& endpoint)
    : endpoint_(endpoint), state_(std::make_shared<State>()) {}

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

namespace {
constexpr auto kDoze = std::chrono::microseconds(100);
constexpr std::chrono::microseconds kLongestDoze(400);  // while callers come with messages
constexpr std::chrono::microseconds kLongestDozeAlone(1600);
constexpr int kDozes = 6;  // some 5 ms alone; then the thread is parked
constexpr std::chrono::milliseconds kNap(2), kLongestNap(10);
}  // namespace

void ProgressThread::add(std::shared_ptr<Driven> driven, When when) {
  {
    std::lock_guard lock(state_->mutex);
    if (!thread_.joinable()) thread_ = std::thread(loop, state_, &endpoint_);
    auto& active = state_->active;
    if (std::find(active.begin(), active.end(), driven) == active.end())
      active.push_back(std::move(driven));
    if (when == When::now)
      state_->in_earnest = true;
    else if (++state_->n_soon, state_->dozing)
      return;
  }
  state_->changed.notify_all();
  endpoint_.ring_self();  // it may sleep on behalf of another engine
}

void ProgressThread::remove(Driven* driven) {
  std::shared_ptr<Driven> last;  // let go outside the lock
  std::lock_guard lock(state_->mutex);
  auto& active = state_->active;
  const auto found = std::find_if(active.begin(), active.end(),
                                  [&](const auto& other) { return other.get() == driven; });
  if (found == active.end()) return;
  last = std::move(*found);
  active.erase(found);
}

bool ProgressThread::idle() const {
  std::lock_guard lock(state_->mutex);
  return state_->active.empty();
}

void ProgressThread::loop(std::shared_ptr<State> state, Endpoint* endpoint) {
  // Behind a computing caller the thread takes little of its core: it goes to sleep after 50 us of
  // nothing.
  Waiter waiter(8, std::chrono::microseconds(50));
  std::vector<std::shared_ptr<Driven>> round;
  std::vector<pollfd> sockets;
  std::chrono::milliseconds nap = kNap;
  uint64_t seen = 0;  // of n_soon
  std::chrono::microseconds doze = kDoze;
  int dozed = 0;  // times in a row that no message came
  bool moved = false;
  std::unique_lock lock(state->mutex);
  for (;;) {
    const auto idle =
        std::stable_partition(state->active.begin(), state->active.end(),
                              [](const auto& driven) { return driven->has_background(); });
    round.assign(std::make_move_iterator(idle), std::make_move_iterator(state->active.end()));
    state->active.erase(idle, state->active.end());
    if (!round.empty()) {  // outside the lock: with its last engine the endpoint goes, and with it
                           // this thread
      lock.unlock();
      round.clear();
      lock.lock();
    }
    if (state->active.empty()) state->in_earnest = false;
    const bool callers_come = state->n_soon != seen;
    seen = state->n_soon;
    const bool dozes = state->active.empty() || (callers_come && !state->in_earnest && !moved);
    if (dozes) {
      dozed = callers_come ? 0 : dozed + 1;
      const auto longest = callers_come ? kLongestDoze : kLongestDozeAlone;
      doze = std::min(doze, longest);
      if (dozed <= kDozes) {
        state->dozing = true;
        state->changed.wait_for(lock, doze, [&] { return state->stopping || state->in_earnest; });
        state->dozing = false;
        doze = std::min(2 * doze, longest);
      } else {
        state->changed.wait(lock, [&] { return state->stopping || !state->active.empty(); });
        dozed = 0;
        doze = kDoze;
      }
    }
    if (state->stopping) return;
    round = state->active;
    lock.unlock();
    const auto drive = [&] {
      bool any = false;
      for (const auto& driven : round) any |= driven->drive_background();
      return any;
    };
    moved = drive();
    if (moved) {
      waiter.moved();
      nap = kNap;
    } else if (!dozes) {
      switch (waiter.idle()) {
        case Waiter::Next::again:
          break;
        case Waiter::Next::look:
          for (const auto& driven : round) driven->check_background();
          break;
        case Waiter::Next::sleep:
          endpoint->prepare_sleep();
          sockets.clear();
          for (const auto& driven : round) driven->add_waits(sockets);
          // A doorbell or a socket ends it; the limit is for deadlines and lost processes. Each
          // end of it takes a computing caller's core for some 40 us.
          endpoint->sleep(sockets, drive() ? std::chrono::milliseconds(0) : nap);
          nap = std::min(2 * nap, kLongestNap);
          for (const auto& driven : round) driven->check_background();
          break;
      }
    }
    round.clear();
    lock.lock();
    if (state->stopping) return;
  }
}

}  // namespace pycomm::cpu
