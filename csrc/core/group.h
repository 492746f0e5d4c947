// Group: one rank's membership in a set of ranks. It checks a call's arguments, finds the program
// (asked from Python once per collective, algorithm and root, then kept), binds it to memory and
// hands it to the engine. Thread safety: all members.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/engine.h"

namespace pycomm {

// A collective as its caller states it. Sizes in elements of dtype.
struct Call {
  Collective collective;
  DType dtype = DType::bytes;
  ReduceOp op = ReduceOp::sum;
  int root = 0;
  const void* input =
      nullptr;  // nullptr: this rank gives nothing (broadcast and scatter away from the root)
  void* output = nullptr;  // nullptr: this rank gets nothing
  uint64_t numel =
      0;  // elements of the whole tensor: the larger of what goes in and what comes out
  std::vector<uint64_t> counts;  // pieces' elements where they are uneven; all ranks give the same.
                                 // all_to_all: what this
  std::vector<uint64_t> recv_counts;  // rank sends to each, and receives from each
  std::string algorithm;              // empty: the choice table decides
  Wire wire = Wire::none;             // how it looks on links between hosts; no meaning inside one
  float* residual = nullptr;    // all_reduce: as long as the output, gets what coding lost here
  bool must_be_finite = false;  // fail with Code::nonfinite where this rank's output is not
  std::optional<std::chrono::milliseconds> timeout;
  void* stream = nullptr;        // of a device: the caller's
  std::function<void()> finish;  // as Launch's
};

// What Python plans. Called without the group's locks, at most once per key; deterministic, so
// every rank gets the same.
struct Planner {
  // ((max_nbytes, algorithm), ...), ascending; the last has UINT64_MAX.
  // coded: of those, and with steps marked, that code each contribution and each result once.
  std::function<std::vector<std::pair<uint64_t, std::string>>(Collective, int root, bool coded)>
      choices;
  std::function<Program(Collective, const std::string& algorithm, int root, bool coded)> program;
};

class Group {
 public:
  Group(std::string name, int rank, int size, std::shared_ptr<Engine> engine, Planner planner,
        std::chrono::milliseconds timeout);
  ~Group();

  int rank() const { return rank_; }
  int size() const { return size_; }
  const std::string& name() const { return name_; }
  Engine& engine() { return *engine_; }
  std::chrono::milliseconds timeout() const { return timeout_; }
  void set_timeout(std::chrono::milliseconds timeout) { timeout_ = timeout; }
  void choose_anew() { ++n_choices_; }  // the planner will answer otherwise from now on

  void run(const Call& call);
  std::shared_ptr<Work> start(const Call& call, std::shared_ptr<void> keep_alive);
  void run_send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                std::optional<std::chrono::milliseconds> timeout);
  int run_recv(void* data, uint64_t nbytes, int peer, int64_t tag,
               std::optional<std::chrono::milliseconds> timeout);
  std::shared_ptr<Work> send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                             std::optional<std::chrono::milliseconds> timeout,
                             std::shared_ptr<void> keep_alive);
  std::shared_ptr<Work> recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                             std::optional<std::chrono::milliseconds> timeout,
                             std::shared_ptr<void> keep_alive);
  // Engine::start_together. Messages have no deadline yet: `timeout` gives it.
  std::shared_ptr<Work> start_together(const std::vector<Call>& calls,
                                       std::vector<Message> messages,
                                       std::optional<std::chrono::milliseconds> timeout,
                                       std::shared_ptr<void> keep_alive);

 private:
  struct Choices {
    std::vector<std::pair<uint64_t, std::string>> table;
  };
  Launch bind(const Call& call);
  void check(const Call& call) const;
  void check_wire(const Call& call) const;
  void check_peer(const char* what, const char* towards, int peer, int least) const;
  const std::string& choose(const Call& call, uint64_t nbytes, bool coded);
  const Program* program(Collective collective, const std::string& algorithm, int root, bool coded);
  Clock::time_point deadline(std::optional<std::chrono::milliseconds> timeout) const;

  const std::string name_;
  const int rank_;
  const int size_;
  std::shared_ptr<Engine> engine_;
  Planner planner_;
  std::chrono::milliseconds timeout_;
  uint8_t barrier_byte_ = 0;  // what barriers across hosts reduce; one runs at a time
  std::mutex cache_mutex_;    // never held while Python plans: a planner needs the GIL
  std::atomic<int> n_choices_{0};
  std::map<std::tuple<Collective, int, bool, int>, Choices> choices_;  // the last: n_choices_ then
  std::map<std::tuple<Collective, std::string, int, bool>, std::unique_ptr<Program>> programs_;
};

}  // namespace pycomm
