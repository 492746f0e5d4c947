#include "torch/row_memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <utility>

namespace pycomm::torch_layer {

at::Tensor RowMemory::empty(int64_t n_rows, int64_t width, at::ScalarType dtype) {
  const auto options = at::TensorOptions().dtype(dtype);
  const int64_t nbytes = n_rows * width * static_cast<int64_t>(c10::elementSize(dtype));
  if (nbytes == 0) return at::empty({n_rows, width}, options);
  at::Tensor block;
  {
    std::lock_guard lock(mutex_);
    auto best = free_.end();
    for (auto each = free_.begin(); each != free_.end(); ++each)
      if (each->numel() >= nbytes && each->numel() / 2 <= nbytes &&
          (best == free_.end() || each->numel() < best->numel()))
        best = each;
    if (best != free_.end()) {
      block = std::move(*best);
      free_.erase(best);
      free_nbytes_ -= block.numel();
    }
  }
  // An eighth more, so that the next batch, a little larger, fits too.
  if (!block.defined())
    block = at::empty({nbytes + nbytes / 8}, at::TensorOptions().dtype(at::kByte));
  void* const data = block.mutable_data_ptr();
  return at::from_blob(
      data, {n_rows, width},
      [self = shared_from_this(), block = std::move(block)](void*) mutable {
        self->give_back(std::move(block));
      },
      options);
}

void RowMemory::give_back(at::Tensor block) {
  std::vector<at::Tensor> let_go;  // freed after the lock
  std::lock_guard lock(mutex_);
  free_nbytes_ += block.numel();
  free_.push_back(std::move(block));
  while (free_nbytes_ > keeps_nbytes_) {
    free_nbytes_ -= free_.front().numel();
    let_go.push_back(std::move(free_.front()));
    free_.erase(free_.begin());
  }
}

}  // namespace pycomm::torch_layer
