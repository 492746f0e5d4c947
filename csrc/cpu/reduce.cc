#include "cpu/reduce.h"

#include <type_traits>

#define PYCOMM_SIMD plain
#include "cpu/reduce_kernels.inc"

namespace pycomm::cpu {

#if defined(__x86_64__)
namespace avx2 {
void reduce(void* d, const void* a, const void* b, unsigned long n, DType dtype, ReduceOp op);
void to_float32(float* out, const void* in, unsigned long n, DType dtype);
void from_float32(void* out, const float* in, unsigned long n, DType dtype);
}  // namespace avx2
namespace avx512 {
void reduce(void* d, const void* a, const void* b, unsigned long n, DType dtype, ReduceOp op);
void to_float32(float* out, const void* in, unsigned long n, DType dtype);
void from_float32(void* out, const float* in, unsigned long n, DType dtype);
}  // namespace avx512
#endif

namespace {

struct Kernels {
  void (*reduce)(void*, const void*, const void*, unsigned long, DType, ReduceOp);
  void (*to_float32)(float*, const void*, unsigned long, DType);
  void (*from_float32)(void*, const float*, unsigned long, DType);
};

Kernels best_kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {avx512::reduce, avx512::to_float32, avx512::from_float32};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c"))
    return {avx2::reduce, avx2::to_float32, avx2::from_float32};
#endif
  return {plain::reduce, plain::to_float32, plain::from_float32};
}

const Kernels& kernels() {
  static const Kernels best = best_kernels();
  return best;
}

template <class T>
void divide_by(void* data, size_t numel, int divisor) {
  using Wide = std::conditional_t<(sizeof(T) < sizeof(int)), int, T>;  // one that holds the divisor
  auto* values = static_cast<T*>(data);
  for (size_t i = 0; i < numel; ++i)
    values[i] = static_cast<T>(static_cast<Wide>(values[i]) / static_cast<Wide>(divisor));
}

template <class T>
void divide_narrow(void* data, size_t numel, int divisor) {
  auto* values = static_cast<T*>(data);
  for (size_t i = 0; i < numel; ++i)
    plain::narrow(values[i], plain::widen(values[i]) / static_cast<float>(divisor));
}

}  // namespace

void reduce(void* dst, const void* a, const void* b, size_t numel, DType dtype, ReduceOp op) {
  kernels().reduce(dst, a, b, numel, dtype, op);
}

void to_float32(float* out, const void* in, size_t numel, DType dtype) {
  kernels().to_float32(out, in, numel, dtype);
}

void from_float32(void* out, const float* in, size_t numel, DType dtype) {
  kernels().from_float32(out, in, numel, dtype);
}

void divide(void* data, size_t numel, DType dtype, int divisor) {
  switch (dtype) {
    case DType::uint8:
      return divide_by<uint8_t>(data, numel, divisor);
    case DType::int8:
      return divide_by<int8_t>(data, numel, divisor);
    case DType::int16:
      return divide_by<int16_t>(data, numel, divisor);
    case DType::int32:
      return divide_by<int32_t>(data, numel, divisor);
    case DType::int64:
      return divide_by<int64_t>(data, numel, divisor);
    case DType::uint16:
      return divide_by<uint16_t>(data, numel, divisor);
    case DType::uint32:
      return divide_by<uint32_t>(data, numel, divisor);
    case DType::uint64:
      return divide_by<uint64_t>(data, numel, divisor);
    case DType::float16:
      return divide_narrow<plain::Fp16>(data, numel, divisor);
    case DType::bfloat16:
      return divide_narrow<plain::Bf16>(data, numel, divisor);
    case DType::float32:
      return divide_by<float>(data, numel, divisor);
    case DType::float64:
      return divide_by<double>(data, numel, divisor);
    case DType::complex64:
      return divide_by<float>(data, 2 * numel, divisor);
    case DType::complex128:
      return divide_by<double>(data, 2 * numel, divisor);
    case DType::boolean:
    case DType::float8_e4m3fn:
    case DType::float8_e5m2:
    case DType::bytes:
      return;
  }
}

}  // namespace pycomm::cpu
