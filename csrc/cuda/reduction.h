// What NCCL calls a reduction: which of its types and operations serve one of ours.
#pragma once

#include <optional>

#include "core/dtype.h"
#include "cuda/nccl_api.h"

namespace pycomm::cuda {

struct Reduction {
  NcclDType dtype;
  NcclOp op;
  int elements = 1;  // of NCCL's type in one of ours: a complex number is two
};

inline std::optional<NcclDType> nccl_dtype(DType dtype) {
  switch (dtype) {
    case DType::uint8:
    case DType::boolean:
      return NcclDType::uint8;
    case DType::int8:
      return NcclDType::int8;
    case DType::int32:
      return NcclDType::int32;
    case DType::uint32:
      return NcclDType::uint32;
    case DType::int64:
      return NcclDType::int64;
    case DType::uint64:
      return NcclDType::uint64;
    case DType::float16:
      return NcclDType::float16;
    case DType::bfloat16:
      return NcclDType::bfloat16;
    case DType::float32:
    case DType::complex64:
      return NcclDType::float32;
    case DType::float64:
    case DType::complex128:
      return NcclDType::float64;
    default:  // 16-bit integers and fp8
      return std::nullopt;
  }
}

// Nothing where NCCL has no such reduction. A bool is 0 or 1: its sum is a maximum, its product a
// minimum.
inline std::optional<Reduction> reduction_of(DType dtype, ReduceOp op) {
  const auto type = nccl_dtype(dtype);
  if (!type) return std::nullopt;
  const bool boolean = dtype == DType::boolean;
  const int elements = dtype == DType::complex64 || dtype == DType::complex128 ? 2 : 1;
  switch (op) {
    case ReduceOp::sum:
      return Reduction{*type, boolean ? NcclOp::max : NcclOp::sum, elements};
    case ReduceOp::avg:
      return Reduction{*type, NcclOp::avg, elements};
    case ReduceOp::product:
      return Reduction{*type, boolean ? NcclOp::min : NcclOp::product, elements};
    case ReduceOp::min:
      return Reduction{*type, NcclOp::min, elements};
    case ReduceOp::max:
      return Reduction{*type, NcclOp::max, elements};
    case ReduceOp::band:
      if (boolean) return Reduction{*type, NcclOp::min, elements};
      return std::nullopt;
    case ReduceOp::bor:
      if (boolean) return Reduction{*type, NcclOp::max, elements};
      return std::nullopt;
    case ReduceOp::bxor:
      return std::nullopt;
  }
  return std::nullopt;
}

}  // namespace pycomm::cuda
