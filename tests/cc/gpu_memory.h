// What tests on a GPU share: errors as exceptions, device memory, and values of a dtype.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "core/dtype.h"
#include "core/status.h"
#include "cpu/reduce.h"

namespace pycomm {

inline void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
inline void require(const Status& status) {
  if (!status.ok()) throw Error(status);
}

// Device memory filled with 0xa5, at a distance from 16-byte alignment.
class Memory {
 public:
  explicit Memory(size_t nbytes, size_t offset = 0) : nbytes_(nbytes), offset_(offset) {
    require(cudaMalloc(&base_, nbytes + offset + 16));
    require(cudaMemset(base_, 0xa5, nbytes + offset + 16));
  }
  Memory(const std::vector<char>& from, size_t offset) : Memory(from.size(), offset) {
    require(cudaMemcpy(data(), from.data(), from.size(), cudaMemcpyHostToDevice));
  }
  ~Memory() { (void)cudaFree(base_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const { return static_cast<char*>(base_) + offset_; }
  std::vector<char> read() const {
    std::vector<char> to(nbytes_);
    require(cudaMemcpy(to.data(), data(), nbytes_, cudaMemcpyDeviceToHost));
    return to;
  }

 private:
  void* base_ = nullptr;
  const size_t nbytes_, offset_;
};

// Normal values of a dtype, as bytes.
inline std::vector<char> values(size_t numel, DType dtype, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 10);
  std::vector<float> wide(numel);
  for (float& value : wide) value = normal(random);
  std::vector<char> narrow(numel * size_of(dtype));
  if (dtype == DType::float32)
    std::memcpy(narrow.data(), wide.data(), narrow.size());
  else
    cpu::from_float32(narrow.data(), wide.data(), numel, dtype);
  return narrow;
}

inline std::vector<float> widened(const std::vector<char>& data, size_t numel, DType dtype) {
  std::vector<float> wide(numel);
  if (dtype == DType::float32)
    std::memcpy(wide.data(), data.data(), data.size());
  else
    cpu::to_float32(wide.data(), data.data(), numel, dtype);
  return wide;
}

constexpr DType kDTypes[] = {DType::float32, DType::float16, DType::bfloat16};

}  // namespace pycomm
