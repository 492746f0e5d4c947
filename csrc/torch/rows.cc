#include "torch/rows.h"

#include <torch/csrc/utils/pybind.h>

#include "cpu/rows.h"
#include "torch/arrays.h"
#include "torch/py_group.h"

namespace pycomm::torch_layer {
namespace {

bool is_summable(DType dtype) {
  return dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16;
}

void require_summable(const char* what, DType dtype) {
  if (!is_summable(dtype))
    refuse(what, std::string("takes float32, bfloat16 or float16, not ") + name_of(dtype));
}

const int64_t* indices(const char* what, const View& view) {
  if (view.dtype != DType::int64)
    refuse(what, std::string("indices must be int64, not ") + name_of(view.dtype));
  return static_cast<const int64_t*>(view.data);
}

// Sources of rows as wide as `width` values of one dtype.
std::vector<cpu::Rows> sources_of(const char* what, const py::sequence& objects, DType dtype,
                                  uint64_t width) {
  std::vector<cpu::Rows> sources;
  for (const py::handle object : objects) {
    const View source = host_view(what, object, false);
    if (source.dtype != dtype || (source.rows > 0 && source.row() != width))
      refuse(what, "a source has rows of " + std::to_string(source.row()) + " " +
                       name_of(source.dtype) + ", not " + std::to_string(width) + " " +
                       name_of(dtype));
    sources.push_back(
        {static_cast<const std::byte*>(source.data), static_cast<int64_t>(source.rows)});
  }
  return sources;
}

DType dtype_of_first(const char* what, const py::sequence& objects) {
  if (objects.size() == 0) refuse(what, "give at least one source");
  return host_view(what, objects[0], false).dtype;
}

uint64_t width_of(py::handle tensor) {
  return py::cast<py::sequence>(tensor.attr("shape"))[1].cast<uint64_t>();
}

void copy_rows(const py::object& out, const py::sequence& sources, const py::object& source,
               const py::object& rows, const py::object& to) {
  const char* what = "copy_rows";
  const View target = host_view(what, out, true), from = host_view(what, source, false),
             row = host_view(what, rows, false);
  const uint64_t width = width_of(out);
  if (from.numel != row.numel) refuse(what, "source and rows differ in length");
  const int64_t* places = nullptr;
  if (!to.is_none()) {
    const View place = host_view(what, to, false);
    if (place.numel != row.numel) refuse(what, "to and rows differ in length");
    places = indices(what, place);
  }
  const auto all = sources_of(what, sources, target.dtype, width);
  const int64_t* at = indices(what, from);
  const int64_t* which = indices(what, row);
  py::gil_scoped_release release;
  cpu::copy_rows(static_cast<std::byte*>(target.data), static_cast<int64_t>(target.rows), places,
                 all, at, which, static_cast<int64_t>(row.numel), width * size_of(target.dtype));
}

void combine_rows(const py::object& out, const py::sequence& sources, const py::object& source,
                  const py::object& rows, const py::object& offsets, const py::object& weights) {
  const char* what = "combine_rows";
  const View target = host_view(what, out, true), from = host_view(what, source, false),
             row = host_view(what, rows, false), offset = host_view(what, offsets, false);
  const uint64_t width = width_of(out);
  const DType dtype = dtype_of_first(what, sources);
  require_summable(what, dtype);
  require_summable(what, target.dtype);
  if (from.numel != row.numel) refuse(what, "source and rows differ in length");
  if (offset.numel != target.rows + 1)
    refuse(what, std::to_string(offset.numel) + " offsets for " + std::to_string(target.rows) +
                     " rows; there must be one more");
  const float* factors = nullptr;
  if (!weights.is_none()) {
    const View weight = host_view(what, weights, false);
    if (weight.dtype != DType::float32 || weight.numel != row.numel)
      refuse(what, "weights must be float32, one for each term");
    factors = static_cast<const float*>(weight.data);
  }
  const auto all = sources_of(what, sources, dtype, width);
  const int64_t* at = indices(what, from);
  const int64_t* which = indices(what, row);
  const int64_t* starts = indices(what, offset);
  py::gil_scoped_release release;
  cpu::combine_rows(target.data, target.dtype, all, dtype, at, which, starts, factors,
                    static_cast<int64_t>(target.rows), static_cast<int64_t>(row.numel), width);
}

void code_rows(const py::object& coded, const py::object& values, const std::string& wire,
               bool encodes) {
  const char* what = encodes ? "encode_rows" : "decode_rows";
  const View code = host_view(what, coded, encodes), value = host_view(what, values, !encodes);
  const Wire form = parse_wire(wire);
  require_summable(what, value.dtype);
  const uint64_t width = width_of(values);
  if (code.dtype != DType::uint8 || code.rows != value.rows ||
      code.numel != code.rows * coded_nbytes(form, width))
    refuse(what, "a row of " + std::to_string(width) + " values takes " +
                     std::to_string(coded_nbytes(form, width)) + " bytes as " + wire);
  py::gil_scoped_release release;
  if (encodes)
    cpu::encode_rows(static_cast<std::byte*>(code.data), value.data, value.dtype,
                     static_cast<int64_t>(value.rows), width, form);
  else
    cpu::decode_rows(value.data, static_cast<const std::byte*>(code.data), value.dtype,
                     static_cast<int64_t>(value.rows), width, form);
}

// Memory of another rank's heap, as bytes. It keeps the endpoint, not the other rank's tensor.
at::Tensor peer_bytes(const std::shared_ptr<cpu::Endpoint>& endpoint, int rank, uint64_t address,
                      int64_t nbytes) {
  if (rank < 0 || rank >= endpoint->size() || !endpoint->local(rank))
    refuse("peer_bytes", "rank " + std::to_string(rank) + " is not on this host");
  if (nbytes < 0) refuse("peer_bytes", "nbytes is negative");
  std::byte* data = rank == endpoint->rank()
                        ? reinterpret_cast<std::byte*>(address)
                        : endpoint->peer_memory().mapped(endpoint->place(rank), address,
                                                         static_cast<size_t>(nbytes));
  if (data == nullptr || (rank == endpoint->rank() && !endpoint->peer_memory().in_heap(data)))
    refuse("peer_bytes", "rank " + std::to_string(rank) + " has no such memory in its heap");
  return at::from_blob(data, {nbytes}, [endpoint](void*) {}, at::TensorOptions().dtype(at::kByte));
}

}  // namespace

void def_rows(py::module_& m) {
  m.def(
      "copy_rows", &copy_rows, py::arg("out"), py::arg("sources"), py::arg("source"),
      py::arg("rows"), py::arg("to") = py::none(),
      "out[to[i] or i] = sources[source[i]][rows[i]]; zeros where rows[i] is -1. 2-D, one dtype.");
  m.def("combine_rows", &combine_rows, py::arg("out"), py::arg("sources"), py::arg("source"),
        py::arg("rows"), py::arg("offsets"), py::arg("weights") = py::none(),
        "out[i] = the sum over j from offsets[i] to offsets[i + 1] of weights[j] * "
        "sources[source[j]][rows[j]], in order, in fp32, rounded once.");
  m.def(
      "encode_rows",
      [](const py::object& coded, const py::object& values, const std::string& wire) {
        code_rows(coded, values, wire, true);
      },
      py::arg("coded"), py::arg("values"), py::arg("wire"), "Each row in the wire's form.");
  m.def(
      "decode_rows",
      [](const py::object& values, const py::object& coded, const std::string& wire) {
        code_rows(coded, values, wire, false);
      },
      py::arg("values"), py::arg("coded"), py::arg("wire"), "What encode_rows() was given, about.");
  m.def("peer_bytes", &peer_bytes, py::arg("endpoint"), py::arg("rank"), py::arg("address"),
        py::arg("nbytes"), "uint8 [nbytes] of the heap of a rank of this host.");
}

}  // namespace pycomm::torch_layer
