#include "cpu/store_word.h"

#include <exception>
#include <utility>

namespace pycomm::cpu {

StoreWord::StoreWord(MakeStore make) : state_(std::make_shared<State>()) {
  state_->make = std::move(make);
}

StoreWord::~StoreWord() {
  if (!thread_.joinable()) return;
  std::unique_lock lock(state_->mutex);
  state_->stopping = true;
  state_->changed.notify_all();
  const bool idle = state_->changed.wait_for(lock, std::chrono::milliseconds(100),
                                             [this] { return state_->idle(); });
  lock.unlock();
  if (idle)
    thread_.join();
  else
    thread_.detach();
}

void StoreWord::start() {
  if (!thread_.joinable()) thread_ = std::thread([state = state_] { loop(state); });
  state_->changed.notify_all();
}

void StoreWord::say(Word word, std::chrono::milliseconds limit) {
  std::unique_lock lock(state_->mutex);
  state_->to_say.push_back(std::move(word));
  start();
  state_->changed.wait_for(lock, limit, [this] { return state_->idle(); });
}

void StoreWord::look(const std::vector<std::string>& keys, std::chrono::milliseconds limit) {
  std::unique_lock lock(state_->mutex);
  if (limit.count() > 0 || state_->idle()) {
    state_->to_find = keys;
    start();
  }
  if (limit.count() > 0) state_->changed.wait_for(lock, limit, [this] { return state_->idle(); });
}

std::optional<std::string> StoreWord::found(const std::string& key) const {
  std::lock_guard lock(state_->mutex);
  const auto at = state_->found.find(key);
  return at == state_->found.end() ? std::nullopt : std::optional(at->second);
}

void StoreWord::loop(const std::shared_ptr<State>& state) {
  std::unique_lock lock(state->mutex);
  for (;;) {
    state->changed.wait(lock, [&] { return state->stopping || !state->idle(); });
    if (state->idle()) return;  // what was said before the end is still written
    const auto to_say = std::exchange(state->to_say, {});
    const auto to_find = std::exchange(state->to_find, {});
    state->busy = true;
    lock.unlock();
    std::map<std::string, std::string> found;
    try {
      if (!state->store) state->store = state->make();
      for (const auto& [key, value, first] : to_say)
        if (!first || !state->store->peek(key)) state->store->set(key, value);
      for (const auto& key : to_find)
        if (auto value = state->store->peek(key)) found[key] = std::move(*value);
    } catch (const std::exception&) {
      // The store has gone with its rank; connections and deadlines still tell.
    }
    lock.lock();
    state->busy = false;
    state->found.merge(found);
    state->changed.notify_all();
  }
}

}  // namespace pycomm::cpu
