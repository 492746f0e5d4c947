#include "cpu/rows.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>

#include "core/status.h"
#include "cpu/coding.h"
#include "cpu/reduce.h"

// A product is rounded before it is added, on every machine (rows.h).
#pragma GCC optimize("fp-contract=off")

namespace pycomm::cpu {
namespace {

constexpr size_t kBlock = 2048;  // values: a block of the sum and one of a row stay in the L1 cache

[[noreturn]] void refuse(const std::string& text) { throw Error(Code::invalid_argument, text); }

// lowest: -1 where a row of zeros may be asked for.
void require_inside(const char* what, const std::vector<Rows>& sources, const int64_t* source,
                    const int64_t* rows, int64_t n, int64_t lowest) {
  for (int64_t i = 0; i < n; ++i) {
    if (rows[i] == -1 && lowest == -1) continue;
    if (source[i] < 0 || source[i] >= static_cast<int64_t>(sources.size()))
      refuse(std::string(what) + ": source " + std::to_string(source[i]) + " at " +
             std::to_string(i) + "; there are " + std::to_string(sources.size()));
    const int64_t n_rows = sources[static_cast<size_t>(source[i])].n_rows;
    if (rows[i] < 0 || rows[i] >= n_rows)
      refuse(std::string(what) + ": row " + std::to_string(rows[i]) + " at " + std::to_string(i) +
             "; source " + std::to_string(source[i]) + " has " + std::to_string(n_rows));
  }
}

inline float widen(float x) { return x; }
inline float widen(uint16_t bf16) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(bf16) << 16);
}

// sum += row * factor, widened, multiplied and added in one pass: a third of the time of three.
template <class T>
[[gnu::always_inline]] inline void add_product_loop(float* sum, const T* row, float factor,
                                                    size_t n) {
  for (size_t k = 0; k < n; ++k) {
    const float product = widen(row[k]) * factor;
    sum[k] += product;
  }
}

template <class T>
[[gnu::always_inline]] inline void add_products_loop(float* sum, const T* a, const T* b, size_t n) {
  for (size_t k = 0; k < n; ++k) {
    const float product = widen(a[k]) * widen(b[k]);
    sum[k] += product;
  }
}

#if defined(__x86_64__)
[[gnu::target("avx2")]] void add_product_avx2(float* sum, const float* row, float f, size_t n) {
  add_product_loop(sum, row, f, n);
}
[[gnu::target("avx2")]] void add_products_avx2(float* sum, const float* a, const float* b,
                                               size_t n) {
  add_products_loop(sum, a, b, n);
}
[[gnu::target("avx2")]] void add_products_avx2(float* sum, const uint16_t* a, const uint16_t* b,
                                               size_t n) {
  add_products_loop(sum, a, b, n);
}
[[gnu::target("avx2")]] void add_product_avx2(float* sum, const uint16_t* row, float f, size_t n) {
  add_product_loop(sum, row, f, n);
}
#endif

template <class T>
void add_product(float* sum, const T* row, float factor, size_t n) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;
  if (has_avx2) return add_product_avx2(sum, row, factor, n);
#endif
  add_product_loop(sum, row, factor, n);
}

template <class T>
void add_products(float* sum, const T* a, const T* b, size_t n) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") != 0;
  if (has_avx2) return add_products_avx2(sum, a, b, n);
#endif
  add_products_loop(sum, a, b, n);
}

constexpr size_t kDotVectors = 32, kVectorNbytes = 16;  // rows.h

// products(sum, begin, count) adds those of columns begin to begin + count - 1.
template <size_t kPerVector, class Products>
float dot(size_t width, Products&& products) {
  constexpr size_t kSums = kDotVectors * kPerVector;
  alignas(64) std::array<float, kSums> sum{};
  for (size_t begin = 0; begin < width; begin += kSums)
    products(sum.data(), begin, std::min(kSums, width - begin));
  std::array<float, kDotVectors> of_vector;
  for (size_t v = 0; v < kDotVectors; ++v) {
    of_vector[v] = sum[v * kPerVector];
    for (size_t k = 1; k < kPerVector; ++k) of_vector[v] += sum[v * kPerVector + k];
  }
  for (size_t offset = kDotVectors / 2; offset > 0; offset /= 2)
    for (size_t v = 0; v < offset; ++v) of_vector[v] += of_vector[v + offset];
  return of_vector[0];
}

float dot(const std::byte* a, const std::byte* b, DType dtype, size_t width) {
  if (dtype == DType::float32) {
    const auto *x = reinterpret_cast<const float*>(a), *y = reinterpret_cast<const float*>(b);
    return dot<kVectorNbytes / sizeof(float)>(width, [&](float* sum, size_t begin, size_t n) {
      add_products(sum, x + begin, y + begin, n);
    });
  }
  const auto *x = reinterpret_cast<const uint16_t*>(a), *y = reinterpret_cast<const uint16_t*>(b);
  constexpr size_t kPerVector = kVectorNbytes / sizeof(uint16_t);
  return dot<kPerVector>(width, [&](float* sum, size_t begin, size_t n) {
    if (dtype == DType::bfloat16) return add_products(sum, x + begin, y + begin, n);
    alignas(64) std::array<float, kDotVectors * kPerVector> wide_x, wide_y;
    to_float32(wide_x.data(), x + begin, n, dtype);
    to_float32(wide_y.data(), y + begin, n, dtype);
    add_products(sum, wide_x.data(), wide_y.data(), n);
  });
}

// rows: as row_dots() takes them.
void require_rows(const Rows& of, const int64_t* rows, int64_t n) {
  if (rows == nullptr && n > of.n_rows)
    refuse("row_dots: " + std::to_string(n) + " products of " + std::to_string(of.n_rows) +
           " rows");
  for (int64_t i = 0; rows != nullptr && i < n; ++i)
    if (rows[i] < -1 || rows[i] >= of.n_rows)
      refuse("row_dots: row " + std::to_string(rows[i]) + " at " + std::to_string(i) +
             "; there are " + std::to_string(of.n_rows));
}

}  // namespace

void copy_rows(std::byte* out, int64_t n_out, const int64_t* to, const std::vector<Rows>& sources,
               const int64_t* source, const int64_t* rows, int64_t n, size_t row_nbytes) {
  require_inside("copy_rows", sources, source, rows, n, -1);
  if (to == nullptr && n > n_out)
    refuse("copy_rows: " + std::to_string(n) + " rows for an output of " + std::to_string(n_out));
  for (int64_t i = 0; to != nullptr && i < n; ++i)
    if (to[i] < 0 || to[i] >= n_out)
      refuse("copy_rows: output row " + std::to_string(to[i]) + " at " + std::to_string(i) +
             "; there are " + std::to_string(n_out));
  for (int64_t i = 0; i < n; ++i) {
    std::byte* row = out + static_cast<size_t>(to != nullptr ? to[i] : i) * row_nbytes;
    if (rows[i] < 0)
      std::memset(row, 0, row_nbytes);
    else
      std::memcpy(
          row,
          sources[static_cast<size_t>(source[i])].data + static_cast<size_t>(rows[i]) * row_nbytes,
          row_nbytes);
  }
}

void combine_rows(void* out, DType out_dtype, const std::vector<Rows>& sources, DType dtype,
                  const int64_t* source, const int64_t* rows, const int64_t* offsets,
                  const float* weights, int64_t n, int64_t n_terms, size_t width) {
  require_inside("combine_rows", sources, source, rows, n_terms, 0);
  for (int64_t i = 0; i < n; ++i)
    if (offsets[i + 1] < offsets[i]) refuse("combine_rows: offsets fall");
  if (offsets[0] != 0 || offsets[n] != n_terms)
    refuse("combine_rows: offsets go from " + std::to_string(offsets[0]) + " to " +
           std::to_string(offsets[n]) + ", there are " + std::to_string(n_terms) + " terms");
  const size_t in_size = size_of(dtype), out_size = size_of(out_dtype);
  alignas(64) std::array<float, kBlock> sum, term;
  for (int64_t i = 0; i < n; ++i) {
    for (size_t begin = 0; begin < width; begin += kBlock) {
      const size_t count = std::min(kBlock, width - begin);
      std::memset(sum.data(), 0, count * sizeof(float));
      for (int64_t j = offsets[i]; j < offsets[i + 1]; ++j) {
        const std::byte* row = sources[static_cast<size_t>(source[j])].data +
                               (static_cast<size_t>(rows[j]) * width + begin) * in_size;
        const float factor = weights != nullptr ? weights[j] : 1.0f;
        if (dtype == DType::float32) {
          add_product(sum.data(), reinterpret_cast<const float*>(row), factor, count);
        } else if (dtype == DType::bfloat16) {
          add_product(sum.data(), reinterpret_cast<const uint16_t*>(row), factor, count);
        } else {
          to_float32(term.data(), row, count, dtype);
          add_product(sum.data(), term.data(), factor, count);
        }
      }
      std::byte* place =
          static_cast<std::byte*>(out) + (static_cast<size_t>(i) * width + begin) * out_size;
      if (out_dtype == DType::float32)
        std::memcpy(place, sum.data(), count * sizeof(float));
      else
        from_float32(place, sum.data(), count, out_dtype);
    }
  }
}

void row_dots(float* out, const Rows& a, const int64_t* a_rows, const Rows& b,
              const int64_t* b_rows, DType dtype, int64_t n, size_t width) {
  require_rows(a, a_rows, n);
  require_rows(b, b_rows, n);
  const size_t row_nbytes = width * size_of(dtype);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t in_a = a_rows != nullptr ? a_rows[i] : i;
    const int64_t in_b = b_rows != nullptr ? b_rows[i] : i;
    out[i] = in_a < 0 || in_b < 0
                 ? 0.0f
                 : dot(a.data + static_cast<size_t>(in_a) * row_nbytes,
                       b.data + static_cast<size_t>(in_b) * row_nbytes, dtype, width);
  }
}

void count_slots(int64_t* positions, int64_t* counts, int64_t* offsets, const int64_t* bins,
                 int64_t n, int64_t n_bins) {
  std::fill(counts, counts + n_bins, 0);
  for (int64_t i = 0; i < n; ++i)
    positions[i] = bins[i] >= 0 && bins[i] < n_bins ? counts[bins[i]]++ : -1;
  offsets[0] = 0;
  for (int64_t bin = 0; bin < n_bins; ++bin) offsets[bin + 1] = offsets[bin] + counts[bin];
}

void encode_rows(std::byte* out, const void* in, DType dtype, int64_t n, size_t width, Wire wire) {
  std::vector<float> wide(dtype == DType::float32 ? 0 : width);
  const size_t row_nbytes = coded_nbytes(wire, width), size = size_of(dtype);
  for (int64_t i = 0; i < n; ++i) {
    const std::byte* row =
        static_cast<const std::byte*>(in) + static_cast<size_t>(i) * width * size;
    const auto* values = reinterpret_cast<const float*>(row);
    if (dtype != DType::float32) {
      to_float32(wide.data(), row, width, dtype);
      values = wide.data();
    }
    encode(out + static_cast<size_t>(i) * row_nbytes, values, width, wire);
  }
}

void decode_rows(void* out, const std::byte* in, DType dtype, int64_t n, size_t width, Wire wire) {
  std::vector<float> wide(dtype == DType::float32 ? 0 : width);
  const size_t row_nbytes = coded_nbytes(wire, width), size = size_of(dtype);
  for (int64_t i = 0; i < n; ++i) {
    std::byte* row = static_cast<std::byte*>(out) + static_cast<size_t>(i) * width * size;
    auto* values = dtype == DType::float32 ? reinterpret_cast<float*>(row) : wide.data();
    decode(values, in + static_cast<size_t>(i) * row_nbytes, width, wire);
    if (dtype != DType::float32) from_float32(row, values, width, dtype);
  }
}

}  // namespace pycomm::cpu
