// One-shot and two-shot all_reduce over symmetric memory: peer_protocol.h on a GPU.
#include <cuda/atomic>

#include "cuda/cuda.h"
#include "cuda/launch.cuh"
#include "cuda/peer_protocol.h"

namespace pycomm::cuda {
namespace {

// config
constexpr int kVectorsAThread = 2;

// arguments: PeerArguments

// kernel
__device__ __forceinline__ uint64_t now_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

struct DeviceMachine {
  template <class Function>
  __device__ void each(Range range, Function&& function) const {
    for (int64_t i = range.begin + threadIdx.x; i < range.end; i += blockDim.x) function(i);
  }
  // A peer's staged values are read once: around this GPU's L1.
  template <class T>
  __device__ PeerVector<T> load(const char* area, int64_t i) const {
    const uint4 raw = __ldcv(reinterpret_cast<const uint4*>(area) + i);
    return __builtin_bit_cast(PeerVector<T>, raw);
  }
  template <class T>
  __device__ float widen(T x) const {
    return cuda::widen(x);
  }
  template <class T>
  __device__ T narrow(float x) const {
    return cuda::narrow<T>(x);
  }
  // Thread r speaks with rank r. All threads' stores come before the flag: the barrier orders them
  // before thread r's release, which is of system scope.
  __device__ uint32_t exchange(const PeerArguments& args, int block, int which) const {
    using Flag = ::cuda::atomic_ref<uint64_t, ::cuda::thread_scope_system>;
    PeerControl* const mine = args.control(args.rank);
    __syncthreads();
    bool failed = false;
    if (static_cast<int>(threadIdx.x) < args.n_ranks) {
      const int peer = static_cast<int>(threadIdx.x);
      Flag(args.control(peer)->flags[which][block][args.rank])
          .store(peer_flag(args.tag, args.epoch), ::cuda::std::memory_order_release);
      const uint64_t deadline = now_ns() + args.timeout_ns;
      for (;;) {
        const PeerState state = peer_state(
            Flag(mine->flags[which][block][peer]).load(::cuda::std::memory_order_acquire), args);
        if (state == PeerState::present) break;
        failed = Word(mine->error).load(::cuda::std::memory_order_relaxed) != 0;
        if (failed) break;
        if (state == PeerState::absent && now_ns() < deadline) continue;
        for (int rank = 0; rank < args.n_ranks; ++rank)
          Word(args.control(rank)->error)
              .store(state == PeerState::mistaken ? kPeerMismatch : kPeerTimedOut,
                     ::cuda::std::memory_order_relaxed);
        failed = true;
        break;
      }
    }
    if (__syncthreads_or(failed) == 0) return 0;
    return Word(mine->error).load(::cuda::std::memory_order_relaxed);
  }

 private:
  using Word = ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_system>;
};

template <class T>
__global__ void __launch_bounds__(kThreads) peer_kernel(const PeerArguments args, bool two_shot) {
  DeviceMachine machine;
  const uint32_t error =
      peer_all_reduce_block<T>(args, static_cast<int>(blockIdx.x), two_shot, machine);
  if (error != 0 && threadIdx.x == 0 && args.failed != nullptr)
    ::cuda::atomic_ref<uint32_t, ::cuda::thread_scope_system>(*args.failed)
        .store(error, ::cuda::std::memory_order_release);
}

}  // namespace

// launch
Status peer_all_reduce(PeerArguments args, DType dtype, bool two_shot, int n_ranks_on_device,
                       void* stream) {
  const auto refuse = [](const std::string& text) {
    return Status{Code::invalid_argument, "CUDA kernel 'peer_all_reduce': " + text};
  };
  if (args.n_ranks < 1 || args.n_ranks > kMaxPeers)
    return refuse(std::to_string(args.n_ranks) + " ranks; it takes 1 to " +
                  std::to_string(kMaxPeers));
  if (args.op != ReduceOp::sum && args.op != ReduceOp::product && args.op != ReduceOp::min &&
      args.op != ReduceOp::max)
    return refuse(std::string("has sum, product, min and max, not ") + name_of(args.op));
  const int64_t nbytes = args.numel * static_cast<int64_t>(size_of(dtype));
  if (nbytes > args.capacity || args.capacity % kVectorBytes != 0)
    return refuse(std::to_string(nbytes) + " bytes for areas of " + std::to_string(args.capacity) +
                  ", which must hold them and be a multiple of 16");
  return for_float_type("peer_all_reduce", dtype, [&]<class T>(T) -> Status {
    if (args.numel == 0) return {};
    const int64_t wanted = ceil_div(ceil_div(nbytes, kVectorBytes), kThreads * kVectorsAThread);
    args.n_blocks = static_cast<int>(std::clamp<int64_t>(wanted, 1, kMaxPeerBlocks));
    int device = 0, multiprocessors = 0, blocks_each = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
      error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, peer_kernel<T>, kThreads, 0);
    if (error != cudaSuccess) {
      (void)cudaGetLastError();
      return {Code::internal, std::string("CUDA kernel 'peer_all_reduce': ") +
                                  cudaGetErrorName(error) + ": " + cudaGetErrorString(error)};
    }
    const int places = multiprocessors * blocks_each;
    if (!peers_fit(n_ranks_on_device, args.n_blocks, places))
      return refuse(std::to_string(n_ranks_on_device) + " ranks with " +
                    std::to_string(args.n_blocks) +
                    " blocks each do not fit on the device at "
                    "once (" +
                    std::to_string(places) + " places), and would wait for each other");
    peer_kernel<T>
        <<<static_cast<unsigned>(args.n_blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            args, two_shot);
    return launched("peer_all_reduce");
  });
}

}  // namespace pycomm::cuda
