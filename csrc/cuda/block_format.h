// The quantised form of a tensor, and the arithmetic of one value. The kernels and the CPU tests
// run the same code.
//
// n values are cut into blocks of 128; the last is padded with zeros. In memory: all blocks' codes,
// one byte a value, then all blocks' scales, one fp32 a block. A value is code * scale, and scale =
// max|x| of the block / the code's largest value. So fp32 shrinks to 1/3.88, bf16 to 1/1.94, and
// both parts stay 16-byte aligned where the start is.
//
// A block that holds a NaN or an infinity gets the scale NaN: an overflow reaches every reader, as
// it would unquantised.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "cuda/indexing.h"
#ifdef __CUDACC__
#include <cuda_fp8.h>
#endif

namespace pycomm::cuda {

enum class BlockCode : uint8_t { int8, e4m3 };

constexpr int kBlockNumel = 128;
// Below this a block's scale would leave the normal range and 1/scale overflow. Such a block rounds
// as if its maximum were this: absolute errors under 1e-32.
constexpr float kSmallestBlockMax = 0x1p-100f;

PYCOMM_HD int64_t n_blocks(int64_t numel) { return ceil_div(numel, kBlockNumel); }
PYCOMM_HD int64_t scales_offset(int64_t numel) { return n_blocks(numel) * kBlockNumel; }
PYCOMM_HD int64_t quantised_nbytes(int64_t numel) {
  return n_blocks(numel) * (kBlockNumel + static_cast<int64_t>(sizeof(float)));
}

PYCOMM_HD constexpr float largest(BlockCode code) {
  return code == BlockCode::int8 ? 127.0f : 448.0f;
}

// |x| as bits. They order as the magnitudes do, with NaN above infinity above every finite value,
// so one unsigned maximum over a block finds its largest value and whether all are finite.
PYCOMM_HD uint32_t magnitude_bits(float x) { return __builtin_bit_cast(uint32_t, x) & 0x7fffffffu; }

struct BlockScale {
  float to_code;   // x * to_code is what gets rounded
  float to_value;  // the stored scale
};

PYCOMM_HD BlockScale block_scale(uint32_t max_magnitude_bits, BlockCode code) {
  if (max_magnitude_bits >= 0x7f800000u) return {0.0f, __builtin_bit_cast(float, 0x7fc00000u)};
  const float max = fmaxf(__builtin_bit_cast(float, max_magnitude_bits), kSmallestBlockMax);
  return {largest(code) / max, max / largest(code)};
}

// To nearest even, saturating at +-448; NaN gives 0x7f. What the hardware does, for hosts and for
// GPUs before sm_89.
PYCOMM_HD uint8_t e4m3_by_integers(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), magnitude = bits & 0x7fffffffu,
                 sign = (bits >> 24) & 0x80u;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(0x7fu);
  if (magnitude >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7eu);  // 448
  // 2^-6 is the smallest normal e4m3; below it a code is a multiple of 2^-9, and rounding up to 8
  // gives that normal.
  const uint32_t code =
      magnitude < 0x3c800000u
          ? static_cast<uint32_t>(rintf(__builtin_bit_cast(float, magnitude) * 512.0f))
          : ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - ((127u - 7u) << 3);
  return static_cast<uint8_t>(sign | code);
}

PYCOMM_HD uint8_t encode(BlockCode code, float x, float to_code) {
  const float scaled = x * to_code;
  if (code == BlockCode::int8) {
    // The clamp also gives NaN (0 * infinity) a number, since a cast from NaN is undefined.
    return static_cast<uint8_t>(static_cast<int8_t>(rintf(fminf(fmaxf(scaled, -127.0f), 127.0f))));
  }
#ifdef __CUDA_ARCH__
  return __nv_cvt_float_to_fp8(scaled, __NV_SATFINITE, __NV_E4M3);  // one instruction from sm_89 on
#else
  return e4m3_by_integers(scaled);
#endif
}

PYCOMM_HD float decode(BlockCode code, uint8_t byte, float to_value) {
  if (code == BlockCode::int8) return static_cast<float>(static_cast<int8_t>(byte)) * to_value;
  // e4m3's bits in fp32's places read 2^120 too small, subnormals included; a power of two corrects
  // that exactly. 0x7f would read 480, but only blocks whose scale is NaN hold it.
  const uint32_t magnitude = static_cast<uint32_t>(byte & 0x7fu) << 20,
                 sign = static_cast<uint32_t>(byte & 0x80u) << 24;
  return __builtin_bit_cast(float, magnitude | sign) * 0x1p120f * to_value;
}

}  // namespace pycomm::cuda
