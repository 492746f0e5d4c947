// Rows by index (cpu/rows.h) on tensors, and tensors of other ranks' heaps, for Python.
#pragma once

#include "torch/python.h"

namespace pycomm::torch_layer {

void def_rows(py::module_& m);

}  // namespace pycomm::torch_layer
