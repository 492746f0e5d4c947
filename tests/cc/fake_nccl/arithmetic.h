// Reductions of the fake NCCL, written apart from pycomm's own kernels: in rank order, integers
// wrap, floats of 16 bits in double and rounded once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace fake {

inline size_t size_of(int dtype) {
  constexpr size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return sizes[dtype];
}
inline bool known(int dtype, int op) { return dtype >= 0 && dtype < 10 && op >= 0 && op < 5; }

// A float with 5 exponent and 10 mantissa bits, or 8 and 7.
inline double widen(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const double mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}
// To nearest even, by trying: the value's neighbours are known exactly.
inline uint16_t narrow(double value, int exponent_bits) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const auto infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits);
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return infinity | 1;
  if (magnitude == 0) return sign;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  exponent = std::max(exponent - 1, 1 - bias);
  const double steps = std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent));
  const auto code =
      static_cast<uint32_t>(steps) + (static_cast<uint32_t>(exponent + bias - 1) << mantissa_bits);
  return code >= infinity || magnitude == INFINITY ? sign | infinity
                                                   : sign | static_cast<uint16_t>(code);
}

template <class T>
T combine(T a, T b, int op) {
  switch (op) {
    case 0:
    case 4:
      return static_cast<T>(a + b);
    case 1:
      return static_cast<T>(a * b);
    case 2:
      return a > b ? a : b;
    default:
      return a < b ? a : b;
  }
}

template <class T, class Wide, class Read, class Write>
void each(char* out, const std::vector<const char*>& inputs, size_t count, int op, int n, Read read,
          Write write) {
  for (size_t i = 0; i < count; ++i) {
    const auto value = [&](int rank) {
      T raw;
      std::memcpy(&raw, inputs[static_cast<size_t>(rank)] + i * sizeof(T), sizeof(T));
      return static_cast<Wide>(read(raw));
    };
    Wide sum = value(0);
    for (int rank = 1; rank < n; ++rank) sum = combine<Wide>(sum, value(rank), op);
    if (op == 4) sum = static_cast<Wide>(sum / static_cast<Wide>(n));
    const T raw = write(sum);
    std::memcpy(out + i * sizeof(T), &raw, sizeof(T));
  }
}

template <class T>
void plain(char* out, const std::vector<const char*>& inputs, size_t count, int op, int n) {
  // Unsigned arithmetic wraps; only where the sign matters is the type itself taken.
  using Wrapping = typename std::conditional_t<std::is_integral_v<T>, std::make_unsigned<T>,
                                               std::type_identity<T>>::type;
  const auto same = [](auto x) { return x; };
  if (op == 0 || op == 1)
    each<Wrapping, Wrapping>(out, inputs, count, op, n, same, same);
  else
    each<T, T>(out, inputs, count, op, n, same, same);
}

inline void reduce(char* out, const std::vector<const char*>& inputs, size_t count, int dtype,
                   int op, int n) {
  const auto small = [&](int exponent_bits) {
    each<uint16_t, double>(
        out, inputs, count, op, n, [=](uint16_t raw) { return widen(raw, exponent_bits); },
        [=](double value) { return narrow(value, exponent_bits); });
  };
  switch (dtype) {
    case 0:
      return plain<int8_t>(out, inputs, count, op, n);
    case 1:
      return plain<uint8_t>(out, inputs, count, op, n);
    case 2:
      return plain<int32_t>(out, inputs, count, op, n);
    case 3:
      return plain<uint32_t>(out, inputs, count, op, n);
    case 4:
      return plain<int64_t>(out, inputs, count, op, n);
    case 5:
      return plain<uint64_t>(out, inputs, count, op, n);
    case 6:
      return small(5);
    case 7:
      return plain<float>(out, inputs, count, op, n);
    case 8:
      return plain<double>(out, inputs, count, op, n);
    default:
      return small(8);
  }
}

}  // namespace fake
