// Store: the key-value service through which ranks find each other once, at set-up. csrc/torch adapts c10d's stores.
#pragma once

#include <chrono>
#include <string>
#include <vector>

namespace pycomm {

class Store {
 public:
  virtual ~Store() = default;
  virtual void set(const std::string& key, const std::string& value) = 0;
  // The values of all keys, in order, once all exist. Throws Error(timeout) naming a missing key after `timeout`.
  virtual std::vector<std::string> get_all(const std::vector<std::string>& keys, std::chrono::milliseconds timeout) = 0;
};

}  // namespace pycomm
