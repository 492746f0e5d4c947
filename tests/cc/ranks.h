// Ranks as threads of one process, for the engine's tests: a store in memory, a ring planner
// written here by hand (an oracle apart from pycomm/planners), and groups over any hosts.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

#include "core/group.h"
#include "cpu/endpoint.h"
#include "cpu/engine.h"
#include "testing.h"

namespace pycomm::testing {

class MemoryStore final : public Store {
 public:
  void set(const std::string& key, const std::string& value) override {
    std::lock_guard lock(mutex_);
    values_[key] = value;
    changed_.notify_all();
  }
  std::vector<std::string> get_all(const std::vector<std::string>& keys,
                                   std::chrono::milliseconds timeout) override {
    std::unique_lock lock(mutex_);
    std::vector<std::string> found;
    for (const auto& key : keys) {
      if (!changed_.wait_for(lock, timeout, [&] { return values_.contains(key); }))
        throw Error(Code::timeout, "nobody set '" + key + "'");
      found.push_back(values_[key]);
    }
    return found;
  }
  std::optional<std::string> peek(const std::string& key) override {
    std::lock_guard lock(mutex_);
    const auto found = values_.find(key);
    return found == values_.end() ? std::nullopt : std::optional(found->second);
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;
};

class PrefixStore final : public Store {
 public:
  PrefixStore(Store& store, std::string prefix) : store_(store), prefix_(std::move(prefix)) {}
  void set(const std::string& key, const std::string& value) override {
    store_.set(prefix_ + key, value);
  }
  std::vector<std::string> get_all(const std::vector<std::string>& keys,
                                   std::chrono::milliseconds timeout) override {
    std::vector<std::string> prefixed;
    for (const auto& key : keys) prefixed.push_back(prefix_ + key);
    return store_.get_all(prefixed, timeout);
  }
  std::optional<std::string> peek(const std::string& key) override {
    return store_.peek(prefix_ + key);
  }

 private:
  Store& store_;
  const std::string prefix_;
};

// Ring all_reduce (2(n-1) rounds), and all_to_all in one round: what a planner and project() would
// give.
inline Program ring_program(Collective collective, int n, int rank) {
  Program program;
  program.collective = collective;
  program.algorithm = "ring";
  program.n_ranks = n;
  program.rank = rank;
  const auto add = [&](StepKind kind, Buffer source, Buffer destination, int peer, int chunk,
                       int round, std::vector<int> deps) {
    const auto begin = static_cast<int32_t>(program.deps.size());
    for (const int dep : deps) program.deps.push_back(dep);
    program.steps.push_back({kind, source, destination, 0, peer, chunk, -1, round, begin,
                             static_cast<int32_t>(deps.size()), -1});
    return static_cast<int>(program.steps.size()) - 1;
  };
  if (collective == Collective::all_to_all) {
    program.n_chunks = n * n;
    add(StepKind::copy, Buffer::input, Buffer::output, -1, rank * n + rank, 0, {});
    for (int d = 1; d < n; ++d) {
      const int to = (rank + d) % n, from = (rank - d + n) % n;
      add(StepKind::send, Buffer::input, Buffer::input, to, rank * n + to, d, {});
      add(StepKind::recv, Buffer::output, Buffer::output, from, from * n + rank, d, {});
    }
    return program;
  }
  program.n_chunks = n;
  if (n == 1) {
    add(StepKind::copy, Buffer::input, Buffer::output, -1, 0, 0, {});
    return program;
  }
  const int next = (rank + 1) % n, before = (rank - 1 + n) % n;
  std::vector<int> wrote(static_cast<size_t>(n), -1), sent(static_cast<size_t>(n), -1);
  const auto deps = [&](int chunk) {
    std::vector<int> result;
    if (wrote[chunk] >= 0) result.push_back(wrote[chunk]);
    if (sent[chunk] >= 0) result.push_back(sent[chunk]);
    return result;
  };
  for (int round = 0; round < 2 * (n - 1); ++round) {
    const int out = ((rank - round) % n + n) % n, in = ((rank - round - 1) % n + n) % n;
    const bool reduces = round < n - 1;
    const Buffer from = wrote[out] >= 0 ? Buffer::output : Buffer::input;
    std::vector<int> out_deps;
    if (wrote[out] >= 0) out_deps.push_back(wrote[out]);
    const int send = add(StepKind::send, from, Buffer::output, next, out, round, out_deps);
    const int recv = add(reduces ? StepKind::recv_reduce : StepKind::recv, Buffer::input,
                         Buffer::output, before, in, round, deps(in));
    sent[out] = send;
    wrote[in] = recv;
  }
  return program;
}

// The ring of two ranks on two hosts with a wire: each rank completes one chunk and shares it.
inline Program coded_ring_program(int rank) {
  Program program = ring_program(Collective::all_reduce, 2, rank);
  for (Step& step : program.steps) {
    step.flags = kCoded;
    const bool shares = step.kind == StepKind::send && step.round == 1;
    if (shares || step.kind == StepKind::recv_reduce) step.flags |= kSealed;
  }
  return program;
}

inline Planner ring_planner(int n, int rank) {
  return {[](Collective, int, bool) {
            return std::vector<std::pair<uint64_t, std::string>>{{UINT64_MAX, "ring"}};
          },
          [n, rank](Collective collective, const std::string&, int, bool coded) {
            return coded ? coded_ring_program(rank) : ring_program(collective, n, rank);
          }};
}

using Body = std::function<void(Group&, const std::shared_ptr<cpu::Endpoint>&, Store&)>;

// Runs body on every rank, hosts[i] being rank i's host label; a rank's exception fails the test,
// named.
inline void run_ranks(const std::vector<std::string>& hosts, const Body& body,
                      std::chrono::milliseconds timeout = std::chrono::seconds(30)) {
  MemoryStore store;
  const int n = static_cast<int>(hosts.size());
  std::vector<std::thread> threads;
  for (int rank = 0; rank < n; ++rank)
    threads.emplace_back([&, rank] {
      try {
        cpu::EndpointOptions options;
        options.host_id = hosts[static_cast<size_t>(rank)];
        auto endpoint = cpu::Endpoint::create(store, rank, n, options);
        std::vector<int> ranks(static_cast<size_t>(n));
        for (int i = 0; i < n; ++i) ranks[static_cast<size_t>(i)] = i;
        auto own = std::make_shared<PrefixStore>(store, "world/");
        Group group("world", rank, n,
                    cpu::CpuEngine::create(
                        endpoint, [own] { return own; }, "world", "world", ranks, timeout),
                    ring_planner(n, rank), timeout);
        body(group, endpoint, store);
      } catch (const std::exception& error) {
        ::testing::fail("rank", rank, error.what());
      }
    });
  for (auto& thread : threads) thread.join();
}

inline std::vector<std::string> one_host(int n) {
  return std::vector<std::string>(static_cast<size_t>(n), "a");
}

inline Call all_reduce(float* data, uint64_t numel, ReduceOp op = ReduceOp::sum) {
  Call call;
  call.collective = Collective::all_reduce;
  call.dtype = DType::float32;
  call.op = op;
  call.input = data;
  call.output = data;
  call.numel = numel;
  return call;
}

}  // namespace pycomm::testing
