#include "torch/expert_plan.h"

#include <torch/csrc/utils/pybind.h>

#include "cpu/expert_plan.h"
#include "torch/arrays.h"

namespace pycomm::torch_layer {
namespace {

at::Tensor tensor(cpu::Ints values) {
  const auto held = std::make_shared<cpu::Ints>(std::move(values));
  if (held->empty()) return at::empty({0}, at::TensorOptions().dtype(at::kLong));
  return at::from_blob(
      held->data(), {static_cast<int64_t>(held->size())}, [held](void*) {},
      at::TensorOptions().dtype(at::kLong));
}

py::tuple tuple_of(const cpu::Ints& values) { return py::tuple(py::cast(values)); }

// What convert() makes of each.
template <class Each, class Convert>
py::tuple each_of(std::vector<Each> values, Convert convert) {
  py::tuple found(values.size());
  for (size_t i = 0; i < values.size(); ++i) found[i] = convert(std::move(values[i]));
  return found;
}

py::object terms(cpu::Terms of) {
  return py::make_tuple(tensor(std::move(of.source)), tensor(std::move(of.rows)),
                        tensor(std::move(of.offsets)));
}

py::dict leg(cpu::Leg of) {
  py::dict found;
  found["index"] = tensor(std::move(of.index));
  found["sends"] = each_of(std::move(of.sends), tuple_of);
  found["receives"] = each_of(std::move(of.receives), tuple_of);
  return found;
}

py::object on_host(cpu::OnHost of) {
  py::dict found;
  found["staged"] = tuple_of(of.staged);
  found["arrived"] = tuple_of(of.arrived);
  found["partials"] = tuple_of(of.partials);
  found["gateway"] = each_of(std::move(of.gateway), terms);
  found["own"] = terms(std::move(of.own));
  return found;
}

py::dict route(cpu::Route of) {
  py::dict found;
  found["leg"] = leg(std::move(of.leg));
  found["expansions"] = each_of(std::move(of.expansions), [](cpu::Expansion each) {
    return py::make_tuple(tensor(std::move(each.to)), tensor(std::move(each.source)),
                          tensor(std::move(each.rows)));
  });
  found["leaving"] = each_of(std::move(of.leaving), terms);
  found["leaving_rows"] = each_of(std::move(of.leaving_rows), tensor);
  found["own"] = terms(std::move(of.own));
  found["home"] = each_of(std::move(of.home), terms);
  found["on_host"] = of.on_host ? on_host(std::move(*of.on_host)) : py::none();
  return found;
}

cpu::ExpertRequest::Mode mode_of(const std::string& name) {
  using Mode = cpu::ExpertRequest::Mode;
  if (name == "none") return Mode::none;
  if (name == "rank") return Mode::rank;
  if (name == "host") return Mode::host;
  refuse("expert_tables", "mode '" + name + "' is none of none, rank, host");
}

cpu::ExpertRequest::Layout layout_of(const std::string& name) {
  using Layout = cpu::ExpertRequest::Layout;
  if (name == "expert") return Layout::expert;
  if (name == "rank") return Layout::rank;
  if (name == "token") return Layout::token;
  refuse("expert_tables", "layout '" + name + "' is none of expert, rank, token");
}

template <class Id>
void widen(const View& view, std::vector<int32_t>* ids) {
  const auto* from = static_cast<const Id*>(view.data);
  ids->assign(from, from + view.numel);
}

std::vector<int32_t> ids_of(const View& view) {
  std::vector<int32_t> ids;
  if (view.dtype == DType::uint8)
    widen<uint8_t>(view, &ids);
  else if (view.dtype == DType::int16)
    widen<int16_t>(view, &ids);
  else if (view.dtype == DType::int32)
    widen<int32_t>(view, &ids);
  else
    refuse("expert_tables",
           std::string("ids are uint8, int16 or int32, not ") + name_of(view.dtype));
  return ids;
}

py::dict expert_tables(const cpu::ExpertPlaces& places, const py::object& ids,
                       const cpu::Ints& n_tokens, const std::string& mode,
                       const std::string& layout, bool cuts_experts, int64_t n_crossings,
                       int64_t n_stages, int64_t align, int64_t max_tokens, bool drop) {
  const View view = host_view("expert_tables", ids, false);
  const auto top_k =
      py::cast<py::sequence>(ids.attr("shape"))[1].cast<int64_t>();  // also of no tokens
  const cpu::ExpertRequest request{
      mode_of(mode), layout_of(layout), cuts_experts, n_crossings, n_stages,
      align,         max_tokens,        drop};
  cpu::ExpertTables of;
  {
    py::gil_scoped_release release;
    of = cpu::expert_tables(places, request, ids_of(view), n_tokens, top_k);
  }
  py::dict found;
  found["expert_counts"] = tensor(std::move(of.expert_counts));
  found["expert_offsets"] = tensor(std::move(of.expert_offsets));
  found["stage_counts"] = tensor(std::move(of.stage_counts)).view({n_stages, -1});
  found["dropped"] = of.dropped;
  found["slot_of_out"] = tensor(std::move(of.slot_of_out));
  found["slot_expert"] = tensor(std::move(of.slot_expert));
  found["slot_of_row"] = tensor(std::move(of.slot_of_row)).view({-1, top_k});
  found["slot_weights"] = tensor(std::move(of.slot_weights));
  found["home_weights"] = tensor(std::move(of.home_weights));
  found["scalars"] = leg(std::move(of.scalars));
  found["out"] = route(std::move(of.out));
  found["back"] = of.back ? py::object(route(std::move(*of.back))) : py::none();
  found["every_token_goes"] = of.every_token_goes;
  return found;
}

}  // namespace

void def_expert_plan(py::module_& m) {
  py::class_<cpu::ExpertPlaces>(m, "ExpertPlaces", "Where experts are, as a rank sees it.")
      .def(py::init<int64_t, int64_t, cpu::Ints, cpu::Ints, cpu::Ints, cpu::Ints, cpu::Ints>(),
           py::arg("rank"), py::arg("n_experts"), py::arg("host_of"), py::arg("n_held"),
           py::arg("rank_of"), py::arg("local_of"), py::arg("expert_of"));
  m.def("expert_tables", &expert_tables, py::arg("places"), py::arg("ids"), py::arg("n_tokens"),
        py::arg("mode"), py::arg("layout"), py::arg("cuts_experts"), py::arg("n_crossings"),
        py::arg("n_stages"), py::arg("align"), py::arg("max_tokens"), py::arg("drop"),
        "The tables of a plan (pycomm/moe/tables.py) from ids [tokens of all ranks, K].");
}

}  // namespace pycomm::torch_layer
