// The kernels on a GPU against the same arithmetic on the host, bit for bit. `make test-gpu` runs
// it; `make test` only compiles it. Without a GPU every test fails: none may pass by not running.
#include <cstdlib>
#include <memory>

#include "core/wire.h"
#include "cpu/coding.h"
#include "cuda/cuda.h"
#include "gpu_memory.h"
#include "testing.h"

using namespace pycomm;

namespace {

// PYCOMM_TEST_SMALL=1, for compute-sanitizer, leaves the large ones out.
const std::vector<size_t> kNumels = [] {
  std::vector<size_t> all{1, 7, 127, 128, 129, 4096, 100001, (1 << 22) + 3};
  if (std::getenv("PYCOMM_TEST_SMALL") != nullptr) all.resize(6);
  return all;
}();

}  // namespace

TEST(reduce_gives_the_cpu_engines_bits) {
  for (const DType dtype : kDTypes)
    for (const ReduceOp op : {ReduceOp::sum, ReduceOp::product, ReduceOp::min, ReduceOp::max})
      for (const size_t numel : kNumels)
        for (const size_t offset : {size_t{0}, size_of(dtype)}) {
          const auto a = values(numel, dtype, 1), b = values(numel, dtype, 2);
          std::vector<char> expected(a.size());
          cpu::reduce(expected.data(), a.data(), b.data(), numel, dtype, op);
          const Memory on_a(a, offset), on_b(b, 0), out(a.size(), offset);
          require(cuda::reduce(out.data(), on_a.data(), on_b.data(), numel, dtype, op, nullptr));
          require(cudaDeviceSynchronize());
          EXPECT_TRUE(out.read() == expected);
        }
}

TEST(quantise_and_dequantise_give_the_hosts_bits) {
  for (const DType dtype : kDTypes)
    for (const BlockCode code : {BlockCode::int8, BlockCode::e4m3})
      for (const size_t numel : kNumels) {
        const auto x = values(numel, dtype, 3);
        const auto wide = widened(x, numel, dtype);
        const auto n = static_cast<int64_t>(numel);
        std::vector<char> expected(static_cast<size_t>(quantised_nbytes(n, code)), 0);
        std::vector<float> back(numel);
        for (int64_t block = 0; block < n_blocks(n); ++block) {
          int32_t largest_bits = 0;
          const int64_t end = std::min(n, (block + 1) * kBlockNumel);
          for (int64_t i = block * kBlockNumel; i < end; ++i)
            largest_bits = std::max(largest_bits, magnitude_bits(wide[static_cast<size_t>(i)]));
          const BlockScale scale = block_scale(largest_bits, code);
          for (int64_t i = block * kBlockNumel; i < (block + 1) * kBlockNumel; ++i) {
            const float value = i < n ? wide[static_cast<size_t>(i)] : 0.0f;
            const uint8_t byte = encode(code, value, scale.to_code);
            expected[static_cast<size_t>(i)] = static_cast<char>(byte);
            if (i < n) back[static_cast<size_t>(i)] = decode(code, byte, scale.to_value);
          }
          std::memcpy(expected.data() + scales_offset(n, code) + block * 4, &scale.to_value, 4);
        }
        const Memory in(x, 0), coded(expected.size());
        require(cuda::quantise(coded.data(), in.data(), numel, dtype, code, nullptr));
        require(cudaDeviceSynchronize());
        EXPECT_TRUE(coded.read() == expected);
        const Memory out(x.size());
        require(cuda::dequantise(out.data(), coded.data(), numel, dtype, code, false, nullptr));
        require(cudaDeviceSynchronize());
        std::vector<char> narrow(x.size());
        if (dtype == DType::float32)
          std::memcpy(narrow.data(), back.data(), narrow.size());
        else
          cpu::from_float32(narrow.data(), back.data(), numel, dtype);
        EXPECT_TRUE(out.read() == narrow);
      }
}

TEST(dequantise_sum_adds_forms_in_order_and_rounds_once) {
  for (const DType dtype : kDTypes)
    for (const BlockCode code : {BlockCode::int8, BlockCode::e4m3})
      for (const size_t numel : kNumels) {
        const auto n = static_cast<int64_t>(numel);
        const int64_t stride = (quantised_nbytes(n, code) + 15) / 16 * 16;
        const Memory forms(static_cast<size_t>(3 * stride)), out(numel * size_of(dtype));
        for (int form = 0; form < 3; ++form) {
          const Memory x(values(numel, dtype, static_cast<unsigned>(10 + form)), 0);
          require(
              cuda::quantise(forms.data() + form * stride, x.data(), numel, dtype, code, nullptr));
          require(cudaDeviceSynchronize());
        }
        require(cuda::dequantise_sum(out.data(), forms.data(), 3, stride, numel, dtype, code, 0.5f,
                                     nullptr));
        require(cudaDeviceSynchronize());
        const auto bytes = forms.read();
        std::vector<float> sums(numel);
        for (int64_t i = 0; i < n; ++i) {
          float sum = 0;
          for (int form = 0; form < 3; ++form) {
            const char* const at = bytes.data() + form * stride;
            float to_value;
            std::memcpy(&to_value, at + scales_offset(n, code) + i / kBlockNumel * 4, 4);
            sum += decode(code, static_cast<uint8_t>(at[i]), to_value);
          }
          sums[static_cast<size_t>(i)] = sum * 0.5f;
        }
        std::vector<char> expected(numel * size_of(dtype));
        if (dtype == DType::float32)
          std::memcpy(expected.data(), sums.data(), expected.size());
        else
          cpu::from_float32(expected.data(), sums.data(), numel, dtype);
        EXPECT_TRUE(out.read() == expected);
      }
}

TEST(requantise_sum_gives_the_cpu_engines_bits) {
  for (const Wire wire : {Wire::int8, Wire::fp8})
    for (const size_t numel : kNumels) {
      const BlockCode code = block_code(wire);
      const auto n = static_cast<int64_t>(numel);
      const auto nbytes = static_cast<size_t>(quantised_nbytes(n, code));
      const int64_t stride = (quantised_nbytes(n, code) + 15) / 16 * 16;
      std::vector<char> forms(static_cast<size_t>(3 * stride));
      std::vector<float> sum(numel, 0.0f), decoded(numel), lost(numel);
      for (int form = 0; form < 3; ++form) {
        const auto x = widened(values(numel, DType::float32, static_cast<unsigned>(20 + form)),
                               numel, DType::float32);
        char* const at = forms.data() + form * stride;
        cpu::encode(at, x.data(), numel, wire);
        cpu::decode(decoded.data(), at, numel, wire);
        for (size_t i = 0; i < numel; ++i) sum[i] = form == 0 ? decoded[i] : sum[i] + decoded[i];
      }
      for (float& value : sum) value *= 0.5f;
      std::vector<char> expected(nbytes);
      cpu::encode(expected.data(), sum.data(), numel, wire);
      cpu::decode(decoded.data(), expected.data(), numel, wire);
      for (size_t i = 0; i < numel; ++i) lost[i] = 2.5f * (sum[i] - decoded[i]);
      const Memory given(forms, 0), found(nbytes), loss(numel * sizeof(float));
      require(cudaMemset(loss.data(), 0, numel * sizeof(float)));
      require(cuda::requantise_sum(found.data(), given.data(), 3, stride, numel, code, 0.5f,
                                   nullptr, {reinterpret_cast<float*>(loss.data()), 2.5f}));
      require(cudaDeviceSynchronize());
      EXPECT_TRUE(found.read() == expected);
      EXPECT_TRUE(std::memcmp(loss.read().data(), lost.data(), numel * sizeof(float)) == 0);
    }
}

TEST(pack_and_unpack_move_every_element_once) {
  for (const DType dtype : kDTypes) {
    std::vector<std::unique_ptr<Memory>> memory;
    std::vector<cuda::Tensor> tensors;
    std::vector<char> expected;
    for (size_t i = 0; i < 300; ++i) {  // several launches of 128
      const size_t numel = i * 37 % 1000;
      const auto x = values(numel, dtype, static_cast<unsigned>(i));
      memory.push_back(std::make_unique<Memory>(x, i % 3 * size_of(dtype)));
      tensors.push_back({memory.back()->data(), numel});
      expected.insert(expected.end(), x.begin(), x.end());
    }
    const Memory bucket(expected.size());
    require(cuda::pack(bucket.data(), tensors, 1.0f, dtype, nullptr));
    require(cudaDeviceSynchronize());
    EXPECT_TRUE(bucket.read() == expected);
    for (const auto& tensor : tensors)
      if (tensor.numel > 0) require(cudaMemset(tensor.data, 0, tensor.numel * size_of(dtype)));
    require(cuda::unpack(bucket.data(), tensors, 1.0f, dtype, nullptr));
    require(cudaDeviceSynchronize());
    std::vector<char> again;
    for (const auto& each : memory) {
      const auto x = each->read();
      again.insert(again.end(), x.begin(), x.end());
    }
    EXPECT_TRUE(again == expected);
  }
}
