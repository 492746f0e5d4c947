// What every file that speaks to Python needs: timeouts in seconds, pycomm's errors as Python's,
// and Python objects that C++ keeps.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <optional>
#include <string>

#include "core/status.h"

namespace pycomm::torch_layer {

namespace py = pybind11;

using Milliseconds = std::chrono::milliseconds;

inline Milliseconds milliseconds_of(double seconds) {
  if (!(seconds > 0))
    throw Error(Code::invalid_argument,
                "a timeout must be positive, got " + std::to_string(seconds) + " s");
  return Milliseconds(static_cast<int64_t>(std::min(std::ceil(seconds * 1e3), 3e12)));
}

inline std::optional<Milliseconds> limit_of(const std::optional<double>& timeout_s) {
  return timeout_s ? std::optional(milliseconds_of(*timeout_s)) : std::nullopt;
}

[[noreturn]] inline void refuse(const char* what, const std::string& text) {
  throw Error(Code::invalid_argument, std::string(what) + ": " + text);
}

inline const char* exception_name(Code code) {
  switch (code) {
    case Code::invalid_argument:
      return "InvalidArgument";
    case Code::timeout:
      return "PeerTimeout";
    case Code::peer_lost:
      return "PeerLost";
    case Code::mismatch:
      return "CollectiveMismatch";
    case Code::closed:
      return "GroupClosed";
    case Code::nonfinite:
      return "NonfiniteError";
    default:
      return "PycommError";
  }
}

inline void set_python_error(const Error& error) {
  const py::object type = py::module_::import("pycomm.errors").attr(exception_name(error.code()));
  PyErr_SetString(type.ptr(), error.what());
}

// A Python object whose last owner may be any thread.
inline std::shared_ptr<void> held(py::object object) {
  return std::shared_ptr<void>(new py::object(std::move(object)), [](void* pointer) {
    if (!Py_IsInitialized()) return;
    py::gil_scoped_acquire gil;
    delete static_cast<py::object*>(pointer);
  });
}

}  // namespace pycomm::torch_layer
