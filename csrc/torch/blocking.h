// Blocking: a call that may wait, made from Python. It lets go of the GIL; signals (Ctrl-C) are
// handled meanwhile, and what their handlers raise ends the wait.
#pragma once

#include <pybind11/pybind11.h>

#include "core/engine.h"

namespace pycomm::torch_layer {

// Throws what a signal handler of Python's raises.
inline void check_signals() {
  if (!Py_IsInitialized()) return;
  pybind11::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

// Whether Python knows this thread alone.
inline bool is_only_thread() {
  if (!Py_IsInitialized()) return false;
  pybind11::gil_scoped_acquire gil;
  return PyThreadState_Next(PyInterpreterState_ThreadHead(PyInterpreterState_Get())) == nullptr;
}

struct Blocking {
  pybind11::gil_scoped_release release;
  InterruptScope scope{check_signals, is_only_thread};
};

}  // namespace pycomm::torch_layer
