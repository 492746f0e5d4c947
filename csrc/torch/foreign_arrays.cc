// Arrays of other libraries, by the protocols that they share: __cuda_array_interface__ (Numba,
// CUDA Array Interface, version 3) and __dlpack__ (DLPack 1.0, Python array API).
#include <ATen/dlpack.h>

#include "torch/arrays.h"
#include "torch/device_side.h"

namespace pycomm::torch_layer {
namespace {

// Whether sizes and strides (in elements) are those of an array whose last index moves fastest.
bool is_contiguous(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  int64_t expected = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    if (shape[i] == 0) return true;
    if (shape[i] != 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

void set_shape(const char* what, const std::vector<int64_t>& shape,
               const std::vector<int64_t>& strides, View* view) {
  if (!strides.empty() && !is_contiguous(shape, strides))
    refuse(what, "the array is not C-contiguous; copy it, with ascontiguousarray() for example");
  view->numel = 1;
  for (const int64_t size : shape) view->numel *= static_cast<uint64_t>(size);
  view->rows = shape.empty() ? 1 : static_cast<uint64_t>(shape[0]);
}

[[noreturn]] void refuse_read_only(const char* what) {
  refuse(what, "the array is read-only; give one that can be written");
}

View cuda_view(const char* what, const py::dict& interface, bool writable) {
  View view;
  const auto type = interface["typestr"].cast<std::string>();
  if (type.size() < 3 || type[0] == '>') refuse(what, "its bytes are swapped (" + type + ")");
  if (type[1] == 'V')
    refuse(what, "typestr " + type +
                     " names no dtype; give the array by __dlpack__, or a view of it as uint8");
  view.dtype = numpy_dtype(what, py::dtype(type));
  const auto shape = interface["shape"].cast<std::vector<int64_t>>();
  std::vector<int64_t> strides;
  if (interface.contains("strides") && !interface["strides"].is_none())
    for (const int64_t bytes : interface["strides"].cast<std::vector<int64_t>>())
      strides.push_back(bytes / static_cast<int64_t>(size_of(view.dtype)));
  set_shape(what, shape, strides, &view);
  if (interface.contains("mask") && !interface["mask"].is_none())
    refuse(what, "the array has a mask; give its data alone");
  const auto data = interface["data"].cast<std::pair<uintptr_t, bool>>();
  if (writable && data.second) refuse_read_only(what);
  view.data = reinterpret_cast<void*>(data.first);
  view.device = device_of(view.data);
  if (interface.contains("stream") && !interface["stream"].is_none()) {
    const auto stream = interface["stream"].cast<uintptr_t>();
    if (stream == 0) refuse(what, "its stream is 0, which __cuda_array_interface__ does not allow");
    view.stream = reinterpret_cast<void*>(stream);  // 1 and 2 are CUDA's own names of the defaults
    view.has_stream = view.names_stream = true;
  }
  return view;
}

std::optional<DType> dtype_of(const DLDataType& type) {
  if (type.lanes != 1) return std::nullopt;
  const int bits = type.bits;
  switch (type.code) {
    case kDLBool:
      return bits == 8 ? std::optional(DType::boolean) : std::nullopt;
    case kDLInt:
      return bits == 8    ? std::optional(DType::int8)
             : bits == 16 ? std::optional(DType::int16)
             : bits == 32 ? std::optional(DType::int32)
             : bits == 64 ? std::optional(DType::int64)
                          : std::nullopt;
    case kDLUInt:
      return bits == 8    ? std::optional(DType::uint8)
             : bits == 16 ? std::optional(DType::uint16)
             : bits == 32 ? std::optional(DType::uint32)
             : bits == 64 ? std::optional(DType::uint64)
                          : std::nullopt;
    case kDLFloat:
      return bits == 16   ? std::optional(DType::float16)
             : bits == 32 ? std::optional(DType::float32)
             : bits == 64 ? std::optional(DType::float64)
                          : std::nullopt;
    case kDLBfloat:
      return bits == 16 ? std::optional(DType::bfloat16) : std::nullopt;
    case kDLComplex:
      return bits == 64    ? std::optional(DType::complex64)
             : bits == 128 ? std::optional(DType::complex128)
                           : std::nullopt;
    case kDLFloat8_e4m3fn:
      return DType::float8_e4m3fn;
    case kDLFloat8_e5m2:
      return DType::float8_e5m2;
    default:
      return std::nullopt;
  }
}

// Asks in the newest form that the array's library knows. A copy would be written in vain.
py::object capsule_of(const char* what, py::handle object, const std::optional<py::int_>& stream) {
  py::dict options;
  if (stream) options["stream"] = *stream;
  py::dict newer(**options);
  newer["max_version"] = py::make_tuple(DLPACK_MAJOR_VERSION, 0);
  newer["copy"] = false;
  for (const py::dict& form : {newer, options}) {
    try {
      return object.attr("__dlpack__")(**form);
    } catch (py::error_already_set& error) {
      if (error.matches(PyExc_TypeError) && form.contains("copy")) continue;  // an older library
      if (!error.matches(PyExc_BufferError) && !error.matches(PyExc_TypeError)) throw;
      refuse(what, std::string("its __dlpack__ gives no memory: ") + error.what());
    }
  }
  return py::none();
}

View dlpack_view(const char* what, py::handle object, bool writable) {
  const auto [type, index] = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  const bool on_host = type == kDLCPU || type == kDLCUDAHost;
  if (!on_host && type != kDLCUDA && type != kDLCUDAManaged)
    refuse(what, "the array is on a device of DLPack's type " + std::to_string(type) +
                     "; groups move memory of CPUs (1) and CUDA devices (2)");
  View view;
  std::optional<py::int_> stream;
  if (!on_host) {
    view.device = c10::Device(at::kCUDA, static_cast<c10::DeviceIndex>(index));
    view.stream = current_stream_of(view.device);
    view.has_stream = true;
    stream = py::int_(view.stream == nullptr ? 1 : reinterpret_cast<uintptr_t>(view.stream));
  }
  view.owner = capsule_of(what, object, stream);
  const DLTensor* tensor = nullptr;
  // Not consumed: it goes with its capsule, after the call.
  if (PyCapsule_IsValid(view.owner.ptr(), "dltensor_versioned")) {
    const auto* managed = static_cast<const DLManagedTensorVersioned*>(
        PyCapsule_GetPointer(view.owner.ptr(), "dltensor_versioned"));
    if (managed->version.major != DLPACK_MAJOR_VERSION)
      refuse(what, "its __dlpack__ speaks version " + std::to_string(managed->version.major) +
                       ", pycomm " + std::to_string(DLPACK_MAJOR_VERSION));
    if (writable && (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0) refuse_read_only(what);
    tensor = &managed->dl_tensor;
  } else if (PyCapsule_IsValid(view.owner.ptr(), "dltensor")) {
    tensor =
        &static_cast<const DLManagedTensor*>(PyCapsule_GetPointer(view.owner.ptr(), "dltensor"))
             ->dl_tensor;
  } else {
    refuse(what, "its __dlpack__ gives no DLPack capsule");
  }
  const auto dtype = dtype_of(tensor->dtype);
  if (!dtype)
    refuse(what, "DLPack dtype (code " + std::to_string(tensor->dtype.code) + ", " +
                     std::to_string(tensor->dtype.bits) + " bits, " +
                     std::to_string(tensor->dtype.lanes) + " lanes) is not supported");
  view.dtype = *dtype;
  std::vector<int64_t> strides;
  if (tensor->strides != nullptr) strides.assign(tensor->strides, tensor->strides + tensor->ndim);
  set_shape(what, {tensor->shape, tensor->shape + tensor->ndim}, strides, &view);
  view.data = static_cast<std::byte*>(tensor->data) + tensor->byte_offset;
  if (reinterpret_cast<uintptr_t>(view.data) % std::min<size_t>(size_of(view.dtype), 8) != 0)
    refuse(what, "the array's memory is not aligned for its dtype; copy it");
  return view;
}

}  // namespace

View foreign_view(const char* what, py::handle object, bool writable) {
  if (py::hasattr(object, "__cuda_array_interface__"))
    return cuda_view(what, object.attr("__cuda_array_interface__"), writable);
  if (py::hasattr(object, "__dlpack__") && py::hasattr(object, "__dlpack_device__"))
    return dlpack_view(what, object, writable);
  refuse(what,
         "takes a torch tensor, a numpy array, or one with __cuda_array_interface__ or "
         "__dlpack__, got " +
             std::string(py::str(py::type::of(object))));
}

}  // namespace pycomm::torch_layer
