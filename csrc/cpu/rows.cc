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

#if defined(__x86_64__)
[[gnu::target("avx2")]] void add_product_avx2(float* sum, const float* row, float f, size_t n) {
  add_product_loop(sum, row, f, n);
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
