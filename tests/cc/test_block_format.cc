// The block format as the kernels compute it, run on the CPU: sizes, round-trip error, and the
// values that break things.
#include <cmath>
#include <limits>
#include <random>

#include "core/block_format.h"
#include "testing.h"

using namespace pycomm;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One block at a time, as a kernel's lanes do it together.
std::vector<float> round_trip(const std::vector<float>& x, BlockCode code) {
  const int64_t n = static_cast<int64_t>(x.size());
  std::vector<float> result(x.size());
  for (int64_t block = 0; block < n_blocks(n); ++block) {
    const int64_t begin = block * kBlockNumel, end = std::min(n, begin + kBlockNumel);
    int32_t max = 0;
    for (int64_t i = begin; i < end; ++i) max = std::max(max, magnitude_bits(x[i]));
    const BlockScale scale = block_scale(max, code);
    for (int64_t i = begin; i < end; ++i)
      result[i] = decode(code, encode(code, x[i], scale.to_code), scale.to_value);
  }
  return result;
}

// Half a step of the code at the value x of a block whose largest magnitude is max, and 1e-4 for
// the fp32 roundings.
float error_bound(BlockCode code, float x, float max) {
  if (code != BlockCode::e4m3) return max / largest(code) * 0.5f * (1 + 1e-4f);
  return std::max(std::fabs(x) / 16, max / 448 * 0x1p-10f) *
         (1 + 1e-4f);  // 3 bits after the point, or a subnormal
}

}  // namespace

TEST(sizes_and_offsets) {
  for (BlockCode code : {BlockCode::int8, BlockCode::e4m3}) {
    EXPECT_EQ(quantised_nbytes(0, code), 0);
    for (int64_t n : {1, 127, 128}) EXPECT_EQ(quantised_nbytes(n, code), 132);
    EXPECT_EQ(quantised_nbytes(129, code), 264);
    EXPECT_EQ(scales_offset(129, code), 256);
    EXPECT_EQ(scales_offset(int64_t{1} << 40, code), int64_t{1} << 40);
  }
  EXPECT_EQ(quantised_nbytes(129, BlockCode::int4), 136);
  EXPECT_EQ(scales_offset(129, BlockCode::int4), 128);
}

TEST(round_trip_error_is_within_half_a_step) {
  std::mt19937 random(7);
  for (BlockCode code : {BlockCode::int8, BlockCode::e4m3, BlockCode::int4}) {
    for (int64_t n : {1, 2, 127, 128, 129, 255, 256, 1000}) {
      for (float magnitude : {1e-30f, 1e-3f, 1.0f, 1e4f, 1e30f}) {
        std::normal_distribution<float> normal(0, magnitude);
        std::vector<float> x(n);
        for (float& value : x) value = normal(random);
        const std::vector<float> y = round_trip(x, code);
        for (int64_t i = 0; i < n; ++i) {
          float max = kSmallestBlockMax;
          for (int64_t j = i / kBlockNumel * kBlockNumel;
               j < std::min(n, (i / kBlockNumel + 1) * kBlockNumel); ++j)
            max = std::max(max, std::fabs(x[j]));
          EXPECT_TRUE(std::fabs(x[i] - y[i]) <= error_bound(code, x[i], max));
        }
      }
    }
  }
}

TEST(zeros_stay_zero_and_the_largest_value_is_kept) {
  for (BlockCode code : {BlockCode::int8, BlockCode::e4m3, BlockCode::int4}) {
    for (float value : round_trip(std::vector<float>(200, 0.0f), code)) EXPECT_EQ(value, 0.0f);
    const std::vector<float> y = round_trip({-3.5f, 1.0f, 0.0f}, code);
    EXPECT_TRUE(std::fabs(y[0] + 3.5f) < 1e-6f);
    EXPECT_EQ(y[2], 0.0f);
  }
}

TEST(tiny_and_huge_blocks_neither_overflow_nor_turn_into_nan) {
  for (BlockCode code : {BlockCode::int8, BlockCode::e4m3, BlockCode::int4}) {
    for (float value : {1e-45f, 1e-38f, 0x1p-101f, 3.4e38f}) {
      const float limit = std::numeric_limits<float>::max();
      for (float y : round_trip({value, -value, 0.0f}, code)) EXPECT_TRUE(std::fabs(y) <= limit);
    }
    EXPECT_TRUE(std::fabs(round_trip({1e-45f}, code)[0]) < 1e-31f);
  }
}

TEST(a_value_that_is_not_finite_reaches_every_reader_of_its_block_and_no_other) {
  for (BlockCode code : {BlockCode::int8, BlockCode::e4m3, BlockCode::int4}) {
    for (float bad : {kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
      std::vector<float> x(300, 1.0f);
      x[130] = bad;
      const std::vector<float> y = round_trip(x, code);
      for (int i = 0; i < 300; ++i) EXPECT_EQ(std::isnan(y[i]), i / kBlockNumel == 1);
    }
  }
}

TEST(e4m3_codes_decode_to_themselves) {
  for (int byte = 0; byte < 256; ++byte) {
    if ((byte & 0x7f) == 0x7f) continue;  // NaN
    const float value = decode(BlockCode::e4m3, static_cast<uint8_t>(byte), 1.0f);
    EXPECT_EQ(int{e4m3_by_integers(value)}, byte);
  }
}

TEST(e4m3_rounds_to_the_nearest_code_and_ties_to_even) {
  for (int code = 0; code < 0x7e; ++code) {
    const float low = decode(BlockCode::e4m3, static_cast<uint8_t>(code), 1.0f);
    const float high = decode(BlockCode::e4m3, static_cast<uint8_t>(code + 1), 1.0f);
    const float middle = (low + high) / 2;
    EXPECT_EQ(int{e4m3_by_integers(middle)}, code % 2 ? code + 1 : code);
    EXPECT_EQ(int{e4m3_by_integers(std::nextafter(middle, 0.0f))}, code);
    EXPECT_EQ(int{e4m3_by_integers(std::nextafter(middle, kInfinity))}, code + 1);
    EXPECT_EQ(int{e4m3_by_integers(-high)}, 0x80 | (code + 1));
  }
  for (float large : {448.0f, 449.0f, 1e9f, kInfinity})
    EXPECT_EQ(int{e4m3_by_integers(large)}, 0x7e);
}
