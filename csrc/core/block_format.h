// The quantised form of a tensor, and the arithmetic of one value. The CPU engine, the CUDA kernels
// and the tests run the same code, so all get the same bits.
//
// n values are cut into blocks of 128; the last is padded with zeros. In memory: all blocks' codes,
// then all blocks' scales, one fp32 a block. int8 and e4m3 take a byte a value; of int4 byte j of a
// block holds value j in its lower half and value j + 64 in its upper one. A value is code * scale,
// and scale = max|x| of the block / the code's largest value. So fp32 shrinks to 1/3.88 (int4:
// 1/7.53), and both parts stay 16-byte aligned where the start is.
//
// A CUDA file includes <cuda_fp8.h> before this (cuda/cuda.h does), for the hardware's conversion.
//
// A block that holds a NaN or an infinity gets the scale NaN: an overflow reaches every reader, as
// it would unquantised.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/host_device.h"

namespace pycomm {

enum class BlockCode : uint8_t { int8, e4m3, int4 };

constexpr int kBlockNumel = 128;
// Below this a block's scale would leave the normal range and 1/scale overflow. Such a block rounds
// as if its maximum were this: absolute errors under 1e-31. Every product below is then a normal
// number or rounds to code 0, so that a processor that flushes subnormals gets the same bits.
constexpr float kSmallestBlockMax = 0x1p-100f;

PYCOMM_HD constexpr int codes_nbytes(BlockCode code) {  // of a block
  return code == BlockCode::int4 ? kBlockNumel / 2 : kBlockNumel;
}
PYCOMM_HD constexpr int64_t n_blocks(int64_t numel) {
  return (numel + kBlockNumel - 1) / kBlockNumel;
}
PYCOMM_HD constexpr int64_t scales_offset(int64_t numel, BlockCode code) {
  return n_blocks(numel) * codes_nbytes(code);
}
PYCOMM_HD constexpr int64_t quantised_nbytes(int64_t numel, BlockCode code) {
  return n_blocks(numel) * (codes_nbytes(code) + static_cast<int64_t>(sizeof(float)));
}

PYCOMM_HD constexpr float largest(BlockCode code) {
  return code == BlockCode::int8 ? 127.0f : code == BlockCode::int4 ? 7.0f : 448.0f;
}

// Where it is kept what coding loses: to[i] += factor * (x[i] - what is read of it). nullptr:
// nowhere.
struct Loss {
  float* to = nullptr;
  float factor = 1.0f;
};

// |x| as bits. They order as the magnitudes do, with NaN above infinity above every finite value,
// so one maximum over a block finds its largest value and whether all are finite. Signed, since
// that is what SSE and AVX compare; never negative.
PYCOMM_HD int32_t magnitude_bits(float x) { return __builtin_bit_cast(int32_t, x) & 0x7fffffff; }

struct BlockScale {
  float to_code;   // x * to_code is what gets rounded
  float to_value;  // the stored scale
};

PYCOMM_HD BlockScale block_scale(int32_t max_magnitude_bits, BlockCode code) {
  if (max_magnitude_bits >= 0x7f800000) return {0.0f, __builtin_bit_cast(float, 0x7fc00000u)};
  const float found = __builtin_bit_cast(float, max_magnitude_bits);
  const float max = found > kSmallestBlockMax ? found : kSmallestBlockMax;
  return {largest(code) / max, max / largest(code)};
}

// To nearest even. REQUIRES: |x| rounds to at most 448.
PYCOMM_HD uint32_t e4m3_in_range(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = (bits >> 24) & 0x80u;
  const int32_t magnitude = magnitude_bits(x);
  const auto round_up = static_cast<uint32_t>(magnitude);
  const uint32_t normal = ((round_up + 0x7ffffu + ((round_up >> 20) & 1u)) >> 20) - (120u << 3);
  // 2^-6 is the smallest normal e4m3; below it a code is a multiple of 2^-9. Adding 2^14 puts its 3
  // bits at the end of the mantissa, rounded by the adder; rounding up to 8 gives that normal.
  const uint32_t subnormal =
      __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0x1p14f) - 0x46800000u;
  return sign | (magnitude < 0x3c800000 ? subnormal : normal);
}

// Any x: saturates at +-448; NaN gives 0x7f. What the hardware does, for hosts and for GPUs before
// sm_89.
PYCOMM_HD uint8_t e4m3_by_integers(float x) {
  const int32_t magnitude = magnitude_bits(x);
  if (magnitude > 0x7f800000) return 0x7fu;
  if (magnitude >= 0x43e00000) return x < 0 ? 0xfeu : 0x7eu;  // 448
  return static_cast<uint8_t>(e4m3_in_range(x));
}

// The code of x in a block whose values are all finite, in the lowest 8 bits; of int4 in the lowest
// 4, with what is above them to be cut off.
PYCOMM_HD uint32_t encode_finite(BlockCode code, float x, float to_code) {
  const float scaled = x * to_code;
  if (code == BlockCode::e4m3) return e4m3_in_range(scaled);
  // Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the lowest bits.
  return __builtin_bit_cast(uint32_t, scaled + 0x1.8p23f);
}

// Any x. Of int4 the lowest 4 bits count.
PYCOMM_HD uint8_t encode(BlockCode code, float x, float to_code) {
  const float scaled = x * to_code;
  if (code == BlockCode::e4m3) {
#ifdef __CUDA_ARCH__
    return __nv_cvt_float_to_fp8(scaled, __NV_SATFINITE, __NV_E4M3);  // one instruction from sm_89
#else
    return e4m3_by_integers(scaled);
#endif
  }
  // The first clamp also gives NaN (0 * infinity) a number.
  const float above = scaled > -largest(code) ? scaled : -largest(code);
  const float clamped = above < largest(code) ? above : largest(code);
  return static_cast<uint8_t>(encode_finite(code, clamped, 1.0f));
}

// Of int4 the lower 4 bits are read.
PYCOMM_HD float decode(BlockCode code, uint8_t byte, float to_value) {
  if (code == BlockCode::int8)
    return static_cast<float>(static_cast<int32_t>(static_cast<int8_t>(byte))) * to_value;
  if (code == BlockCode::int4)
    return static_cast<float>(static_cast<int32_t>((byte & 0xfu) ^ 8u) - 8) * to_value;
  const uint32_t magnitude = byte & 0x7fu, sign = static_cast<uint32_t>(byte & 0x80u) << 24;
  const uint32_t subnormal =
      __builtin_bit_cast(uint32_t, static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f);
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  // 0x7f reads 480, but only blocks whose scale is NaN hold it.
  return __builtin_bit_cast(float, (magnitude < 8u ? subnormal : normal) | sign) * to_value;
}

}  // namespace pycomm
