// The MoE kernels' loops, a warp's item and a lane at a time on the CPU, by the kernels' own index
// arithmetic (cuda/moe_indexing.h): each value is touched once, vectors are aligned, and the bytes
// are those of the CPU implementation (cpu/rows.h).
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <type_traits>

#include "cpu/rows.h"
#include "cuda/moe_indexing.h"
#include "testing.h"

#pragma GCC optimize("fp-contract=off")

using namespace pycomm;
using namespace pycomm::cuda;

namespace {

constexpr int64_t kWidths[] = {1, 3, 8, 127, 128, 129, 511, 512, 513, 1024, 1500, 2049};

float widen(float x) { return x; }
float widen(uint16_t bf16) { return __builtin_bit_cast(float, static_cast<uint32_t>(bf16) << 16); }

struct Half {
  uint16_t bits = 0;
  Half() = default;
  explicit Half(int value) : bits(value == 7 ? 0x4700 : 0) {}  // the numbers that tests fill with
  bool operator==(const Half&) const = default;
};

float widen(Half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float size = exponent ? std::ldexp(float(1024 + mantissa), exponent - 25)
                              : std::ldexp(float(mantissa), -24);
  return x.bits >> 15 ? -size : size;
}

template <class T>
constexpr DType kDType = DType::bfloat16;
template <>
constexpr DType kDType<float> = DType::float32;
template <>
constexpr DType kDType<Half> = DType::float16;

template <class T>
T drawn(std::mt19937& random) {
  if constexpr (std::is_same_v<T, Half>) {  // any finite one, subnormal ones among them
    Half x;
    do x.bits = static_cast<uint16_t>(random());
    while ((x.bits >> 10 & 31) == 31);
    return x;
  } else {
    const float value = std::normal_distribution<float>(0, 10)(random);
    if constexpr (sizeof(T) == 4) return value;
    return static_cast<T>(__builtin_bit_cast(uint32_t, value) >> 16);
  }
}

struct Routing {  // tables over sources of 5, 1 and 9 rows
  std::vector<int64_t> source, rows;
  explicit Routing(int64_t n, bool zeros, std::mt19937& random) : source(n), rows(n) {
    for (int64_t i = 0; i < n; ++i) {
      source[i] = random() % 3;
      rows[i] = random() % (source[i] == 0 ? 5 : source[i] == 1 ? 1 : 9);
      if (zeros && random() % 4 == 0) rows[i] = -1;
    }
  }
};

template <class T>
struct Sources {
  std::vector<std::vector<T>> values;
  std::vector<cpu::Rows> rows;
  Sources(int64_t width, std::mt19937& random) {
    for (int64_t n : {5, 1, 9}) {
      auto& each = values.emplace_back(n * width);
      for (T& x : each) x = drawn<T>(random);
      rows.push_back({reinterpret_cast<const std::byte*>(each.data()), n});
    }
  }
  const T* row(const Routing& routing, int64_t i, int64_t width) const {
    return values[routing.source[i]].data() + routing.rows[i] * width;
  }
};

template <class T>
void expand_equals_the_cpu(int64_t width) {
  constexpr int kPerVector = kVectorBytes / sizeof(T);
  constexpr int64_t kRows = 11, kOut = 14;
  std::mt19937 random(static_cast<unsigned>(width));
  const Sources<T> sources(width, random);
  const Routing routing(kRows, true, random);
  std::vector<int64_t> to(kOut);
  std::iota(to.begin(), to.end(), 0);
  std::shuffle(to.begin(), to.end(), random);
  std::vector<T> expected(kOut * width, T(7)), out = expected;
  cpu::copy_rows(reinterpret_cast<std::byte*>(expected.data()), kOut, to.data(), sources.rows,
                 routing.source.data(), routing.rows.data(), kRows, width * sizeof(T));

  std::vector<int> touched(out.size());
  for (int64_t item = 0; item < kRows * tiles_per_row(width, kPerVector); ++item) {
    const RowTile tile = row_tile(item, width, kPerVector);
    const int64_t first = to[tile.row] * width + tile.begin, n = tile.end - tile.begin;
    const bool zeros = routing.rows[tile.row] < 0;
    const T* from = zeros ? nullptr : sources.row(routing, tile.row, width) + tile.begin;
    const VectorSpan span =
        vector_span(n, sizeof(T), common_misalignment(zeros ? &out[first] : from, &out[first]));
    const auto move = [&](int64_t at) {
      out.at(first + at) = zeros ? T(0) : from[at];
      ++touched.at(first + at);
    };
    for (int64_t v = 0; v < span.n_vectors; ++v) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(&out[first + span.head + v * kPerVector]) % 16, 0u);
      for (int k = 0; k < kPerVector; ++k) move(span.head + v * kPerVector + k);
    }
    for (int64_t i = 0; i < span.n_scalars(); ++i) move(span.scalar(i));
  }
  EXPECT_TRUE(out == expected);
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t k = 0; k < width; ++k) EXPECT_EQ(touched[to[i] * width + k], 1);
}

template <class T>
void combine_equals_the_cpu(int64_t width, bool weighted) {
  constexpr int kPerVector = kVectorBytes / sizeof(T);
  std::mt19937 random(static_cast<unsigned>(width));
  const Sources<T> sources(width, random);
  const std::vector<int64_t> offsets = {0, 0, 1, 9, 9, 12};
  const int64_t n = 5, n_terms = offsets.back();
  const Routing routing(n_terms, false, random);
  std::vector<float> weights(n_terms), expected(n * width, 7), out = expected;
  for (float& weight : weights) weight = std::uniform_real_distribution<float>(-1, 1)(random);
  cpu::combine_rows(expected.data(), DType::float32, sources.rows, kDType<T>, routing.source.data(),
                    routing.rows.data(), offsets.data(), weighted ? weights.data() : nullptr, n,
                    n_terms, width);

  for (int64_t item = 0; item < n * tiles_per_row(width, kPerVector); ++item) {
    const RowTile tile = row_tile(item, width, kPerVector);
    for (int lane = 0; lane < kWarp; ++lane)
      for (int turn = 0; turn < kTurns; ++turn) {
        const int64_t first = lane_column(tile, turn, lane, kPerVector);
        for (int64_t column = first; column < std::min(first + kPerVector, tile.end); ++column) {
          float sum = 0;
          for (int64_t j = offsets[tile.row]; j < offsets[tile.row + 1]; ++j) {
            const float product =
                widen(sources.row(routing, j, width)[column]) * (weighted ? weights[j] : 1.0f);
            sum = sum + product;
          }
          out.at(tile.row * width + column) = sum;
        }
      }
  }
  EXPECT_EQ(std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)), 0);
}

// Products of a row's columns, summed as a warp does it.
template <class T, class Product>
float lanes_sum(int64_t width, Product&& product) {
  constexpr int kPerVector = kVectorBytes / sizeof(T);
  std::vector<float> lanes(kWarp);
  for (int lane = 0; lane < kWarp; ++lane) {
    float sums[kPerVector] = {};
    for (int64_t column = int64_t{lane} * kPerVector; column < width; column += kWarp * kPerVector)
      for (int k = 0; k < kPerVector; ++k) {
        const float one = column + k < width ? product(column + k) : 0.0f;
        sums[k] = sums[k] + one;
      }
    lanes[lane] = sums[0];
    for (int k = 1; k < kPerVector; ++k) lanes[lane] = lanes[lane] + sums[k];
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {  // what __shfl_xor_sync gives
    std::vector<float> others = lanes;
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane] += others[lane ^ offset];
  }
  return lanes[0];
}

// Within fp32's rounding of the products' sum in double as well: 2^-23 of the magnitudes for each
// addition.
template <class T>
void dots_equal_the_cpu(int64_t width) {
  std::mt19937 random(static_cast<unsigned>(width));
  const Sources<T> sources(width, random);
  const std::vector<T>&a = sources.values[2], &b = sources.values[0];
  const std::vector<int64_t> a_rows = {8, -1, 0, 5, 0, 8}, b_rows = {4, 1, 3, -1, 0, 4};
  std::vector<float> expected(a_rows.size(), 7);
  cpu::row_dots(expected.data(), sources.rows[2], a_rows.data(), sources.rows[0], b_rows.data(),
                kDType<T>, static_cast<int64_t>(a_rows.size()), width);
  for (size_t i = 0; i < a_rows.size(); ++i) {
    if (a_rows[i] < 0 || b_rows[i] < 0) {
      EXPECT_EQ(expected[i], 0.0f);
      continue;
    }
    double exact = 0, magnitude = 0;
    const float found = lanes_sum<T>(width, [&](int64_t column) {
      const float x = widen(a[a_rows[i] * width + column]),
                  y = widen(b[b_rows[i] * width + column]);
      exact += double{x} * y;
      magnitude += std::abs(double{x} * y);
      return x * y;
    });
    EXPECT_EQ(std::memcmp(&found, &expected[i], sizeof(float)), 0);
    EXPECT_TRUE(std::abs(expected[i] - exact) <= std::ldexp(magnitude, -23) * double(width));
  }
}

// weigh_kernel's pass beside a copy, products and dots of the CPU's.
template <class T>
void weighing_equals_the_cpu(int64_t width) {
  constexpr int64_t kRows = 11;
  std::mt19937 random(static_cast<unsigned>(width));
  const Sources<T> sources(width, random);
  const Routing routing(kRows, true, random);
  std::vector<T> b(kRows * width), rows(b.size());
  for (T& x : b) x = drawn<T>(random);
  std::vector<int64_t> to(kRows), places(kRows);
  std::iota(to.begin(), to.end(), 0);
  std::shuffle(to.begin(), to.end(), random);
  places.assign(to.rbegin(), to.rend());
  std::vector<float> weights(kRows), dots(kRows, 7), of_rows(kRows);
  for (float& weight : weights) weight = std::uniform_real_distribution<float>(-1, 1)(random);
  std::vector<float> out(b.size(), 7), expected(b.size(), 7);
  cpu::copy_rows(reinterpret_cast<std::byte*>(rows.data()), kRows, nullptr, sources.rows,
                 routing.source.data(), routing.rows.data(), kRows, width * sizeof(T));
  const auto as_rows = [](const std::vector<T>& from) {
    return cpu::Rows{reinterpret_cast<const std::byte*>(from.data()), kRows};
  };
  cpu::row_dots(of_rows.data(), as_rows(rows), nullptr, as_rows(b), places.data(), kDType<T>, kRows,
                width);
  for (int64_t i = 0; i < kRows; ++i) {
    const bool zeros = routing.rows[i] < 0;
    const T* const from = zeros ? nullptr : sources.row(routing, i, width);
    const T* const other = b.data() + places[i] * width;
    dots[places[i]] = lanes_sum<T>(width, [&](int64_t column) {
      const float x = zeros ? 0.0f : widen(from[column]), weight = weights[places[i]];
      out[to[i] * width + column] = zeros ? 0.0f : x * weight;
      return zeros ? 0.0f : x * widen(other[column]);
    });
    for (int64_t k = 0; k < width; ++k)
      expected[to[i] * width + k] = zeros ? 0.0f : widen(rows[i * width + k]) * weights[places[i]];
    const float dot = zeros ? 0.0f : of_rows[i];
    EXPECT_EQ(std::memcmp(&dots[places[i]], &dot, sizeof(float)), 0);
  }
  EXPECT_EQ(std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)), 0);
}

template <class T>
void coding_equals_the_cpu(int64_t width) {
  constexpr int kPerLane = kVectorBytes / sizeof(T), kLanes = kBlockNumel / kPerLane;
  constexpr int64_t kRows = 3;
  std::mt19937 random(static_cast<unsigned>(width));
  std::vector<T> rows(Sources<T>(width, random).values[0]);
  rows.resize(kRows * width);
  std::fill_n(rows.begin() + width, width, T(0));  // a row of zeros
  const int64_t row_nbytes = coded_row_nbytes(width);
  EXPECT_EQ(row_nbytes, static_cast<int64_t>(coded_nbytes(Wire::fp8, width)));
  std::vector<std::byte> expected(kRows * row_nbytes), coded(expected.size(), std::byte{7});
  cpu::encode_rows(expected.data(), rows.data(), kDType<T>, kRows, width, Wire::fp8);
  std::vector<float> back(kRows * width), decoded(back.size(), 7);
  cpu::decode_rows(back.data(), expected.data(), DType::float32, kRows, width, Wire::fp8);

  const int64_t padded = padded_width(width);
  for (int64_t item = 0; item < kRows * tiles_per_row(padded, kPerLane); ++item) {
    const RowTile tile = row_tile(item, padded, kPerLane);
    const auto value = [&](int64_t column) {
      return column < width ? widen(rows.at(tile.row * width + column)) : 0.0f;
    };
    for (int turn = 0; turn < kTurns; ++turn)
      for (int block = 0; block < kWarp / kLanes; ++block) {
        // The lanes that share a shuffle hold one block, all of it or none.
        const int64_t first = lane_column(tile, turn, block * kLanes, kPerLane);
        const int64_t last = lane_column(tile, turn, block * kLanes + kLanes - 1, kPerLane);
        EXPECT_EQ(first % kBlockNumel, 0);
        EXPECT_EQ(last + kPerLane - first, int64_t{kBlockNumel});
        EXPECT_EQ(first < tile.end, last < tile.end);
        if (first >= tile.end) continue;
        int32_t max = 0;
        for (int k = 0; k < kBlockNumel; ++k) max = std::max(max, magnitude_bits(value(first + k)));
        const BlockScale scale = block_scale(max, BlockCode::e4m3);
        std::byte* const row = coded.data() + tile.row * row_nbytes;
        for (int k = 0; k < kBlockNumel; ++k)
          row[first + k] = std::byte{encode(BlockCode::e4m3, value(first + k), scale.to_code)};
        std::memcpy(row + scale_offset(width, first), &scale.to_value, sizeof(float));
      }
  }
  EXPECT_TRUE(coded == expected);

  for (int64_t item = 0; item < kRows * tiles_per_row(width, kPerLane); ++item) {
    const RowTile tile = row_tile(item, width, kPerLane);
    const std::byte* const row = coded.data() + tile.row * row_nbytes;
    for (int lane = 0; lane < kWarp; ++lane)
      for (int turn = 0; turn < kTurns; ++turn) {
        const int64_t first = lane_column(tile, turn, lane, kPerLane);
        if (first >= tile.end) continue;
        float to_value;  // one scale for all that a lane holds
        std::memcpy(&to_value, row + scale_offset(width, first), sizeof(float));
        for (int64_t column = first; column < std::min(first + kPerLane, width); ++column)
          decoded.at(tile.row * width + column) =
              decode(BlockCode::e4m3, static_cast<uint8_t>(row[column]), to_value);
      }
  }
  EXPECT_EQ(std::memcmp(decoded.data(), back.data(), back.size() * sizeof(float)), 0);
}

// A CUDA block's loop of moe_slots.cu, its warps one after the other.
void count_equals_the_cpu(int64_t n, int64_t n_bins) {
  constexpr int kWarps = 8;
  std::mt19937 random(static_cast<unsigned>(n + n_bins));
  std::vector<int64_t> bins(n), expected(n, 7), counts(n_bins, 7), offsets(n_bins + 1, 7);
  for (auto& bin : bins) bin = static_cast<int64_t>(random() % (n_bins + 2)) - 1;
  cpu::count_slots(expected.data(), counts.data(), offsets.data(), bins.data(), n, n_bins);
  std::vector<int64_t> positions(n, -1);
  for (int64_t own = 0; own < n_bins; ++own) {
    int64_t count = 0, below = 0;
    for (int64_t first = 0; first < n; first += kWarps * kWarp) {
      int before = 0;
      for (int warp = 0; warp < kWarps; ++warp) {
        uint32_t lanes = 0;
        const auto bin = [&](int lane) {
          const int64_t i = first + warp * kWarp + lane;
          return i < n ? bins[i] : -1;
        };
        for (int lane = 0; lane < kWarp; ++lane) lanes |= uint32_t{bin(lane) == own} << lane;
        for (int lane = 0; lane < kWarp; ++lane) {
          if (bin(lane) == own)
            positions[first + warp * kWarp + lane] = count + before + n_set_below(lanes, lane);
          below += bin(lane) >= 0 && bin(lane) < own;
        }
        before += n_set(lanes);
      }
      count += before;
    }
    EXPECT_EQ(count, counts[own]);
    EXPECT_EQ(below, offsets[own]);
  }
  EXPECT_EQ(offsets[n_bins], offsets[n_bins - 1] + counts[n_bins - 1]);
  EXPECT_TRUE(positions == expected);
  // By hand: what stands before it.
  for (int64_t i = 0; i < n; ++i) {
    const bool known = bins[i] >= 0 && bins[i] < n_bins;
    const auto same = std::count(bins.begin(), bins.begin() + i, bins[i]);
    EXPECT_EQ(expected[i], known ? same : -1);
  }
}

}  // namespace

TEST(expand_moves_the_bytes_that_the_cpu_does) {
  for (int64_t width : kWidths) {
    expand_equals_the_cpu<float>(width);
    expand_equals_the_cpu<uint16_t>(width);
    expand_equals_the_cpu<Half>(width);
  }
}

TEST(combine_sums_as_the_cpu_does) {
  for (int64_t width : kWidths)
    for (bool weighted : {false, true}) {
      combine_equals_the_cpu<float>(width, weighted);
      combine_equals_the_cpu<uint16_t>(width, weighted);
      combine_equals_the_cpu<Half>(width, weighted);
    }
}

TEST(dots_sum_as_the_cpu_does) {
  for (int64_t width : kWidths) {
    dots_equal_the_cpu<float>(width);
    dots_equal_the_cpu<uint16_t>(width);
    dots_equal_the_cpu<Half>(width);
  }
}

TEST(rows_are_weighed_as_the_cpu_does_in_three_passes) {
  for (int64_t width : kWidths) {
    weighing_equals_the_cpu<float>(width);
    weighing_equals_the_cpu<uint16_t>(width);
    weighing_equals_the_cpu<Half>(width);
  }
}

TEST(rows_are_coded_and_decoded_as_on_the_cpu) {
  for (int64_t width : kWidths) {
    coding_equals_the_cpu<float>(width);
    coding_equals_the_cpu<uint16_t>(width);
    coding_equals_the_cpu<Half>(width);
  }
}

TEST(slots_are_counted_and_placed_as_on_the_cpu) {
  for (const int64_t n : {0, 1, 31, 32, 33, 255, 256, 257, 1000})
    for (const int64_t n_bins : {1, 2, 7, 40}) count_equals_the_cpu(n, n_bins);
}
