// The reduction kernels of every instruction set this processor has, against one scalar at a time
// computed another way.
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "cpu/reduce.h"
#include "testing.h"

using pycomm::DType;
using pycomm::ReduceOp;

namespace pycomm::cpu {
#define KERNELS_OF(simd)                                                        \
  namespace simd {                                                              \
  void reduce(void*, const void*, const void*, unsigned long, DType, ReduceOp); \
  void to_float32(float*, const void*, unsigned long, DType);                   \
  void from_float32(void*, const float*, unsigned long, DType);                 \
  }
KERNELS_OF(plain)
#if defined(__x86_64__)
KERNELS_OF(avx2)
KERNELS_OF(avx512)
#endif
}  // namespace pycomm::cpu

namespace {

using Kernel = void (*)(void*, const void*, const void*, unsigned long, DType, ReduceOp);

void chosen(void* dst, const void* a, const void* b, unsigned long n, DType dtype, ReduceOp op) {
  pycomm::cpu::reduce(dst, a, b, n, dtype, op);
}

std::vector<std::pair<const char*, Kernel>> kernels() {
  std::vector<std::pair<const char*, Kernel>> found = {{"chosen", &chosen},
                                                       {"plain", &pycomm::cpu::plain::reduce}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
    found.push_back({"avx2", &pycomm::cpu::avx2::reduce});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back({"avx512", &pycomm::cpu::avx512::reduce});
#endif
  return found;
}

// The 16-bit floats by their definition: p bits of significand, smallest normal exponent, largest
// finite value.
struct Half {
  int p, emin, mantissa;
  double max;
};
constexpr Half kFp16{11, -14, 10, 65504.0};
constexpr Half kBf16{8, -126, 7, 3.3895313892515355e38};

double decode(const Half& format, uint16_t bits) {
  const int exponent_bits = 15 - format.mantissa;
  const int exponent = (bits & 0x7fff) >> format.mantissa,
            fraction = bits & ((1 << format.mantissa) - 1);
  const double sign = (bits & 0x8000) ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1)
    return fraction ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(fraction, format.emin - format.mantissa);
  return sign * std::ldexp(fraction + (1 << format.mantissa),
                           exponent - 1 + format.emin - format.mantissa);
}

// The nearest value of the format, ties to even: what decode() of the result must be.
double nearest(const Half& format, double x) {
  if (std::isnan(x) || std::isinf(x) || x == 0) return x;
  const double ulp = std::ldexp(1.0, std::max(std::ilogb(x), format.emin) - (format.p - 1));
  const double rounded = std::nearbyint(x / ulp) * ulp;
  return std::fabs(rounded) > format.max ? std::copysign(std::numeric_limits<double>::infinity(), x)
                                         : rounded;
}

template <class T>
struct Type {
  using Value = T;
  static T random(std::mt19937_64& rng) {
    const uint64_t bits = rng();
    if constexpr (std::is_floating_point_v<T>) {
      constexpr T special[] = {T(0),
                               -T(0),
                               T(1),
                               std::numeric_limits<T>::infinity(),
                               -std::numeric_limits<T>::infinity(),
                               std::numeric_limits<T>::quiet_NaN(),
                               std::numeric_limits<T>::denorm_min(),
                               std::numeric_limits<T>::max()};
      if (bits % 4 == 0) return special[(bits >> 8) % 8];
      return static_cast<T>(static_cast<double>(static_cast<int64_t>(bits)) * 1e-15);
    } else {
      return static_cast<T>(bits);
    }
  }
  // Small types in 64 bits, 64-bit ones in 128: nothing overflows on the way.
  static T combine(T a, T b, ReduceOp op) {
    if constexpr (std::is_floating_point_v<T>) {
      switch (op) {
        case ReduceOp::sum:
        case ReduceOp::avg:
          return a + b;
        case ReduceOp::product:
          return a * b;
        case ReduceOp::min:
          return std::isnan(a) ? a : std::isnan(b) ? b : b < a ? b : a;
        default:
          return std::isnan(a) ? a : std::isnan(b) ? b : b > a ? b : a;
      }
    } else {
      using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
      const auto x = static_cast<Wide>(a), y = static_cast<Wide>(b);
      switch (op) {
        case ReduceOp::sum:
        case ReduceOp::avg:
          return static_cast<T>(x + y);
        case ReduceOp::product:
          return static_cast<T>(static_cast<unsigned __int128>(x) *
                                static_cast<unsigned __int128>(y));
        case ReduceOp::min:
          return x < y ? a : b;
        case ReduceOp::max:
          return x > y ? a : b;
        case ReduceOp::band:
          return static_cast<T>(x & y);
        case ReduceOp::bor:
          return static_cast<T>(x | y);
        case ReduceOp::bxor:
          return static_cast<T>(x ^ y);
      }
      return 0;
    }
  }
  static bool same(T got, T expected) {
    if constexpr (std::is_floating_point_v<T>) {
      if (std::isnan(expected)) return std::isnan(got);
    }
    return got == expected;
  }
};

struct Bool : Type<uint8_t> {
  static uint8_t random(std::mt19937_64& rng) { return rng() & 1; }
  static uint8_t combine(uint8_t a, uint8_t b, ReduceOp op) {
    switch (op) {
      case ReduceOp::product:
      case ReduceOp::min:
      case ReduceOp::band:
        return a && b;
      case ReduceOp::bxor:
        return a != b;
      default:
        return a || b;
    }
  }
};

template <const Half& format>
struct Narrow {
  using Value = uint16_t;
  static uint16_t random(std::mt19937_64& rng) { return static_cast<uint16_t>(rng()); }
  static double combined(uint16_t a, uint16_t b, ReduceOp op) {
    const double x = decode(format, a), y = decode(format, b);
    switch (op) {
      case ReduceOp::sum:
      case ReduceOp::avg:
        return static_cast<float>(x + y);  // exact in double, rounded to fp32
      case ReduceOp::product:
        return static_cast<float>(x * y);
      case ReduceOp::min:
        return std::isnan(x) ? x : std::isnan(y) ? y : x < y ? x : y;
      default:
        return std::isnan(x) ? x : std::isnan(y) ? y : x > y ? x : y;
    }
  }
  struct Expected {
    double value;
    std::vector<uint16_t> nans;  // where it is NaN: its bits, one of these; empty for any
  };
  static Expected combine(uint16_t a, uint16_t b, ReduceOp op) {
    // A sum or product of NaN has the operand's payload, and is quiet; min and max give the
    // operand.
    const bool chosen = op == ReduceOp::min || op == ReduceOp::max;
    const auto quiet = static_cast<uint16_t>(chosen ? 0 : 1 << (format.mantissa - 1));
    Expected expected{nearest(format, combined(a, b, op)), {}};
    for (const uint16_t operand : {a, b})
      if (std::isnan(decode(format, operand)) && !(chosen && !expected.nans.empty()))
        expected.nans.push_back(operand | quiet);
    return expected;
  }
  static bool same(uint16_t got, const Expected& expected) {
    const double value = decode(format, got);
    if (!std::isnan(expected.value))
      return value == expected.value && std::signbit(value) == std::signbit(expected.value);
    return std::isnan(value) &&
           (expected.nans.empty() ||
            std::find(expected.nans.begin(), expected.nans.end(), got) != expected.nans.end());
  }
};

template <class T>
void check(DType dtype, const std::vector<ReduceOp>& ops) {
  using Value = typename T::Value;
  constexpr size_t kGuard = 8;
  std::mt19937_64 rng(static_cast<uint64_t>(dtype));
  for (const auto& [name, kernel] : kernels())
    for (const ReduceOp op : ops)
      for (size_t n = 0; n <= 200; ++n) {
        std::vector<Value> a(n + 16), b(n + 16), out(n + 16 + kGuard);
        for (auto& value : a) value = T::random(rng);
        for (auto& value : b) value = T::random(rng);
        const size_t at = n % 5, bt = n % 3, ot = n % 7;  // starts that no vector is aligned to
        for (int in_place = 0; in_place < 3; ++in_place) {
          auto left = a, right = b;
          Value* const pa = left.data() + at;
          Value* const pb = right.data() + bt;
          Value* const dst = in_place == 1 ? pa : in_place == 2 ? pb : out.data() + ot;
          const Value before[2] = {dst[n], dst[n + 1]};
          kernel(dst, pa, pb, n, dtype, op);
          EXPECT_TRUE(std::memcmp(before, dst + n, sizeof(before)) == 0);  // nothing behind the end
          for (size_t i = 0; i < n; ++i) {
            if (T::same(dst[i], T::combine(a[at + i], b[bt + i], op))) continue;
            testing::fail(__FILE__, __LINE__,
                          std::string(name) + " " + pycomm::name_of(op) + " of " +
                              pycomm::name_of(dtype) + ", element " + std::to_string(i) + " of " +
                              std::to_string(n) + ", in place " + std::to_string(in_place));
            return;
          }
        }
      }
}

const std::vector<ReduceOp> kArithmetic = {ReduceOp::sum, ReduceOp::avg, ReduceOp::product,
                                           ReduceOp::min, ReduceOp::max};
const std::vector<ReduceOp> kAll = {ReduceOp::sum, ReduceOp::avg, ReduceOp::product,
                                    ReduceOp::min, ReduceOp::max, ReduceOp::band,
                                    ReduceOp::bor, ReduceOp::bxor};

template <const Half& format>
void check_every_value(DType dtype) {
  // x + (-0) is x, for every x there is: both conversions are exact. NaN stays NaN.
  std::vector<uint16_t> all(65536), zero(65536, 0x8000), got(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  for (const auto& [name, kernel] : kernels()) {
    kernel(got.data(), all.data(), zero.data(), all.size(), dtype, ReduceOp::sum);
    for (size_t i = 0; i < all.size(); ++i) {
      const bool nan = std::isnan(decode(format, all[i]));
      if (nan ? std::isnan(decode(format, got[i])) : got[i] == all[i]) continue;
      testing::fail(name, static_cast<int>(i), "does not survive the conversions");
      return;
    }
    // Every value with some others: products and sums land between values, below the smallest,
    // above the largest; zeros, infinities and NaNs of both kinds keep what they have.
    for (const uint16_t other :
         {0x0001, 0x03ff, 0x0400, 0x3c01, 0x3bff, 0x3f81, 0x4248, 0x7bff, 0x7f7f, 0xbc00, 0x8001,
          0x7c00, 0x0000, 0x8000, 0x7f80, 0xff80, 0xfc00, 0x7f81, 0xffa5, 0x7fff, 0x7c01}) {
      const std::vector<uint16_t> same(65536, other);
      for (const ReduceOp op : {ReduceOp::sum, ReduceOp::product, ReduceOp::min, ReduceOp::max}) {
        kernel(got.data(), all.data(), same.data(), all.size(), dtype, op);
        for (size_t i = 0; i < all.size(); ++i) {
          if (Narrow<format>::same(got[i], Narrow<format>::combine(all[i], other, op))) continue;
          testing::fail(name, static_cast<int>(i),
                        std::string("rounded wrongly by ") + pycomm::name_of(op) + " with " +
                            std::to_string(other));
          return;
        }
      }
    }
  }
}

template <class T>
void check_divide(DType dtype) {
  std::mt19937_64 rng(7);
  for (const int divisor : {1, 2, 3, 7, 127, 128, 200, 255, 256, 1000, 65536, 100000})
    for (const size_t n : {0, 1, 5, 67}) {
      std::vector<T> values(n + 1), got;
      for (auto& value : values) value = Type<T>::random(rng);
      got = values;
      pycomm::cpu::divide(got.data(), n, dtype, divisor);
      for (size_t i = 0; i <= n; ++i) {
        T expected = values[i];
        if (i < n) {
          if constexpr (std::is_floating_point_v<T>)
            expected = values[i] / static_cast<T>(divisor);
          else
            expected = static_cast<T>(static_cast<__int128>(values[i]) / divisor);
        }
        if (Type<T>::same(got[i], expected)) continue;
        testing::fail(pycomm::name_of(dtype), divisor,
                      "element " + std::to_string(i) + " of " + std::to_string(n));
        return;
      }
    }
}

}  // namespace

TEST(integers_combine_as_wide_integers_cut_to_size) {
  check<Type<uint8_t>>(DType::uint8, kAll);
  check<Type<int8_t>>(DType::int8, kAll);
  check<Type<uint16_t>>(DType::uint16, kAll);
  check<Type<int16_t>>(DType::int16, kAll);
  check<Type<uint32_t>>(DType::uint32, kAll);
  check<Type<int32_t>>(DType::int32, kAll);
  check<Type<uint64_t>>(DType::uint64, kAll);
  check<Type<int64_t>>(DType::int64, kAll);
}

TEST(booleans_combine_as_logic) {
  check<Bool>(DType::boolean, {ReduceOp::sum, ReduceOp::product, ReduceOp::min, ReduceOp::max,
                               ReduceOp::band, ReduceOp::bor, ReduceOp::bxor});
}

TEST(floats_combine_bit_for_bit_and_nan_wins) {
  check<Type<float>>(DType::float32, kArithmetic);
  check<Type<double>>(DType::float64, kArithmetic);
}

TEST(narrow_floats_combine_in_fp32_and_round_once) {
  check<Narrow<kFp16>>(DType::float16, kArithmetic);
  check<Narrow<kBf16>>(DType::bfloat16, kArithmetic);
}

TEST(every_fp16_converts_and_rounds_to_nearest_even) { check_every_value<kFp16>(DType::float16); }
TEST(every_bf16_converts_and_rounds_to_nearest_even) { check_every_value<kBf16>(DType::bfloat16); }

TEST(complex_sums_are_sums_of_parts) {
  std::mt19937_64 rng(3);
  for (const auto& [name, kernel] : kernels())
    for (size_t n = 0; n <= 40; ++n) {
      std::vector<float> a(2 * n), b(2 * n), got(2 * n);
      for (auto& value : a) value = static_cast<float>(static_cast<int32_t>(rng()));
      for (auto& value : b) value = static_cast<float>(static_cast<int32_t>(rng()));
      kernel(got.data(), a.data(), b.data(), n, DType::complex64, ReduceOp::sum);
      for (size_t i = 0; i < 2 * n; ++i) EXPECT_EQ(got[i], a[i] + b[i]);
      std::vector<double> c(a.begin(), a.end()), d(b.begin(), b.end()), wide(2 * n);
      kernel(wide.data(), c.data(), d.data(), n, DType::complex128, ReduceOp::avg);
      for (size_t i = 0; i < 2 * n; ++i) EXPECT_EQ(wide[i], c[i] + d[i]);
    }
}

TEST(a_mean_truncates_whatever_the_number_of_ranks) {
  check_divide<uint8_t>(DType::uint8);
  check_divide<int8_t>(DType::int8);
  check_divide<uint16_t>(DType::uint16);
  check_divide<int16_t>(DType::int16);
  check_divide<uint32_t>(DType::uint32);
  check_divide<int32_t>(DType::int32);
  check_divide<uint64_t>(DType::uint64);
  check_divide<int64_t>(DType::int64);
  check_divide<float>(DType::float32);
  check_divide<double>(DType::float64);
}

TEST(a_mean_of_narrow_floats_rounds_once) {
  const auto each = [](const Half& format, DType dtype) {
    for (const int divisor : {1, 2, 3, 7, 64, 1000}) {
      std::vector<uint16_t> values(65536);
      for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(i);
      pycomm::cpu::divide(values.data(), values.size(), dtype, divisor);
      for (size_t i = 0; i < values.size(); ++i) {
        const double x = decode(format, static_cast<uint16_t>(i));
        const double expected = nearest(format, static_cast<float>(x / divisor)),
                     got = decode(format, values[i]);
        if (std::isnan(expected) ? std::isnan(got) : got == expected) continue;
        testing::fail(pycomm::name_of(dtype), static_cast<int>(i),
                      "divided by " + std::to_string(divisor));
        return;
      }
    }
  };
  each(kFp16, DType::float16);
  each(kBf16, DType::bfloat16);
}

namespace {

struct Conversion {
  const char* name;
  void (*widen)(float*, const void*, unsigned long, DType);
  void (*narrow)(void*, const float*, unsigned long, DType);
};

void widen_chosen(float* out, const void* in, unsigned long n, DType dtype) {
  pycomm::cpu::to_float32(out, in, n, dtype);
}
void narrow_chosen(void* out, const float* in, unsigned long n, DType dtype) {
  pycomm::cpu::from_float32(out, in, n, dtype);
}

std::vector<Conversion> conversions() {
  std::vector<Conversion> found = {
      {"chosen", widen_chosen, narrow_chosen},
      {"plain", pycomm::cpu::plain::to_float32, pycomm::cpu::plain::from_float32}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
    found.push_back({"avx2", pycomm::cpu::avx2::to_float32, pycomm::cpu::avx2::from_float32});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back({"avx512", pycomm::cpu::avx512::to_float32, pycomm::cpu::avx512::from_float32});
#endif
  return found;
}

// A format by its definition. `nan` is the one code of NaN that a narrowing gives.
struct Float8 {
  DType dtype;
  int mantissa, bias, infinity;  // infinity: its code, or -1
  uint8_t nan, largest;
};
constexpr Float8 kFloat8[] = {{DType::float8_e4m3fn, 3, 7, -1, 0x7f, 0x7e},
                              {DType::float8_e5m2, 2, 15, 0x7c, 0x7f, 0x7b}};

float value_of(const Float8& format, int code) {
  const int exponent = code >> format.mantissa, fraction = code & ((1 << format.mantissa) - 1);
  if (code == format.infinity) return std::numeric_limits<float>::infinity();
  if (code > format.largest) return std::numeric_limits<float>::quiet_NaN();
  const int units = exponent == 0 ? fraction : fraction + (1 << format.mantissa);
  return std::ldexp(static_cast<float>(units),
                    std::max(exponent, 1) - format.bias - format.mantissa);
}

}  // namespace

TEST(every_float8_widens_exactly_and_comes_back) {
  for (const Float8& format : kFloat8)
    for (const Conversion& convert : conversions()) {
      uint8_t codes[256], back[256];
      float wide[256];
      for (int i = 0; i < 256; ++i) codes[i] = static_cast<uint8_t>(i);
      convert.widen(wide, codes, 256, format.dtype);
      convert.narrow(back, wide, 256, format.dtype);
      for (int i = 0; i < 256; ++i) {
        const float value = value_of(format, i & 0x7f);
        if (std::isnan(value)) {
          EXPECT_TRUE(std::isnan(wide[i]));
          EXPECT_EQ(back[i] & 0x7f, format.nan);
        } else {
          EXPECT_EQ(wide[i], i < 128 ? value : -value);
          EXPECT_EQ(static_cast<int>(back[i]), i);
        }
      }
    }
}

TEST(float8_rounds_to_nearest_even_and_overflows_as_torch_casts) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const Float8& format : kFloat8) {
    std::vector<float> values;
    std::vector<uint8_t> expected;
    for (int code = 0; code < format.largest; ++code) {
      const float low = value_of(format, code), high = value_of(format, code + 1),
                  middle = (low + high) / 2;  // exact: both have few bits
      const auto even = static_cast<uint8_t>(code % 2 == 0 ? code : code + 1);
      values.insert(values.end(), {std::nextafter(middle, 0.0f), middle,
                                   std::nextafter(middle, kInfinity), -middle});
      expected.insert(expected.end(),
                      {static_cast<uint8_t>(code), even, static_cast<uint8_t>(code + 1),
                       static_cast<uint8_t>(even | 0x80)});
    }
    // One more step up would be the value of the code after the largest: beyond its middle, too
    // far.
    const float largest = value_of(format, format.largest),
                middle = largest + (largest - value_of(format, format.largest - 1)) / 2;
    const uint8_t beyond = format.infinity < 0 ? format.nan : static_cast<uint8_t>(format.infinity);
    values.insert(values.end(),
                  {std::nextafter(middle, 0.0f), std::nextafter(middle, kInfinity), 3e38f,
                   kInfinity, std::numeric_limits<float>::quiet_NaN(), 1e-45f});
    expected.insert(expected.end(),
                    {format.largest, beyond, beyond, beyond, format.nan, uint8_t{0}});
    for (const Conversion& convert : conversions()) {
      std::vector<uint8_t> codes(values.size());
      convert.narrow(codes.data(), values.data(), values.size(), format.dtype);
      for (size_t i = 0; i < values.size(); ++i) EXPECT_EQ(+codes[i], +expected[i]);
    }
  }
}
