// Rows by index in one pass with what becomes of them, on tensors of a CUDA device alone
// (cuda/moe.h), for Python. Indices are not read on the host: what made the tables checked them.
#pragma once

#include "torch/python.h"

namespace pycomm::torch_layer {

void def_fused_rows(py::module_& m);

}  // namespace pycomm::torch_layer
