// all_reduce of sparse COO tensors, as Gloo has it: the sum of all ranks', coalesced, in place of
// the input.
//
// Ranks hold different numbers of values, so it has two stages: an all_gather of every rank's shape
// and count, in its turn among the group's collectives, then indices and values as messages to
// every rank. The end of each step starts the next: no thread waits between them.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "core/group.h"

namespace pycomm::torch_layer {

// number: of this among the group's sparse calls, the same on all ranks.
// REQUIRES: a sparse COO tensor on CPU, of a dtype that can be summed.
std::shared_ptr<Work> start_sparse_all_reduce(const std::shared_ptr<Group>& group,
                                              const at::Tensor& tensor, int64_t number,
                                              std::optional<std::chrono::milliseconds> timeout);

}  // namespace pycomm::torch_layer
