// How fast the kernels are, against copying on the same GPU. Prints a line per measurement: what,
// values, bytes read and written, then seconds of each round. Fresh random inputs, rotated past the
// L2; outputs are poisoned before. gpu.py runs it and writes the results.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/cuda.h"

using namespace pycomm;

namespace {

void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

struct Task {
  std::string name;
  size_t numel, nbytes;
  std::function<Status(int turn)> run;
  std::vector<double> seconds = {};
};

constexpr int kRounds = 30;

}  // namespace

int main() try {
  cudaDeviceProp properties;
  require(cudaGetDeviceProperties(&properties, 0));
  std::fprintf(stderr, "%s\n", properties.name);
  const size_t largest = size_t{1} << 28;  // bytes
  const int n_turns = static_cast<int>(
      std::max<size_t>(3, 3 * static_cast<size_t>(properties.l2CacheSize) / (size_t{1} << 24) + 1));
  std::vector<float> values(largest / sizeof(float));
  std::mt19937 random(std::random_device{}());
  std::normal_distribution<float> normal;
  for (float& value : values) value = normal(random);
  std::vector<char*> in, other, out;
  for (int turn = 0; turn < n_turns; ++turn)
    for (auto* list : {&in, &other, &out}) {
      void* memory = nullptr;
      require(cudaMalloc(&memory, largest + (size_t{1} << 20)));
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
      tasks.push_back(
          {"dequantise-reduce" + suffix, numel, 2 * nbytes + coded, [&, numel, code](int turn) {
             return cuda::dequantise(out[turn], in[turn], numel, DType::bfloat16, code, true,
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
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin));
  require(cudaEventCreate(&end));
  for (int round = -3; round < kRounds; ++round)
    for (Task& task : tasks) {
      const int turn = (round + 3) % n_turns;
      require(cudaMemset(out[turn], 0xa5, task.numel * 2));
      require(cudaEventRecord(begin));
      if (const Status status = task.run(turn); !status.ok()) throw Error(status);
      require(cudaEventRecord(end));
      require(cudaEventSynchronize(end));
      float milliseconds = 0;
      require(cudaEventElapsedTime(&milliseconds, begin, end));
      if (round >= 0) task.seconds.push_back(static_cast<double>(milliseconds) * 1e-3);
    }
  for (const Task& task : tasks) {
    std::printf("%s\t%zu\t%zu", task.name.c_str(), task.numel, task.nbytes);
    for (const double seconds : task.seconds) std::printf("\t%.9f", seconds);
    std::printf("\n");
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "gpu_kernels: %s\n", error.what());
  return 1;
}
