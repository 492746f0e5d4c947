// What one lane does to its part of a block in the quantising kernels (quantise.cu), and what the
// CPU tests run in its place (tests/cc/test_block_lanes.cc). A lane holds kPerLane neighbouring
// values; only the largest magnitude of a block goes between lanes.
#pragma once

#include <cstdint>
#ifdef __CUDACC__
#include <cuda_fp8.h>
#endif

#include "core/block_format.h"

namespace pycomm::cuda {

// Never fused into one rounding, so that a CPU that rounds both gets the same bits.
PYCOMM_HD float rounded_sum(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
PYCOMM_HD float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

template <int n>
struct alignas(n) Codes {
  uint8_t x[n];
};

// Quantised forms of as many values, stride_bytes apart, whose sum is to be taken times factor.
struct Forms {
  int n;
  int64_t stride_bytes;
  float factor;
};

// A lane's place: its block, its first value, and how many of its values the tensor has.
struct Lane {
  int64_t block, first;
  int n;
};

template <int kPerLane>
PYCOMM_HD Lane lane_at(int64_t at, int64_t numel) {
  const int64_t first = at * kPerLane, left = numel - first;
  return {first / kBlockNumel, first,
          static_cast<int>(left < 0          ? 0
                           : left < kPerLane ? left
                                             : kPerLane)};
}

// The sums of a lane's values over all forms, in their order. Padding sums to zero.
template <int kPerLane, BlockCode kCode>
PYCOMM_HD void sum_lane(const uint8_t* codes, const float* scales, const Lane& lane,
                        const Forms& forms, float* sum) {
  for (int form = 0; form < forms.n; ++form) {
    const auto of_form =
        *reinterpret_cast<const Codes<kPerLane>*>(codes + form * forms.stride_bytes + lane.first);
    const float to_value = *reinterpret_cast<const float*>(
        reinterpret_cast<const char*>(scales + lane.block) + form * forms.stride_bytes);
    for (int k = 0; k < kPerLane; ++k) {
      const float value = decode(kCode, of_form.x[k], to_value);
      sum[k] = form == 0 ? value : rounded_sum(sum[k], value);
    }
  }
  for (int k = 0; k < kPerLane; ++k) sum[k] = rounded_product(sum[k], forms.factor);
}

template <int kPerLane>
PYCOMM_HD int32_t largest_of_lane(const float* values) {
  int32_t largest = 0;
  for (int k = 0; k < kPerLane; ++k) {
    const int32_t magnitude = magnitude_bits(values[k]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// Writes a lane's codes, adds what they lose, and, as a block's first lane, writes its scale.
template <int kPerLane, BlockCode kCode>
PYCOMM_HD void code_lane(uint8_t* codes, float* scales, const Lane& lane, const float* values,
                         int32_t largest_of_block, const Loss& loss) {
  const BlockScale scale = block_scale(largest_of_block, kCode);
  Codes<kPerLane> found;
  for (int k = 0; k < kPerLane; ++k) found.x[k] = encode(kCode, values[k], scale.to_code);
  *reinterpret_cast<Codes<kPerLane>*>(codes + lane.first) = found;
  if (lane.first % kBlockNumel == 0) scales[lane.block] = scale.to_value;
  if (loss.to == nullptr) return;
  for (int k = 0; k < kPerLane; ++k) {  // a fixed count keeps the codes in registers
    if (k >= lane.n) continue;
    const float lost = rounded_sum(values[k], -decode(kCode, found.x[k], scale.to_value));
    float* const to = loss.to + lane.first + k;
    *to = rounded_sum(*to, rounded_product(loss.factor, lost));
  }
}

}  // namespace pycomm::cuda
