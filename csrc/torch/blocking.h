// Blocking: a call that may wait, made from Python. It lets go of the GIL; signals (Ctrl-C) are
// handled meanwhile, and what their handlers raise ends the wait. And how Works are waited for.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <span>

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

// As c10d has it: without a limit what comes next on `stream` comes after the operations, and
// nobody waits; with a limit, or where they have no stream, the caller waits. Each has a deadline
// of its own. Throws the operations' errors, Error(timeout) beyond the limit.
inline void wait_for(std::span<const std::shared_ptr<Work>> works,
                     const std::function<void*()>& stream,
                     std::optional<std::chrono::milliseconds> limit) {
  constexpr auto kForever = std::chrono::milliseconds(std::chrono::hours(24 * 365));
  if (stream && !limit) {
    void* const next = stream();
    for (const auto& work : works) work->order_before(next);
    return;
  }
  const auto until = Clock::now() + limit.value_or(kForever);
  for (const auto& work : works)
    work->wait(std::max(std::chrono::milliseconds(0),
                        std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now())));
}

}  // namespace pycomm::torch_layer
