// pycomm._C: the engine for Python. Arrays come in as torch tensors or numpy arrays and are used
// where they lie; every call that may wait lets go of the GIL. Not torch/extension.h but the two
// headers it needs: 25 s to compile instead of 43.
#include <pybind11/chrono.h>
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>

#include "core/group.h"
#include "cpu/endpoint.h"
#include "cpu/engine.h"
#include "torch/backend.h"
#include "torch/blocking.h"
#include "torch/tensors.h"
#ifdef PYCOMM_WITH_CUDA
#include "cuda/cuda.h"
#endif

namespace py = pybind11;

namespace pycomm::torch_layer {
namespace {

using Milliseconds = std::chrono::milliseconds;

Milliseconds milliseconds_of(double seconds) {
  if (!(seconds > 0))
    throw Error(Code::invalid_argument,
                "a timeout must be positive, got " + std::to_string(seconds) + " s");
  return Milliseconds(static_cast<int64_t>(std::min(std::ceil(seconds * 1e3), 3e12)));
}

std::optional<Milliseconds> limit_of(const std::optional<double>& timeout_s) {
  return timeout_s ? std::optional(milliseconds_of(*timeout_s)) : std::nullopt;
}

const char* exception_name(Code code) {
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
    default:
      return "PycommError";
  }
}

void set_python_error(const Error& error) {
  const py::object type = py::module_::import("pycomm.errors").attr(exception_name(error.code()));
  PyErr_SetString(type.ptr(), error.what());
}

// A Python object whose last owner may be any thread.
std::shared_ptr<void> held(py::object object) {
  return std::shared_ptr<void>(new py::object(std::move(object)), [](void* pointer) {
    if (!Py_IsInitialized()) return;
    py::gil_scoped_acquire gil;
    delete static_cast<py::object*>(pointer);
  });
}

// A tensor or array, checked: CPU, contiguous, of a known dtype.
struct View {
  void* data = nullptr;
  uint64_t numel = 0;
  uint64_t rows = 1;  // dim 0
  DType dtype = DType::bytes;
  uint64_t row() const { return rows == 0 ? 0 : numel / rows; }
  uint64_t nbytes() const { return numel * size_of(dtype); }
};

[[noreturn]] void refuse(const char* what, const std::string& text) {
  throw Error(Code::invalid_argument, std::string(what) + ": " + text);
}

DType numpy_dtype(const char* what, const py::dtype& dtype) {
  const auto size = dtype.itemsize();
  switch (dtype.kind()) {
    case 'b':
      return DType::boolean;
    case 'i':
      return size == 1   ? DType::int8
             : size == 2 ? DType::int16
             : size == 4 ? DType::int32
                         : DType::int64;
    case 'u':
      return size == 1   ? DType::uint8
             : size == 2 ? DType::uint16
             : size == 4 ? DType::uint32
                         : DType::uint64;
    case 'f':
      if (size <= 8)
        return size == 2 ? DType::float16 : size == 4 ? DType::float32 : DType::float64;
      break;
    case 'c':
      if (size <= 16) return size == 8 ? DType::complex64 : DType::complex128;
      break;
    default:
      break;
  }
  refuse(what, "numpy dtype " + dtype.attr("name").cast<std::string>() + " is not supported");
}

View view(const char* what, py::handle object, bool writable) {
  View view;
  if (THPVariable_Check(object.ptr())) {
    const at::Tensor& tensor = THPVariable_Unpack(object.ptr());
    if (!tensor.device().is_cpu())
      refuse(what, "the tensor is on " + tensor.device().str() +
                       "; this group moves CPU memory, call .cpu()");
    if (tensor.layout() != at::kStrided) refuse(what, "the tensor is sparse; call .to_dense()");
    if (!tensor.is_contiguous()) refuse(what, "the tensor is not contiguous; call .contiguous()");
    if (tensor.is_conj() || tensor.is_neg())
      refuse(what,
             "the tensor is a conjugated or negated view; call .resolve_conj() or .resolve_neg()");
    if (writable && tensor.requires_grad() && tensor.is_leaf() && at::GradMode::is_enabled())
      refuse(what,
             "the tensor requires grad and would be written in place; use torch.no_grad() or "
             ".detach()");
    const auto dtype = dtype_of(tensor.scalar_type());
    if (!dtype)
      refuse(what,
             std::string("dtype ") + c10::toString(tensor.scalar_type()) + " is not supported");
    view.dtype = *dtype;
    view.numel = static_cast<uint64_t>(tensor.numel());
    view.rows = tensor.dim() > 0 ? static_cast<uint64_t>(tensor.size(0)) : 1;
    view.data = tensor.data_ptr();
    return view;
  }
  if (!py::isinstance<py::array>(object))
    refuse(what, "takes a torch tensor or a numpy array, got " +
                     std::string(py::str(py::type::of(object))));
  const auto array = py::reinterpret_borrow<py::array>(object);
  if ((array.flags() & py::array::c_style) == 0)
    refuse(what, "the array is not C-contiguous; call numpy.ascontiguousarray()");
  if ((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0)
    refuse(what, "the array's memory is not aligned for its dtype; copy it");
  if (const char order = array.dtype().byteorder(); order == '<' || order == '>')  // native is '='
    refuse(what, "the array's bytes are swapped; call .astype() with a native dtype");
  if (writable && !array.writeable())
    refuse(what, "the array is read-only; give one that can be written");
  view.dtype = numpy_dtype(what, array.dtype());
  view.numel = static_cast<uint64_t>(array.size());
  view.rows = array.ndim() > 0 ? static_cast<uint64_t>(array.shape(0)) : 1;
  view.data = const_cast<void*>(array.data());
  return view;
}

ReduceOp parse_op(const std::string& name) {
  for (int op = 0; op <= static_cast<int>(ReduceOp::bxor); ++op)
    if (name == name_of(static_cast<ReduceOp>(op))) return static_cast<ReduceOp>(op);
  refuse("op", "'" + name + "' is none of sum, avg, product, min, max, band, bor, bxor");
}

Collective parse_collective(const std::string& name) {
  for (int c = 0; c < kCollectives; ++c)
    if (name == name_of(static_cast<Collective>(c))) return static_cast<Collective>(c);
  refuse("collective", "'" + name + "' is not a collective");
}

// What every collective takes beside its arrays.
struct Common {
  bool async_op;
  std::optional<double> timeout_s;
  std::optional<std::string> algorithm;
};

class PyWork {
 public:
  PyWork(std::shared_ptr<Work> work) : work_(std::move(work)) {}
  void wait(std::optional<double> timeout_s) {
    const auto limit = limit_of(timeout_s).value_or(Milliseconds(std::chrono::hours(24 * 365)));
    Blocking blocking;
    work_->wait(limit);
  }
  bool is_completed() const { return work_->done(); }
  double duration_s() const { return work_->duration_s(); }
  int source() const { return work_->source(); }

 private:
  const std::shared_ptr<Work> work_;
};

class PyGroup {
 public:
  explicit PyGroup(std::shared_ptr<Group> group) : group_(std::move(group)) {}
  const std::shared_ptr<Group>& group() const { return group_; }

  py::object all_reduce(const py::object& x, ReduceOp op, bool async_op,
                        std::optional<double> timeout_s, std::optional<std::string> algorithm) {
    const View data = view("all_reduce", x, true);
    Call call =
        start_call(Collective::all_reduce, data, data.numel, {async_op, timeout_s, algorithm});
    call.op = op;
    call.input = call.output = data.data;
    return submit(std::move(call), async_op, x, x);
  }
  py::object reduce(const py::object& x, int root, ReduceOp op, bool async_op,
                    std::optional<double> timeout_s, std::optional<std::string> algorithm) {
    const View data = view("reduce", x, group_->rank() == root);
    Call call = start_call(Collective::reduce, data, data.numel, {async_op, timeout_s, algorithm});
    call.op = op;
    call.root = root;
    call.input = data.data;
    call.output = group_->rank() == root ? data.data : nullptr;
    return submit(std::move(call), async_op, x, x);
  }
  py::object broadcast(const py::object& x, int root, bool async_op,
                       std::optional<double> timeout_s, std::optional<std::string> algorithm) {
    const View data = view("broadcast", x, group_->rank() != root);
    Call call =
        start_call(Collective::broadcast, data, data.numel, {async_op, timeout_s, algorithm});
    call.root = root;
    call.input = call.output = data.data;
    return submit(std::move(call), async_op, x, x);
  }
  py::object all_gather(const py::object& output, const py::object& input,
                        const std::optional<std::vector<int64_t>>& counts, bool async_op,
                        std::optional<double> timeout_s, std::optional<std::string> algorithm) {
    const View out = view("all_gather output", output, true),
               in = view("all_gather input", input, false);
    Call call =
        start_call(Collective::all_gather, out, out.numel, {async_op, timeout_s, algorithm});
    call.counts = elements("all_gather", counts, out, in, "output", "input");
    call.input = in.data;
    call.output = out.data;
    return submit(std::move(call), async_op, output, py::make_tuple(output, input));
  }
  py::object reduce_scatter(const py::object& output, const py::object& input, ReduceOp op,
                            const std::optional<std::vector<int64_t>>& counts, bool async_op,
                            std::optional<double> timeout_s, std::optional<std::string> algorithm) {
    const View out = view("reduce_scatter output", output, true),
               in = view("reduce_scatter input", input, false);
    Call call =
        start_call(Collective::reduce_scatter, in, in.numel, {async_op, timeout_s, algorithm});
    call.op = op;
    call.counts = elements("reduce_scatter", counts, in, out, "input", "output");
    call.input = in.data;
    call.output = out.data;
    return submit(std::move(call), async_op, output, py::make_tuple(output, input));
  }
  py::object gather(const py::object& output, const py::object& input, int root, bool async_op,
                    std::optional<double> timeout_s, std::optional<std::string> algorithm) {
    const View in = view("gather input", input, false);
    Call call =
        start_call(Collective::gather, in, in.numel * ranks(), {async_op, timeout_s, algorithm});
    call.root = root;
    call.input = in.data;
    if (group_->rank() == root) {
      if (output.is_none())
        refuse("gather", "the root (rank " + std::to_string(root) + ") must give an output");
      const View out = view("gather output", output, true);
      elements("gather", std::nullopt, out, in, "output", "input");
      call.output = out.data;
    } else if (!output.is_none()) {
      refuse("gather",
             "only the root (rank " + std::to_string(root) + ") gives an output; pass None");
    }
    return submit(std::move(call), async_op, output, py::make_tuple(output, input));
  }
  py::object scatter(const py::object& output, const py::object& input, int root, bool async_op,
                     std::optional<double> timeout_s, std::optional<std::string> algorithm) {
    const View out = view("scatter output", output, true);
    Call call =
        start_call(Collective::scatter, out, out.numel * ranks(), {async_op, timeout_s, algorithm});
    call.root = root;
    call.output = out.data;
    if (group_->rank() == root) {
      if (input.is_none())
        refuse("scatter", "the root (rank " + std::to_string(root) + ") must give an input");
      const View in = view("scatter input", input, false);
      elements("scatter", std::nullopt, in, out, "input", "output");
      call.input = in.data;
    } else if (!input.is_none()) {
      refuse("scatter",
             "only the root (rank " + std::to_string(root) + ") gives an input; pass None");
    }
    return submit(std::move(call), async_op, output, py::make_tuple(output, input));
  }
  py::object all_to_all(const py::object& output, const py::object& input,
                        const std::optional<std::vector<int64_t>>& output_counts,
                        const std::optional<std::vector<int64_t>>& input_counts, bool async_op,
                        std::optional<double> timeout_s, std::optional<std::string> algorithm) {
    const View out = view("all_to_all output", output, true),
               in = view("all_to_all input", input, false);
    Call call = start_call(Collective::all_to_all, in, std::max(in.numel, out.numel),
                           {async_op, timeout_s, algorithm});
    if (in.dtype != out.dtype) refuse("all_to_all", "output and input differ in dtype");
    if (input_counts.has_value() != output_counts.has_value())
      refuse("all_to_all", "give both input_counts and output_counts, or neither");
    if (input_counts) {
      call.counts = rows_to_elements("all_to_all input_counts", *input_counts, in);
      call.recv_counts = rows_to_elements("all_to_all output_counts", *output_counts, out);
    } else if (in.numel != out.numel) {
      refuse("all_to_all", "input has " + std::to_string(in.numel) + " elements, output " +
                               std::to_string(out.numel) + "; without counts they must be equal");
    }
    call.input = in.data;
    call.output = out.data;
    return submit(std::move(call), async_op, output, py::make_tuple(output, input));
  }
  py::object barrier(bool async_op, std::optional<double> timeout_s) {
    Call call;
    call.collective = Collective::barrier;
    call.timeout = limit_of(timeout_s);
    return submit(std::move(call), async_op, py::none(), py::none());
  }
  py::object send(const py::object& x, int dst, int64_t tag, bool async_op,
                  std::optional<double> timeout_s) {
    const View data = view("send", x, false);
    if (!async_op) {
      Blocking blocking;
      group_->run_send(data.data, data.nbytes(), dst, tag, limit_of(timeout_s));
      return py::none();
    }
    std::shared_ptr<void> keep = held(x);
    std::shared_ptr<Work> work;
    {
      Blocking blocking;
      work = group_->send(data.data, data.nbytes(), dst, tag, limit_of(timeout_s), std::move(keep));
    }
    return py::cast(PyWork(std::move(work)));
  }
  py::object recv(const py::object& x, std::optional<int> src, int64_t tag, bool async_op,
                  std::optional<double> timeout_s) {
    const View data = view("recv", x, true);
    if (src && *src < 0)
      refuse("recv", "src is " + std::to_string(*src) + "; give a rank, or None for any");
    if (!async_op) {
      int source = -1;
      {
        Blocking blocking;
        source =
            group_->run_recv(data.data, data.nbytes(), src.value_or(-1), tag, limit_of(timeout_s));
      }
      return py::int_(source);
    }
    std::shared_ptr<void> keep = held(x);
    std::shared_ptr<Work> work;
    {
      Blocking blocking;
      work = group_->recv(data.data, data.nbytes(), src.value_or(-1), tag, limit_of(timeout_s),
                          std::move(keep));
    }
    return py::cast(PyWork(work));
  }
  Stats stats() const {
    py::gil_scoped_release release;
    return group_->engine().stats();
  }
  void revoke(const std::string& why) {
    py::gil_scoped_release release;
    group_->engine().revoke(
        {Code::closed, "rank " + std::to_string(group_->rank()) + " revoked it: " + why});
  }
  void close() {
    py::gil_scoped_release release;
    group_->engine().close();
  }

 private:
  uint64_t ranks() const { return static_cast<uint64_t>(group_->size()); }
  static Call start_call(Collective collective, const View& like, uint64_t numel,
                         const Common& common) {
    Call call;
    call.collective = collective;
    call.dtype = like.dtype;
    call.numel = numel;
    call.timeout = limit_of(common.timeout_s);
    if (common.algorithm) call.algorithm = *common.algorithm;
    return call;
  }
  std::vector<uint64_t> rows_to_elements(const char* what, const std::vector<int64_t>& counts,
                                         const View& of) const {
    if (counts.size() != ranks())
      refuse(what,
             std::to_string(counts.size()) + " counts for " + std::to_string(ranks()) + " ranks");
    std::vector<uint64_t> result;
    uint64_t rows = 0;
    for (const int64_t count : counts) {
      if (count < 0)
        refuse(what, "a count is " + std::to_string(count) + "; rows cannot be negative");
      rows += static_cast<uint64_t>(count);
      result.push_back(static_cast<uint64_t>(count) * of.row());
    }
    if (rows != of.rows && of.numel > 0)
      refuse(what, "the counts add up to " + std::to_string(rows) + " rows, the tensor has " +
                       std::to_string(of.rows));
    return result;
  }
  // Checks the whole tensor against this rank's piece; the pieces in elements where they are
  // uneven.
  std::vector<uint64_t> elements(const char* what,
                                 const std::optional<std::vector<int64_t>>& counts,
                                 const View& whole, const View& piece, const char* whole_name,
                                 const char* piece_name) const {
    if (whole.dtype != piece.dtype)
      refuse(what, std::string(whole_name) + " is " + name_of(whole.dtype) + ", " + piece_name +
                       " is " + name_of(piece.dtype));
    std::vector<uint64_t> result;
    uint64_t expected = whole.numel / ranks();
    if (counts) {
      result = rows_to_elements(what, *counts, whole);
      expected = result[static_cast<size_t>(group_->rank())];
    }
    if (piece.numel != expected || (!counts && whole.numel % ranks() != 0))
      refuse(what, std::string(whole_name) + " has " + std::to_string(whole.numel) +
                       " elements for " + std::to_string(ranks()) + " ranks, " + piece_name +
                       " has " + std::to_string(piece.numel) + "; rank " +
                       std::to_string(group_->rank()) + "'s piece must have " +
                       std::to_string(expected));
    return result;
  }
  py::object submit(Call call, bool async_op, const py::object& result, const py::object& keep) {
    if (!async_op) {
      Blocking blocking;
      group_->run(call);
      return result;
    }
    auto keep_alive = held(keep);
    std::shared_ptr<Work> work;
    {
      py::gil_scoped_release release;
      work = group_->start(call, std::move(keep_alive));
    }
    return py::cast(PyWork(std::move(work)));
  }

  const std::shared_ptr<Group> group_;
};

// Raises the exception that is being handled in Python.
PyObject* raise_in_python() noexcept {
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
bool from_python(PyObject* object) {
  if (object == nullptr || object == Py_False) return false;
  return object == Py_True || py::cast<bool>(py::handle(object));
}
template <>
py::object from_python(PyObject* object) {
  return object == nullptr ? py::none() : py::reinterpret_borrow<py::object>(object);
}
template <>
ReduceOp from_python(PyObject* object) {
  return object == nullptr ? ReduceOp::sum : parse_op(py::cast<std::string>(py::handle(object)));
}

// A method of PyGroup as CPython calls it. pybind11's own dispatch would double the price of a
// small collective.
struct Method {
  const char* name;
  const char* doc;  // begins with the signature, as inspect.signature() reads it
  std::vector<const char*> parameters;
  Py_ssize_t n_required;
  Py_ssize_t n_positional;         // those after it are given by keyword
  std::vector<PyObject*> names{};  // interned
};

// Where each parameter's argument is, in order. False with a TypeError set.
bool take_arguments(const Method& method, PyObject* const* given, Py_ssize_t n_given,
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

template <auto member>
struct Bound;
template <class... Args, py::object (PyGroup::*member)(Args...)>
struct Bound<member> {
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
      void* group = reinterpret_cast<py::detail::instance*>(self)->simple_value_holder[0];
      if (group == nullptr) refuse(method.name, "the group's __init__ has not run");
      return (static_cast<PyGroup*>(group)->*member)(
                 from_python<std::remove_cvref_t<Args>>(taken[i])...)
          .release()
          .ptr();
    } catch (...) {
      return raise_in_python();
    }
  }
};

template <auto member>
void def_method(py::class_<PyGroup>& type, Method method) {
  using Bound = torch_layer::Bound<member>;
  for (const char* name : method.parameters)
    method.names.push_back(PyUnicode_InternFromString(name));
  Bound::method = std::move(method);
  PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*) = &Bound::call;
  static PyMethodDef definition{
      Bound::method.name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
      METH_FASTCALL | METH_KEYWORDS, Bound::method.doc};
  auto* descriptor = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), &definition);
  if (descriptor == nullptr) throw py::error_already_set();
  type.attr(Bound::method.name) = py::reinterpret_steal<py::object>(descriptor);
}

void def_collectives(py::class_<PyGroup>& type) {
  def_method<&PyGroup::all_reduce>(
      type, {"all_reduce",
             "all_reduce($self, x, op='sum', *, async_op=False, timeout_s=None, algorithm=None)\n"
             "--\n\n"
             "x becomes the reduction of all ranks' x, on every rank, bit for bit the same. Any "
             "shape.",
             {"x", "op", "async_op", "timeout_s", "algorithm"},
             1,
             2});
  def_method<&PyGroup::reduce>(
      type,
      {"reduce",
       "reduce($self, x, root=0, op='sum', *, async_op=False, timeout_s=None, algorithm=None)\n"
       "--\n\n"
       "The root's x becomes the reduction of all ranks' x; other ranks' x stays as it is.",
       {"x", "root", "op", "async_op", "timeout_s", "algorithm"},
       1,
       3});
  def_method<&PyGroup::broadcast>(
      type, {"broadcast",
             "broadcast($self, x, root=0, *, async_op=False, timeout_s=None, algorithm=None)\n"
             "--\n\n"
             "Every rank's x becomes the root's.",
             {"x", "root", "async_op", "timeout_s", "algorithm"},
             1,
             2});
  def_method<&PyGroup::all_gather>(
      type, {"all_gather",
             "all_gather($self, output, input, counts=None, *, async_op=False, timeout_s=None, "
             "algorithm=None)\n"
             "--\n\n"
             "output, [sum of rows, ...], becomes all ranks' inputs one after the other; counts: "
             "rows of each rank's.",
             {"output", "input", "counts", "async_op", "timeout_s", "algorithm"},
             2,
             3});
  def_method<&PyGroup::reduce_scatter>(
      type, {"reduce_scatter",
             "reduce_scatter($self, output, input, op='sum', counts=None, *, async_op=False, "
             "timeout_s=None, algorithm=None)\n"
             "--\n\n"
             "output becomes this rank's piece of the reduction of all inputs, [sum of rows, ...]; "
             "counts: rows of each.",
             {"output", "input", "op", "counts", "async_op", "timeout_s", "algorithm"},
             2,
             4});
  def_method<&PyGroup::gather>(
      type, {"gather",
             "gather($self, output, input, root=0, *, async_op=False, timeout_s=None, "
             "algorithm=None)\n"
             "--\n\n"
             "The root's output, size times as long, becomes all inputs in rank order; None "
             "elsewhere.",
             {"output", "input", "root", "async_op", "timeout_s", "algorithm"},
             2,
             3});
  def_method<&PyGroup::scatter>(
      type, {"scatter",
             "scatter($self, output, input, root=0, *, async_op=False, timeout_s=None, "
             "algorithm=None)\n"
             "--\n\n"
             "output becomes this rank's piece of the root's input, which is size times as long; "
             "None elsewhere.",
             {"output", "input", "root", "async_op", "timeout_s", "algorithm"},
             2,
             3});
  def_method<&PyGroup::all_to_all>(
      type,
      {"all_to_all",
       "all_to_all($self, output, input, output_counts=None, input_counts=None, *, "
       "async_op=False, timeout_s=None, algorithm=None)\n"
       "--\n\n"
       "Piece j of input goes to rank j, whose piece i comes from rank i. Counts are rows; "
       "without them all equal.",
       {"output", "input", "output_counts", "input_counts", "async_op", "timeout_s", "algorithm"},
       2,
       4});
  def_method<&PyGroup::barrier>(type, {"barrier",
                                       "barrier($self, *, async_op=False, timeout_s=None)\n"
                                       "--\n\n"
                                       "Returns once every rank has entered it.",
                                       {"async_op", "timeout_s"},
                                       0,
                                       0});
  def_method<&PyGroup::send>(
      type, {"send",
             "send($self, x, dst, tag=0, *, async_op=False, timeout_s=None)\n"
             "--\n\n"
             "x goes to rank dst. Returns when x may be written again, which may be before it is "
             "received.",
             {"x", "dst", "tag", "async_op", "timeout_s"},
             2,
             3});
  def_method<&PyGroup::recv>(
      type,
      {"recv",
       "recv($self, x, src=None, tag=0, *, async_op=False, timeout_s=None)\n"
       "--\n\n"
       "x becomes the next message with this tag from rank src (None: from any). Returns the rank "
       "that sent it, or with async_op a Work with .source. Raises InvalidArgument where the "
       "message has another size.",
       {"x", "src", "tag", "async_op", "timeout_s"},
       1,
       3});
}

Program program_of(const py::object& planned) {
  Program program;
  program.collective = parse_collective(planned.attr("collective").cast<std::string>());
  program.algorithm = planned.attr("algorithm").cast<std::string>();
  program.n_ranks = planned.attr("n_ranks").cast<int>();
  program.rank = planned.attr("rank").cast<int>();
  program.root = planned.attr("root").cast<int>();
  program.n_chunks = planned.attr("n_chunks").cast<int>();
  program.n_scratch = planned.attr("n_scratch").cast<int>();
  const auto steps = planned.attr("steps").cast<py::array>();
  PYCOMM_CHECK(steps.itemsize() == sizeof(Step) && (steps.flags() & py::array::c_style) != 0,
               "project() and program.h differ");
  program.steps.resize(static_cast<size_t>(steps.size()));
  std::memcpy(program.steps.data(), steps.data(), static_cast<size_t>(steps.nbytes()));
  const auto deps =
      planned.attr("deps").cast<py::array_t<int32_t, py::array::c_style | py::array::forcecast>>();
  program.deps.assign(deps.data(), deps.data() + deps.size());
  return program;
}

// `planner` has choices(collective, root) and program(collective, algorithm, root);
// pycomm/group.py.
Planner planner_of(py::object planner) {
  const std::shared_ptr<void> keep = held(planner);
  const auto object = [keep]() -> py::object& { return *static_cast<py::object*>(keep.get()); };
  return {[object](Collective collective, int root) {
            py::gil_scoped_acquire gil;
            std::vector<std::pair<uint64_t, std::string>> table;
            for (const auto& row : object().attr("choices")(name_of(collective), root)) {
              const auto pair = row.cast<std::pair<std::optional<uint64_t>, std::string>>();
              table.emplace_back(pair.first.value_or(UINT64_MAX), pair.second);
            }
            return table;
          },
          [object](Collective collective, const std::string& algorithm, int root) {
            py::gil_scoped_acquire gil;
            return program_of(object().attr("program")(name_of(collective), algorithm, root));
          }};
}

std::shared_ptr<Group> make_group(const std::shared_ptr<cpu::Endpoint>& endpoint,
                                  const c10::intrusive_ptr<c10d::Store>& store,
                                  const std::string& name, const std::string& key,
                                  const std::vector<int>& ranks, const py::object& planner,
                                  double timeout_s) {
  const auto timeout = milliseconds_of(timeout_s);
  const auto at = std::find(ranks.begin(), ranks.end(), endpoint->rank());
  if (at == ranks.end())
    throw Error(Code::invalid_argument,
                "rank " + std::to_string(endpoint->rank()) + " is not in group '" + name + "'");
  Planner plan = planner_of(planner);
  Blocking blocking;
  auto engine = cpu::CpuEngine::create(
      endpoint, [store] { return std::make_shared<TorchStore>(store); }, name, key, ranks, timeout);
  return std::make_shared<Group>(name, static_cast<int>(at - ranks.begin()),
                                 static_cast<int>(ranks.size()), std::move(engine), std::move(plan),
                                 timeout);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "pycomm's C++ engine; use it through pycomm";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      set_python_error(error);
    }
  });

  py::class_<Stats>(
      m, "Stats", "What this rank has sent and how long the group was at work, since it was made.")
      .def_readonly("ops", &Stats::ops, "operations finished")
      .def_readonly("bytes_inside_hosts", &Stats::bytes_inside_hosts,
                    "sent to ranks of the same host")
      .def_readonly("bytes_between_hosts", &Stats::bytes_between_hosts,
                    "sent to ranks of other hosts")
      .def_readonly("busy_s", &Stats::busy_s,
                    "seconds in which at least one operation was under way")
      .def("__repr__", [](const Stats& s) {
        return "Stats(ops=" + std::to_string(s.ops) +
               ", bytes_inside_hosts=" + std::to_string(s.bytes_inside_hosts) +
               ", bytes_between_hosts=" + std::to_string(s.bytes_between_hosts) +
               ", busy_s=" + std::to_string(s.busy_s) + ")";
      });

  py::class_<PyWork>(m, "Work", "A started operation; wait() for its result.")
      .def("wait", &PyWork::wait, py::arg("timeout_s") = py::none(),
           "Returns when the operation is done; raises its error, or PeerTimeout after timeout_s "
           "seconds (it goes on then).")
      .def("is_completed", &PyWork::is_completed)
      .def_property_readonly("duration_s", &PyWork::duration_s,
                             "seconds from start to end, 0 before that")
      .def_property_readonly("source", &PyWork::source, "recv: the rank that sent");

  py::class_<cpu::Endpoint, std::shared_ptr<cpu::Endpoint>>(m, "Endpoint")
      .def(py::init([](const c10::intrusive_ptr<c10d::Store>& store, int rank, int size,
                       const std::string& host_id, const std::string& address, double timeout_s) {
             cpu::EndpointOptions options;
             options.host_id = host_id;
             options.address = address;
             options.timeout = milliseconds_of(timeout_s);
             Blocking blocking;
             TorchStore adapted(store);
             return cpu::Endpoint::create(adapted, rank, size, options);
           }),
           py::arg("store"), py::arg("rank"), py::arg("size"), py::arg("host_id"),
           py::arg("address"), py::arg("timeout_s"))
      .def_property_readonly("rank", &cpu::Endpoint::rank)
      .def_property_readonly("size", &cpu::Endpoint::size)
      .def(
          "empty",
          [](const std::shared_ptr<cpu::Endpoint>& endpoint, const std::vector<int64_t>& shape,
             const py::object& dtype) {
            if (!THPDtype_Check(dtype.ptr()))
              refuse("empty", "dtype is a " + std::string(py::str(py::type::of(dtype))) +
                                  ", not a torch.dtype");
            const auto type = reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
            py::gil_scoped_release release;  // the pages are made now: a second for some GB
            return empty_in_peer_memory(endpoint, shape, type);
          },
          py::arg("shape"), py::arg("dtype"))
      .def_property_readonly("warnings", &cpu::Endpoint::warnings,
                             "what the system refused at set-up, for this rank to report")
      .def_property_readonly("host_ids", [](const cpu::Endpoint& endpoint) {
        std::vector<std::string> hosts;
        for (int rank = 0; rank < endpoint.size(); ++rank)
          hosts.push_back(endpoint.member(rank).host);
        return hosts;
      });

  const auto none = py::none();
  py::class_<PyGroup> group(m, "Group");
  group
      .def(py::init([](const std::shared_ptr<cpu::Endpoint>& endpoint,
                       const c10::intrusive_ptr<c10d::Store>& store, const std::string& name,
                       const std::string& key, const std::vector<int>& ranks,
                       const py::object& planner, double timeout_s) {
             return PyGroup(make_group(endpoint, store, name, key, ranks, planner, timeout_s));
           }),
           py::arg("endpoint"), py::arg("store"), py::arg("name"), py::arg("key"), py::arg("ranks"),
           py::arg("planner"), py::arg("timeout_s"))
      .def_property_readonly("rank", [](const PyGroup& group) { return group.group()->rank(); })
      .def_property_readonly("size", [](const PyGroup& group) { return group.group()->size(); })
      .def_property_readonly("name", [](const PyGroup& group) { return group.group()->name(); })
      .def_property(
          "timeout_s",
          [](const PyGroup& group) {
            return static_cast<double>(group.group()->timeout().count()) / 1e3;
          },
          [](PyGroup& group, double timeout_s) {
            group.group()->set_timeout(milliseconds_of(timeout_s));
          })
      .def("native_nbytes",
           [](const PyGroup& group, const std::string& collective) {
             return group.group()->engine().native_nbytes(parse_collective(collective), true);
           })
      .def("stats", &PyGroup::stats)
      .def("revoke", &PyGroup::revoke)
      .def("close", &PyGroup::close)
      .def(
          "_closer",
          [](const PyGroup& group) {
            return py::cpp_function([group = group.group()] {
              py::gil_scoped_release release;
              group->engine().close();
            });
          },
          "close() for whoever must not hold on to the group.");
  def_collectives(group);

  py::class_<PycommBackend, c10d::Backend, c10::intrusive_ptr<PycommBackend>>(m, "Backend")
      .def(py::init([](const PyGroup& group, const std::shared_ptr<cpu::Endpoint>& endpoint,
                       const py::object& split, const py::object& merge) {
             const auto callable = [](const std::shared_ptr<void>& keep) -> py::object& {
               return *static_cast<py::object*>(keep.get());
             };
             PycommBackend::Makers makers;
             makers.split = [keep = held(split), callable](const auto& store, const auto& ranks,
                                                           const auto& name) {
               py::gil_scoped_acquire gil;
               return callable(keep)(store, ranks, name).template cast<PyGroup&>().group();
             };
             makers.merge = [keep = held(merge), callable](
                                const auto& store, int rank, int size, const auto& name,
                                double timeout_s) -> PycommBackend::BackendPtr {
               py::gil_scoped_acquire gil;
               return callable(keep)(store, rank, size, name, timeout_s)
                   .template cast<c10::intrusive_ptr<PycommBackend>>();
             };
             return c10::make_intrusive<PycommBackend>(group.group(), endpoint, std::move(makers));
           }),
           py::arg("group"), py::arg("endpoint"), py::arg("split"), py::arg("merge"))
      .def_property_readonly("endpoint", &PycommBackend::endpoint)
      .def_property_readonly("options", &PycommBackend::getBackendOptions)
      .def("get_error", &PycommBackend::getError)
      .def_property_readonly("pycomm_group",
                             [](const PycommBackend& backend) { return PyGroup(backend.group()); });

#ifdef PYCOMM_WITH_CUDA
  m.def(
      "cuda_info",
      [](const std::string& nccl_wheel) {
        const cuda::Info info = cuda::info(nccl_wheel);
        py::list devices;
        for (const auto& device : info.devices)
          devices.append(
              py::dict(py::arg("name") = device.name,
                       py::arg("capability") = py::make_tuple(device.major, device.minor),
                       py::arg("n_multiprocessors") = device.n_multiprocessors,
                       py::arg("memory_nbytes") = device.memory_nbytes));
        py::dict features;
        for (const auto& [name, present] : info.nccl_features) features[py::str(name)] = present;
        return py::dict(
            py::arg("runtime_version") = info.runtime_version,
            py::arg("driver_version") = info.driver_version, py::arg("devices") = devices,
            py::arg("device_problem") = info.device_problem, py::arg("nccl_path") = info.nccl_path,
            py::arg("nccl_version") = info.nccl_version, py::arg("nccl_features") = features,
            py::arg("nccl_problem") = info.nccl_problem);
      },
      py::arg("nccl_wheel") = "", "What CUDA and NCCL this machine has, as pycomm sees them.");
#endif
}

}  // namespace pycomm::torch_layer
