// A device and an NCCL that do nothing, at once: what a call on them takes is what pycomm adds to
// CUDA's and NCCL's own calls. Built and loaded by gpu_host.py.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "cuda/device.h"

namespace {

using pycomm::BlockCode;
using pycomm::DType;
using pycomm::Loss;

std::atomic<uint64_t> device_calls{0};

class NullDevice final : public pycomm::cuda::Device {
 public:
  explicit NullDevice(std::string id) : id_(std::move(id)) {}
  std::string id() const override { return id_; }
  std::string name() const override { return "null " + id_; }
  bool is_host_memory() const override { return true; }
  Stream new_stream() override { return next(); }
  void free_stream(Stream) override {}
  Event new_event() override { return next(); }
  void free_event(Event) override {}
  void record(Event, Stream) override { ++device_calls; }
  void wait(Stream, Event) override { ++device_calls; }
  void wait_value(Stream, const uint32_t*, uint32_t) override {}
  void write_value(Stream, uint32_t* word, uint32_t value) override { *word = value; }
  bool passed(Event) override { return true; }
  double elapsed_s(Event, Event) override { return 0; }
  bool capturing(Stream) override {
    ++device_calls;
    return false;
  }
  void* allocate(size_t nbytes) override { return std::malloc(nbytes); }
  void release(void* memory) override { std::free(memory); }
  void* allocate_shared(size_t nbytes) override { return allocate(nbytes); }
  void release_shared(void* memory) override { release(memory); }
  std::string handle_of(void*) override { return ""; }
  void* map_shared(const std::string&) override { return nullptr; }
  void unmap_shared(void*, const std::string&) override {}
  void* allocate_pinned(size_t nbytes) override { return allocate(nbytes); }
  void release_pinned(void* memory) override { release(memory); }
  void copy(void*, const void*, size_t, Stream) override {}
  void zero(void*, size_t, Stream) override {}
  void quantise(void*, const void*, size_t, DType, BlockCode, Loss, Stream) override {}
  void requantise_sum(void*, const void*, int, int64_t, size_t, BlockCode, float, Loss,
                      Stream) override {}
  void dequantise_sum(void*, const void*, int, int64_t, size_t, DType, BlockCode, float,
                      Stream) override {}
  void peer_all_reduce(const pycomm::cuda::PeerArguments&, DType, bool, int, Stream) override {}
  void in_order(Stream, std::function<void()>) override {}

 private:
  static void* next() {
    static std::atomic<uintptr_t> count{1};
    return reinterpret_cast<void*>(++count);
  }
  const std::string id_;
};

int comms[64];

}  // namespace

extern "C" {

// How often an event was recorded or waited for, or a stream asked whether it is captured.
uint64_t null_device_calls() { return device_calls; }
pycomm::cuda::Device* pycomm_test_device(const char* id) { return new NullDevice(id); }

int ncclGetVersion(int* version) {
  *version = 21800;
  return 0;
}
const char* ncclGetErrorString(int) { return "no error"; }
const char* ncclGetLastError(void*) { return ""; }
int ncclGetUniqueId(void* id) {
  std::memset(id, 1, 128);
  return 0;
}
struct Id {
  char bytes[128];
};
int ncclCommInitRankConfig(void** comm, int, Id, int, void*) {
  *comm = comms;
  return 0;
}
int ncclCommSplit(void*, int color, int, void** comm, void*) {
  *comm = color < 0 ? nullptr : comms;
  return 0;
}
int ncclCommGetAsyncError(void*, int* result) { return *result = 0; }
int ncclCommFinalize(void*) { return 0; }
int ncclCommDestroy(void*) { return 0; }
int ncclCommAbort(void*) { return 0; }
int ncclGroupStart() { return 0; }
int ncclGroupEnd() { return 0; }
int ncclAllReduce() { return 0; }
int ncclReduce() { return 0; }
int ncclBroadcast() { return 0; }
int ncclAllGather() { return 0; }
int ncclReduceScatter() { return 0; }
int ncclSend() { return 0; }
int ncclRecv() { return 0; }
}
