// The tables of an expert exchange (cpu/expert_plan.h), for Python.
#pragma once

#include "torch/python.h"

namespace pycomm::torch_layer {

void def_expert_plan(py::module_& m);

}  // namespace pycomm::torch_layer
