// Standstill: finds ranks of one host that wait for each other in different groups, for ever. Each
// rank writes, from the slow look of a wait, in which collective its only thread waits and for
// which rank that has not entered it; whoever follows these words back to itself has found a
// circle. Nothing is written by a rank of which another thread may call, or that has other work
// under way: there is no circle through it. Thread safety: all members; enter(), wait_for() and
// look() by the thread that waits.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace pycomm::cpu {

// A rank's words, in the page that the ranks of a host share.
//
// An epoch is one wait: odd while it lasts. The owner writes `what` before it becomes odd. `edge`
// names an epoch of the rank waited for, in which that rank was seen not to have entered; as its
// only thread waited then and does until that epoch ends, this stays true as long.
struct StandstillLine {
  static constexpr size_t kWhat = 20, kVerdict = 120;  // words of text
  alignas(64) std::atomic<uint32_t> epoch{0};
  std::atomic<uint64_t> edge{0};  // place << 32 | epoch of the rank waited for; 0: not known yet
  std::atomic<uint64_t> what[kWhat];
  // An epoch that is in a circle: epoch << 1 while the one who found it writes the verdict, then
  // epoch << 1 | 1, which publishes it. It only grows, so that there is one writer at a time, and
  // none comes late. A rank may be in several circles: the first to be found is told.
  std::atomic<uint64_t> condemned{0};
  std::atomic<uint64_t> verdict[kVerdict];
};

class Standstill {
 public:
  // lines: by place, all ranks of the host.
  void attach(int me, std::vector<StandstillLine*> lines, std::vector<int> ranks);
  // A thread of this rank calls, before it enters anything. The second one ends all this for the
  // rank; the first one may do so from within a wait, in a callback or a signal handler, and ends
  // what that wait has said.
  void called_by(std::thread::id thread);
  bool speaks() const;  // in enter()

  // Begins to say that the rank waits, in `what`. False where more than one thread calls here.
  bool enter(const std::string& what);
  void leave();  // not in enter(): nothing
  // Says for whom, in the entered wait: the rank at `place`. missing(): whether that rank has not
  // entered what this one waits for it to enter; asked once it is seen to stand still. False where
  // it does not, or is not missing.
  bool wait_for(int place, const std::function<bool()>& missing);
  // The circle that this rank waits in; empty where there is none, or none is found yet.
  std::string look();
  std::string verdict() const;  // likewise, where another rank has found it

 private:
  StandstillLine& line(size_t place) const { return *lines_[place]; }

  size_t me_ = 0;
  std::vector<StandstillLine*> lines_;
  std::vector<int> ranks_;  // by place
  std::mutex mutex_;
  std::thread::id caller_;
  bool several_ = false;
};

}  // namespace pycomm::cpu
