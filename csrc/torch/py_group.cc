#include "torch/py_group.h"

#include <c10/core/DeviceGuard.h>

#include "torch/arrays.h"
#include "torch/method.h"

namespace pycomm::torch_layer {
namespace {

// What becomes of a result with NaN or infinity.
enum class Nonfinite { pass, raise };

ReduceOp parse_op(const std::string& name) {
  for (int op = 0; op <= static_cast<int>(ReduceOp::bxor); ++op)
    if (name == name_of(static_cast<ReduceOp>(op))) return static_cast<ReduceOp>(op);
  refuse("op", "'" + name + "' is none of sum, avg, product, min, max, band, bor, bxor");
}

// What every collective takes beside its arrays, and what those with a wire do.
struct Common {
  bool async_op;
  std::optional<double> timeout_s;
  std::optional<std::string> algorithm;
  Wire wire = Wire::none;
  Nonfinite wire_nonfinite = Nonfinite::pass;
};

uint64_t ranks(const Group& group) { return static_cast<uint64_t>(group.size()); }

Call start_call(Collective collective, const View& like, uint64_t numel, const Common& common) {
  Call call;
  call.collective = collective;
  call.dtype = like.dtype;
  call.numel = numel;
  call.timeout = limit_of(common.timeout_s);
  if (common.algorithm) call.algorithm = *common.algorithm;
  call.wire = common.wire;
  call.must_be_finite = common.wire_nonfinite == Nonfinite::raise;
  if (call.must_be_finite && call.wire == Wire::none)
    refuse(name_of(collective), "wire_nonfinite is 'raise', but there is no wire; give one");
  return call;
}

std::vector<uint64_t> rows_to_elements(const Group& group, const char* what,
                                       const std::vector<int64_t>& counts, const View& of) {
  if (counts.size() != ranks(group))
    refuse(what, std::to_string(counts.size()) + " counts for " + std::to_string(ranks(group)) +
                     " ranks");
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

// Checks the whole tensor against this rank's piece; the pieces in elements where they are uneven.
std::vector<uint64_t> elements(const Group& group, const char* what,
                               const std::optional<std::vector<int64_t>>& counts, const View& whole,
                               const View& piece, const char* whole_name, const char* piece_name) {
  if (whole.dtype != piece.dtype)
    refuse(what, std::string(whole_name) + " is " + name_of(whole.dtype) + ", " + piece_name +
                     " is " + name_of(piece.dtype));
  std::vector<uint64_t> result;
  uint64_t expected = whole.numel / ranks(group);
  if (counts) {
    result = rows_to_elements(group, what, *counts, whole);
    expected = result[static_cast<size_t>(group.rank())];
  }
  if (piece.numel != expected || (!counts && whole.numel % ranks(group) != 0))
    refuse(what, std::string(whole_name) + " has " + std::to_string(whole.numel) +
                     " elements for " + std::to_string(ranks(group)) + " ranks, " + piece_name +
                     " has " + std::to_string(piece.numel) + "; rank " +
                     std::to_string(group.rank()) + "'s piece must have " +
                     std::to_string(expected));
  return result;
}

bool on_device(const View& view) { return !view.device.is_cpu(); }

// The stream of a call's arrays. Throws where they are on several devices, or several streams.
void* stream_of(const char* what, std::initializer_list<const View*> arrays) {
  const auto stream = [](const View& view) {
    void* const found = view.has_stream ? view.stream : current_stream_of(view.device);
    return reinterpret_cast<uintptr_t>(found) == 1 ? nullptr : found;  // two names of the default
  };
  const View& first = **arrays.begin();
  for (const View* view : arrays) {
    if (view->device != first.device)
      refuse(what, "one array is on " + first.device.str() + ", another on " + view->device.str() +
                       "; all arrays of a call must be on one device");
    if (stream(*view) != stream(first))
      refuse(what, "its arrays stand on two streams of " + first.device.str() +
                       "; make one current and give both in its order");
  }
  return stream(first);
}

// What a Work's wait() makes wait: the stream that the arrays name, or else the one that is current
// then. REQUIRES: they are on one device.
std::function<void*()> waiting_stream(std::initializer_list<const View*> arrays) {
  const View& first = **arrays.begin();
  for (const View* view : arrays)
    if (view->names_stream) return [stream = view->stream] { return stream; };
  return [device = first.device] { return current_stream_of(device); };
}

py::object work_of(PyWork::Works works, std::function<void*()> stream = {}) {
  return py::cast(PyWork(std::move(works), std::move(stream)));
}

void require_no_tag(const char* what, int64_t tag) {
  if (tag != 0)
    refuse(what,
           "tag " + std::to_string(tag) +
               ": NCCL's messages have no tag, they come in the order in which they are sent");
}

// The device is current where torch knows such devices; else it is the caller's to make it so.
struct Current {
  explicit Current(const c10::Device& device) : guard(known(device)) {}
  static std::optional<c10::Device> known(const c10::Device& device) {
    if (device.is_cpu() || !c10::impl::hasDeviceGuardImpl(device.type())) return std::nullopt;
    return device;
  }
  c10::OptionalDeviceGuard guard;
};

// On a device a call that is not asynchronous is put on the arrays' stream and returns at once.
py::object submit(PyGroup& self, Call call, bool async_op, const py::object& result,
                  const py::object& keep, std::initializer_list<const View*> arrays) {
  Group* group = self.group().get();
  bool device = false, owned = false;
  for (const View* view : arrays) {
    device |= on_device(*view);
    owned |= !view->owner.is_none();
  }
  if (device) {
    const char* const what = name_of(call.collective);
    call.stream = stream_of(what, arrays);
    group = &self.on(what, (**arrays.begin()).device);
  }
  const Current current(device ? (**arrays.begin()).device : c10::Device(at::kCPU));
  if (!async_op) {
    {
      Blocking blocking;
      group->run(call);
    }
    return result;
  }
  py::list kept;
  kept.append(keep);
  if (owned)
    for (const View* view : arrays) kept.append(view->owner);
  auto keep_alive = held(std::move(kept));
  std::shared_ptr<Work> work;
  {
    py::gil_scoped_release release;
    work = group->start(call, std::move(keep_alive));
  }
  return work_of({std::move(work)}, device ? waiting_stream(arrays) : nullptr);
}

// A message of an array on a device.
std::shared_ptr<Work> start_message(PyGroup& self, const char* what, const View& data, bool is_send,
                                    int peer, int64_t tag, std::optional<double> timeout_s,
                                    const py::object& x) {
  if (peer < 0) refuse(what, "from any rank: NCCL must know who sends; name the source");
  require_no_tag(what, tag);
  Message message{is_send, data.data, data.nbytes(), peer, stream_of(what, {&data}), {}, true};
  Group& group = self.on(what, data.device);
  auto keep = held(py::make_tuple(x, data.owner));
  const Current current(data.device);
  Blocking blocking;
  return group.start_together({}, {message}, limit_of(timeout_s), std::move(keep));
}

py::object all_reduce(PyGroup& self, const py::object& x, ReduceOp op, bool async_op,
                      std::optional<double> timeout_s, std::optional<std::string> algorithm,
                      Wire wire, Nonfinite wire_nonfinite, const py::object& wire_residual) {
  const View data = view("all_reduce", x, true);
  Call call = start_call(Collective::all_reduce, data, data.numel,
                         {async_op, timeout_s, algorithm, wire, wire_nonfinite});
  call.op = op;
  call.input = call.output = data.data;
  View residual = data;
  if (!wire_residual.is_none()) {
    residual = view("all_reduce wire_residual", wire_residual, true);
    if (wire == Wire::none)
      refuse("all_reduce", "wire_residual is what a wire loses, but there is no wire; give one");
    if (residual.dtype != DType::float32 || residual.numel != data.numel)
      refuse("all_reduce wire_residual", "must be float32 of x's " + std::to_string(data.numel) +
                                             " elements; it is " + name_of(residual.dtype) +
                                             " of " + std::to_string(residual.numel));
    call.residual = static_cast<float*>(residual.data);
  }
  return submit(self, std::move(call), async_op, x, py::make_tuple(x, wire_residual),
                {&data, &residual});
}

py::object reduce(PyGroup& self, const py::object& x, int root, ReduceOp op, bool async_op,
                  std::optional<double> timeout_s, std::optional<std::string> algorithm) {
  Group& group = *self.group();
  const View data = view("reduce", x, group.rank() == root);
  Call call = start_call(Collective::reduce, data, data.numel, {async_op, timeout_s, algorithm});
  call.op = op;
  call.root = root;
  call.input = data.data;
  call.output = group.rank() == root ? data.data : nullptr;
  return submit(self, std::move(call), async_op, x, x, {&data});
}

py::object broadcast(PyGroup& self, const py::object& x, int root, bool async_op,
                     std::optional<double> timeout_s, std::optional<std::string> algorithm) {
  Group& group = *self.group();
  const View data = view("broadcast", x, group.rank() != root);
  Call call = start_call(Collective::broadcast, data, data.numel, {async_op, timeout_s, algorithm});
  call.root = root;
  call.input = call.output = data.data;
  return submit(self, std::move(call), async_op, x, x, {&data});
}

py::object all_gather(PyGroup& self, const py::object& output, const py::object& input,
                      const std::optional<std::vector<int64_t>>& counts, bool async_op,
                      std::optional<double> timeout_s, std::optional<std::string> algorithm,
                      Wire wire, Nonfinite wire_nonfinite) {
  Group& group = *self.group();
  const View out = view("all_gather output", output, true),
             in = view("all_gather input", input, false);
  Call call = start_call(Collective::all_gather, out, out.numel,
                         {async_op, timeout_s, algorithm, wire, wire_nonfinite});
  call.counts = elements(group, "all_gather", counts, out, in, "output", "input");
  call.input = in.data;
  call.output = out.data;
  return submit(self, std::move(call), async_op, output, py::make_tuple(output, input),
                {&out, &in});
}

py::object reduce_scatter(PyGroup& self, const py::object& output, const py::object& input,
                          ReduceOp op, const std::optional<std::vector<int64_t>>& counts,
                          bool async_op, std::optional<double> timeout_s,
                          std::optional<std::string> algorithm, Wire wire,
                          Nonfinite wire_nonfinite) {
  Group& group = *self.group();
  const View out = view("reduce_scatter output", output, true),
             in = view("reduce_scatter input", input, false);
  Call call = start_call(Collective::reduce_scatter, in, in.numel,
                         {async_op, timeout_s, algorithm, wire, wire_nonfinite});
  call.op = op;
  call.counts = elements(group, "reduce_scatter", counts, in, out, "input", "output");
  call.input = in.data;
  call.output = out.data;
  return submit(self, std::move(call), async_op, output, py::make_tuple(output, input),
                {&out, &in});
}

py::object gather(PyGroup& self, const py::object& output, const py::object& input, int root,
                  bool async_op, std::optional<double> timeout_s,
                  std::optional<std::string> algorithm) {
  Group& group = *self.group();
  const View in = view("gather input", input, false);
  View out = in;
  Call call =
      start_call(Collective::gather, in, in.numel * ranks(group), {async_op, timeout_s, algorithm});
  call.root = root;
  call.input = in.data;
  if (group.rank() == root) {
    if (output.is_none())
      refuse("gather", "the root (rank " + std::to_string(root) + ") must give an output");
    out = view("gather output", output, true);
    elements(group, "gather", std::nullopt, out, in, "output", "input");
    call.output = out.data;
  } else if (!output.is_none()) {
    refuse("gather",
           "only the root (rank " + std::to_string(root) + ") gives an output; pass None");
  }
  return submit(self, std::move(call), async_op, output, py::make_tuple(output, input),
                {&out, &in});
}

py::object scatter(PyGroup& self, const py::object& output, const py::object& input, int root,
                   bool async_op, std::optional<double> timeout_s,
                   std::optional<std::string> algorithm) {
  Group& group = *self.group();
  const View out = view("scatter output", output, true);
  View in = out;
  Call call = start_call(Collective::scatter, out, out.numel * ranks(group),
                         {async_op, timeout_s, algorithm});
  call.root = root;
  call.output = out.data;
  if (group.rank() == root) {
    if (input.is_none())
      refuse("scatter", "the root (rank " + std::to_string(root) + ") must give an input");
    in = view("scatter input", input, false);
    elements(group, "scatter", std::nullopt, in, out, "input", "output");
    call.input = in.data;
  } else if (!input.is_none()) {
    refuse("scatter",
           "only the root (rank " + std::to_string(root) + ") gives an input; pass None");
  }
  return submit(self, std::move(call), async_op, output, py::make_tuple(output, input),
                {&out, &in});
}

py::object all_to_all(PyGroup& self, const py::object& output, const py::object& input,
                      const std::optional<std::vector<int64_t>>& output_counts,
                      const std::optional<std::vector<int64_t>>& input_counts, bool async_op,
                      std::optional<double> timeout_s, std::optional<std::string> algorithm,
                      Wire wire, Nonfinite wire_nonfinite) {
  Group& group = *self.group();
  const View out = view("all_to_all output", output, true),
             in = view("all_to_all input", input, false);
  Call call = start_call(Collective::all_to_all, in, std::max(in.numel, out.numel),
                         {async_op, timeout_s, algorithm, wire, wire_nonfinite});
  if (in.dtype != out.dtype) refuse("all_to_all", "output and input differ in dtype");
  if (input_counts.has_value() != output_counts.has_value())
    refuse("all_to_all", "give both input_counts and output_counts, or neither");
  if (input_counts) {
    call.counts = rows_to_elements(group, "all_to_all input_counts", *input_counts, in);
    call.recv_counts = rows_to_elements(group, "all_to_all output_counts", *output_counts, out);
  } else if (in.numel != out.numel) {
    refuse("all_to_all", "input has " + std::to_string(in.numel) + " elements, output " +
                             std::to_string(out.numel) + "; without counts they must be equal");
  }
  call.input = in.data;
  call.output = out.data;
  return submit(self, std::move(call), async_op, output, py::make_tuple(output, input),
                {&out, &in});
}

py::object barrier(PyGroup& self, bool async_op, std::optional<double> timeout_s) {
  Call call;
  call.collective = Collective::barrier;
  call.timeout = limit_of(timeout_s);
  return submit(self, std::move(call), async_op, py::none(), py::none(), {});
}

py::object send(PyGroup& self, const py::object& x, int dst, int64_t tag, bool async_op,
                std::optional<double> timeout_s) {
  Group& group = *self.group();
  const View data = view("send", x, false);
  if (on_device(data)) {
    const auto work = start_message(self, "send", data, true, dst, tag, timeout_s, x);
    if (async_op) return work_of({work}, waiting_stream({&data}));
    {
      Blocking blocking;
      work->order_before(stream_of("send", {&data}));
    }
    return py::none();
  }
  if (!async_op) {
    {
      Blocking blocking;
      group.run_send(data.data, data.nbytes(), dst, tag, limit_of(timeout_s));
    }
    return py::none();
  }
  std::shared_ptr<void> keep = held(x);
  std::shared_ptr<Work> work;
  {
    Blocking blocking;
    work = group.send(data.data, data.nbytes(), dst, tag, limit_of(timeout_s), std::move(keep));
  }
  return work_of({std::move(work)});
}

py::object recv(PyGroup& self, const py::object& x, std::optional<int> src, int64_t tag,
                bool async_op, std::optional<double> timeout_s) {
  Group& group = *self.group();
  const View data = view("recv", x, true);
  if (src && *src < 0)
    refuse("recv", "src is " + std::to_string(*src) + "; give a rank, or None for any");
  if (on_device(data)) {
    const int from = src.value_or(-1);
    const auto work = start_message(self, "recv", data, false, from, tag, timeout_s, x);
    if (async_op) return work_of({work}, waiting_stream({&data}));
    {
      Blocking blocking;
      work->order_before(stream_of("recv", {&data}));
    }
    return py::int_(from);
  }
  if (!async_op) {
    int source = -1;
    {
      Blocking blocking;
      source = group.run_recv(data.data, data.nbytes(), src.value_or(-1), tag, limit_of(timeout_s));
    }
    return py::int_(source);
  }
  std::shared_ptr<void> keep = held(x);
  std::shared_ptr<Work> work;
  {
    Blocking blocking;
    work = group.recv(data.data, data.nbytes(), src.value_or(-1), tag, limit_of(timeout_s),
                      std::move(keep));
  }
  return work_of({std::move(work)});
}

// What exchange() is given: pairs of an array and a rank.
struct Parcel {
  py::object x;
  View data;
  bool is_send;
  int peer;
};

std::vector<Parcel> parcels(const Group& group, const py::object& sends,
                            const py::object& receives) {
  std::vector<Parcel> all;
  for (const bool is_send : {false, true}) {
    const py::object& given = is_send ? sends : receives;
    if (given.is_none()) continue;
    for (const py::handle each : given) {
      const auto [x, peer] = each.cast<std::pair<py::object, int>>();
      if (peer < 0 || peer >= group.size() || peer == group.rank())
        refuse("exchange", "rank " + std::to_string(group.rank()) + " of " +
                               std::to_string(group.size()) + " cannot exchange with rank " +
                               std::to_string(peer));
      all.push_back(
          {x, view(is_send ? "exchange, send" : "exchange, receive", x, !is_send), is_send, peer});
      if (all.back().data.device != all.front().data.device)
        refuse("exchange", "one array is on " + all.front().data.device.str() + ", another on " +
                               all.back().data.device.str() +
                               "; all arrays of a call must be on one device");
    }
  }
  return all;
}

py::object exchange(PyGroup& self, const py::object& sends, const py::object& receives, int64_t tag,
                    bool async_op, std::optional<double> timeout_s) {
  Group& group = *self.group();
  const auto all = parcels(group, sends, receives);
  const auto limit = limit_of(timeout_s);
  const bool device = !all.empty() && on_device(all.front().data);
  PyWork::Works works;
  std::function<void*()> stream;
  if (device) {
    require_no_tag("exchange", tag);
    void* callers = nullptr;
    std::vector<Message> messages;
    py::list kept;
    for (const Parcel& each : all) {
      callers = stream_of("exchange", {&all.front().data, &each.data});
      messages.push_back(
          {each.is_send, each.data.data, each.data.nbytes(), each.peer, callers, {}});
      kept.append(py::make_tuple(each.x, each.data.owner));
    }
    Group& there = self.on("exchange", all.front().data.device);
    stream = waiting_stream({&all.front().data});
    auto keep = held(std::move(kept));
    const Current current(all.front().data.device);
    Blocking blocking;
    works.push_back(there.start_together({}, std::move(messages), limit, std::move(keep)));
    if (!async_op) works.front()->order_before(callers);
  } else {
    for (const Parcel& each : all) {
      auto keep = held(py::make_tuple(each.x, each.data.owner));
      Blocking blocking;
      works.push_back(each.is_send ? group.send(each.data.data, each.data.nbytes(), each.peer, tag,
                                                limit, std::move(keep))
                                   : group.recv(each.data.data, each.data.nbytes(), each.peer, tag,
                                                limit, std::move(keep)));
    }
  }
  if (async_op) return work_of(std::move(works), std::move(stream));
  if (!device) PyWork(std::move(works)).wait(std::nullopt);
  return py::none();
}

}  // namespace

DeviceSide& PyGroup::side(const char* what, const c10::Device& device) {
  const std::lock_guard lock(devices_->mutex);
  if (!devices_->options)
    refuse(what, "the array is on " + device.str() +
                     "; this group moves CPU memory, copy it to the host first");
  auto& side = devices_->side;
  if (side == nullptr) side = DeviceSide::create(*devices_->options, device, group_);
  if (side->device() != device)
    refuse(what, "the array is on " + device.str() + ", this group works on " +
                     side->device().str() +
                     ", where its first array was; a rank has one device, make it current before "
                     "arrays are made");
  return *side;
}

void PyGroup::revoke(const Status& why) const {
  std::shared_ptr<DeviceSide> side;
  {
    const std::lock_guard lock(devices_->mutex);
    side = devices_->side;
  }
  if (side != nullptr) side->revoke(why);
  group_->engine().revoke(why);
}

void PyGroup::set_timeout(Milliseconds timeout) const {
  group_->set_timeout(timeout);
  const std::lock_guard lock(devices_->mutex);
  if (devices_->side != nullptr) devices_->side->group().set_timeout(timeout);
}

Stats PyGroup::stats() const {
  Stats all = group_->engine().stats();
  const std::lock_guard lock(devices_->mutex);
  if (devices_->side == nullptr) return all;
  const Stats device = devices_->side->group().engine().stats();
  all.bytes_inside_hosts += device.bytes_inside_hosts;
  all.bytes_between_hosts += device.bytes_between_hosts;
  return all;
}

void PyGroup::close() const {
  std::shared_ptr<DeviceSide> side;
  {
    const std::lock_guard lock(devices_->mutex);
    side = devices_->side;
  }
  if (side != nullptr) side->group().engine().close();
  group_->engine().close();
}

Wire parse_wire(const std::string& name) {
  for (int wire = 1; wire < kWires; ++wire)
    if (name == name_of(static_cast<Wire>(wire))) return static_cast<Wire>(wire);
  refuse("wire", "'" + name + "' is none of bf16, fp8, int8, int4");
}

template <>
ReduceOp from_python(PyObject* object) {
  return object == nullptr ? ReduceOp::sum : parse_op(py::cast<std::string>(py::handle(object)));
}

template <>
Wire from_python(PyObject* object) {
  return object == nullptr || object == Py_None
             ? Wire::none
             : parse_wire(py::cast<std::string>(py::handle(object)));
}

template <>
Nonfinite from_python(PyObject* object) {
  const auto name = object == nullptr ? "pass" : py::cast<std::string>(py::handle(object));
  if (name == "pass") return Nonfinite::pass;
  if (name == "raise") return Nonfinite::raise;
  refuse("wire_nonfinite", "'" + name + "' is neither pass nor raise");
}

void def_methods(py::class_<PyGroup>& type) {
  def_method<all_reduce>(
      type,
      {"all_reduce",
       "all_reduce($self, x, op='sum', *, async_op=False, timeout_s=None, algorithm=None, "
       "wire=None, wire_nonfinite='pass', wire_residual=None)\n"
       "--\n\n"
       "x becomes the reduction of all ranks' x, on every rank, bit for bit the same. Any "
       "shape. wire_residual: float32 of x's size, gets what this rank's coding lost; added "
       "to x before the next call, nothing is lost for good.",
       {"x", "op", "async_op", "timeout_s", "algorithm", "wire", "wire_nonfinite", "wire_residual"},
       1,
       2});
  def_method<reduce>(
      type,
      {"reduce",
       "reduce($self, x, root=0, op='sum', *, async_op=False, timeout_s=None, algorithm=None)\n"
       "--\n\n"
       "The root's x becomes the reduction of all ranks' x; other ranks' x stays as it is.",
       {"x", "root", "op", "async_op", "timeout_s", "algorithm"},
       1,
       3});
  def_method<broadcast>(
      type, {"broadcast",
             "broadcast($self, x, root=0, *, async_op=False, timeout_s=None, algorithm=None)\n"
             "--\n\n"
             "Every rank's x becomes the root's.",
             {"x", "root", "async_op", "timeout_s", "algorithm"},
             1,
             2});
  def_method<all_gather>(
      type, {"all_gather",
             "all_gather($self, output, input, counts=None, *, async_op=False, timeout_s=None, "
             "algorithm=None, "
             "wire=None, wire_nonfinite=\'pass\')\n"
             "--\n\n"
             "output, [sum of rows, ...], becomes all ranks' inputs one after the other; counts: "
             "rows of each rank's.",
             {"output", "input", "counts", "async_op", "timeout_s", "algorithm", "wire",
              "wire_nonfinite"},
             2,
             3});
  def_method<reduce_scatter>(
      type, {"reduce_scatter",
             "reduce_scatter($self, output, input, op='sum', counts=None, *, async_op=False, "
             "timeout_s=None, algorithm=None, "
             "wire=None, wire_nonfinite=\'pass\')\n"
             "--\n\n"
             "output becomes this rank's piece of the reduction of all inputs, [sum of rows, ...]; "
             "counts: rows of each.",
             {"output", "input", "op", "counts", "async_op", "timeout_s", "algorithm", "wire",
              "wire_nonfinite"},
             2,
             4});
  def_method<gather>(
      type, {"gather",
             "gather($self, output, input, root=0, *, async_op=False, timeout_s=None, "
             "algorithm=None)\n"
             "--\n\n"
             "The root's output, size times as long, becomes all inputs in rank order; None "
             "elsewhere.",
             {"output", "input", "root", "async_op", "timeout_s", "algorithm"},
             2,
             3});
  def_method<scatter>(
      type, {"scatter",
             "scatter($self, output, input, root=0, *, async_op=False, timeout_s=None, "
             "algorithm=None)\n"
             "--\n\n"
             "output becomes this rank's piece of the root's input, which is size times as long; "
             "None elsewhere.",
             {"output", "input", "root", "async_op", "timeout_s", "algorithm"},
             2,
             3});
  def_method<all_to_all>(
      type, {"all_to_all",
             "all_to_all($self, output, input, output_counts=None, input_counts=None, *, "
             "async_op=False, timeout_s=None, algorithm=None, "
             "wire=None, wire_nonfinite=\'pass\')\n"
             "--\n\n"
             "Piece j of input goes to rank j, whose piece i comes from rank i. Counts are rows; "
             "without them all equal.",
             {"output", "input", "output_counts", "input_counts", "async_op", "timeout_s",
              "algorithm", "wire", "wire_nonfinite"},
             2,
             4});
  def_method<barrier>(type, {"barrier",
                             "barrier($self, *, async_op=False, timeout_s=None)\n"
                             "--\n\n"
                             "Returns once every rank has entered it.",
                             {"async_op", "timeout_s"},
                             0,
                             0});
  def_method<send>(
      type, {"send",
             "send($self, x, dst, tag=0, *, async_op=False, timeout_s=None)\n"
             "--\n\n"
             "x goes to rank dst. Returns when x may be written again, which may be before it is "
             "received.",
             {"x", "dst", "tag", "async_op", "timeout_s"},
             2,
             3});
  def_method<recv>(
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
  def_method<exchange>(
      type,
      {"exchange",
       "exchange($self, sends=(), receives=(), tag=0, *, async_op=False, timeout_s=None)\n"
       "--\n\n"
       "Messages that start together, so that none waits for another: pairs (x, dst) and (x, src). "
       "On a device they are one launch, which ranks make in one order with their collectives.",
       {"sends", "receives", "tag", "async_op", "timeout_s"},
       0,
       3});
}

}  // namespace pycomm::torch_layer
