#include "cpu/standstill.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace pycomm::cpu {
namespace {

// Text as words that others may read meanwhile, and then drop: release and acquire keep each of
// them between the epochs that the reader compares.
template <size_t n>
void put(std::atomic<uint64_t> (&words)[n], const std::string& text) {
  uint64_t copy[n] = {};
  std::memcpy(copy, text.data(), std::min(text.size(), sizeof(copy) - 1));
  for (size_t i = 0; i < n; ++i) words[i].store(copy[i], std::memory_order_release);
}

template <size_t n>
std::string get(const std::atomic<uint64_t> (&words)[n]) {
  uint64_t copy[n];
  for (size_t i = 0; i < n; ++i) copy[i] = words[i].load(std::memory_order_acquire);
  return {reinterpret_cast<const char*>(copy),
          strnlen(reinterpret_cast<const char*>(copy), sizeof(copy))};
}

bool waits(uint32_t epoch) { return (epoch & 1) != 0; }

constexpr auto kWriter = std::chrono::milliseconds(10);  // that another has for an older verdict

// Whether the verdict of that epoch is the caller's to write; else another has begun to, or the
// epoch is over. A writer of an older one that stands still, or was killed, keeps the line: that
// rank is left to its deadline.
bool claim(std::atomic<uint64_t>& condemned, uint32_t epoch) {
  const uint64_t claimed = uint64_t{epoch} << 1;
  const auto until = std::chrono::steady_clock::now() + kWriter;
  for (uint64_t last = condemned.load(std::memory_order_relaxed); last < claimed;) {
    const bool written = last == 0 || (last & 1) != 0;
    // Acquire: the words of the older verdict come before ours.
    if (written && condemned.compare_exchange_weak(last, claimed, std::memory_order_acquire,
                                                   std::memory_order_relaxed))
      return true;
    if (written) continue;
    if (std::chrono::steady_clock::now() >= until) return false;
    std::this_thread::yield();
    last = condemned.load(std::memory_order_relaxed);
  }
  return false;
}

}  // namespace

void Standstill::attach(int me, std::vector<StandstillLine*> lines, std::vector<int> ranks) {
  me_ = static_cast<size_t>(me);
  lines_ = std::move(lines);
  ranks_ = std::move(ranks);
}

void Standstill::called_by(std::thread::id thread) {
  std::lock_guard lock(mutex_);
  if (caller_ == std::thread::id()) caller_ = thread;
  if (caller_ != thread) several_ = true;
  auto& epoch = line(me_).epoch;
  if (const uint32_t now = epoch.load(std::memory_order_relaxed); waits(now))
    epoch.store(now + 1, std::memory_order_release);  // before the call that may end a wait
}

bool Standstill::speaks() const { return waits(line(me_).epoch.load(std::memory_order_relaxed)); }

bool Standstill::enter(const std::string& what) {
  std::lock_guard lock(mutex_);
  if (several_ || caller_ != std::this_thread::get_id()) return false;
  StandstillLine& mine = line(me_);
  const uint32_t now = mine.epoch.load(std::memory_order_relaxed);
  if (waits(now)) return true;
  mine.edge.store(0, std::memory_order_release);
  put(mine.what, what);
  // Publishes the words above, and all that this rank has entered so far; pairs with wait_for().
  mine.epoch.store(now + 1, std::memory_order_release);
  return true;
}

void Standstill::leave() {
  std::lock_guard lock(mutex_);
  auto& epoch = line(me_).epoch;
  if (const uint32_t now = epoch.load(std::memory_order_relaxed); waits(now))
    epoch.store(now + 1, std::memory_order_release);
}

bool Standstill::wait_for(int place, const std::function<bool()>& missing) {
  const uint32_t theirs = line(static_cast<size_t>(place)).epoch.load(std::memory_order_acquire);
  // In this order: what it entered before that epoch is seen, and in the epoch it enters nothing.
  const bool stands = waits(theirs) && missing();
  const uint64_t edge = static_cast<uint64_t>(place) << 32 | theirs;
  line(me_).edge.store(stands ? edge : 0, std::memory_order_release);
  return stands;
}

std::string Standstill::verdict() const {
  const uint32_t mine = line(me_).epoch.load(std::memory_order_relaxed);
  const uint64_t written = uint64_t{mine} << 1 | 1;
  if (!waits(mine) || line(me_).condemned.load(std::memory_order_acquire) != written) return {};
  return get(line(me_).verdict);
}

std::string Standstill::look() {
  const uint32_t mine = line(me_).epoch.load(std::memory_order_relaxed);
  if (!waits(mine)) return {};
  struct Stop {
    size_t place;
    uint32_t epoch;
    std::string what;
  };
  std::vector<Stop> circle;
  Stop at{me_, mine, {}};
  do {
    const uint64_t edge = line(at.place).edge.load(std::memory_order_acquire);
    at.what = get(line(at.place).what);
    circle.push_back(at);
    at = {static_cast<size_t>(edge >> 32), static_cast<uint32_t>(edge), {}};
    if (edge == 0 || circle.size() > lines_.size()) return {};
    if (line(at.place).epoch.load(std::memory_order_acquire) != at.epoch) return {};
  } while (at.place != me_);
  // All of these waits lasted when the first of them is read again: each edge names the next one's.
  for (const Stop& stop : circle)
    if (line(stop.place).epoch.load(std::memory_order_acquire) != stop.epoch) return {};
  std::rotate(circle.begin(),
              std::min_element(circle.begin(), circle.end(),
                               [](const Stop& a, const Stop& b) { return a.place < b.place; }),
              circle.end());
  const auto name = [this](const Stop& stop) {
    return "rank " + std::to_string(ranks_[stop.place]);
  };
  std::string text = name(circle[0]);
  for (size_t i = 0; i < circle.size(); ++i)
    text += (i == 0 ? " waits in " : ", which waits in ") + circle[i].what + " for " +
            name(circle[(i + 1) % circle.size()]);
  for (const Stop& stop : circle) {
    auto& condemned = line(stop.place).condemned;
    if (!claim(condemned, stop.epoch)) continue;
    put(line(stop.place).verdict, text);
    condemned.store(uint64_t{stop.epoch} << 1 | 1, std::memory_order_release);
  }
  return text;
}

}  // namespace pycomm::cpu
