// The wire's kernels against the arithmetic of one value in core/block_format.h, for every
// instruction set that this processor has: byte for byte.
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "cpu/coding.h"
#include "testing.h"

using namespace pycomm;

namespace pycomm::cpu {
#define PYCOMM_DECLARE(simd)                                           \
  namespace simd {                                                     \
  void encode(void* out, const float* in, unsigned long n, Wire wire); \
  void decode(float* out, const void* in, unsigned long n, Wire wire); \
  int max_magnitude(const float* values, unsigned long n);             \
  }
PYCOMM_DECLARE(plain)
#if defined(__x86_64__)
PYCOMM_DECLARE(avx2)
PYCOMM_DECLARE(avx512)
#endif
}  // namespace pycomm::cpu

namespace {

struct Kernels {
  const char* name;
  void (*encode)(void*, const float*, unsigned long, Wire);
  void (*decode)(float*, const void*, unsigned long, Wire);
  int (*max_magnitude)(const float*, unsigned long);
};

std::vector<Kernels> runnable() {
  using namespace cpu;
  std::vector<Kernels> sets{{"plain", plain::encode, plain::decode, plain::max_magnitude}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"))
    sets.push_back({"avx2", avx2::encode, avx2::decode, avx2::max_magnitude});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets.push_back({"avx512", avx512::encode, avx512::decode, avx512::max_magnitude});
#endif
  return sets;
}

using Bytes = std::vector<uint8_t>;

// core/block_format.h, value by value.
Bytes encoded(const std::vector<float>& x, BlockCode code) {
  const auto n = static_cast<int64_t>(x.size());
  Bytes out(static_cast<size_t>(quantised_nbytes(n, code)));
  for (int64_t block = 0; block < n_blocks(n); ++block) {
    const auto at = [&](int64_t i) {
      return block * kBlockNumel + i < n ? x[static_cast<size_t>(block * kBlockNumel + i)] : 0.0f;
    };
    int32_t max = 0;
    for (int i = 0; i < kBlockNumel; ++i) max = std::max(max, magnitude_bits(at(i)));
    const BlockScale scale = block_scale(max, code);
    uint8_t* codes = out.data() + block * codes_nbytes(code);
    for (int i = 0; i < codes_nbytes(code); ++i) {
      codes[i] = encode(code, at(i), scale.to_code);
      if (code == BlockCode::int4)
        codes[i] =
            static_cast<uint8_t>((codes[i] & 0xf) | (encode(code, at(i + 64), scale.to_code) << 4));
    }
    std::memcpy(out.data() + scales_offset(n, code) + block * 4, &scale.to_value, 4);
  }
  return out;
}

uint16_t to_bf16(float x) {
  const auto bits = __builtin_bit_cast(uint32_t, x);
  if (std::isnan(x)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  // To the nearer of two neighbours, by distance in the bits.
  const uint32_t low = bits >> 16, rest = bits & 0xffff;
  return static_cast<uint16_t>(low + (rest > 0x8000 || (rest == 0x8000 && (low & 1))));
}

std::vector<std::vector<float>> inputs() {
  std::mt19937 random(5);
  std::vector<std::vector<float>> all;
  for (size_t n : {0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 1000, 4096})
    for (int kind = 0; kind < 6; ++kind) {
      std::vector<float> x(n);
      std::normal_distribution<float> normal;
      for (size_t i = 0; i < n; ++i) {
        const auto bits = static_cast<uint32_t>(random());
        switch (kind) {
          case 0:
            x[i] = normal(random);
            break;
          case 1:  // every bit pattern, NaN and infinity among them
            x[i] = __builtin_bit_cast(float, bits);
            break;
          case 2:  // finite, of all magnitudes
            x[i] = __builtin_bit_cast(float, bits % 0x7f800000u | (bits & 0x80000000u));
            break;
          case 3:  // an outlier in every other block
            x[i] = normal(random) * (i % 256 == 77 ? 1e30f : 1e-3f);
            break;
          case 4:  // subnormal
            x[i] = __builtin_bit_cast(float, bits & 0x807fffffu);
            break;
          default:  // halfway between two codes
            x[i] = static_cast<float>(static_cast<int>(bits % 255) - 127) + 0.5f * (bits % 3 != 0);
        }
      }
      all.push_back(std::move(x));
    }
  return all;
}

template <class Check>
void for_all(Check check) {
  for (const auto& set : runnable())
    for (const auto& x : inputs()) check(set, x);
}

}  // namespace

TEST(block_codes_are_those_of_one_value_at_a_time) {
  for_all([](const Kernels& set, const std::vector<float>& x) {
    for (Wire wire : {Wire::fp8, Wire::int8, Wire::int4}) {
      const Bytes expected = encoded(x, block_code(wire));
      Bytes got(coded_nbytes(wire, x.size()));
      set.encode(got.data(), x.data(), x.size(), wire);
      EXPECT_TRUE(got == expected);
    }
  });
}

TEST(decoded_values_are_those_of_one_value_at_a_time) {
  for_all([](const Kernels& set, const std::vector<float>& x) {
    for (Wire wire : {Wire::fp8, Wire::int8, Wire::int4}) {
      const BlockCode code = block_code(wire);
      const auto n = static_cast<int64_t>(x.size());
      const Bytes bytes = encoded(x, code);
      std::vector<float> got(x.size() + 1, 7.0f);
      set.decode(got.data(), bytes.data(), x.size(), wire);
      EXPECT_EQ(got.back(), 7.0f);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t block = i / kBlockNumel, in_block = i % kBlockNumel;
        float scale;
        std::memcpy(&scale, bytes.data() + scales_offset(n, code) + block * 4, 4);
        const uint8_t byte =
            bytes[static_cast<size_t>(block * codes_nbytes(code) + in_block % codes_nbytes(code))];
        const float value = decode(code, in_block < codes_nbytes(code) ? byte : byte >> 4, scale);
        EXPECT_EQ(__builtin_bit_cast(uint32_t, got[static_cast<size_t>(i)]),
                  __builtin_bit_cast(uint32_t, value));
      }
    }
  });
}

TEST(bf16_rounds_to_nearest_even_and_keeps_what_is_not_finite) {
  for_all([](const Kernels& set, const std::vector<float>& x) {
    std::vector<uint16_t> got(x.size());
    set.encode(got.data(), x.data(), x.size(), Wire::bf16);
    std::vector<float> back(x.size());
    set.decode(back.data(), got.data(), x.size(), Wire::bf16);
    for (size_t i = 0; i < x.size(); ++i) {
      EXPECT_EQ(got[i], to_bf16(x[i]));
      EXPECT_EQ(__builtin_bit_cast(uint32_t, back[i]), static_cast<uint32_t>(got[i]) << 16);
      EXPECT_EQ(std::isnan(back[i]), std::isnan(x[i]));
    }
  });
}

TEST(the_largest_magnitude_tells_whether_all_are_finite) {
  for_all([](const Kernels& set, const std::vector<float>& x) {
    bool finite = true;
    for (float value : x) finite &= std::isfinite(value);
    EXPECT_EQ(set.max_magnitude(x.data(), x.size()) < 0x7f800000, finite);
    EXPECT_EQ(cpu::all_finite(x.data(), x.size(), DType::float32), finite);
  });
}

// torch.set_flush_denormal() on one rank must not make its bits differ from the others'.
#if defined(__SSE__)
TEST(flushing_subnormals_changes_no_bit) {
  const unsigned before = _mm_getcsr();
  for_all([before](const Kernels& set, const std::vector<float>& x) {
    for (Wire wire : {Wire::bf16, Wire::fp8, Wire::int8, Wire::int4}) {
      Bytes plain(coded_nbytes(wire, x.size())), flushed(plain.size());
      std::vector<float> back(x.size()), back_flushed(x.size());
      set.encode(plain.data(), x.data(), x.size(), wire);
      set.decode(back.data(), plain.data(), x.size(), wire);
      _mm_setcsr(before | 0x8040);  // flush to zero, denormals are zero
      set.encode(flushed.data(), x.data(), x.size(), wire);
      set.decode(back_flushed.data(), flushed.data(), x.size(), wire);
      _mm_setcsr(before);
      EXPECT_TRUE(plain == flushed);
      EXPECT_TRUE(x.empty() ||
                  std::memcmp(back.data(), back_flushed.data(), x.size() * sizeof(float)) == 0);
    }
  });
}
#endif

TEST(a_round_trip_goes_segment_by_segment) {
  std::mt19937 random(9);
  std::normal_distribution<float> normal;
  for (size_t n : {size_t{0}, size_t{1}, kWireSegment - 1, kWireSegment, 2 * kWireSegment + 129})
    for (Wire wire : {Wire::bf16, Wire::fp8, Wire::int8, Wire::int4}) {
      std::vector<float> x(n), expected(n);
      for (float& value : x) value = normal(random);
      for (size_t i = 0; i < n; i += kWireSegment) {
        const size_t m = std::min<size_t>(kWireSegment, n - i);
        Bytes bytes(coded_nbytes(wire, m));
        cpu::encode(bytes.data(), x.data() + i, m, wire);
        cpu::decode(expected.data() + i, bytes.data(), m, wire);
      }
      cpu::round_trip(x.data(), x.data(), n, wire);
      EXPECT_TRUE(x == expected);
    }
}

TEST(segments_are_whole_blocks_and_sizes_add_up) {
  EXPECT_EQ(kWireSegment % kBlockNumel, 0u);
  for (Wire wire : {Wire::bf16, Wire::fp8, Wire::int8, Wire::int4})
    for (uint64_t rest : {0, 1, 127, 128, 129})
      EXPECT_EQ(coded_nbytes(wire, 3 * kWireSegment + rest),
                3 * coded_nbytes(wire, kWireSegment) + coded_nbytes(wire, rest));
  EXPECT_EQ(coded_nbytes(Wire::int8, 128), 132u);
  EXPECT_EQ(coded_nbytes(Wire::int4, 1), 68u);
  EXPECT_EQ(coded_nbytes(Wire::bf16, 3), 6u);
  EXPECT_EQ(coded_nbytes(Wire::none, 3), 12u);
}
