// Memory of all ranks of one host on their devices (cuda/symmetric_memory.h), for Python.
#pragma once

#include "torch/py_group.h"

namespace pycomm::torch_layer {

void def_symmetric_memory(py::module_& m, py::class_<PyGroup>& group);

}  // namespace pycomm::torch_layer
