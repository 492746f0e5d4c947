// What the MoE row kernels share: buffers in a kernel's arguments, a grid of warps, argument
// checks.
#pragma once

#include <cuda_fp8.h>  // before block_format.h

#include <span>

#include "cuda/launch.cuh"
#include "cuda/moe.h"
#include "cuda/moe_indexing.h"

namespace pycomm::cuda {

constexpr int kWarps = kThreads / kWarp;  // of a CUDA block

struct Buffers {
  char* of[kMaxRowBuffers];
};

__device__ __forceinline__ int64_t this_warp() {
  return int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
}
__device__ __forceinline__ int64_t n_warps() { return int64_t{gridDim.x} * kWarps; }
__device__ __forceinline__ int this_lane() { return static_cast<int>(threadIdx.x % kWarp); }

// What a table says at i; where there is none, other.
__device__ __forceinline__ int64_t at(const int64_t* table, int64_t i, int64_t other) {
  return table != nullptr ? table[i] : other;
}

template <class Pointer>
Status gather(const char* kernel, std::span<Pointer const> buffers, int alignment, Buffers* out) {
  const std::string name = std::string("CUDA kernel '") + kernel + "'";
  if (buffers.empty() || buffers.size() > kMaxRowBuffers)
    return {Code::invalid_argument, name + " takes 1 to " + std::to_string(kMaxRowBuffers) +
                                        " buffers of rows, not " + std::to_string(buffers.size())};
  for (size_t i = 0; i < buffers.size(); ++i) {
    const unsigned off = reinterpret_cast<uintptr_t>(buffers[i]) % static_cast<unsigned>(alignment);
    if (off != 0)
      return {Code::invalid_argument, name + " needs buffers " + std::to_string(alignment) +
                                          "-byte aligned; buffer " + std::to_string(i) + " is " +
                                          std::to_string(off) + " bytes off"};
    out->of[i] = static_cast<char*>(const_cast<void*>(static_cast<const void*>(buffers[i])));
  }
  return {};
}

// Whether every row of row_nbytes is, from base on.
inline bool aligned(const void* base, int64_t row_nbytes) {
  return reinterpret_cast<uintptr_t>(base) % kVectorBytes == 0 && row_nbytes % kVectorBytes == 0;
}

// Of a kernel with a warp for each tile of each of n rows.
template <class T>
unsigned grid(int64_t n, int64_t width) {
  return grid_for(n * tiles_per_row(width, Vector<T>::n) * kWarp);
}

inline Status check_rows(const char* kernel, int64_t n, int64_t width) {
  if (n >= 0 && width >= 0) return {};
  return {Code::invalid_argument, std::string("CUDA kernel '") + kernel + "' takes no " +
                                      std::to_string(n) + " rows of " + std::to_string(width) +
                                      " values: neither may be negative"};
}

}  // namespace pycomm::cuda
