// An NCCL that hands each call on to the one that TIMED_NCCL names, and adds up by thread what the
// calls take on the host: so that what a layer above it adds is known. It has what pycomm needs of
// NCCL, nothing that is optional. Built and read by gpu_ranks.py.
#include <dlfcn.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

thread_local uint64_t spent_ns = 0, n_calls = 0;

class Timer {
 public:
  ~Timer() {
    n_calls += 1;
    spent_ns += static_cast<uint64_t>(
        std::chrono::nanoseconds(std::chrono::steady_clock::now() - begin_).count());
  }

 private:
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

template <class Function>
Function* next(const char* name) {
  const char* const path = std::getenv("TIMED_NCCL");
  static void* const library = path == nullptr ? nullptr : ::dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* const found = library == nullptr ? nullptr : ::dlsym(library, name);
  if (found == nullptr) {
    std::fprintf(stderr, "timed_nccl: no %s in TIMED_NCCL=%s\n", name, path ? path : "");
    std::abort();
  }
  return reinterpret_cast<Function*>(found);
}

struct Id {
  char bytes[128];
};

}  // namespace

#define HAND_ON(result, name, parameters, arguments)        \
  result name parameters {                                  \
    static auto* const on = next<result parameters>(#name); \
    const Timer timer;                                      \
    return on arguments;                                    \
  }

extern "C" {

uint64_t timed_nccl_ns() { return spent_ns; }  // of this thread, since it began
uint64_t timed_nccl_calls() { return n_calls; }

HAND_ON(int, ncclGetVersion, (int* version), (version))
HAND_ON(const char*, ncclGetErrorString, (int result), (result))
HAND_ON(const char*, ncclGetLastError, (void* comm), (comm))
HAND_ON(int, ncclGetUniqueId, (Id * id), (id))
HAND_ON(int, ncclCommInitRankConfig, (void** comm, int n, Id id, int rank, void* config),
        (comm, n, id, rank, config))
HAND_ON(int, ncclCommSplit, (void* comm, int color, int key, void** made, void* config),
        (comm, color, key, made, config))
HAND_ON(int, ncclCommGetAsyncError, (void* comm, int* result), (comm, result))
HAND_ON(int, ncclCommFinalize, (void* comm), (comm))
HAND_ON(int, ncclCommDestroy, (void* comm), (comm))
HAND_ON(int, ncclCommAbort, (void* comm), (comm))
HAND_ON(int, ncclGroupStart, (), ())
HAND_ON(int, ncclGroupEnd, (), ())
HAND_ON(int, ncclAllReduce,
        (const void* in, void* out, size_t count, int type, int op, void* comm, void* stream),
        (in, out, count, type, op, comm, stream))
HAND_ON(int, ncclReduce,
        (const void* in, void* out, size_t count, int type, int op, int root, void* comm,
         void* stream),
        (in, out, count, type, op, root, comm, stream))
HAND_ON(int, ncclBroadcast,
        (const void* in, void* out, size_t count, int type, int root, void* comm, void* stream),
        (in, out, count, type, root, comm, stream))
HAND_ON(int, ncclAllGather,
        (const void* in, void* out, size_t count, int type, void* comm, void* stream),
        (in, out, count, type, comm, stream))
HAND_ON(int, ncclReduceScatter,
        (const void* in, void* out, size_t count, int type, int op, void* comm, void* stream),
        (in, out, count, type, op, comm, stream))
HAND_ON(int, ncclSend,
        (const void* data, size_t count, int type, int peer, void* comm, void* stream),
        (data, count, type, peer, comm, stream))
HAND_ON(int, ncclRecv, (void* data, size_t count, int type, int peer, void* comm, void* stream),
        (data, count, type, peer, comm, stream))
}
