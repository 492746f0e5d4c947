// What the lanes of the quantising kernels do, run in turn on the host, against the CPU engine's
// coding of whole tensors, bit for bit.
#include <cstring>
#include <random>

#include "cpu/coding.h"
#include "cuda/block_lanes.h"
#include "testing.h"

using namespace pycomm;

namespace {

constexpr int kPerLane = 4;  // as for float32

template <BlockCode kCode>
void check(Wire wire, int64_t numel, int n_forms, float factor) {
  const auto n = static_cast<size_t>(numel);
  const int64_t nbytes = quantised_nbytes(numel, kCode), stride = (nbytes + 15) / 16 * 16;
  std::mt19937 random(static_cast<unsigned>(numel + n_forms));
  std::normal_distribution<float> normal(0, 3);
  // The CPU: decodes each form, adds in order, codes the sum.
  std::vector<char> forms(static_cast<size_t>(stride * n_forms));
  std::vector<float> sum(n, 0.0f), values(n), lost(n), earlier(n);
  for (int form = 0; form < n_forms; ++form) {
    for (float& value : values) value = normal(random);
    char* const at = forms.data() + form * stride;
    cpu::encode(at, values.data(), n, wire);
    cpu::decode(values.data(), at, n, wire);
    for (size_t i = 0; i < n; ++i) sum[i] = form == 0 ? values[i] : sum[i] + values[i];
  }
  for (float& value : sum) value *= factor;
  std::vector<char> expected(static_cast<size_t>(nbytes)), found(expected.size());
  cpu::encode(expected.data(), sum.data(), n, wire);
  cpu::decode(values.data(), expected.data(), n, wire);
  for (size_t i = 0; i < n; ++i) {
    earlier[i] = normal(random);
    lost[i] = earlier[i] + 2.5f * (sum[i] - values[i]);
  }
  // The lanes of a block, then of the next.
  const auto* codes = reinterpret_cast<const uint8_t*>(forms.data());
  const auto* scales = reinterpret_cast<const float*>(codes + scales_offset(numel, kCode));
  auto* to = reinterpret_cast<uint8_t*>(found.data());
  auto* to_scales = reinterpret_cast<float*>(to + scales_offset(numel, kCode));
  constexpr int kLanes = kBlockNumel / kPerLane;
  for (int64_t block = 0; block < n_blocks(numel); ++block) {
    float sums[kLanes][kPerLane];
    int32_t largest = 0;
    for (int at = 0; at < kLanes; ++at) {
      const auto lane = cuda::lane_at<kPerLane>(block * kLanes + at, numel);
      EXPECT_EQ(lane.block, block);
      cuda::sum_lane<kPerLane, kCode>(codes, scales, lane, {n_forms, stride, factor}, sums[at]);
      largest = std::max(largest, cuda::largest_of_lane<kPerLane>(sums[at]));
    }
    for (int at = 0; at < kLanes; ++at)
      cuda::code_lane<kPerLane, kCode>(to, to_scales,
                                       cuda::lane_at<kPerLane>(block * kLanes + at, numel),
                                       sums[at], largest, {earlier.data(), 2.5f});
  }
  EXPECT_TRUE(found == expected);
  EXPECT_TRUE(std::memcmp(earlier.data(), lost.data(), n * sizeof(float)) == 0);
}

}  // namespace

TEST(sums_of_forms_are_coded_anew_with_the_cpu_engines_bits) {
  for (const int64_t numel : {1, 3, 127, 128, 129, 1000, 4099})
    for (const int n_forms : {1, 2, 5})
      for (const float factor : {1.0f, 1.0f / 3}) {
        check<BlockCode::int8>(Wire::int8, numel, n_forms, factor);
        check<BlockCode::e4m3>(Wire::fp8, numel, n_forms, factor);
      }
}
