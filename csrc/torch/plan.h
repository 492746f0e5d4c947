// What c10d asks, as a Call: reduce ops, and tensors and lists of tensors as memory of one piece.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <numeric>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <vector>

#include "core/group.h"
#include "torch/tensors.h"

namespace pycomm::torch_layer {

inline ReduceOp reduce_op_of(const c10d::ReduceOp& op) {
  switch (op.op_) {
    case c10d::ReduceOp::SUM:
    case c10d::ReduceOp::PREMUL_SUM:
      return ReduceOp::sum;
    case c10d::ReduceOp::AVG:
      return ReduceOp::avg;
    case c10d::ReduceOp::PRODUCT:
      return ReduceOp::product;
    case c10d::ReduceOp::MIN:
      return ReduceOp::min;
    case c10d::ReduceOp::MAX:
      return ReduceOp::max;
    case c10d::ReduceOp::BAND:
      return ReduceOp::band;
    case c10d::ReduceOp::BOR:
      return ReduceOp::bor;
    case c10d::ReduceOp::BXOR:
      return ReduceOp::bxor;
    default:
      throw Error(Code::invalid_argument, "this ReduceOp is unknown to pycomm");
  }
}

// The input of a reduction after PREMUL_SUM's factor; itself for every other op.
inline at::Tensor premultiplied(const at::Tensor& input, const c10d::ReduceOp& op) {
  if (op.op_ != c10d::ReduceOp::PREMUL_SUM) return input;
  // Its name in torch 2.11; later ones keep it as an alias.
  const auto* supplement = dynamic_cast<const c10d::NCCLPreMulSumSupplement*>(op.supplement_.get());
  if (supplement == nullptr) throw Error(Code::invalid_argument, "PREMUL_SUM without a factor");
  return supplement->tensor_factor.defined() ? input * supplement->tensor_factor.to(input.dtype())
                                             : input * supplement->double_factor;
}

inline std::vector<uint64_t> numels(at::TensorList tensors) {
  std::vector<uint64_t> counts;
  counts.reserve(tensors.size());
  for (const auto& tensor : tensors) counts.push_back(static_cast<uint64_t>(tensor.numel()));
  return counts;
}

inline uint64_t total(const std::vector<uint64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), uint64_t{0});
}

inline bool all_equal(const std::vector<uint64_t>& counts) {
  return std::all_of(counts.begin(), counts.end(),
                     [&](uint64_t count) { return count == counts.front(); });
}

// The memory of tensors that lie one after the other, as those of chunk() do; nullptr where they do
// not.
inline void* adjacent(at::TensorList tensors) {
  auto* const begin = static_cast<std::byte*>(tensors.front().data_ptr());
  const std::byte* at = begin;
  for (const auto& tensor : tensors) {
    if (!tensor.is_contiguous() || tensor.data_ptr() != at) return nullptr;
    at += tensor.nbytes();
  }
  return begin;
}

// The tensors' places in a flat one.
inline at::Tensor flat_like(at::TensorList tensors) {
  return at::empty({static_cast<int64_t>(total(numels(tensors)))}, tensors.front().options());
}

inline void flatten(const at::Tensor& flat, at::TensorList tensors) {
  const at::NoGradGuard no_grad;
  int64_t at = 0;
  for (const auto& tensor : tensors) {
    flat.narrow(0, at, tensor.numel()).view(tensor.sizes()).copy_(tensor);
    at += tensor.numel();
  }
}

inline void unflatten(const at::Tensor& flat, at::TensorList tensors) {
  const at::NoGradGuard no_grad;
  int64_t at = 0;
  for (const auto& tensor : tensors) {
    tensor.copy_(flat.narrow(0, at, tensor.numel()).view(tensor.sizes()));
    at += tensor.numel();
  }
}

// A call, and the tensors whose memory it names.
struct Plan {
  Call call;
  c10::SmallVector<at::Tensor, 2> held;
  c10::Device device = at::kCPU;  // of all its tensors
  bool has_device = false;

  // Throws where the tensors are on several devices.
  void note(const at::Tensor& tensor) {
    if (has_device && tensor.device() != device)
      throw Error(Code::invalid_argument, std::string(name_of(call.collective)) +
                                              ": one tensor is on " + device.str() +
                                              ", another on " + tensor.device().str() +
                                              "; all tensors of a call must be on one device");
    device = tensor.device();
    has_device = true;
  }
  void note(at::TensorList tensors) {
    for (const auto& tensor : tensors) note(tensor);
  }

  // Where the engine writes: the tensor, or a contiguous stand-in that is copied back at the end.
  void* write(const at::Tensor& tensor) {
    note(tensor);
    if (tensor.is_contiguous()) {
      held.push_back(tensor);
      return tensor.data_ptr();
    }
    const at::Tensor flat = tensor.contiguous();
    call.finish = [flat, tensor] {
      const at::NoGradGuard no_grad;
      tensor.copy_(flat);
    };
    return flat.data_ptr();
  }
  const void* read(const at::Tensor& tensor) {
    note(tensor);
    held.push_back(tensor.contiguous());
    return held.back().data_ptr();
  }
  // The same of a list's tensors, one after the other. `also_read`: they hold values already.
  void* write(at::TensorList tensors, bool also_read = false) {
    note(tensors);
    if (void* const memory = adjacent(tensors)) {
      held.append(tensors.begin(), tensors.end());
      return memory;
    }
    const at::Tensor flat = flat_like(tensors);
    if (also_read) flatten(flat, tensors);
    call.finish = [flat, list = tensors.vec()] { unflatten(flat, list); };
    return flat.data_ptr();
  }
  const void* read(at::TensorList tensors) {
    note(tensors);
    if (const void* const memory = adjacent(tensors)) {
      held.append(tensors.begin(), tensors.end());
      return memory;
    }
    held.push_back(flat_like(tensors));
    flatten(held.back(), tensors);
    return held.back().data_ptr();
  }
};

}  // namespace pycomm::torch_layer
