// NCCL's functions over messages (fake_moves.cc). Reductions go in rank order, in double for
// floats.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "fake_nccl/arithmetic.h"
#include "fake_nccl/fake_comm.h"

using namespace fake;

namespace {

uint64_t kind_of(int operation, int dtype, int op, int root) {
  return static_cast<uint64_t>(operation) << 24 | static_cast<uint64_t>(dtype) << 16 |
         static_cast<uint64_t>(op) << 8 | static_cast<uint64_t>(root);
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

}  // namespace

extern "C" {

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
const char* ncclGetLastError(ncclComm* comm) { return last_error_of(comm); }
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
  if (given != nullptr) last_max_ctas = given->max_ctas;
  join(comm);
  *result = comm;
  return answer(comm);
}
#ifndef FAKE_WITHOUT_SPLIT
int ncclCommSplit(ncclComm* parent, int color, int key, ncclComm** result, void* config) {
  if (const int failed = failing("ncclCommSplit"); failed != kSuccess) return failed;
  last_max_ctas = static_cast<const Config*>(config)->max_ctas;
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
