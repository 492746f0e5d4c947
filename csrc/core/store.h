// Store: the key-value service through which ranks find each other at set-up, and through which
// word of a broken group reaches ranks that have no connection to whoever broke it. csrc/torch
// adapts c10d's stores. Thread safety: all members.
#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <vector>

namespace pycomm {

class Store {
 public:
  virtual ~Store() = default;
  virtual void set(const std::string& key, const std::string& value) = 0;
  // The values of all keys, in order, once all exist. Throws Error(timeout) naming a missing key
  // after `timeout`.
  virtual std::vector<std::string> get_all(const std::vector<std::string>& keys,
                                           std::chrono::milliseconds timeout) = 0;
  // The value, or nothing where the key is not set; never waits for a key.
  virtual std::optional<std::string> peek(const std::string& key) = 0;
};

}  // namespace pycomm
