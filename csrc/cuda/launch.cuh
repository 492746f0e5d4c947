// What every kernel file needs: element types, 16-byte vectors, grid size, and errors of a launch
// as Status.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>

#include "core/dtype.h"
#include "core/status.h"
#include "cuda/indexing.h"

namespace pycomm::cuda {

constexpr int kThreads = 256;
constexpr int64_t kMaxGrid = 65536;  // above it the kernels' loops take more than one turn

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// To nearest even.
template <class T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// One 16-byte load or store of T.
template <class T>
struct alignas(kVectorBytes) Vector {
  static constexpr int n = kVectorBytes / sizeof(T);
  T x[n];
};

inline unsigned grid_for(int64_t n_threads) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(n_threads, kThreads), 1, kMaxGrid));
}

// REQUIRES: called straight after the launch of kernel, on the same thread.
inline Status launched(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return {Code::internal, std::string("CUDA kernel '") + kernel + "' did not start: " +
                              cudaGetErrorName(error) + ": " + cudaGetErrorString(error)};
}

// Calls launch(T{}) with the dtype's device type.
template <class Launch>
Status for_float_type(const char* kernel, DType dtype, Launch&& launch) {
  switch (dtype) {
    case DType::float32:
      return launch(float{});
    case DType::float16:
      return launch(__half{});
    case DType::bfloat16:
      return launch(__nv_bfloat16{});
    default:
      return {Code::invalid_argument, std::string("CUDA kernel '") + kernel +
                                          "' takes float32, float16 and bfloat16, not " +
                                          name_of(dtype)};
  }
}

}  // namespace pycomm::cuda
