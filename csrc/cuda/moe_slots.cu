// Which place a slot has in its bin, and how many slots bins have: the layout of a batch.
#include "cuda/moe_launch.cuh"

namespace pycomm::cuda {
namespace {

// config: a CUDA block counts one bin, over all slots in order, kThreads at a time. Blocks need
// nothing of each other: each also counts the slots of all bins before its own.
struct Slots {
  int64_t *positions, *counts, *offsets;
  const int64_t* bins;
  int64_t n, n_bins;
};

// kernel
__global__ void __launch_bounds__(kThreads) count_kernel(const Slots args) {
  __shared__ int of_warp[kWarps];
  __shared__ unsigned long long all_below;
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  for (int64_t own = blockIdx.x; own < args.n_bins; own += gridDim.x) {
    if (threadIdx.x == 0) all_below = 0;
    int64_t count = 0, below = 0;
    for (int64_t first = 0; first < args.n; first += kThreads) {
      const int64_t i = first + threadIdx.x;
      const int64_t bin = i < args.n ? args.bins[i] : -1;
      const uint32_t lanes = __ballot_sync(~0u, bin == own);
      if (this_lane() == 0) of_warp[warp] = n_set(lanes);
      __syncthreads();
      int before = n_set_below(lanes, this_lane()), all = 0;
#pragma unroll
      for (int each = 0; each < kWarps; ++each) {
        before += each < warp ? of_warp[each] : 0;
        all += of_warp[each];
      }
      if (bin == own) args.positions[i] = count + before;
      if (own == 0 && i < args.n && (bin < 0 || bin >= args.n_bins)) args.positions[i] = -1;
      count += all;
      below += bin >= 0 && bin < own;
      __syncthreads();
    }
    atomicAdd(&all_below, static_cast<unsigned long long>(below));
    __syncthreads();
    if (threadIdx.x == 0) {
      const auto offset = static_cast<int64_t>(all_below);
      args.counts[own] = count;
      args.offsets[own] = offset;
      if (own == args.n_bins - 1) args.offsets[args.n_bins] = offset + count;
    }
    __syncthreads();
  }
}

}  // namespace

// launch
Status count_slots(int64_t* positions, int64_t* counts, int64_t* offsets, const int64_t* bins,
                   int64_t n, int64_t n_bins, void* stream) {
  if (n < 0 || n_bins < 1)
    return {Code::invalid_argument, "CUDA kernel 'count_slots' takes no " + std::to_string(n) +
                                        " slots in " + std::to_string(n_bins) + " bins"};
  const Slots args{positions, counts, offsets, bins, n, n_bins};
  const auto grid = static_cast<unsigned>(std::min<int64_t>(n_bins, kMaxGrid));
  count_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return launched("count_slots");
}

}  // namespace pycomm::cuda
