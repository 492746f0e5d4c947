// RowMemory: memory of output rows that is taken again once nobody holds it. The system's work for
// new pages takes longer than writing the rows to them (docs/moe.md).
// Thread safety: any thread may take, and the last to hold a tensor gives its memory back.
// Invariant: memory is free, or behind one tensor (and its views), never both.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace pycomm::torch_layer {

class RowMemory : public std::enable_shared_from_this<RowMemory> {
 public:
  // keeps_nbytes: of free memory at most; what came back first is let go first.
  explicit RowMemory(int64_t keeps_nbytes) : keeps_nbytes_(keeps_nbytes) {}

  // [n_rows, width] of a type, on the CPU, not initialised.
  at::Tensor empty(int64_t n_rows, int64_t width, at::ScalarType dtype);

 private:
  void give_back(at::Tensor block);

  const int64_t keeps_nbytes_;
  std::mutex mutex_;
  std::vector<at::Tensor> free_;  // uint8, by when they came back
  int64_t free_nbytes_ = 0;
};

}  // namespace pycomm::torch_layer
