// Block quantisation for the wire, and back. The format and the arithmetic of one value stand in
// core/block_format.h.
#include "cuda/block_lanes.h"
#include "cuda/cuda.h"
#include "cuda/launch.cuh"

namespace pycomm::cuda {
namespace {

// config: a lane holds 16 bytes of the tensor; 32 lanes (fp32) or 16 (fp16, bf16) hold one block
template <class T>
struct Config {
  static constexpr int kPerLane = Vector<T>::n;
  static constexpr int kLanes = kBlockNumel / kPerLane;
};

template <class T>
struct Arguments {
  T* tensor;
  uint8_t* codes;
  float* scales;
  int64_t numel;
  bool aligned;  // tensor is 16-byte aligned
};

template <class T>
struct Place : Lane {
  bool whole;  // all of a vector, aligned
  __device__ Place(const Arguments<T>& args, int64_t at)
      : Lane(lane_at<Config<T>::kPerLane>(at, args.numel)),
        whole(args.aligned && n == Config<T>::kPerLane) {}
};

template <class T>
__device__ Vector<T> load(const Arguments<T>& args, const Place<T>& place) {
  if (place.whole) return *reinterpret_cast<const Vector<T>*>(args.tensor + place.first);
  Vector<T> x;
#pragma unroll
  for (int k = 0; k < Vector<T>::n; ++k)
    x.x[k] = k < place.n ? args.tensor[place.first + k] : narrow<T>(0.0f);
  return x;
}

template <class T>
__device__ void store(const Arguments<T>& args, const Place<T>& place, const Vector<T>& x) {
  if (place.whole) {
    *reinterpret_cast<Vector<T>*>(args.tensor + place.first) = x;
    return;
  }
#pragma unroll
  for (int k = 0; k < Vector<T>::n; ++k)
    if (k < place.n) args.tensor[place.first + k] = x.x[k];
}

// The largest magnitude of this thread's block. Its lanes leave a loop over blocks together, so
// they, and only they, take part in its shuffles.
template <class T>
__device__ int32_t largest_of_block(const float* values) {
  constexpr int kLanes = Config<T>::kLanes;
  const unsigned mask = (kLanes == 32 ? ~0u : 0xffffu) << (threadIdx.x % 32 / kLanes * kLanes);
  int32_t largest = largest_of_lane<Config<T>::kPerLane>(values);
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    largest = ::max(largest, __shfl_xor_sync(mask, largest, offset));
  return largest;
}

template <class T, BlockCode kCode>
__global__ void __launch_bounds__(kThreads)
    quantise_kernel(const Arguments<T> args, const Loss loss) {
  using C = Config<T>;
  const int64_t n_lanes = n_blocks(args.numel) * C::kLanes, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < n_lanes; at += stride) {
    const Place<T> place(args, at);
    const Vector<T> x = load(args, place);
    float values[C::kPerLane];
#pragma unroll
    for (int k = 0; k < C::kPerLane; ++k) values[k] = widen(x.x[k]);
    code_lane<C::kPerLane, kCode>(args.codes, args.scales, place, values,
                                  largest_of_block<T>(values), loss);
  }
}

template <class T, BlockCode kCode, bool kAccumulate>
__global__ void __launch_bounds__(kThreads) dequantise_kernel(const Arguments<T> args) {
  using C = Config<T>;
  const int64_t n_lanes = n_blocks(args.numel) * C::kLanes, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < n_lanes; at += stride) {
    const Place<T> place(args, at);
    const auto codes = *reinterpret_cast<const Codes<C::kPerLane>*>(args.codes + place.first);
    const float to_value = args.scales[place.block];
    Vector<T> x;
    if constexpr (kAccumulate) x = load(args, place);
#pragma unroll
    for (int k = 0; k < C::kPerLane; ++k) {
      const float value = decode(kCode, codes.x[k], to_value);
      x.x[k] = narrow<T>(kAccumulate ? rounded_sum(widen(x.x[k]), value) : value);
    }
    store(args, place, x);
  }
}

template <BlockCode kCode>
__global__ void __launch_bounds__(kThreads)
    requantise_sum_kernel(const Arguments<float> from, const Arguments<float> to, const Forms forms,
                          const Loss loss) {
  using C = Config<float>;
  const int64_t n_lanes = n_blocks(from.numel) * C::kLanes, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < n_lanes; at += stride) {
    const Place<float> place(from, at);
    float sum[C::kPerLane];
    sum_lane<C::kPerLane, kCode>(from.codes, from.scales, place, forms, sum);
    code_lane<C::kPerLane, kCode>(to.codes, to.scales, place, sum, largest_of_block<float>(sum),
                                  loss);
  }
}

template <class T, BlockCode kCode>
__global__ void __launch_bounds__(kThreads)
    dequantise_sum_kernel(const Arguments<T> args, const Forms forms) {
  using C = Config<T>;
  const int64_t n_lanes = n_blocks(args.numel) * C::kLanes, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < n_lanes; at += stride) {
    const Place<T> place(args, at);
    float sum[C::kPerLane];
    sum_lane<C::kPerLane, kCode>(args.codes, args.scales, place, forms, sum);
    Vector<T> x;
#pragma unroll
    for (int k = 0; k < C::kPerLane; ++k) x.x[k] = narrow<T>(sum[k]);
    store(args, place, x);
  }
}

// launch
template <class T>
Arguments<T> arguments(void* quantised, void* tensor, size_t numel) {
  const int64_t n = static_cast<int64_t>(numel);
  auto* codes = static_cast<uint8_t*>(quantised);
  return {static_cast<T*>(tensor), codes,
          reinterpret_cast<float*>(codes + scales_offset(n, BlockCode::int8)), n,
          reinterpret_cast<uintptr_t>(tensor) % kVectorBytes == 0};
}

Status check(const char* kernel, const void* quantised, BlockCode code) {
  if (code == BlockCode::int4)  // whose values share bytes, and so lanes
    return {Code::invalid_argument,
            std::string("CUDA kernel '") + kernel + "' takes int8 and e4m3, not int4"};
  const unsigned misalignment = reinterpret_cast<uintptr_t>(quantised) % kVectorBytes;
  if (misalignment == 0) return {};
  return {Code::invalid_argument, std::string("CUDA kernel '") + kernel +
                                      "' needs its quantised buffer 16-byte aligned; it is " +
                                      std::to_string(misalignment) + " bytes off"};
}

Status check_stride(const char* kernel, int64_t stride_bytes) {
  if (stride_bytes % kVectorBytes == 0) return {};
  return {Code::invalid_argument, std::string("CUDA kernel '") + kernel +
                                      "' needs forms a multiple of 16 bytes apart; they are " +
                                      std::to_string(stride_bytes)};
}

template <class T>
unsigned grid(const Arguments<T>& args) {
  return grid_for(n_blocks(args.numel) * Config<T>::kLanes);
}

}  // namespace

Status quantise(void* dst, const void* src, size_t numel, DType dtype, BlockCode code, void* stream,
                Loss loss) {
  if (Status status = check("quantise", dst, code); !status.ok()) return status;
  return for_float_type("quantise", dtype, [&]<class T>(T) -> Status {
    const auto args = arguments<T>(dst, const_cast<void*>(src), numel);  // the kernel only reads it
    if (numel == 0) return {};
    const auto kernel = code == BlockCode::int8 ? quantise_kernel<T, BlockCode::int8>
                                                : quantise_kernel<T, BlockCode::e4m3>;
    kernel<<<grid(args), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, loss);
    return launched("quantise");
  });
}

Status dequantise(void* dst, const void* src, size_t numel, DType dtype, BlockCode code,
                  bool accumulate, void* stream) {
  if (Status status = check("dequantise", src, code); !status.ok()) return status;
  return for_float_type("dequantise", dtype, [&]<class T>(T) -> Status {
    const auto args = arguments<T>(const_cast<void*>(src), dst, numel);
    if (numel == 0) return {};
    const auto of_int8 = accumulate ? dequantise_kernel<T, BlockCode::int8, true>
                                    : dequantise_kernel<T, BlockCode::int8, false>;
    const auto of_e4m3 = accumulate ? dequantise_kernel<T, BlockCode::e4m3, true>
                                    : dequantise_kernel<T, BlockCode::e4m3, false>;
    const auto kernel = code == BlockCode::int8 ? of_int8 : of_e4m3;
    kernel<<<grid(args), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    return launched("dequantise");
  });
}

Status dequantise_sum(void* dst, const void* src, int n_forms, int64_t stride_bytes, size_t numel,
                      DType dtype, BlockCode code, float factor, void* stream) {
  if (Status status = check("dequantise_sum", src, code); !status.ok()) return status;
  if (Status status = check_stride("dequantise_sum", stride_bytes); !status.ok()) return status;
  return for_float_type("dequantise_sum", dtype, [&]<class T>(T) -> Status {
    const auto args = arguments<T>(const_cast<void*>(src), dst, numel);
    if (numel == 0) return {};
    const auto kernel = code == BlockCode::int8 ? dequantise_sum_kernel<T, BlockCode::int8>
                                                : dequantise_sum_kernel<T, BlockCode::e4m3>;
    kernel<<<grid(args), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        args, Forms{n_forms, stride_bytes, factor});
    return launched("dequantise_sum");
  });
}

Status requantise_sum(void* dst, const void* src, int n_forms, int64_t stride_bytes, size_t numel,
                      BlockCode code, float factor, void* stream, Loss loss) {
  for (const void* buffer : {static_cast<const void*>(dst), src})
    if (Status status = check("requantise_sum", buffer, code); !status.ok()) return status;
  if (Status status = check_stride("requantise_sum", stride_bytes); !status.ok()) return status;
  if (numel == 0) return {};
  const auto from = arguments<float>(const_cast<void*>(src), nullptr, numel);
  const auto to = arguments<float>(dst, nullptr, numel);
  const auto kernel = code == BlockCode::int8 ? requantise_sum_kernel<BlockCode::int8>
                                              : requantise_sum_kernel<BlockCode::e4m3>;
  kernel<<<grid(from), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      from, to, Forms{n_forms, stride_bytes, factor}, loss);
  return launched("requantise_sum");
}

}  // namespace pycomm::cuda
