// What the programs that time kernels share (gpu_kernels.cc, gpu_moe.cc): they print a line per
// measurement: what, values, bytes read and written, then seconds of each round. Inputs are fresh
// and rotated past the L2, outputs poisoned before where they are not read. gpu.py runs them and
// writes the results.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/status.h"

namespace pycomm {

inline void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

struct Task {
  std::string name;
  size_t numel, nbytes;  // nbytes: what must be read and written at least
  std::function<Status(int turn)> run;
  bool reads_output = false;  // so what poisons it would put its input into the L2
  std::vector<double> seconds = {};
};

constexpr int kRounds = 30, kWarmUps = 3;

// How many sets of buffers, each of so many bytes, before the first is out of the L2 again.
inline int turns_past_l2(size_t nbytes) {
  int device = 0, l2_nbytes = 0;
  require(cudaGetDevice(&device));
  require(cudaDeviceGetAttribute(&l2_nbytes, cudaDevAttrL2CacheSize, device));
  return static_cast<int>(std::max<size_t>(3, 3 * static_cast<size_t>(l2_nbytes) / nbytes + 1));
}

// Times the tasks in turns, each on another set of buffers than the last, and prints them. poison:
// called before each, off the clock.
inline void measure(std::vector<Task>& tasks, int n_turns,
                    const std::function<void(const Task&, int turn)>& poison) {
  cudaEvent_t begin, end;
  require(cudaEventCreate(&begin));
  require(cudaEventCreate(&end));
  int n_run = 0;
  for (int round = 0; round < kWarmUps + kRounds; ++round)
    for (Task& task : tasks) {
      const int turn = n_run++ % n_turns;
      poison(task, turn);
      require(cudaEventRecord(begin));
      if (const Status status = task.run(turn); !status.ok()) throw Error(status);
      require(cudaEventRecord(end));
      require(cudaEventSynchronize(end));
      float milliseconds = 0;
      require(cudaEventElapsedTime(&milliseconds, begin, end));
      if (round >= kWarmUps) task.seconds.push_back(static_cast<double>(milliseconds) * 1e-3);
    }
  require(cudaEventDestroy(begin));
  require(cudaEventDestroy(end));
  for (const Task& task : tasks) {
    std::printf("%s\t%zu\t%zu", task.name.c_str(), task.numel, task.nbytes);
    for (const double seconds : task.seconds) std::printf("\t%.9f", seconds);
    std::printf("\n");
  }
}

}  // namespace pycomm
