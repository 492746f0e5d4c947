// The MoE kernels on a GPU against the CPU implementation (cpu/rows.h), bit for bit. `make
// test-gpu` runs it; `make test` only compiles it. Without a GPU every test fails: none may pass by
// not running.
#include <algorithm>
#include <array>
#include <memory>
#include <numeric>

#include "core/wire.h"
#include "cpu/rows.h"
#include "cuda/moe.h"
#include "gpu_memory.h"
#include "testing.h"

using namespace pycomm;

namespace {

constexpr int64_t kWidths[] = {1, 8, 129, 1500, 2048};
constexpr int64_t kRows = 37;

template <class T>
std::vector<char> bytes(const std::vector<T>& from) {
  const auto* begin = reinterpret_cast<const char*>(from.data());
  return {begin, begin + from.size() * sizeof(T)};
}

// A table on both sides.
template <class T>
struct Table {
  std::vector<T> host;
  Memory device;
  explicit Table(std::vector<T> values) : host(std::move(values)), device(bytes(host), 0) {}
  const T* data() const { return reinterpret_cast<const T*>(device.data()); }
};

// Three buffers of rows, at distances from alignment, on both sides.
struct Sources {
  static constexpr std::array<int64_t, 3> kRowsOf = {5, 1, 9};
  std::vector<std::vector<char>> host;
  std::vector<std::unique_ptr<Memory>> memory;
  std::vector<cpu::Rows> rows;
  std::vector<const void*> device;
  void add(std::vector<char> values, int64_t n, size_t offset) {
    memory.push_back(std::make_unique<Memory>(values, offset));
    device.push_back(memory.back()->data());
    host.push_back(std::move(values));
    rows.push_back({reinterpret_cast<const std::byte*>(host.back().data()), n});
  }
  Sources(int64_t width, DType dtype, size_t offset) {
    for (const int64_t n : kRowsOf)
      add(values(static_cast<size_t>(n * width), dtype, static_cast<unsigned>(n)), n, offset);
  }
};

// Tables of n entries into Sources; rows of zeros among them where asked for.
struct Routing {
  Table<int64_t> source, rows;
  static std::vector<int64_t> draw(int64_t n, bool zeros, bool of_rows) {
    std::mt19937 random(7);
    std::vector<int64_t> drawn;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t source = random() % 3, row = random() % 1000, zero = random() % 4;
      const int64_t chosen = zeros && zero == 0 ? -1 : row % Sources::kRowsOf[source];
      drawn.push_back(of_rows ? chosen : source);
    }
    return drawn;
  }
  Routing(int64_t n, bool zeros) : source(draw(n, zeros, false)), rows(draw(n, zeros, true)) {}
};

std::vector<int64_t> shuffled(int64_t n) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(5));
  return order;
}

std::vector<float> some_weights(int64_t n) {
  std::mt19937 random(11);
  std::vector<float> weights(static_cast<size_t>(n));
  for (float& weight : weights) weight = std::uniform_real_distribution<float>(-1, 1)(random);
  return weights;
}

std::byte* as_bytes(std::vector<char>& data) { return reinterpret_cast<std::byte*>(data.data()); }

template <class Check>
void for_shapes(Check&& check) {
  for (const DType dtype : kDTypes)
    for (const int64_t width : kWidths)
      for (const size_t offset : {size_t{0}, size_of(dtype)}) check(dtype, width, offset);
}

}  // namespace

TEST(expand_copies_as_the_cpu_does) {
  for_shapes([](DType dtype, int64_t width, size_t offset) {
    const Sources sources(width, dtype, offset);
    const Routing routing(kRows, true);
    const Table<int64_t> to(shuffled(kRows));
    const size_t row_nbytes = static_cast<size_t>(width) * size_of(dtype);
    std::vector<char> expected(kRows * row_nbytes);
    cpu::copy_rows(as_bytes(expected), kRows, to.host.data(), sources.rows,
                   routing.source.host.data(), routing.rows.host.data(), kRows, row_nbytes);
    const Memory out(expected.size());
    require(cuda::expand_rows(out.data(), sources.device, routing.source.data(),
                              routing.rows.data(), to.data(), kRows, width, dtype, nullptr));
    require(cudaDeviceSynchronize());
    EXPECT_TRUE(out.read() == expected);
  });
}

TEST(combine_sums_as_the_cpu_does) {
  for_shapes([](DType dtype, int64_t width, size_t offset) {
    const Sources sources(width, dtype, offset);
    const Routing routing(kRows, false);
    const Table<float> weights(some_weights(kRows));
    const Table<int64_t> offsets({0, 0, 1, 9, 9, kRows});
    for (const DType out_dtype : {dtype, DType::float32})
      for (const bool weighted : {false, true}) {
        std::vector<char> expected(static_cast<size_t>(5 * width) * size_of(out_dtype));
        cpu::combine_rows(expected.data(), out_dtype, sources.rows, dtype,
                          routing.source.host.data(), routing.rows.host.data(), offsets.host.data(),
                          weighted ? weights.host.data() : nullptr, 5, kRows,
                          static_cast<size_t>(width));
        const Memory out(expected.size());
        require(cuda::combine_rows(out.data(), out_dtype, sources.device, dtype,
                                   routing.source.data(), routing.rows.data(), offsets.data(),
                                   weighted ? weights.data() : nullptr, 5, width, nullptr));
        require(cudaDeviceSynchronize());
        EXPECT_TRUE(out.read() == expected);
      }
  });
}

// Each row alone, with its product by b; rows of zeros among them.
TEST(rows_are_weighed_as_the_cpu_expands_multiplies_and_sums) {
  for_shapes([](DType dtype, int64_t width, size_t offset) {
    const Sources sources(width, dtype, offset);
    const Routing routing(kRows, true);
    const Table<float> weights(some_weights(kRows));
    const Table<int64_t> to(shuffled(kRows)), places(shuffled(kRows));
    const size_t numel = static_cast<size_t>(kRows * width), row_nbytes = width * size_of(dtype);
    auto b = values(numel, dtype, 2);
    std::vector<char> rows(numel * size_of(dtype));
    cpu::copy_rows(as_bytes(rows), kRows, nullptr, sources.rows, routing.source.host.data(),
                   routing.rows.host.data(), kRows, row_nbytes);
    std::vector<float> dots(kRows), of_rows(kRows), products(numel);
    cpu::row_dots(of_rows.data(), {as_bytes(rows), kRows}, nullptr, {as_bytes(b), kRows},
                  places.host.data(), dtype, kRows, static_cast<size_t>(width));
    const auto wide = widened(rows, numel, dtype);
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t place = places.host[i];
      dots[place] = routing.rows.host[i] < 0 ? 0.0f : of_rows[i];
      for (int64_t k = 0; k < width; ++k)
        products[to.host[i] * width + k] =
            routing.rows.host[i] < 0 ? 0.0f : wide[i * width + k] * weights.host[place];
    }
    std::vector<char> expected = bytes(products);
    if (dtype != DType::float32) {
      expected.resize(numel * size_of(dtype));
      cpu::from_float32(expected.data(), products.data(), numel, dtype);
    }
    const Memory out(expected.size()), on_b(b, offset), of_dots(kRows * sizeof(float));
    require(cuda::weigh_rows(out.data(), reinterpret_cast<float*>(of_dots.data()), sources.device,
                             routing.source.data(), routing.rows.data(), to.data(), places.data(),
                             weights.data(), on_b.data(), kRows, width, dtype, nullptr));
    require(cudaDeviceSynchronize());
    EXPECT_TRUE(out.read() == expected);
    EXPECT_TRUE(of_dots.read() == bytes(dots));
  });
}

TEST(dots_sum_as_the_cpu_does) {
  for_shapes([](DType dtype, int64_t width, size_t offset) {
    const auto numel = static_cast<size_t>(kRows * width);
    auto a = values(numel, dtype, 1), b = values(numel, dtype, 2);
    auto chosen = shuffled(kRows);
    chosen[3] = -1;
    std::vector<float> expected(kRows);
    cpu::row_dots(expected.data(), {as_bytes(a), kRows}, chosen.data(), {as_bytes(b), kRows},
                  nullptr, dtype, kRows, static_cast<size_t>(width));
    const Table<int64_t> a_rows(chosen);
    const Memory on_a(a, offset), on_b(b, 0), out(kRows * sizeof(float));
    require(cuda::row_dots(reinterpret_cast<float*>(out.data()), on_a.data(), a_rows.data(),
                           on_b.data(), nullptr, kRows, width, dtype, nullptr));
    require(cudaDeviceSynchronize());
    EXPECT_TRUE(out.read() == bytes(expected));
  });
}

TEST(rows_are_packed_in_fp8_and_spread_as_on_the_cpu) {
  for_shapes([](DType dtype, int64_t width, size_t offset) {
    const auto coded_nbytes = static_cast<size_t>(pycomm::coded_nbytes(Wire::fp8, width));
    const auto x = values(static_cast<size_t>(kRows * width), dtype, 1);
    std::vector<char> coded(kRows * coded_nbytes);
    cpu::encode_rows(as_bytes(coded), x.data(), dtype, kRows, static_cast<size_t>(width),
                     Wire::fp8);
    // Row i of x goes to row order[i] of buffers i % 3 and, but for every fifth, (i + 1) % 3, row 7
    // nowhere; decoding reads it in the first.
    const auto order = shuffled(kRows);
    std::vector<int64_t> buffer, starts{0}, of_place, place;
    for (int64_t i = 0; i < kRows; ++i) {
      buffer.push_back(i % 3);
      for (int64_t copy = 0; copy < (i == 7 ? 0 : i % 5 == 0 ? 1 : 2); ++copy) {
        of_place.push_back((i + copy) % 3);
        place.push_back(order[i]);
      }
      starts.push_back(static_cast<int64_t>(place.size()));
    }
    const Table<int64_t> on_buffer(buffer), from(starts), which(of_place), to(place);
    std::vector<std::unique_ptr<Memory>> memory;
    std::vector<void*> buffers;
    for (int i = 0; i < 3; ++i) {
      memory.push_back(std::make_unique<Memory>(coded.size(), 4));
      buffers.push_back(memory.back()->data());
    }
    const Memory on_x(x, offset);
    require(cuda::encode_rows(buffers, from.data(), which.data(), to.data(), on_x.data(), kRows,
                              width, dtype, nullptr));
    require(cudaDeviceSynchronize());
    std::vector<std::vector<char>> expected(3, std::vector<char>(coded.size(), char(0xa5)));
    for (int64_t i = 0; i < kRows; ++i)
      for (int64_t j = starts[i]; j < starts[i + 1]; ++j)
        std::copy_n(coded.begin() + i * coded_nbytes, coded_nbytes,
                    expected[of_place[j]].begin() + place[j] * coded_nbytes);
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(memory[i]->read() == expected[i]);

    std::vector<char> back(x.size());
    cpu::decode_rows(back.data(), reinterpret_cast<const std::byte*>(coded.data()), dtype, kRows,
                     static_cast<size_t>(width), Wire::fp8);
    auto read = order;
    for (const int64_t i : {2, 7}) {
      read[i] = -1;
      std::fill_n(back.begin() + i * width * size_of(dtype), width * size_of(dtype), 0);
    }
    const Table<int64_t> rows(read);
    const std::vector<const void*> sources(buffers.begin(), buffers.end());
    const Memory out(back.size(), offset);
    require(cuda::decode_rows(out.data(), sources, on_buffer.data(), rows.data(), nullptr, kRows,
                              width, dtype, nullptr));
    require(cudaDeviceSynchronize());
    EXPECT_TRUE(out.read() == back);
  });
}

TEST(slots_are_counted_and_placed_as_the_cpu_does) {
  for (const int64_t n : {1, 255, 256, 257, 5000})
    for (const int64_t n_bins : {1, 7, 300}) {
      std::mt19937 random(static_cast<unsigned>(n + n_bins));
      std::vector<int64_t> drawn(static_cast<size_t>(n));
      for (auto& bin : drawn)
        bin = static_cast<int64_t>(random() % static_cast<unsigned>(n_bins + 2)) - 1;
      const Table<int64_t> bins(std::move(drawn));
      std::vector<int64_t> positions(static_cast<size_t>(n)), counts(static_cast<size_t>(n_bins)),
          offsets(static_cast<size_t>(n_bins + 1));
      cpu::count_slots(positions.data(), counts.data(), offsets.data(), bins.host.data(), n,
                       n_bins);
      const Memory at(bytes(positions).size()), of(bytes(counts).size()),
          from(bytes(offsets).size());
      const auto ints = [](const Memory& memory) {
        return reinterpret_cast<int64_t*>(const_cast<char*>(memory.data()));
      };
      require(cuda::count_slots(ints(at), ints(of), ints(from), bins.data(), n, n_bins, nullptr));
      require(cudaDeviceSynchronize());
      EXPECT_TRUE(at.read() == bytes(positions));
      EXPECT_TRUE(of.read() == bytes(counts));
      EXPECT_TRUE(from.read() == bytes(offsets));
    }
}
