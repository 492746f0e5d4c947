#include "torch/symmetric_memory.h"

#include <ATen/ops/from_blob.h>
#include <torch/csrc/utils/pybind.h>

#include "torch/arrays.h"

namespace pycomm::torch_layer {
namespace {

struct PySymmetricMemory {
  std::shared_ptr<cuda::SymmetricMemory> memory;
  c10::Device device;  // of its tensors

  // A tensor keeps this rank's memory, and no other's mapped.
  at::Tensor of(int rank) const {
    if (rank < 0 || rank >= memory->size())
      refuse("SymmetricMemory",
             "there is no rank " + std::to_string(rank) + " of " + std::to_string(memory->size()));
    char* const data = memory->of(rank);
    if (data == nullptr) refuse("SymmetricMemory", "it was given up");
    // Named, since the address may be another device's, which this one reaches.
    return at::from_blob(
        data, {memory->nbytes()}, [keep = memory](void*) {},
        at::TensorOptions().dtype(at::kByte).device(device), device);
  }
};

py::object symmetric_memory(PyGroup& self, const py::object& like, int64_t nbytes,
                            const std::optional<PySymmetricMemory>& instead) {
  const char* what = "symmetric_memory";
  const View example = view(what, like, false);
  if (example.device.is_cpu())
    refuse(what, "the array is the host's, where Group.empty() gives memory that other ranks map");
  if (nbytes < 1) refuse(what, "nbytes is " + std::to_string(nbytes) + "; give 1 or more");
  DeviceSide& side = self.side(what, example.device);
  std::string why;
  std::shared_ptr<cuda::SymmetricMemory> made;
  {
    Blocking blocking;
    made = side.share(nbytes, instead ? instead->memory : nullptr, &why);
  }
  if (made == nullptr) return py::str(why);
  return py::cast(PySymmetricMemory{std::move(made), side.memory_device()});
}

}  // namespace

void def_symmetric_memory(py::module_& m, py::class_<PyGroup>& group) {
  py::class_<PySymmetricMemory>(m, "SymmetricMemory",
                                "Memory of each rank of one host, which all of them have mapped.")
      .def_property_readonly("nbytes",
                             [](const PySymmetricMemory& self) { return self.memory->nbytes(); })
      .def("of", &PySymmetricMemory::of, py::arg("rank"),
           "uint8 [nbytes] of that rank, until the memory is given up.");
  group.def("symmetric_memory", &symmetric_memory, py::arg("like"), py::arg("nbytes"),
            py::arg("instead") = py::none(),
            "nbytes of zeros on each rank's device, which all ranks of this group, of one host, "
            "have mapped; or, on all of them, why one cannot map another's. All ranks call it. "
            "like: an array on the device. instead: of an earlier call, given up for it. What "
            "reads or writes another rank's memory comes before a later collective of the group "
            "on its stream, and has ended before the memory is given up.");
}

}  // namespace pycomm::torch_layer
