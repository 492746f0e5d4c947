#include "cpu/reduce.h"

#include <type_traits>

#define PYCOMM_SIMD plain
#include "cpu/reduce_kernels.inc"

namespace pycomm::cpu {

#if defined(__x86_64__)
namespace avx2 {
void reduce(void* d, const void* a, const void* b, unsigned long n, DType dtype, ReduceOp op);
}
namespace avx512 {
void reduce(void* d, const void* a, const void* b, unsigned long n, DType dtype, ReduceOp op);
}
#endif

namespace {

using Kernel = void (*)(void*, const void*, const void*, unsigned long, DType, ReduceOp);

Kernel best_kernel() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512::reduce;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    return avx2::reduce;
#endif
  return plain::reduce;
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
  static const Kernel kernel = best_kernel();
  kernel(dst, a, b, numel, dtype, op);
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
    case DType::bytes:
      return;
  }
}

}  // namespace pycomm::cpu
