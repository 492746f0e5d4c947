// Asked: whether the receive of a message that is about to leave is posted already. Such a message
// may wait for its receiver, who takes it at once; any other one that fits into the ring has to
// leave without. Both sides count, by tag: the receiver what it has asked this peer for, the sender
// what it has sent. The n-th message finds its receive posted where n are: of those, the messages
// before it have taken n - 1 at most. Receives from any rank do not count, since another rank's
// message may take them. Checked in models/asked.pml.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

namespace pycomm::cpu {

class Asked {
 public:
  // The receiver's side. `word`: where it tells the sender, who reads it alone.
  void posted(std::atomic<uint64_t>& word, int64_t tag) { tell(word, tag, 1); }
  // One that nothing has come for ends. A message that counted on it waits for the next.
  void withdrawn(std::atomic<uint64_t>& word, int64_t tag) { tell(word, tag, -1); }

  // The sender's side. Which message of its tag this is, from 1 on; 0 where that is not counted.
  uint64_t count(int64_t tag) { return counted(tag) ? ++sent_[static_cast<size_t>(tag)] : 0; }
  static bool asked(const std::atomic<uint64_t>& word, int64_t tag, uint64_t nth) {
    // Relaxed: the count says all. Only the latest tag's is there.
    const uint64_t told = word.load(std::memory_order_relaxed);
    return nth > 0 && told % kTags == static_cast<uint64_t>(tag) && told / kTags >= nth;
  }

 private:
  static constexpr int64_t kTags = 64;  // torch's is 0 where none is given
  static bool counted(int64_t tag) { return tag >= 0 && tag < kTags; }
  void tell(std::atomic<uint64_t>& word, int64_t tag, int64_t change) {
    if (!counted(tag)) return;
    uint64_t& n = posted_[static_cast<size_t>(tag)];
    n += static_cast<uint64_t>(change);
    word.store(n * kTags + static_cast<uint64_t>(tag), std::memory_order_relaxed);
  }

  std::array<uint64_t, kTags> posted_{}, sent_{};
};

}  // namespace pycomm::cpu
