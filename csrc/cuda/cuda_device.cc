#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <random>

#include "core/status.h"
#include "cuda/cuda.h"
#include "cuda/device.h"

namespace pycomm::cuda {
namespace {

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // reported here; the next launch must not report it again
  throw Error(Code::internal, std::string(what) + ": " + cudaGetErrorName(error) + ": " +
                                  cudaGetErrorString(error));
}

void require(const Status& status) {
  if (!status.ok()) throw Error(status);
}

// A function of the driver's, which nothing links: the runtime knows it. As CUDA 12.0 has it.
template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult answer = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  require(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &answer), name);
#else
  require(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &answer), name);
#endif
  if (found == nullptr || answer != cudaDriverEntryPointSuccess)
    throw Error(Code::internal, std::string(name) + ": the CUDA driver has no such function");
  return reinterpret_cast<Function>(found);
}

// Makes a device current, and what was current again at its end.
class Current {
 public:
  explicit Current(int index) {
    require(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != index) require(cudaSetDevice(index), "cudaSetDevice");
    changed_ = before_ != index;
  }
  ~Current() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// What this process has and no other on the machine.
const std::string& process_token() {
  static const std::string token = [] {
    std::random_device random;
    std::string made;
    for (int i = 0; i < 4; ++i) made += std::to_string(random()) + ".";
    return made;
  }();
  return token;
}

// A handle of shared memory: whose it is, where it is there, and how others map it.
struct Shared {
  cudaIpcMemHandle_t ipc;
  void* address;
  int device;
};

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index) {
    cudaDeviceProp properties;
    require(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
    name_ = "cuda:" + std::to_string(index) + " (" + properties.name + ")";
    char text[3];
    for (const char byte : properties.uuid.bytes) {
      std::snprintf(text, sizeof(text), "%02x", static_cast<unsigned char>(byte));
      id_ += text;
    }
  }
  std::string id() const override { return id_; }
  std::string name() const override { return name_; }

  Stream new_stream() override {
    const Current current(index_);
    int lowest = 0, highest = 0;
    require(cudaDeviceGetStreamPriorityRange(&lowest, &highest),
            "cudaDeviceGetStreamPriorityRange");
    cudaStream_t stream = nullptr;
    require(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, highest),
            "cudaStreamCreateWithPriority");
    return stream;
  }
  void free_stream(Stream stream) override { (void)cudaStreamDestroy(as_stream(stream)); }
  Event new_event() override {
    const Current current(index_);
    cudaEvent_t event = nullptr;
    require(cudaEventCreate(&event), "cudaEventCreate");
    return event;
  }
  void free_event(Event event) override { (void)cudaEventDestroy(as_event(event)); }

  void record(Event event, Stream stream) override {
    const Current current(index_);
    require(cudaEventRecord(as_event(event), as_stream(stream)), "cudaEventRecord");
  }
  void wait(Stream stream, Event event) override {
    const Current current(index_);
    require(cudaStreamWaitEvent(as_stream(stream), as_event(event), 0), "cudaStreamWaitEvent");
  }
  void wait_value(Stream stream, const uint32_t* word, uint32_t value) override {
    const Current current(index_);
    // Pinned memory has one address for host and device.
    static const auto wait =
        driver_function<decltype(&::cuStreamWaitValue32)>("cuStreamWaitValue32");
    const CUresult result = wait(as_stream(stream), reinterpret_cast<CUdeviceptr>(word), value,
                                 CU_STREAM_WAIT_VALUE_GEQ);
    if (result != CUDA_SUCCESS)
      throw Error(Code::internal, "cuStreamWaitValue32: CUDA driver error " +
                                      std::to_string(static_cast<int>(result)));
  }
  void write_value(Stream stream, uint32_t* word, uint32_t value) override {
    const Current current(index_);
    static const auto write =
        driver_function<decltype(&::cuStreamWriteValue32)>("cuStreamWriteValue32");
    const CUresult result = write(as_stream(stream), reinterpret_cast<CUdeviceptr>(word), value,
                                  CU_STREAM_WRITE_VALUE_DEFAULT);
    if (result != CUDA_SUCCESS)
      throw Error(Code::internal, "cuStreamWriteValue32: CUDA driver error " +
                                      std::to_string(static_cast<int>(result)));
  }
  bool passed(Event event) override {
    const cudaError_t error = cudaEventQuery(as_event(event));
    if (error == cudaErrorNotReady) {
      (void)cudaGetLastError();
      return false;
    }
    require(error, "cudaEventQuery");
    return true;
  }
  double elapsed_s(Event from, Event to) override {
    float milliseconds = 0;
    require(cudaEventElapsedTime(&milliseconds, as_event(from), as_event(to)),
            "cudaEventElapsedTime");
    return static_cast<double>(milliseconds) * 1e-3;
  }
  bool capturing(Stream stream) override {
    const Current current(index_);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    require(cudaStreamIsCapturing(as_stream(stream), &status), "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
  }
  void adopt_thread() override {
    (void)cudaSetDevice(index_);
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    (void)cudaThreadExchangeStreamCaptureMode(&mode);
  }

  void* allocate(size_t nbytes) override {
    const Current current(index_);
    void* memory = nullptr;
    require(cudaMalloc(&memory, nbytes), "cudaMalloc");
    return memory;
  }
  void release(void* memory) override { (void)cudaFree(memory); }
  void* allocate_shared(size_t nbytes) override { return allocate(nbytes); }
  void release_shared(void* memory) override { release(memory); }
  std::string handle_of(void* shared) override {
    const Current current(index_);
    Shared made{{}, shared, index_};
    require(cudaIpcGetMemHandle(&made.ipc, shared), "cudaIpcGetMemHandle");
    return process_token() + "\n" + std::string(reinterpret_cast<const char*>(&made), sizeof(made));
  }
  void* map_shared(const std::string& handle) override {
    const Current current(index_);
    const Shared given = shared_of(handle);
    void* mapped = given.address;
    if (!is_own(handle)) {
      require(cudaIpcOpenMemHandle(&mapped, given.ipc, cudaIpcMemLazyEnablePeerAccess),
              "cudaIpcOpenMemHandle");
    } else if (given.device != index_) {
      const cudaError_t error = cudaDeviceEnablePeerAccess(given.device, 0);
      if (error == cudaErrorPeerAccessAlreadyEnabled)
        (void)cudaGetLastError();
      else
        require(error, "cudaDeviceEnablePeerAccess");
    }
    return mapped;
  }
  void unmap_shared(void* mapped, const std::string& handle) override {
    const Current current(index_);
    if (!is_own(handle)) (void)cudaIpcCloseMemHandle(mapped);
  }
  void* allocate_pinned(size_t nbytes) override {
    const Current current(index_);
    void* memory = nullptr;
    require(cudaHostAlloc(&memory, nbytes, cudaHostAllocDefault), "cudaHostAlloc");
    return memory;
  }
  void release_pinned(void* memory) override { (void)cudaFreeHost(memory); }
  void copy(void* dst, const void* src, size_t nbytes, Stream stream) override {
    const Current current(index_);
    require(cudaMemcpyAsync(dst, src, nbytes, cudaMemcpyDefault, as_stream(stream)),
            "cudaMemcpyAsync");
  }
  void zero(void* memory, size_t nbytes, Stream stream) override {
    const Current current(index_);
    require(cudaMemsetAsync(memory, 0, nbytes, as_stream(stream)), "cudaMemsetAsync");
  }
  void quantise(void* dst, const void* src, size_t numel, DType dtype, BlockCode code, Loss loss,
                Stream stream) override {
    const Current current(index_);
    require(cuda::quantise(dst, src, numel, dtype, code, stream, loss));
  }
  void requantise_sum(void* dst, const void* src, int n_forms, int64_t stride_bytes, size_t numel,
                      BlockCode code, float factor, Loss loss, Stream stream) override {
    const Current current(index_);
    require(
        cuda::requantise_sum(dst, src, n_forms, stride_bytes, numel, code, factor, stream, loss));
  }
  void dequantise_sum(void* dst, const void* src, int n_forms, int64_t stride_bytes, size_t numel,
                      DType dtype, BlockCode code, float factor, Stream stream) override {
    const Current current(index_);
    require(
        cuda::dequantise_sum(dst, src, n_forms, stride_bytes, numel, dtype, code, factor, stream));
  }
  void peer_all_reduce(const PeerArguments& args, DType dtype, bool two_shot, int n_ranks_on_device,
                       Stream stream) override {
    const Current current(index_);
    require(cuda::peer_all_reduce(args, dtype, two_shot, n_ranks_on_device, stream));
  }
  void in_order(Stream, std::function<void()> work) override { work(); }

 private:
  static bool is_own(const std::string& handle) {
    return handle.starts_with(process_token() + "\n");
  }
  static Shared shared_of(const std::string& handle) {
    Shared given;
    PYCOMM_CHECK(handle.size() > sizeof(given), "a handle of shared memory");
    std::memcpy(&given, handle.data() + handle.size() - sizeof(given), sizeof(given));
    return given;
  }
  static cudaStream_t as_stream(Stream stream) { return static_cast<cudaStream_t>(stream); }
  static cudaEvent_t as_event(Event event) { return static_cast<cudaEvent_t>(event); }

  const int index_;
  std::string id_, name_;
};

}  // namespace

std::shared_ptr<Device> cuda_device(int index) { return std::make_shared<CudaDevice>(index); }

int device_index_of(const void* memory) {
  int current = 0;
  if (memory == nullptr) {
    require(cudaGetDevice(&current), "cudaGetDevice");
    return current;
  }
  cudaPointerAttributes found{};
  require(cudaPointerGetAttributes(&found, memory), "cudaPointerGetAttributes");
  if (found.type != cudaMemoryTypeDevice && found.type != cudaMemoryTypeManaged)
    throw Error(Code::invalid_argument, "the array's memory is the host's, not a CUDA device's");
  return found.device;
}

}  // namespace pycomm::cuda
