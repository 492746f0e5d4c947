// Methods of a pybind11 class that CPython calls directly (METH_FASTCALL): pybind11's own dispatch
// would double the price of a small collective.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "torch/python.h"

namespace pycomm::torch_layer {

// Raises the exception that is being handled in Python.
inline PyObject* raise_in_python() noexcept {
  try {
    throw;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const Error& error) {
    set_python_error(error);
  } catch (const py::cast_error& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// What a call from Python gives for a parameter; nullptr where it gives none, which is T{}.
template <class T>
T from_python(PyObject* object) {
  return object == nullptr ? T{} : py::cast<T>(py::handle(object));
}
template <>
inline bool from_python(PyObject* object) {
  if (object == nullptr || object == Py_False) return false;
  return object == Py_True || py::cast<bool>(py::handle(object));
}
template <>
inline py::object from_python(PyObject* object) {
  return object == nullptr ? py::none() : py::reinterpret_borrow<py::object>(object);
}
// A method as CPython calls it.
struct Method {
  const char* name;
  const char* doc;  // begins with the signature, as inspect.signature() reads it
  std::vector<const char*> parameters;
  Py_ssize_t n_required;
  Py_ssize_t n_positional;         // those after it are given by keyword
  std::vector<PyObject*> names{};  // interned
};

// Where each parameter's argument is, in order. False with a TypeError set.
inline bool take_arguments(const Method& method, PyObject* const* given, Py_ssize_t n_given,
                           PyObject* keywords, PyObject** taken) {
  if (n_given > method.n_positional) {
    PyErr_Format(PyExc_TypeError, "%s() takes %zd positional arguments, got %zd", method.name,
                 method.n_positional, n_given);
    return false;
  }
  std::copy(given, given + n_given, taken);
  const Py_ssize_t n_keywords = keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords);
  for (Py_ssize_t k = 0; k < n_keywords; ++k) {
    PyObject* keyword = PyTuple_GET_ITEM(keywords, k);
    size_t i = 0;
    while (i < method.names.size() && keyword != method.names[i] &&
           PyUnicode_Compare(keyword, method.names[i]) != 0)
      ++i;
    if (i == method.names.size() || taken[i] != nullptr) {
      PyErr_Format(PyExc_TypeError, "%s() got %s '%U'", method.name,
                   i == method.names.size() ? "an unexpected keyword argument"
                                            : "multiple values for argument",
                   keyword);
      return false;
    }
    taken[i] = given[n_given + k];
  }
  for (Py_ssize_t i = 0; i < method.n_required; ++i)
    if (taken[i] == nullptr) {
      PyErr_Format(PyExc_TypeError, "%s() missing required argument: '%s'", method.name,
                   method.parameters[static_cast<size_t>(i)]);
      return false;
    }
  return true;
}

// function(C++ object behind a Self, arguments...) as a method of Self's Python type.
template <class Self, auto function>
struct Bound;
template <class Self, class Object, class... Args, py::object (*function)(Object&, Args...)>
struct Bound<Self, function> {
  static inline Method method{};
  static PyObject* call(PyObject* self, PyObject* const* given, Py_ssize_t n_given,
                        PyObject* keywords) noexcept {
    PyObject* taken[sizeof...(Args)] = {};
    if (!take_arguments(method, given, n_given, keywords, taken)) return nullptr;
    return call(self, taken, std::index_sequence_for<Args...>());
  }
  template <size_t... i>
  static PyObject* call(PyObject* self, PyObject* const* taken,
                        std::index_sequence<i...>) noexcept {
    try {
      // What pybind11 keeps of an object with one C++ base; nullptr before __init__.
      void* object = reinterpret_cast<py::detail::instance*>(self)->simple_value_holder[0];
      if (object == nullptr) refuse(method.name, "__init__ has not run");
      return function(**static_cast<Self*>(object),
                      from_python<std::remove_cvref_t<Args>>(taken[i])...)
          .release()
          .ptr();
    } catch (...) {
      return raise_in_python();
    }
  }
};

template <auto function, class Self>
void def_method(py::class_<Self>& type, Method method) {
  using Bound = torch_layer::Bound<Self, function>;
  for (const char* name : method.parameters)
    method.names.push_back(PyUnicode_InternFromString(name));
  Bound::method = std::move(method);
  PyObject* (*call)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*) = &Bound::call;
  static PyMethodDef definition{Bound::method.name,
                                reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
                                METH_FASTCALL | METH_KEYWORDS, Bound::method.doc};
  auto* descriptor = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &definition);
  if (descriptor == nullptr) throw py::error_already_set();
  type.attr(Bound::method.name) = py::reinterpret_steal<py::object>(descriptor);
}

}  // namespace pycomm::torch_layer
