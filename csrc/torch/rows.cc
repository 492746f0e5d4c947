#include "torch/rows.h"

#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "cpu/rows.h"
#include "torch/arrays.h"
#include "torch/device_rows.h"
#include "torch/py_group.h"
#include "torch/row_memory.h"

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
std::vector<View> sources_of(const char* what, const py::sequence& objects, DType dtype,
                             uint64_t width) {
  std::vector<View> sources;
  for (const py::handle object : objects) {
    sources.push_back(view(what, object, false));
    const View& source = sources.back();
    if (source.dtype != dtype || (source.rows > 0 && source.row() != width))
      refuse(what, "a source has rows of " + std::to_string(source.row()) + " " +
                       name_of(source.dtype) + ", not " + std::to_string(width) + " " +
                       name_of(dtype));
  }
  return sources;
}

std::vector<cpu::Rows> rows_of(const std::vector<View>& sources) {
  std::vector<cpu::Rows> rows;
  for (const View& each : sources)
    rows.push_back({static_cast<const std::byte*>(each.data), static_cast<int64_t>(each.rows)});
  return rows;
}

// All are on the CPU, or those of a device are named with what would have to be copied.
void require_host(const char* what, const std::vector<View>& sources,
                  std::initializer_list<const View*> others) {
  const auto check = [&](const View& each) {
    if (!each.device.is_cpu())
      refuse(what, "one tensor is on the CPU, another on " + each.device.str() +
                       "; all must be on one device");
  };
  for (const View& each : sources) check(each);
  for (const View* each : others)
    if (each != nullptr) check(*each);
}

DType dtype_of_first(const char* what, const py::sequence& objects) {
  if (objects.size() == 0) refuse(what, "give at least one source");
  return view(what, objects[0], false).dtype;
}

uint64_t width_of(py::handle tensor) {
  return py::cast<py::sequence>(tensor.attr("shape"))[1].cast<uint64_t>();
}

void copy_rows(const py::object& out, const py::sequence& sources, const py::object& source,
               const py::object& rows, const py::object& to) {
  const char* what = "copy_rows";
  const View target = view(what, out, true), from = view(what, source, false),
             row = view(what, rows, false);
  const uint64_t width = width_of(out);
  if (from.numel != row.numel) refuse(what, "source and rows differ in length");
  std::optional<View> place;
  if (!to.is_none()) place = view(what, to, false);
  if (place && place->numel != row.numel) refuse(what, "to and rows differ in length");
  const auto views = sources_of(what, sources, target.dtype, width);
  if (!target.device.is_cpu()) return device_copy_rows(target, views, from, row, place);
  require_host(what, views, {&from, &row, place ? &*place : nullptr});
  const auto all = rows_of(views);
  const int64_t* places = place ? indices(what, *place) : nullptr;
  const int64_t* at = indices(what, from);
  const int64_t* which = indices(what, row);
  py::gil_scoped_release release;
  cpu::copy_rows(static_cast<std::byte*>(target.data), static_cast<int64_t>(target.rows), places,
                 all, at, which, static_cast<int64_t>(row.numel), width * size_of(target.dtype));
}

void combine_rows(const py::object& out, const py::sequence& sources, const py::object& source,
                  const py::object& rows, const py::object& offsets, const py::object& weights) {
  const char* what = "combine_rows";
  const View target = view(what, out, true), from = view(what, source, false),
             row = view(what, rows, false), offset = view(what, offsets, false);
  const uint64_t width = width_of(out);
  const DType dtype = dtype_of_first(what, sources);
  require_summable(what, dtype);
  require_summable(what, target.dtype);
  if (from.numel != row.numel) refuse(what, "source and rows differ in length");
  if (offset.numel != target.rows + 1)
    refuse(what, std::to_string(offset.numel) + " offsets for " + std::to_string(target.rows) +
                     " rows; there must be one more");
  std::optional<View> weight;
  if (!weights.is_none()) weight = view(what, weights, false);
  if (weight && (weight->dtype != DType::float32 || weight->numel != row.numel))
    refuse(what, "weights must be float32, one for each term");
  const auto views = sources_of(what, sources, dtype, width);
  if (!target.device.is_cpu()) return device_combine_rows(target, views, from, row, offset, weight);
  require_host(what, views, {&from, &row, &offset, weight ? &*weight : nullptr});
  const auto all = rows_of(views);
  const auto* factors = weight ? static_cast<const float*>(weight->data) : nullptr;
  const int64_t* at = indices(what, from);
  const int64_t* which = indices(what, row);
  const int64_t* starts = indices(what, offset);
  py::gil_scoped_release release;
  cpu::combine_rows(target.data, target.dtype, all, dtype, at, which, starts, factors,
                    static_cast<int64_t>(target.rows), static_cast<int64_t>(row.numel), width);
}

void row_dots(const py::object& out, const py::object& a, const py::object& a_rows,
              const py::object& b, const py::object& b_rows) {
  const char* what = "row_dots";
  const View target = view(what, out, true);
  if (target.dtype != DType::float32)
    refuse(what, std::string("gives float32, not ") + name_of(target.dtype));
  const DType dtype = view(what, a, false).dtype;
  require_summable(what, dtype);
  const uint64_t width = width_of(a);
  const std::vector<View> factors = sources_of(what, py::make_tuple(a, b), dtype, width);
  std::vector<std::optional<View>> rows;
  for (const py::object& each : {a_rows, b_rows}) {
    rows.push_back(each.is_none() ? std::nullopt : std::optional(view(what, each, false)));
    if (rows.back() && rows.back()->numel != target.numel)
      refuse(what, "rows must be one for each product");
  }
  if (!target.device.is_cpu())
    return device_row_dots(target, factors[0], rows[0], factors[1], rows[1], width);
  require_host(what, factors, {rows[0] ? &*rows[0] : nullptr, rows[1] ? &*rows[1] : nullptr});
  const auto all = rows_of(factors);
  const int64_t* of_a = rows[0] ? indices(what, *rows[0]) : nullptr;
  const int64_t* of_b = rows[1] ? indices(what, *rows[1]) : nullptr;
  py::gil_scoped_release release;
  cpu::row_dots(static_cast<float*>(target.data), all[0], of_a, all[1], of_b, dtype,
                static_cast<int64_t>(target.numel), width);
}

void count_slots(const py::object& positions, const py::object& counts, const py::object& offsets,
                 const py::object& bins) {
  const char* what = "count_slots";
  const View position = view(what, positions, true), count = view(what, counts, true),
             offset = view(what, offsets, true), bin = view(what, bins, false);
  for (const View* each : {&position, &count, &offset, &bin}) (void)indices(what, *each);
  if (position.numel != bin.numel || count.numel < 1 || offset.numel != count.numel + 1)
    refuse(what, std::to_string(position.numel) + " positions of " + std::to_string(bin.numel) +
                     " slots, " + std::to_string(count.numel) + " counts, " +
                     std::to_string(offset.numel) +
                     " offsets; there must be a position for each "
                     "slot, a count for each bin, of which there is one, and one offset more");
  if (!position.device.is_cpu()) return device_count_slots(position, count, offset, bin);
  require_host(what, {}, {&count, &offset, &bin});
  const auto written = [](const View& view) { return static_cast<int64_t*>(view.data); };
  py::gil_scoped_release release;
  cpu::count_slots(written(position), written(count), written(offset), indices(what, bin),
                   static_cast<int64_t>(bin.numel), static_cast<int64_t>(count.numel));
}

void code_rows(const py::object& coded, const py::object& values, const std::string& wire,
               bool encodes) {
  const char* what = encodes ? "encode_rows" : "decode_rows";
  const View code = view(what, coded, encodes), value = view(what, values, !encodes);
  const Wire form = parse_wire(wire);
  require_summable(what, value.dtype);
  const uint64_t width = width_of(values);
  if (code.dtype != DType::uint8 || code.rows != value.rows ||
      code.numel != code.rows * coded_nbytes(form, width))
    refuse(what, "a row of " + std::to_string(width) + " values takes " +
                     std::to_string(coded_nbytes(form, width)) + " bytes as " + wire);
  if (!code.device.is_cpu()) return device_code_rows(code, value, width, form, encodes);
  require_host(what, {}, {&value});
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
  m.def("count_slots", &count_slots, py::arg("positions"), py::arg("counts"), py::arg("offsets"),
        py::arg("bins"),
        "positions[i] = how many slots before i are of bin bins[i], -1 beyond the bins; counts and "
        "offsets of the bins.");
  m.def("row_dots", &row_dots, py::arg("out"), py::arg("a"), py::arg("a_rows"), py::arg("b"),
        py::arg("b_rows"),
        "out[i] = a[a_rows[i] or i] . b[b_rows[i] or i], in fp32; 0 where a row is -1.");
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
  py::class_<RowMemory, std::shared_ptr<RowMemory>>(
      m, "RowMemory", "Memory of output rows that is taken again once nobody holds it.")
      .def(py::init<int64_t>(), py::arg("keeps_nbytes"))
      .def("empty", &RowMemory::empty, py::arg("n_rows"), py::arg("width"), py::arg("dtype"),
           "[n_rows, width], not initialised.");
  m.def("peer_bytes", &peer_bytes, py::arg("endpoint"), py::arg("rank"), py::arg("address"),
        py::arg("nbytes"), "uint8 [nbytes] of the heap of a rank of this host.");
}

}  // namespace pycomm::torch_layer
