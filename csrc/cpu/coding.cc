#include "cpu/coding.h"

#include <algorithm>

#define PYCOMM_SIMD plain
#include "cpu/coding_kernels.inc"

namespace pycomm::cpu {

#if defined(__x86_64__)
namespace avx2 {
void encode(void* out, const float* in, unsigned long n, Wire wire);
void decode(float* out, const void* in, unsigned long n, Wire wire);
int max_magnitude(const float* values, unsigned long n);
}  // namespace avx2
namespace avx512 {
void encode(void* out, const float* in, unsigned long n, Wire wire);
void decode(float* out, const void* in, unsigned long n, Wire wire);
int max_magnitude(const float* values, unsigned long n);
}  // namespace avx512
#endif

namespace {

struct Kernels {
  void (*encode)(void*, const float*, unsigned long, Wire);
  void (*decode)(float*, const void*, unsigned long, Wire);
  int (*max_magnitude)(const float*, unsigned long);
};

Kernels best_kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return {avx512::encode, avx512::decode, avx512::max_magnitude};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c"))
    return {avx2::encode, avx2::decode, avx2::max_magnitude};
#endif
  return {plain::encode, plain::decode, plain::max_magnitude};
}

const Kernels& kernels() {
  static const Kernels best = best_kernels();
  return best;
}

}  // namespace

void encode(void* out, const float* in, size_t numel, Wire wire) {
  kernels().encode(out, in, numel, wire);
}

void decode(float* out, const void* in, size_t numel, Wire wire) {
  kernels().decode(out, in, numel, wire);
}

bool all_finite(const void* values, size_t numel, DType dtype) {
  if (dtype == DType::float32)
    return kernels().max_magnitude(static_cast<const float*>(values), numel) < 0x7f800000;
  const uint16_t exponent = dtype == DType::bfloat16 ? 0x7f80 : 0x7c00;
  const auto* bits = static_cast<const uint16_t*>(values);
  return std::none_of(bits, bits + numel,
                      [exponent](uint16_t x) { return (x & exponent) == exponent; });
}

void round_trip(float* out, const float* in, size_t numel, Wire wire) {
  alignas(64) std::byte segment[coded_nbytes(Wire::bf16, kWireSegment)];
  static_assert(sizeof(segment) >= coded_nbytes(Wire::int8, kWireSegment));
  for (size_t done = 0; done < numel;) {
    const size_t n = std::min<size_t>(numel - done, kWireSegment);
    encode(segment, in + done, n, wire);
    decode(out + done, segment, n, wire);
    done += n;
  }
}

}  // namespace pycomm::cpu
