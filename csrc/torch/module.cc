// pycomm._C: the engine for Python; every call that may wait lets go of the GIL. Not
// torch/extension.h but the headers it needs: 25 s to compile instead of 43.
#include <pybind11/chrono.h>
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/utils/pybind.h>

#include "core/group.h"
#include "cpu/coding.h"
#include "cpu/endpoint.h"
#include "cpu/engine.h"
#include "torch/backend.h"
#include "torch/blocking.h"
#include "torch/expert_plan.h"
#include "torch/fused_rows.h"
#include "torch/py_group.h"
#include "torch/python.h"
#include "torch/rows.h"
#include "torch/symmetric_memory.h"
#include "torch/tensors.h"
#ifdef PYCOMM_WITH_CUDA
#include "cuda/cuda.h"
#endif

namespace pycomm::torch_layer {
namespace {

Collective parse_collective(const std::string& name) {
  for (int c = 0; c < kCollectives; ++c)
    if (name == name_of(static_cast<Collective>(c))) return static_cast<Collective>(c);
  refuse("collective", "'" + name + "' is not a collective");
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
  if (!py::hasattr(planned, "calls")) return program;
  for (const auto& each : planned.attr("calls")) {
    const auto call = py::cast<py::tuple>(each);
    program.calls.push_back({parse_collective(call[0].cast<std::string>()), call[1].cast<int>(),
                             call[2].cast<std::vector<int32_t>>(),
                             call[3].cast<std::vector<int32_t>>()});
  }
  program.partitions = planned.attr("partitions").cast<std::vector<Partition>>();
  return program;
}

// `planner` has choices(collective, root) and program(collective, algorithm, root);
// pycomm/group.py.
Planner planner_of(py::object planner) {
  const std::shared_ptr<void> keep = held(planner);
  const auto object = [keep]() -> py::object& { return *static_cast<py::object*>(keep.get()); };
  return {
      [object](Collective collective, int root, bool coded) {
        py::gil_scoped_acquire gil;
        std::vector<std::pair<uint64_t, std::string>> table;
        for (const auto& row : object().attr("choices")(name_of(collective), root, coded)) {
          const auto pair = row.cast<std::pair<std::optional<uint64_t>, std::string>>();
          table.emplace_back(pair.first.value_or(UINT64_MAX), pair.second);
        }
        return table;
      },
      [object](Collective collective, const std::string& algorithm, int root, bool coded) {
        py::gil_scoped_acquire gil;
        return program_of(object().attr("program")(name_of(collective), algorithm, root, coded));
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

// `planning` has peer_nbytes, max_ctas, between, through_host(why) and select(ranks) as well.
DevicePlanner device_planner_of(const py::object& planning) {
  const auto keep = held(planning);
  const auto object = [keep]() -> py::object& { return *static_cast<py::object*>(keep.get()); };
  return {planner_of(planning),
          [object] {
            py::gil_scoped_acquire gil;
            const auto between = object().attr("between").cast<std::string>();
            return between == "tcp"    ? cuda::Between::tcp
                   : between == "nccl" ? cuda::Between::nccl
                                       : cuda::Between::automatic;
          },
          planning.attr("peer_nbytes").cast<uint64_t>(),
          planning.attr("max_ctas").cast<std::optional<int>>(),
          [object](const std::string& why) {
            py::gil_scoped_acquire gil;
            object().attr("through_host")(why);
          },
          [object](const std::vector<int>& ranks) {
            py::gil_scoped_acquire gil;
            return device_planner_of(object().attr("select")(ranks));
          }};
}

// `part` is called with a store, ranks and a name, and gives a Group.
MakePart part_of(const py::object& part) {
  return [keep = held(part)](const auto& store, const auto& ranks, const auto& name) {
    py::gil_scoped_acquire gil;
    return (*static_cast<py::object*>(keep.get()))(store, ranks, name)
        .template cast<PyGroup&>()
        .group();
  };
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
           "seconds (it goes on then). Of arrays on a device, without timeout_s, the stream that "
           "they "
           "name, or else the current one, waits, and the host does not.")
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

  m.def(
      "round_trip",
      [](const py::array_t<float, py::array::c_style>& values, const std::string& wire) {
        const Wire parsed = parse_wire(wire);
        py::array_t<float> result(values.size());
        cpu::round_trip(result.mutable_data(), values.data(), static_cast<size_t>(values.size()),
                        parsed);
        return result;
      },
      py::arg("values"), py::arg("wire"), "What a rank that is sent these values reads.");

  m.def(
      "swap_memory",
      [](const at::Tensor& a, const at::Tensor& b) {
        if (!a.is_cpu() || !b.is_cpu()) refuse("swap_memory", "both tensors must be on the CPU");
        c10::StorageImpl* first = a.storage().unsafeGetStorageImpl();
        c10::StorageImpl* second = b.storage().unsafeGetStorageImpl();
        if (first == second) return;
        const size_t first_nbytes = first->nbytes(), second_nbytes = second->nbytes();
        at::DataPtr memory = first->set_data_ptr(at::DataPtr(nullptr, at::kCPU));
        memory = second->set_data_ptr(std::move(memory));
        first->set_data_ptr_noswap(std::move(memory));
        first->set_nbytes(second_nbytes);
        second->set_nbytes(first_nbytes);
      },
      py::arg("a"), py::arg("b"),
      "Exchanges the memory of two CPU tensors' storages: what views them views the other's.");

  def_rows(m);
  def_fused_rows(m);
  def_expert_plan(m);

  py::class_<PyGroup> group(m, "Group");
  group
      .def(
          py::init([](const std::shared_ptr<cpu::Endpoint>& endpoint,
                      const c10::intrusive_ptr<c10d::Store>& store, const std::string& name,
                      const std::string& key, const std::vector<int>& ranks,
                      const py::object& planner, double timeout_s, const py::object& device_planner,
                      std::string nccl_wheel, const py::object& part) {
            auto group = make_group(endpoint, store, name, key, ranks, planner, timeout_s);
            if (device_planner.is_none()) return PyGroup(std::move(group));
            std::vector<std::string> hosts;
            for (const int rank : ranks) hosts.push_back(endpoint->member(rank).host);
            return PyGroup(std::move(group),
                           DeviceSide::Options{store, std::move(nccl_wheel), std::move(hosts),
                                               device_planner_of(device_planner), part_of(part)});
          }),
          py::arg("endpoint"), py::arg("store"), py::arg("name"), py::arg("key"), py::arg("ranks"),
          py::arg("planner"), py::arg("timeout_s"), py::arg("device_planner") = py::none(),
          py::arg("nccl_wheel") = "", py::arg("part") = py::none())
      .def_property_readonly("rank", [](const PyGroup& group) { return group.group()->rank(); })
      .def_property_readonly("size", [](const PyGroup& group) { return group.group()->size(); })
      .def_property_readonly("name", [](const PyGroup& group) { return group.group()->name(); })
      .def_property(
          "timeout_s",
          [](const PyGroup& group) {
            return static_cast<double>(group.group()->timeout().count()) / 1e3;
          },
          [](PyGroup& group, double timeout_s) { group.set_timeout(milliseconds_of(timeout_s)); })
      .def("native_nbytes",
           [](const PyGroup& group, const std::string& collective) {
             return group.group()->engine().native_nbytes(parse_collective(collective), true);
           })
      .def("stats",
           [](const PyGroup& group) {
             py::gil_scoped_release release;
             return group.stats();
           })
      .def("revoke",
           [](const PyGroup& group, const std::string& why) {
             py::gil_scoped_release release;
             group.revoke({Code::closed, "rank " + std::to_string(group.group()->rank()) +
                                             " revoked it: " + why});
           })
      .def("close",
           [](const PyGroup& group) {
             py::gil_scoped_release release;
             group.close();
           })
      .def(
          "_closer",
          [](const PyGroup& group) {
            return py::cpp_function([group] {
              py::gil_scoped_release release;
              group.close();
            });
          },
          "close() for whoever must not hold on to the group.");
  def_methods(group);
  def_symmetric_memory(m, group);

  py::class_<PycommBackend, c10d::Backend, c10::intrusive_ptr<PycommBackend>>(m, "Backend")
      .def(py::init([](const PyGroup& group, const std::shared_ptr<cpu::Endpoint>& endpoint,
                       const c10::intrusive_ptr<c10d::Store>& store, std::string nccl_wheel,
                       std::vector<std::string> hosts, const py::object& device_planner,
                       const py::object& split, const py::object& merge) {
             PycommBackend::Makers makers;
             makers.split = part_of(split);
             makers.merge = [keep = held(merge)](const auto& store, int rank, int size,
                                                 const auto& name,
                                                 double timeout_s) -> PycommBackend::BackendPtr {
               py::gil_scoped_acquire gil;
               return (*static_cast<py::object*>(keep.get()))(store, rank, size, name, timeout_s)
                   .template cast<c10::intrusive_ptr<PycommBackend>>();
             };
             return c10::make_intrusive<PycommBackend>(
                 group.group(), endpoint,
                 DeviceSide::Options{store, std::move(nccl_wheel), std::move(hosts),
                                     device_planner_of(device_planner), makers.split},
                 std::move(makers));
           }),
           py::arg("group"), py::arg("endpoint"), py::arg("store"), py::arg("nccl_wheel"),
           py::arg("hosts"), py::arg("device_planner"), py::arg("split"), py::arg("merge"))
      .def_property_readonly("endpoint", &PycommBackend::endpoint)
      .def(
          "all_reduce_wire",
          [](PycommBackend& backend, const at::Tensor& tensor, const std::string& op,
             const std::string& wire, const std::optional<at::Tensor>& residual) {
            const Wire parsed = parse_wire(wire);
            py::gil_scoped_release release;
            return backend.all_reduce_wire(tensor, op == "avg", parsed, residual);
          },
          py::arg("tensor"), py::arg("op"), py::arg("wire"), py::arg("residual") = py::none())
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
        py::list features;
        for (const auto& feature : info.nccl_features)
          features.append(
              py::dict(py::arg("name") = feature.name, py::arg("symbol") = feature.symbol,
                       py::arg("since") = cuda::nccl_version_name(feature.since),
                       py::arg("gives") = feature.gives, py::arg("present") = feature.present));
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
