// What the files of the fake NCCL share: its communicators, and operations as messages between
// their ranks.
#pragma once

#include <atomic>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "fake_nccl/fake_nccl.h"

struct ncclComm;

namespace fake {

constexpr int kMaxRanks = 8, kSplits = 64, kRing = 16384;
enum Result {
  kSuccess = 0,
  kSystemError = 2,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kRemote = 6,
  kInProgress = 7
};

struct Ring {
  std::atomic<uint64_t> head, tail;
  char bytes[kRing];
};
struct SplitSlot {
  std::atomic<int> given;
  int color, key;
};
struct Shared {
  std::atomic<int> joined, aborted;
  std::atomic<size_t> hosts[kMaxRanks];  // fake_nccl_no_network's, hashed
  SplitSlot splits[kSplits][kMaxRanks];
  Ring rings[kMaxRanks * kMaxRanks];  // [from * kMaxRanks + to]; pages are taken as they are used
};

struct Id {
  char name[128];
};
struct Config {
  size_t size;
  unsigned magic, version;
  int blocking, cga_cluster_size, min_ctas, max_ctas;
};

// ---- communicators (fake_comm.cc) ----

extern thread_local std::string last_error;
extern std::atomic<int> hanging_rank, slow_polls, last_max_ctas;

int failing(const char* function);  // what fake_nccl_fail_next() has said of this call
ncclComm* make(const std::string& name, int rank, int size, bool blocking);
void join(ncclComm* comm);  // meets the others in the file of that name
int progress(ncclComm* comm);
int answer(ncclComm* comm);
const char* last_error_of(ncclComm* comm);  // this thread's, or what failed in the background
void free_comm(ncclComm* comm);

// ---- operations (fake_moves.cc) ----

struct Move {
  bool is_send;
  int peer;
  char* data;
  uint64_t nbytes;
  uint64_t kind;  // what both sides must call it; else they never meet, as in NCCL
  uint64_t done = 0;
  bool opened = false;
};
struct Job {
  ncclComm* comm;
  std::vector<Move> moves;  // between two ranks in order
  std::vector<std::vector<char>> memory;
  std::vector<std::function<void()>> before, after;
};
struct Group {
  int depth = 0;
  std::vector<std::pair<FakeStream*, std::unique_ptr<Job>>> jobs;
};
extern thread_local Group group;

int check(ncclComm* comm, const char* function);
Job& job_on(ncclComm* comm, void* stream);
int end_group();
std::vector<int> everyone(const ncclComm* comm);
// Sends to the ranks in `to` what `out` gives for each, collects what those in `from` send, and
// calls `end` with it by rank, itself included.
void exchange(ncclComm* comm, void* stream, uint64_t kind, const std::vector<int>& to,
              const std::function<std::pair<const void*, size_t>(int)>& out,
              const std::vector<int>& from, size_t nbytes_in,
              std::function<void(const std::vector<const char*>&)> end);

}  // namespace fake

// What is pending of a communicator, at most one thing at a time.
struct ncclComm {
  std::string name;
  int rank = 0, size = 0;
  fake::Shared* shared = nullptr;
  bool blocking = true;
  std::atomic<bool> ready{false}, gone{false}, revoked{false};
  std::atomic<int> error{fake::kSuccess}, running{0};
  std::string error_text;  // under a lock of fake_comm.cc's
  int polls = 0, n_splits = 0, n_shrinks = 0;
  std::function<bool()> pending;  // true when it is done; under pending_mutex
  std::mutex pending_mutex;
};
