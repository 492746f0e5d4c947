// Block quantisation for the wire, and back. The format and the arithmetic of one value stand in
// core/block_format.h.
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

template <int n>
struct alignas(n) Codes {
  uint8_t x[n];
};

// What one lane does for one block, and where.
template <class T>
struct Place {
  int64_t block, first;  // first: the lane's first element
  int n;                 // its elements inside the tensor
  bool whole;            // all of a vector, aligned
  __device__ Place(const Arguments<T>& args, int64_t at) {
    block = at / Config<T>::kLanes;
    first = at * Config<T>::kPerLane;
    const int64_t left = args.numel - first;
    n = static_cast<int>(left < 0 ? 0 : left < Config<T>::kPerLane ? left : Config<T>::kPerLane);
    whole = args.aligned && n == Config<T>::kPerLane;
  }
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

template <class T, BlockCode kCode>
__global__ void __launch_bounds__(kThreads) quantise_kernel(const Arguments<T> args) {
  using C = Config<T>;
  const int64_t n_lanes = n_blocks(args.numel) * C::kLanes, stride = int64_t{gridDim.x} * kThreads;
  // The lanes of one block leave the loop together, so they, and only they, take part in its
  // shuffles.
  const unsigned block_mask = (C::kLanes == 32 ? ~0u : 0xffffu)
                              << (threadIdx.x % 32 / C::kLanes * C::kLanes);
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < n_lanes; at += stride) {
    const Place<T> place(args, at);
    const Vector<T> x = load(args, place);
    int32_t max = 0;
#pragma unroll
    for (int k = 0; k < C::kPerLane; ++k) max = ::max(max, magnitude_bits(widen(x.x[k])));
#pragma unroll
    for (int offset = C::kLanes / 2; offset > 0; offset /= 2)
      max = ::max(max, __shfl_xor_sync(block_mask, max, offset));
    const BlockScale scale = block_scale(max, kCode);
    Codes<C::kPerLane> codes;
#pragma unroll
    for (int k = 0; k < C::kPerLane; ++k) codes.x[k] = encode(kCode, widen(x.x[k]), scale.to_code);
    *reinterpret_cast<Codes<C::kPerLane>*>(args.codes + place.first) = codes;
    if (at % C::kLanes == 0) args.scales[place.block] = scale.to_value;
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
      // __fadd_rn is never fused with decode's product, so a CPU that rounds both gets the same
      // bits.
      x.x[k] = narrow<T>(kAccumulate ? __fadd_rn(widen(x.x[k]), value) : value);
    }
    store(args, place, x);
  }
}

// The sum of the tensors that several quantised forms hold, in their order, times a factor.
template <class T, BlockCode kCode>
__global__ void __launch_bounds__(kThreads)
    dequantise_sum_kernel(const Arguments<T> args, int n_forms, int64_t stride_bytes,
                          float factor) {
  using C = Config<T>;
  const int64_t n_lanes = n_blocks(args.numel) * C::kLanes, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < n_lanes; at += stride) {
    const Place<T> place(args, at);
    float sum[C::kPerLane];
    for (int form = 0; form < n_forms; ++form) {
      const auto codes = *reinterpret_cast<const Codes<C::kPerLane>*>(
          args.codes + form * stride_bytes + place.first);
      const float to_value = *reinterpret_cast<const float*>(
          reinterpret_cast<const char*>(args.scales + place.block) + form * stride_bytes);
#pragma unroll
      for (int k = 0; k < C::kPerLane; ++k) {
        const float value = decode(kCode, codes.x[k], to_value);
        sum[k] = form == 0 ? value : __fadd_rn(sum[k], value);
      }
    }
    Vector<T> x;
#pragma unroll
    for (int k = 0; k < C::kPerLane; ++k) x.x[k] = narrow<T>(__fmul_rn(sum[k], factor));
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

template <class T>
unsigned grid(const Arguments<T>& args) {
  return grid_for(n_blocks(args.numel) * Config<T>::kLanes);
}

}  // namespace

Status quantise(void* dst, const void* src, size_t numel, DType dtype, BlockCode code,
                void* stream) {
  if (Status status = check("quantise", dst, code); !status.ok()) return status;
  return for_float_type("quantise", dtype, [&]<class T>(T) -> Status {
    const auto args = arguments<T>(dst, const_cast<void*>(src), numel);  // the kernel only reads it
    if (numel == 0) return {};
    const auto kernel = code == BlockCode::int8 ? quantise_kernel<T, BlockCode::int8>
                                                : quantise_kernel<T, BlockCode::e4m3>;
    kernel<<<grid(args), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
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
  if (stride_bytes % kVectorBytes != 0)
    return {Code::invalid_argument,
            "CUDA kernel 'dequantise_sum' needs forms a multiple of 16 bytes apart; they are " +
                std::to_string(stride_bytes)};
  return for_float_type("dequantise_sum", dtype, [&]<class T>(T) -> Status {
    const auto args = arguments<T>(const_cast<void*>(src), dst, numel);
    if (numel == 0) return {};
    const auto kernel = code == BlockCode::int8 ? dequantise_sum_kernel<T, BlockCode::int8>
                                                : dequantise_sum_kernel<T, BlockCode::e4m3>;
    kernel<<<grid(args), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, n_forms,
                                                                           stride_bytes, factor);
    return launched("dequantise_sum");
  });
}

}  // namespace pycomm::cuda
