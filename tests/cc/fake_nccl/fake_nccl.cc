// Every operation is a set of messages over rings in a file that the ranks map: one ring for each
// ordered pair of ranks. The operations of a group move all at once, each as far as it can, until
// all are done or the communicator is aborted. Reductions go in rank order, in double for floats.
#include "fake_nccl/fake_nccl.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fake_nccl/arithmetic.h"

namespace {

constexpr int kMaxRanks = 8, kSplits = 64, kRing = 16384;
enum Result { kSuccess = 0, kInvalidArgument = 4, kInvalidUsage = 5, kRemote = 6, kInProgress = 7 };

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
  SplitSlot splits[kSplits][kMaxRanks];
  Ring rings[kMaxRanks * kMaxRanks];  // [from * kMaxRanks + to]; pages are taken as they are used
};

struct Id {
  char name[128];
};
struct Config {
  size_t size;
  unsigned magic, version;
  int blocking;
};

thread_local std::string last_error;
std::mutex switches_mutex;
std::string fail_function, fail_text;
int fail_result = 0;
std::atomic<int> hanging_rank{-1}, slow_polls{0}, n_communicators{0};

int failing(const char* function) {
  const std::lock_guard lock(switches_mutex);
  if (fail_function != function) return kSuccess;
  fail_function.clear();
  last_error = fail_text;
  return fail_result;
}

Shared* map(const std::string& name, bool unlinks) {
  const std::string path = "/dev/shm/" + name;
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0 || ::ftruncate(fd, sizeof(Shared)) != 0) return nullptr;
  void* memory = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  if (unlinks) ::unlink(path.c_str());
  return memory == MAP_FAILED ? nullptr : static_cast<Shared*>(memory);
}

}  // namespace

// What is pending of a communicator, at most one thing at a time.
struct ncclComm {
  std::string name;
  int rank = 0, size = 0;
  Shared* shared = nullptr;
  bool blocking = true;
  std::atomic<bool> ready{false}, gone{false}, revoked{false};
  std::atomic<int> error{kSuccess}, running{0};
  std::string error_text;  // under switches_mutex
  int polls = 0, n_splits = 0, n_shrinks = 0;
  std::function<bool()> pending;  // true when it is done; under pending_mutex
  std::mutex pending_mutex;
};

namespace {

std::vector<ncclComm*> all;  // under switches_mutex

ncclComm* make(const std::string& name, int rank, int size, bool blocking) {
  auto* comm = new ncclComm;
  comm->name = name;
  comm->rank = rank;
  comm->size = size;
  comm->blocking = blocking;
  comm->polls = slow_polls;
  n_communicators++;
  const std::lock_guard lock(switches_mutex);
  all.push_back(comm);
  return comm;
}

// Meets the others in the file of that name.
void join(ncclComm* comm) {
  comm->shared = map(comm->name, false);
  comm->shared->joined++;
  comm->pending = [comm] {
    if (comm->polls-- > 0 || comm->shared->joined < comm->size) return false;
    ::unlink(("/dev/shm/" + comm->name).c_str());
    comm->ready = true;
    return true;
  };
}

int progress(ncclComm* comm) {
  if (comm->error != kSuccess) return comm->error;
  const std::lock_guard lock(comm->pending_mutex);
  if (comm->pending && !comm->pending()) return kInProgress;
  comm->pending = nullptr;
  return kSuccess;
}

int answer(ncclComm* comm) {
  if (!comm->blocking) return progress(comm);
  int result;
  while ((result = progress(comm)) == kInProgress)
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  return result;
}

// ---- moving bytes ----

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

bool step(ncclComm* comm, Move& move) {
  Ring& ring = comm->shared->rings[move.is_send ? comm->rank * kMaxRanks + move.peer
                                                : move.peer * kMaxRanks + comm->rank];
  const uint64_t head = ring.head, tail = ring.tail;
  const auto take = [&](void* to, uint64_t at, uint64_t n) {
    for (uint64_t i = 0; i < n; ++i) static_cast<char*>(to)[i] = ring.bytes[(at + i) % kRing];
  };
  const auto give = [&](const void* from, uint64_t at, uint64_t n) {
    for (uint64_t i = 0; i < n; ++i)
      ring.bytes[(at + i) % kRing] = static_cast<const char*>(from)[i];
  };
  const uint64_t opening[2] = {move.kind, move.nbytes};
  if (!move.opened) {
    if (move.is_send) {
      if (kRing - (head - tail) < sizeof(opening)) return false;
      give(opening, head, sizeof(opening));
      ring.head = head + sizeof(opening);
    } else {
      uint64_t theirs[2];
      if (head - tail < sizeof(theirs)) return false;
      take(theirs, tail, sizeof(theirs));
      if (std::memcmp(theirs, opening, sizeof(theirs)) != 0) return false;
      ring.tail = tail + sizeof(theirs);
    }
    return move.opened = true;
  }
  const uint64_t room = move.is_send ? kRing - (head - tail) : head - tail;
  const uint64_t n = std::min(room, move.nbytes - move.done);
  if (n == 0) return false;
  if (move.is_send) {
    give(move.data + move.done, head, n);
    ring.head = head + n;
  } else {
    take(move.data + move.done, tail, n);
    ring.tail = tail + n;
  }
  move.done += n;
  return true;
}

void run(void* argument) {
  const std::unique_ptr<Job> job(static_cast<Job*>(argument));
  ncclComm* const comm = job->comm;
  for (const auto& each : job->before) each();
  bool complete = job->moves.empty();
  while (!complete && !comm->gone && !comm->revoked) {  // an error alone ends nothing
    bool moved = false;
    complete = true;
    std::vector<bool> blocked(2 * kMaxRanks, false);
    if (hanging_rank != comm->rank)
      for (Move& move : job->moves) {
        const bool ended = move.opened && move.done == move.nbytes;
        auto lane = blocked[static_cast<size_t>(move.is_send * kMaxRanks + move.peer)];
        if (ended || lane) {
          complete = complete && ended;
          continue;
        }
        while (step(comm, move)) moved = true;
        if (!move.opened || move.done < move.nbytes) {
          lane = true;
          complete = false;
        }
      }
    else
      complete = false;
    if (!moved && !complete) std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  if (complete)
    for (const auto& each : job->after) each();
  comm->running--;
}

struct Group {
  int depth = 0;
  std::vector<std::pair<FakeStream*, std::unique_ptr<Job>>> jobs;
};
thread_local Group group;

void submit(FakeStream* stream, std::unique_ptr<Job> job) {
  job->comm->running++;
  if (stream == nullptr)
    run(job.release());
  else
    stream->enqueue(run, job.release());
}

int check(ncclComm* comm, const char* function) {
  if (const int result = failing(function); result != kSuccess) return result;
  if (comm == nullptr) return kInvalidArgument;
  if (comm->error != kSuccess) return comm->error;
  if (comm->revoked || !comm->ready) {
    last_error = comm->revoked ? "communicator was revoked" : "communicator is not ready";
    return kInvalidUsage;
  }
  return kSuccess;
}

Job& job_on(ncclComm* comm, void* stream) {
  for (auto& [on, job] : group.jobs)
    if (on == stream && job->comm == comm) return *job;
  group.jobs.emplace_back(static_cast<FakeStream*>(stream), new Job{comm, {}, {}, {}, {}});
  return *group.jobs.back().second;
}

int end_group() {
  if (--group.depth > 0) return kSuccess;
  auto jobs = std::move(group.jobs);
  group.jobs.clear();
  for (auto& [stream, job] : jobs) submit(stream, std::move(job));
  return kSuccess;
}

uint64_t kind_of(int operation, int dtype, int op, int root) {
  return static_cast<uint64_t>(operation) << 24 | static_cast<uint64_t>(dtype) << 16 |
         static_cast<uint64_t>(op) << 8 | static_cast<uint64_t>(root);
}

// Sends to the ranks in `to` what `out` gives for each, collects what those in `from` send, and
// calls `end` with it by rank, itself included.
void exchange(ncclComm* comm, void* stream, uint64_t kind, const std::vector<int>& to,
              const std::function<std::pair<const void*, size_t>(int)>& out,
              const std::vector<int>& from, size_t nbytes_in,
              std::function<void(const std::vector<const char*>&)> end) {
  Job& job = job_on(comm, stream);
  const auto held =
      std::make_shared<std::vector<std::vector<char>>>(static_cast<size_t>(comm->size));
  for (const int peer : to) {
    const auto [data, nbytes] = out(peer);
    if (peer == comm->rank) continue;
    job.moves.push_back({true, peer, static_cast<char*>(const_cast<void*>(data)), nbytes, kind});
  }
  bool own = false;
  for (const int peer : from) {
    auto& memory = (*held)[static_cast<size_t>(peer)];
    memory.resize(nbytes_in);
    if (peer == comm->rank)
      own = true;
    else
      job.moves.push_back({false, peer, memory.data(), nbytes_in, kind});
  }
  if (own) {
    const void* data = out(comm->rank).first;
    job.before.push_back([held, data, nbytes_in, rank = static_cast<size_t>(comm->rank)] {
      std::memcpy((*held)[rank].data(), data, nbytes_in);
    });
  }
  job.after.push_back([held, end = std::move(end)] {
    std::vector<const char*> pointers;
    for (const auto& memory : *held) pointers.push_back(memory.data());
    end(pointers);
  });
}

std::vector<int> everyone(const ncclComm* comm) {
  std::vector<int> ranks(static_cast<size_t>(comm->size));
  for (int i = 0; i < comm->size; ++i) ranks[static_cast<size_t>(i)] = i;
  return ranks;
}

// reduce(out, inputs..) to `out` where this rank gets a result.
int reduction(const char* function, ncclComm* comm, void* stream, uint64_t kind,
              const std::vector<int>& to, const std::vector<int>& from, const char* in,
              size_t in_stride, char* out, size_t count, int dtype, int op) {
  if (const int result = check(comm, function); result != kSuccess) return result;
  if (!fake::known(dtype, op)) return kInvalidArgument;
  const size_t nbytes = count * fake::size_of(dtype);
  group.depth++;
  exchange(
      comm, stream, kind, to,
      [=](int peer) {
        return std::pair<const void*, size_t>(in + static_cast<size_t>(peer) * in_stride, nbytes);
      },
      from, nbytes,
      [=, n = comm->size](const std::vector<const char*>& inputs) {
        if (out != nullptr && inputs[0] != nullptr) fake::reduce(out, inputs, count, dtype, op, n);
      });
  return end_group();
}

int copy_all(const char* function, ncclComm* comm, void* stream, uint64_t kind,
             const std::vector<int>& to, const std::vector<int>& from, const void* in, char* out,
             size_t nbytes, size_t out_stride) {
  if (const int result = check(comm, function); result != kSuccess) return result;
  group.depth++;
  exchange(
      comm, stream, kind, to, [=](int) { return std::pair<const void*, size_t>(in, nbytes); }, from,
      nbytes,
      [=](const std::vector<const char*>& inputs) {
        for (const int rank : from)
          std::memcpy(out + static_cast<size_t>(rank) * out_stride,
                      inputs[static_cast<size_t>(rank)], nbytes);
      });
  return end_group();
}

void free_comm(ncclComm* comm) {
  comm->gone = true;
  while (comm->running > 0) std::this_thread::sleep_for(std::chrono::microseconds(20));
  {
    const std::lock_guard lock(switches_mutex);
    std::erase(all, comm);
  }
  if (comm->shared != nullptr) ::munmap(comm->shared, sizeof(Shared));
  ::unlink(("/dev/shm/" + comm->name).c_str());
  n_communicators--;
  delete comm;
}

}  // namespace

extern "C" {

void fake_nccl_fail_next(const char* function, int result, const char* text) {
  const std::lock_guard lock(switches_mutex);
  fail_function = function;
  fail_result = result;
  fail_text = text;
}
void fake_nccl_hang(int rank) { hanging_rank = rank; }
void fake_nccl_slow_init(int polls) { slow_polls = polls; }
int fake_nccl_n_communicators() { return n_communicators; }
void fake_nccl_async_error(int rank, int result, const char* text) {
  const std::lock_guard lock(switches_mutex);
  for (ncclComm* comm : all)
    if (comm->rank == rank) {
      comm->error_text = text;
      comm->error = result;
    }
}

int ncclGetVersion(int* version) {
  const char* told = std::getenv("FAKE_NCCL_VERSION");
  *version = told != nullptr ? std::atoi(told) : FAKE_VERSION;
  return kSuccess;
}
const char* ncclGetErrorString(int result) {
  constexpr const char* names[] = {"no error",
                                   "unhandled cuda error",
                                   "unhandled system error",
                                   "internal error",
                                   "invalid argument",
                                   "invalid usage",
                                   "remote process exited or there was a network error",
                                   "NCCL operation in progress"};
  return result >= 0 && result < 8 ? names[result] : "unknown result code";
}
const char* ncclGetLastError(ncclComm* comm) {
  const std::lock_guard lock(switches_mutex);
  if (comm != nullptr && !comm->error_text.empty()) last_error = comm->error_text;
  return last_error.c_str();
}
int ncclGetUniqueId(Id* id) {
  if (const int result = failing("ncclGetUniqueId"); result != kSuccess) return result;
  std::random_device random;
  std::memset(id, 0, sizeof(*id));
  std::snprintf(id->name, sizeof(id->name), "pycomm-fake-nccl-%08x%08x", random(), random());
  return kSuccess;
}
int ncclCommInitRankConfig(ncclComm** result, int size, Id id, int rank, void* config) {
  if (const int failed = failing("ncclCommInitRankConfig"); failed != kSuccess) return failed;
  const auto* given = static_cast<const Config*>(config);
  if (size > kMaxRanks || rank < 0 || rank >= size || (given && given->magic != 0xcafebeef))
    return kInvalidArgument;
  ncclComm* comm = make(id.name, rank, size, given == nullptr || given->blocking != 0);
  join(comm);
  *result = comm;
  return answer(comm);
}
#ifndef FAKE_WITHOUT_SPLIT
int ncclCommSplit(ncclComm* parent, int color, int key, ncclComm** result, void*) {
  if (const int failed = failing("ncclCommSplit"); failed != kSuccess) return failed;
  const int turn = parent->n_splits++;
  SplitSlot& mine = parent->shared->splits[turn % kSplits][parent->rank];
  mine.color = color;
  mine.key = key;
  mine.given = turn / kSplits + 1;
  const std::lock_guard lock(parent->pending_mutex);
  parent->pending = [parent, turn, color, result, polls = slow_polls.load()]() mutable {
    const SplitSlot* const slots = parent->shared->splits[turn % kSplits];
    for (int rank = 0; rank < parent->size; ++rank)
      if (slots[rank].given < turn / kSplits + 1) return false;
    if (polls-- > 0) return false;
    if (color < 0) return true;
    int place = 0, members = 0;
    for (int rank = 0; rank < parent->size; ++rank) {
      if (slots[rank].color != color) continue;
      members++;
      place += std::pair(slots[rank].key, rank) < std::pair(slots[parent->rank].key, parent->rank);
    }
    ncclComm* child = make(parent->name + "-" + std::to_string(turn) + "-" + std::to_string(color),
                           place, members, parent->blocking);
    join(child);
    *result = child;
    return true;
  };
  return kInProgress;
}
#endif
int ncclCommGetAsyncError(ncclComm* comm, int* result) {
  *result = progress(comm);
  return kSuccess;
}
int ncclCommFinalize(ncclComm* comm) {
  if (comm->revoked) return kInvalidUsage;
  const std::lock_guard lock(comm->pending_mutex);
  comm->pending = [comm] { return comm->running == 0; };
  return kInProgress;
}
int ncclCommDestroy(ncclComm* comm) {
  free_comm(comm);
  return kSuccess;
}
int ncclCommAbort(ncclComm* comm) {
  free_comm(comm);
  return kSuccess;
}
int ncclGroupStart() {
  group.depth++;
  return kSuccess;
}
int ncclGroupEnd() {
  if (const int failed = failing("ncclGroupEnd"); failed != kSuccess) {
    group.jobs.clear();
    group.depth--;
    return failed;
  }
  return end_group();
}
int ncclAllReduce(const void* in, void* out, size_t count, int dtype, int op, ncclComm* comm,
                  void* stream) {
  return reduction("ncclAllReduce", comm, stream, kind_of(1, dtype, op, 0),
                   comm ? everyone(comm) : std::vector<int>{},
                   comm ? everyone(comm) : std::vector<int>{}, static_cast<const char*>(in), 0,
                   static_cast<char*>(out), count, dtype, op);
}
int ncclReduce(const void* in, void* out, size_t count, int dtype, int op, int root, ncclComm* comm,
               void* stream) {
  return reduction("ncclReduce", comm, stream, kind_of(2, dtype, op, root), {root},
                   comm->rank == root ? everyone(comm) : std::vector<int>{},
                   static_cast<const char*>(in), 0,
                   comm->rank == root ? static_cast<char*>(out) : nullptr, count, dtype, op);
}
int ncclReduceScatter(const void* in, void* out, size_t count, int dtype, int op, ncclComm* comm,
                      void* stream) {
  return reduction("ncclReduceScatter", comm, stream, kind_of(3, dtype, op, 0), everyone(comm),
                   everyone(comm), static_cast<const char*>(in), count * fake::size_of(dtype),
                   static_cast<char*>(out), count, dtype, op);
}
int ncclBroadcast(const void* in, void* out, size_t count, int dtype, int root, ncclComm* comm,
                  void* stream) {
  return copy_all("ncclBroadcast", comm, stream, kind_of(4, dtype, 0, root),
                  comm->rank == root ? everyone(comm) : std::vector<int>{}, {root}, in,
                  static_cast<char*>(out), count * fake::size_of(dtype), 0);
}
int ncclAllGather(const void* in, void* out, size_t count, int dtype, ncclComm* comm,
                  void* stream) {
  const size_t nbytes = count * fake::size_of(dtype);
  return copy_all("ncclAllGather", comm, stream, kind_of(5, dtype, 0, 0), everyone(comm),
                  everyone(comm), in, static_cast<char*>(out), nbytes, nbytes);
}
int ncclSend(const void* data, size_t count, int dtype, int peer, ncclComm* comm, void* stream) {
  if (const int result = check(comm, "ncclSend"); result != kSuccess) return result;
  group.depth++;
  job_on(comm, stream)
      .moves.push_back({true, peer, static_cast<char*>(const_cast<void*>(data)),
                        count * fake::size_of(dtype), kind_of(6, dtype, 0, 0)});
  return end_group();
}
int ncclRecv(void* data, size_t count, int dtype, int peer, ncclComm* comm, void* stream) {
  if (const int result = check(comm, "ncclRecv"); result != kSuccess) return result;
  group.depth++;
  job_on(comm, stream)
      .moves.push_back({false, peer, static_cast<char*>(data), count * fake::size_of(dtype),
                        kind_of(6, dtype, 0, 0)});
  return end_group();
}
#ifndef FAKE_WITHOUT_NEWER
int ncclCommShrink(ncclComm* parent, int* excluded, int n_excluded, ncclComm** result, void*,
                   int flags) {
  if (const int failed = failing("ncclCommShrink"); failed != kSuccess) return failed;
  if (flags == 1) parent->revoked = true;
  if (parent->running > 0 && flags == 0) return kInvalidUsage;
  std::string name = parent->name + "-shrunk" + std::to_string(parent->n_shrinks++);
  int place = parent->rank;
  for (int i = 0; i < n_excluded; ++i) {
    place -= excluded[i] < parent->rank;
    name += "-" + std::to_string(excluded[i]);
  }
  ncclComm* child = make(name, place, parent->size - n_excluded, parent->blocking);
  join(child);
  *result = child;
  return kInProgress;
}
int ncclCommRevoke(ncclComm* comm, int flags) {
  if (flags != 0) return kInvalidArgument;
  comm->revoked = true;
  const std::lock_guard lock(comm->pending_mutex);
  comm->pending = [comm] { return comm->running == 0; };
  return kInProgress;
}
// The engine does not call these; that they are there is a feature.
int ncclCommRegister() { return kSuccess; }
int ncclCommWindowRegister() { return kSuccess; }
int ncclAlltoAll() { return kSuccess; }
#endif
}
