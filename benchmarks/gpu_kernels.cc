// How fast the kernels are, against copying on the same GPU (gpu_timing.h).
#include <random>

#include "cuda/cuda.h"
#include "gpu_timing.h"

using namespace pycomm;

int main() try {
  cudaDeviceProp properties;
  require(cudaGetDeviceProperties(&properties, 0));
  std::fprintf(stderr, "%s\n", properties.name);
  const size_t largest = size_t{1} << 28;  // bytes
  const int n_turns = turns_past_l2(size_t{1} << 24);
  std::vector<float> values(largest / sizeof(float));
  std::mt19937 random(std::random_device{}());
  std::normal_distribution<float> normal;
  for (float& value : values) value = normal(random);
  std::vector<char*> in, other, out;
  for (int turn = 0; turn < n_turns; ++turn)
    for (auto* list : {&in, &other, &out}) {
      void* memory = nullptr;
      require(cudaMalloc(&memory, largest + largest / 16));  // a coded form has its scales too
      require(cudaMemcpy(memory, values.data(), largest, cudaMemcpyHostToDevice));
      list->push_back(static_cast<char*>(memory));
    }
  std::vector<Task> tasks;
  for (const size_t nbytes : {size_t{1} << 20, size_t{1} << 24, size_t{1} << 26, largest}) {
    const size_t numel = nbytes / 2;  // of bfloat16
    tasks.push_back(
        {"copy", numel, 2 * nbytes, [&, nbytes](int turn) {
           require(cudaMemcpyAsync(out[turn], in[turn], nbytes, cudaMemcpyDeviceToDevice, nullptr));
           return Status{};
         }});
    tasks.push_back({"reduce", numel, 3 * nbytes, [&, numel](int turn) {
                       return cuda::reduce(out[turn], in[turn], other[turn], numel, DType::bfloat16,
                                           ReduceOp::sum, nullptr);
                     }});
    for (const BlockCode code : {BlockCode::int8, BlockCode::e4m3}) {
      const std::string suffix = code == BlockCode::int8 ? " int8" : " e4m3";
      const auto coded = static_cast<size_t>(quantised_nbytes(static_cast<int64_t>(numel), code));
      tasks.push_back({"quantise" + suffix, numel, nbytes + coded, [&, numel, code](int turn) {
                         return cuda::quantise(out[turn], in[turn], numel, DType::bfloat16, code,
                                               nullptr);
                       }});
      tasks.push_back({"dequantise-reduce" + suffix, numel, 2 * nbytes + coded,
                       [&, numel, code](int turn) {
                         return cuda::dequantise(out[turn], in[turn], numel, DType::bfloat16, code,
                                                 true, nullptr);
                       },
                       true});
      const auto stride = static_cast<int64_t>((coded + 15) / 16 * 16);
      tasks.push_back(
          {"requantise-sum of 2" + suffix, numel, 3 * coded, [&, numel, code, stride](int turn) {
             return cuda::requantise_sum(out[turn], in[turn], 2, stride, numel, code, 1.0f,
                                         nullptr);
           }});
    }
    tasks.push_back({"pack", numel, 2 * nbytes, [&, numel](int turn) {
                       std::vector<cuda::Tensor> tensors;
                       for (size_t i = 0; i < 64; ++i)
                         tensors.push_back({in[turn] + i * (numel / 64) * 2, numel / 64});
                       return cuda::pack(out[turn], tensors, 0.5f, DType::bfloat16, nullptr);
                     }});
  }
  measure(tasks, n_turns, [&](const Task& task, int turn) {
    if (!task.reads_output) require(cudaMemset(out[turn], 0xa5, task.numel * 2));
  });
} catch (const std::exception& error) {
  std::fprintf(stderr, "gpu_kernels: %s\n", error.what());
  return 1;
}
