// StoreWord: word that a group's ranks leave each other in the store, for those no connection
// joins: why it broke, who left. A store may answer late or never (its server's process may have
// been stopped), so a thread of its own asks; no call here waits longer than told. The thread
// starts with the first word. Thread safety: all members.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "core/store.h"

namespace pycomm::cpu {

class StoreWord {
 public:
  using MakeStore = std::function<std::shared_ptr<Store>()>;
  explicit StoreWord(MakeStore make);  // asked by the thread, once: a store may cost a connection
  ~StoreWord();  // a thread that hangs in the store is left behind; it ends when the store answers
  // Sets key; set_first() only where nobody has. Returns once that is done, or after `limit`.
  void set(std::string key, std::string value, std::chrono::milliseconds limit) {
    say({std::move(key), std::move(value), false}, limit);
  }
  void set_first(std::string key, std::string value, std::chrono::milliseconds limit) {
    say({std::move(key), std::move(value), true}, limit);
  }
  // Looks for the keys. With a limit: behind what is under way, which may have looked too early,
  // and waits up to that long. Without: not at all while something is under way.
  void look(const std::vector<std::string>& keys, std::chrono::milliseconds limit);
  // What a look has found.
  std::optional<std::string> found(const std::string& key) const;

 private:
  struct Word {
    std::string key, value;
    bool first;
  };
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    MakeStore make;
    std::shared_ptr<Store> store;
    std::vector<Word> to_say;
    std::vector<std::string> to_find;
    std::map<std::string, std::string> found;
    bool busy = false;
    bool stopping = false;
    bool idle() const { return !busy && to_say.empty() && to_find.empty(); }
  };
  void say(Word word, std::chrono::milliseconds limit);
  static void loop(const std::shared_ptr<State>& state);
  void start();  // with the lock held

  const std::shared_ptr<State> state_;  // the thread has its own share
  std::thread thread_;
};

}  // namespace pycomm::cpu
