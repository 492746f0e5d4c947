// Arrays from Python, used where they lie: torch tensors and numpy arrays, and those of any library
// that has __cuda_array_interface__ or __dlpack__.
#pragma once

#include <pybind11/numpy.h>
#include <torch/csrc/autograd/python_variable.h>

#include "core/dtype.h"
#include "torch/python.h"
#include "torch/tensors.h"

namespace pycomm::torch_layer {

// A tensor or array, checked: contiguous, of a known dtype.
struct View {
  void* data = nullptr;
  uint64_t numel = 0;
  uint64_t rows = 1;  // dim 0
  DType dtype = DType::bytes;
  c10::Device device = at::kCPU;
  void* stream = nullptr;  // on a device: in whose order it stands; its current one where
                           // has_stream is false
  bool has_stream = false;
  bool names_stream = false;      // the array itself says which it is
  py::object owner = py::none();  // keeps the memory, beside the array itself
  uint64_t row() const { return rows == 0 ? 0 : numel / rows; }
  uint64_t nbytes() const { return numel * size_of(dtype); }
};

inline DType numpy_dtype(const char* what, const py::dtype& dtype) {
  const auto size = dtype.itemsize();
  switch (dtype.kind()) {
    case 'b':
      return DType::boolean;
    case 'i':
      return size == 1   ? DType::int8
             : size == 2 ? DType::int16
             : size == 4 ? DType::int32
                         : DType::int64;
    case 'u':
      return size == 1   ? DType::uint8
             : size == 2 ? DType::uint16
             : size == 4 ? DType::uint32
                         : DType::uint64;
    case 'f':
      if (size <= 8)
        return size == 2 ? DType::float16 : size == 4 ? DType::float32 : DType::float64;
      break;
    case 'c':
      if (size <= 16) return size == 8 ? DType::complex64 : DType::complex128;
      break;
    default:
      break;
  }
  refuse(what, "numpy dtype " + dtype.attr("name").cast<std::string>() + " is not supported");
}

// Of an array of another library. __cuda_array_interface__ says on which stream it stands; what
// __dlpack__ gives on a device is put in the order of torch's current stream, or of the default
// one.
View foreign_view(const char* what, py::handle object, bool writable);

inline View view(const char* what, py::handle object, bool writable) {
  View view;
  if (THPVariable_Check(object.ptr())) {
    const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
    if (!tensor.device().is_cpu() && !tensor.device().is_cuda())
      refuse(what, "the tensor is on " + tensor.device().str() +
                       "; groups move memory of CPUs and CUDA devices, call .cpu()");
    if (tensor.layout() != at::kStrided) refuse(what, "the tensor is sparse; call .to_dense()");
    if (!tensor.is_contiguous()) refuse(what, "the tensor is not contiguous; call .contiguous()");
    if (tensor.is_conj() || tensor.is_neg())
      refuse(what,
             "the tensor is a conjugated or negated view; call .resolve_conj() or .resolve_neg()");
    if (writable && tensor.requires_grad() && tensor.is_leaf() && at::GradMode::is_enabled())
      refuse(what,
             "the tensor requires grad and would be written in place; use torch.no_grad() or "
             ".detach()");
    const auto dtype = dtype_of(tensor.scalar_type());
    if (!dtype)
      refuse(what,
             std::string("dtype ") + c10::toString(tensor.scalar_type()) + " is not supported");
    view.dtype = *dtype;
    view.numel = static_cast<uint64_t>(tensor.numel());
    view.rows = tensor.dim() > 0 ? static_cast<uint64_t>(tensor.size(0)) : 1;
    view.data = tensor.data_ptr();
    view.device = tensor.device();
    return view;
  }
  if (!py::isinstance<py::array>(object)) return foreign_view(what, object, writable);
  const auto array = py::reinterpret_borrow<py::array>(object);
  if ((array.flags() & py::array::c_style) == 0)
    refuse(what, "the array is not C-contiguous; call numpy.ascontiguousarray()");
  if ((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0)
    refuse(what, "the array's memory is not aligned for its dtype; copy it");
  if (const char order = array.dtype().byteorder(); order == '<' || order == '>')  // native is '='
    refuse(what, "the array's bytes are swapped; call .astype() with a native dtype");
  if (writable && !array.writeable())
    refuse(what, "the array is read-only; give one that can be written");
  view.dtype = numpy_dtype(what, array.dtype());
  view.numel = static_cast<uint64_t>(array.size());
  view.rows = array.ndim() > 0 ? static_cast<uint64_t>(array.shape(0)) : 1;
  view.data = const_cast<void*>(array.data());
  return view;
}

inline View host_view(const char* what, py::handle object, bool writable) {
  View found = view(what, object, writable);
  if (!found.device.is_cpu())
    refuse(what, "the array is on " + found.device.str() + "; this works on CPU memory, copy it");
  return found;
}

}  // namespace pycomm::torch_layer
