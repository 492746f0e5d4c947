// all_reduce with a wire between two hosts, ranks as threads: the two-step sum, what a rank's
// coding lost, and calls of every kind behind each other.
#include <cmath>
#include <random>

#include "cpu/coding.h"
#include "ranks.h"

using namespace pycomm;
using namespace pycomm::testing;

namespace {

const std::vector<std::string> kTwoHosts = {"a", "b"};
constexpr Wire kAll[] = {Wire::bf16, Wire::fp8, Wire::int8, Wire::int4};

std::vector<float> values_of(int rank, uint64_t numel) {
  std::mt19937 random(static_cast<unsigned>(rank + 1));
  std::normal_distribution<float> normal;
  std::vector<float> values(numel);
  for (float& value : values) value = normal(random);
  return values;
}

std::vector<float> coded(const std::vector<float>& values, Wire wire) {
  std::vector<float> result(values.size());
  cpu::round_trip(result.data(), values.data(), values.size(), wire);
  return result;
}

// The ring's rank r completes chunk 1 - r: its own contribution and the other's, coded once; what
// it shares is coded once more. losses: by rank.
struct TwoStep {
  std::vector<float> result, losses[2];
  TwoStep(uint64_t numel, Wire wire) : result(numel) {
    const std::vector<float> given[2] = {values_of(0, numel), values_of(1, numel)};
    for (auto& loss : losses) loss.assign(numel, 0);
    const uint64_t half = numel / 2 + numel % 2;
    for (uint64_t chunk : {0, 1}) {
      const uint64_t begin = chunk == 0 ? 0 : half, end = chunk == 0 ? half : numel;
      const auto owner = static_cast<size_t>(1 - chunk);
      const auto part = [&](const std::vector<float>& of) {
        return std::vector<float>(of.begin() + static_cast<ptrdiff_t>(begin),
                                  of.begin() + static_cast<ptrdiff_t>(end));
      };
      std::vector<float> sum = part(given[owner]);
      const std::vector<float> other = part(given[1 - owner]), came = coded(other, wire);
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += came[i];
      const std::vector<float> shared = coded(sum, wire);
      for (size_t i = 0; i < sum.size(); ++i) {
        result[begin + i] = shared[i];
        losses[1 - owner][begin + i] = other[i] - came[i];
        losses[owner][begin + i] = sum[i] - shared[i];
      }
    }
  }
};

Call with_wire(std::vector<float>& data, Wire wire, float* residual = nullptr) {
  Call call = all_reduce(data.data(), data.size());
  call.wire = wire;
  call.residual = residual;
  return call;
}

}  // namespace

TEST(both_ranks_hold_the_two_step_sum_and_know_what_they_lost) {
  run_ranks(kTwoHosts, [](Group& group, auto&, Store&) {
    for (Wire wire : kAll)
      for (uint64_t numel : {0ul, 1ul, 2ul, 129ul, 32768ul, 32769ul, 300001ul}) {
        const TwoStep expected(numel, wire);
        std::vector<float> data = values_of(group.rank(), numel), residual(numel, 7);
        group.run(with_wire(data, wire, residual.data()));
        EXPECT_TRUE(data == expected.result);
        EXPECT_TRUE(residual == expected.losses[group.rank()]);
        data = values_of(group.rank(), numel);
        group.run(with_wire(data, wire));
        EXPECT_TRUE(data == expected.result);
      }
  });
}

TEST(coded_and_plain_calls_follow_each_other_in_flight) {
  run_ranks(kTwoHosts, [](Group& group, auto&, Store&) {
    constexpr uint64_t kNumel = 70001;
    std::vector<std::vector<float>> data(15, values_of(group.rank(), kNumel));
    std::vector<std::shared_ptr<Work>> works;
    for (size_t i = 0; i < data.size(); ++i)
      works.push_back(
          group.start(with_wire(data[i], static_cast<Wire>(i % size_t{kWires})), nullptr));
    for (auto& work : works) work->wait(std::chrono::seconds(20));
    for (size_t i = 0; i < data.size(); ++i) {
      const auto wire = static_cast<Wire>(i % size_t{kWires});
      if (wire == Wire::none) {
        std::vector<float> sum = values_of(0, kNumel);
        const std::vector<float> other = values_of(1, kNumel);
        for (size_t k = 0; k < sum.size(); ++k) sum[k] += other[k];
        EXPECT_TRUE(data[i] == sum);
      } else {
        EXPECT_TRUE(data[i] == TwoStep(kNumel, wire).result);
      }
    }
  });
}

TEST(ranks_with_other_wires_are_both_named) {
  run_ranks(kTwoHosts, [](Group& group, auto&, Store&) {
    std::vector<float> data(1000, 1);
    EXPECT_THROWS("elements, wire int8, ring)",
                  group.run(with_wire(data, group.rank() == 0 ? Wire::int8 : Wire::fp8)));
  });
}

TEST(a_result_that_must_be_finite_fails_alone) {
  run_ranks(kTwoHosts, [](Group& group, auto&, Store&) {
    std::vector<float> data(1000, 1);
    if (group.rank() == 1) data[3] = NAN;
    Call call = with_wire(data, Wire::int8);
    call.must_be_finite = true;
    EXPECT_THROWS("the result holds NaN or infinity", group.run(call));
    data.assign(1000, 1);
    group.run(call);
    EXPECT_TRUE(data == std::vector<float>(1000, 2));
  });
}
