#include "torch/fused_rows.h"

#include <torch/csrc/utils/pybind.h>

#include "core/wire.h"
#include "torch/arrays.h"
#ifdef PYCOMM_WITH_CUDA
#include "cuda/moe.h"
#include "torch/on_device.h"
#endif

namespace pycomm::torch_layer {
namespace {

std::vector<View> views(const char* what, const py::sequence& objects, bool writable) {
  std::vector<View> found;
  for (const py::handle each : objects) found.push_back(view(what, each, writable));
  return found;
}

std::optional<View> optional_view(const char* what, const py::object& object, bool writable) {
  if (object.is_none()) return std::nullopt;
  return view(what, object, writable);
}

// The width of fp8 rows of `values`. Throws where `coded` has none such.
int64_t coded_width(const char* what, const View& values, const std::vector<View>& coded) {
  const uint64_t width = values.row();
  for (const View& each : coded)
    if (each.dtype != DType::uint8 ||
        (values.rows > 0 && each.rows > 0 && each.row() != coded_nbytes(Wire::fp8, width)))
      refuse(what, "a row of " + std::to_string(width) + " values takes " +
                       std::to_string(coded_nbytes(Wire::fp8, width)) + " bytes as fp8, not " +
                       std::to_string(each.row()) + " " + name_of(each.dtype));
  return static_cast<int64_t>(width);
}

void require_length(const char* what, const char* name, const View& table, uint64_t n) {
  if (table.numel != n)
    refuse(what, std::string(name) + " has " + std::to_string(table.numel) + " entries, not " +
                     std::to_string(n));
}

void require_device(const char* what, const View& first) {
  if (first.device.is_cpu()) refuse(what, "is of tensors on a CUDA device; these are on the CPU");
#ifndef PYCOMM_WITH_CUDA
  refuse(what,
         "this pycomm was built without CUDA; build it where nvcc is found (docs/install.md)");
#endif
}

void pack_coded_rows(const py::sequence& buffers, const py::object& starts,
                     const py::object& buffer, const py::object& to, const py::object& values) {
  const char* what = "pack_coded_rows";
  const View value = view(what, values, false), start = view(what, starts, false),
             which = view(what, buffer, false), place = view(what, to, false);
  const auto coded = views(what, buffers, true);
  [[maybe_unused]] const int64_t width = coded_width(what, value, coded);
  require_length(what, "starts", start, value.rows + 1);
  require_length(what, "buffer", which, place.numel);
  require_device(what, value);
#ifdef PYCOMM_WITH_CUDA
  auto all = pointers(coded);
  all.insert(all.end(), {&start, &which, &place});
  const OnDevice on(what, value, all);
  std::vector<void*> memory;
  for (const View& each : coded) memory.push_back(each.data);
  require(what, cuda::encode_rows(memory, ints(what, start), ints(what, which), ints(what, place),
                                  value.data, static_cast<int64_t>(value.rows), width, value.dtype,
                                  on.stream));
#endif
}

void expand_coded_rows(const py::object& out, const py::sequence& sources, const py::object& source,
                       const py::object& rows, const py::object& to) {
  const char* what = "expand_coded_rows";
  const View target = view(what, out, true), from = view(what, source, false),
             row = view(what, rows, false);
  const auto place = optional_view(what, to, false);
  const auto coded = views(what, sources, false);
  [[maybe_unused]] const int64_t width = coded_width(what, target, coded);
  require_length(what, "source", from, row.numel);
  if (place) require_length(what, "to", *place, row.numel);
  require_device(what, target);
#ifdef PYCOMM_WITH_CUDA
  auto all = pointers(coded);
  all.insert(all.end(), {&from, &row});
  if (place) all.push_back(&*place);
  const OnDevice on(what, target, all);
  require(what, cuda::decode_rows(target.data, data_of(coded), ints(what, from), ints(what, row),
                                  place ? ints(what, *place) : nullptr,
                                  static_cast<int64_t>(row.numel), width, target.dtype, on.stream));
#endif
}

void weigh_rows(const py::object& out, const py::object& dots, const py::sequence& sources,
                const py::object& source, const py::object& rows, const py::object& to,
                const py::object& places, const py::object& weights, const py::object& b) {
  const char* what = "weigh_rows";
  const View target = view(what, out, true), from = view(what, source, false),
             row = view(what, rows, false), weight = view(what, weights, false);
  const auto place = optional_view(what, to, false), at = optional_view(what, places, false),
             other = optional_view(what, b, false), dot = optional_view(what, dots, true);
  const auto all_sources = views(what, sources, false);
  for (const View& each : all_sources)
    if (each.dtype != target.dtype ||
        (each.rows > 0 && target.rows > 0 && each.row() != target.row()))
      refuse(what, "sources and out differ in dtype or width");
  require_length(what, "source", from, row.numel);
  if (place) require_length(what, "to", *place, row.numel);
  if (at) require_length(what, "places", *at, row.numel);
  if (weight.dtype != DType::float32) refuse(what, "weights must be float32");
  if (dot.has_value() != other.has_value()) refuse(what, "give both dots and b, or neither");
  if (dot && (dot->dtype != DType::float32 || dot->numel != other->rows))
    refuse(what, "dots must be float32, one for each row of b");
  if (other && (other->dtype != target.dtype ||
                (other->rows > 0 && target.rows > 0 && other->row() != target.row())))
    refuse(what, "b and out differ in dtype or width");
  require_device(what, target);
#ifdef PYCOMM_WITH_CUDA
  auto all = pointers(all_sources);
  all.insert(all.end(), {&from, &row, &weight});
  for (const auto* each : {&place, &at, &other, &dot})
    if (*each) all.push_back(&**each);
  const OnDevice on(what, target, all);
  require(what,
          cuda::weigh_rows(target.data, dot ? static_cast<float*>(dot->data) : nullptr,
                           data_of(all_sources), ints(what, from), ints(what, row),
                           place ? ints(what, *place) : nullptr, at ? ints(what, *at) : nullptr,
                           static_cast<const float*>(weight.data), other ? other->data : nullptr,
                           static_cast<int64_t>(row.numel), static_cast<int64_t>(target.row()),
                           target.dtype, on.stream));
#endif
}

}  // namespace

void def_fused_rows(py::module_& m) {
  m.def("pack_coded_rows", &pack_coded_rows, py::arg("buffers"), py::arg("starts"),
        py::arg("buffer"), py::arg("to"), py::arg("values"),
        "Row i of values in fp8 to row to[j] of buffers[buffer[j]], for j from starts[i] to "
        "starts[i + 1].");
  m.def("expand_coded_rows", &expand_coded_rows, py::arg("out"), py::arg("sources"),
        py::arg("source"), py::arg("rows"), py::arg("to") = py::none(),
        "copy_rows() of sources in fp8, to values.");
  m.def("weigh_rows", &weigh_rows, py::arg("out"), py::arg("dots"), py::arg("sources"),
        py::arg("source"), py::arg("rows"), py::arg("to"), py::arg("places"), py::arg("weights"),
        py::arg("b"),
        "copy_rows() times weights[p], rounded once; dots[p] = the row . b[p], where p is "
        "places[i] or i.");
}

}  // namespace pycomm::torch_layer
