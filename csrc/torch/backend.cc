#include "torch/backend.h"

#include <ATen/ATen.h>
#include <ATen/record_function.h>

#include <numeric>

#include "torch/blocking.h"
#include "torch/plan.h"
#include "torch/sparse.h"
#include "torch/tensors.h"

namespace pycomm::torch_layer {
namespace {

using Milliseconds = std::chrono::milliseconds;
// all_reduce_coalesced takes tensors that are together no larger than this as one: two copies of it
// cost less than another operation.
constexpr uint64_t kCoalesceBytes = 64 * 1024;

}  // namespace

PycommBackend::PycommBackend(std::shared_ptr<Group> group, std::shared_ptr<cpu::Endpoint> endpoint,
                             DeviceSide::Options device_options, Makers makers)
    : c10d::Backend(group->rank(), group->size()),
      group_(std::move(group)),
      endpoint_(std::move(endpoint)),
      makers_(std::move(makers)),
      device_options_(std::move(device_options)) {}

// The device's watch may want the GIL for the last tensors it holds.
PycommBackend::~PycommBackend() {
  if (device_side_ == nullptr) return;
  std::optional<pybind11::gil_scoped_release> release;
  if (Py_IsInitialized() && PyGILState_Check()) release.emplace();
  device_side_.reset();
}

// ---- checks ----

void PycommBackend::refuse(const char* op, const std::string& text) const {
  throw Error(Code::invalid_argument, std::string(op) + " in group '" + group_->name() +
                                          "', rank " + std::to_string(group_->rank()) + ": " +
                                          text);
}

const at::Tensor& PycommBackend::checked(const char* op, const at::Tensor& tensor) const {
  if (!tensor.defined()) refuse(op, "the tensor is undefined");
  if (!tensor.device().is_cpu() && !DeviceSide::serves(tensor.device()))
    refuse(op, "the tensor is on " + tensor.device().str() +
                   ", this backend moves tensors on cpu and cuda; call .cpu(), or register another "
                   "backend for that device, as in init_process_group('cpu:pycomm,xpu:xccl')");
  if (tensor.layout() != at::kStrided) refuse(op, "the tensor is sparse; call .to_dense()");
  if (tensor.is_conj() || tensor.is_neg())
    refuse(op,
           "the tensor is a conjugated or negated view; call .resolve_conj() or .resolve_neg()");
  if (!dtype_of(tensor.scalar_type()))
    refuse(op, std::string("dtype ") + c10::toString(tensor.scalar_type()) + " is not supported");
  return tensor;
}

const at::Tensor& PycommBackend::only(const char* op, const Tensors& tensors) const {
  if (tensors.size() != 1)
    refuse(op, "takes one tensor per rank, got " + std::to_string(tensors.size()));
  return checked(op, tensors.front());
}

const PycommBackend::Tensors& PycommBackend::one_per_rank(const char* op, const char* what,
                                                          const TensorLists& lists) const {
  if (lists.size() != 1 || lists[0].size() != static_cast<size_t>(getSize()))
    refuse(op, std::string(what) + " list must hold one tensor per rank (" +
                   std::to_string(getSize()) + ")" +
                   (lists.size() == 1 ? ", got " + std::to_string(lists[0].size()) : ""));
  for (const auto& tensor : lists[0])
    if (checked(op, tensor).scalar_type() != lists[0][0].scalar_type())
      refuse(op, std::string("the tensors of ") + what + " list differ in dtype");
  return lists[0];
}

// ---- launching ----

PycommBackend::WorkPtr PycommBackend::launch(std::span<Plan> plans, const What& what,
                                             at::TensorList inputs, at::TensorList results) {
  for (Plan& plan : plans) plan.call.timeout = limit_of(what.timeout);
  if (!plans.empty() && plans[0].has_device && DeviceSide::serves(plans[0].device)) [[unlikely]]
    return launch_on_device(plans, what, inputs, results);
  if (!what.async && !coalescing_) {
    const InterruptScope interruptible(check_signals, is_only_thread);
    if (!at::hasCallbacks()) [[likely]] {
      for (const Plan& plan : plans) group_->run(plan.call);
    } else {
      const auto event = begin(what.type, what.title, inputs);
      for (const Plan& plan : plans) group_->run(plan.call);
      event->end_event();
    }
    return {};
  }
  auto work = begin(what.type, what.title, inputs);
  BackendWork::Works works;
  for (Plan& plan : plans)
    works.push_back(
        group_->start(plan.call, std::make_shared<decltype(plan.held)>(std::move(plan.held))));
  return started(std::move(work), std::move(works), results.vec());
}

PycommBackend::WorkPtr PycommBackend::launch(Plan plan, const What& what, at::TensorList inputs,
                                             at::TensorList results) {
  return launch(std::span(&plan, 1), what, inputs, results);
}

c10::intrusive_ptr<BackendWork> PycommBackend::begin(c10d::OpType type, const char* title,
                                                     at::TensorList inputs) const {
  return c10::make_intrusive<BackendWork>(getRank(), type, title, inputs.vec(), future_threads_);
}

PycommBackend::WorkPtr PycommBackend::started(c10::intrusive_ptr<BackendWork> work,
                                              BackendWork::Works works, Tensors results) {
  if (coalescing_) {
    coalesced_.insert(coalesced_.end(), works.begin(), works.end());
    coalesced_results_.insert(coalesced_results_.end(), results.begin(), results.end());
  }
  work->set(std::move(works), std::move(results));
  return work;
}

void PycommBackend::startCoalescing() {
  if (coalescing_) refuse("startCoalescing", "already coalescing");
  coalescing_ = true;
}

PycommBackend::WorkPtr PycommBackend::endCoalescing() {
  if (!coalescing_) refuse("endCoalescing", "startCoalescing was not called");
  coalescing_ = false;
  if (!coalesced_calls_.empty() || !coalesced_messages_.empty()) return coalesced_on_device();
  auto work = begin(c10d::OpType::COALESCED, nullptr, {});
  work->set(std::exchange(coalesced_, {}), std::exchange(coalesced_results_, {}));
  return work;
}

// ---- collectives ----

PycommBackend::WorkPtr PycommBackend::broadcast(Tensors& tensors,
                                                const c10d::BroadcastOptions& opts) {
  const at::Tensor& tensor = only("broadcast", tensors);
  Plan plan;
  plan.call.collective = Collective::broadcast;
  plan.call.dtype = *dtype_of(tensor.scalar_type());
  plan.call.root = static_cast<int>(opts.rootRank);
  plan.call.numel = static_cast<uint64_t>(tensor.numel());
  plan.call.output = plan.write(tensor);
  plan.call.input = plan.call.output;
  return launch(std::move(plan),
                {c10d::OpType::BROADCAST, "pycomm:broadcast", opts.asyncOp, opts.timeout}, tensors,
                tensors);
}

void PycommBackend::plan_all_reduce(Plan& plan, at::TensorList tensors,
                                    const c10d::ReduceOp& op) const {
  plan.call.collective = Collective::all_reduce;
  plan.call.dtype = *dtype_of(tensors.front().scalar_type());
  plan.call.op = reduce_op_of(op);
  if (tensors.size() > 1) {
    plan.call.numel = total(numels(tensors));
    plan.call.output = plan.write(tensors, true);
  } else {
    plan.call.numel = static_cast<uint64_t>(tensors.front().numel());
    plan.call.output = plan.write(tensors.front());
  }
  plan.call.input = plan.call.output;
  if (op.op_ != c10d::ReduceOp::PREMUL_SUM) return;
  Tensors scaled;
  for (const auto& tensor : tensors) scaled.push_back(premultiplied(tensor, op));
  plan.call.input = plan.read(at::TensorList(scaled));
}

PycommBackend::WorkPtr PycommBackend::allreduce(Tensors& tensors,
                                                const c10d::AllreduceOptions& opts) {
  if (tensors.size() == 1 && tensors[0].defined() && tensors[0].layout() == at::kSparse)
      [[unlikely]]
    return all_reduce_sparse(tensors, opts);
  only("all_reduce", tensors);
  Plan plan;
  plan_all_reduce(plan, tensors, opts.reduceOp);
  return launch(std::move(plan),
                {c10d::OpType::ALLREDUCE, "pycomm:all_reduce", opts.asyncOp, opts.timeout}, tensors,
                tensors);
}

PycommBackend::WorkPtr PycommBackend::all_reduce_wire(const at::Tensor& tensor, bool average,
                                                      Wire wire,
                                                      const std::optional<at::Tensor>& residual) {
  checked("all_reduce", tensor);
  Plan plan;
  plan_all_reduce(plan, tensor, average ? c10d::ReduceOp::AVG : c10d::ReduceOp::SUM);
  plan.call.wire = wire;
  if (residual) {
    if (checked("all_reduce residual", *residual).scalar_type() != at::kFloat ||
        residual->numel() != tensor.numel() || !residual->is_contiguous())
      refuse("all_reduce residual", "must be contiguous float32 of as many elements as the tensor");
    if (residual->device() != tensor.device())
      refuse("all_reduce residual", "is on " + residual->device().str() + ", the tensor on " +
                                        tensor.device().str() + "; put both on one device");
    plan.call.residual = residual->mutable_data_ptr<float>();
    plan.held.push_back(*residual);
  }
  return launch(std::move(plan),
                {c10d::OpType::ALLREDUCE, "pycomm:all_reduce", true, c10d::kUnsetTimeout}, tensor,
                tensor);
}

PycommBackend::WorkPtr PycommBackend::all_reduce_sparse(const Tensors& tensors,
                                                        const c10d::AllreduceOptions& opts) {
  const at::Tensor& tensor = tensors[0];
  if (!tensor.device().is_cpu())
    refuse("all_reduce", "the tensor is on " + tensor.device().str() + "; call .cpu()");
  if (opts.reduceOp.op_ != c10d::ReduceOp::SUM)
    refuse("all_reduce", "of sparse tensors knows SUM alone");
  const auto dtype = dtype_of(tensor.scalar_type());
  if (!dtype || is_float8(*dtype) || *dtype == DType::bytes)
    refuse("all_reduce", std::string("sparse tensors of dtype ") +
                             c10::toString(tensor.scalar_type()) + " are not supported");
  auto work = begin(c10d::OpType::_ALLREDUCE_SPARSE, "pycomm:sparse_all_reduce", tensors);
  WorkPtr result = started(
      work,
      {start_sparse_all_reduce(group_, tensor, n_sparse_.fetch_add(1), limit_of(opts.timeout))},
      tensors);
  if (opts.asyncOp || coalescing_) return result;
  result->wait();
  return {};
}

PycommBackend::WorkPtr PycommBackend::allreduce_coalesced(
    Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) {
  for (const auto& tensor : tensors)
    if (checked("all_reduce_coalesced", tensor).scalar_type() != tensors[0].scalar_type())
      refuse("all_reduce_coalesced", "the tensors differ in dtype");
  std::vector<Plan> plans;
  const at::TensorList all(tensors);
  for (size_t begin = 0, end = 0; begin < all.size(); begin = end) {
    uint64_t nbytes = 0;
    while (end < all.size() && (end == begin || nbytes + all[end].nbytes() <= kCoalesceBytes))
      nbytes += all[end++].nbytes();
    plan_all_reduce(plans.emplace_back(), all.slice(begin, end - begin), opts.reduceOp);
  }
  return launch(
      plans, {c10d::OpType::ALLREDUCE_COALESCED, "pycomm:all_reduce", opts.asyncOp, opts.timeout},
      tensors, tensors);
}

PycommBackend::WorkPtr PycommBackend::reduce(Tensors& tensors, const c10d::ReduceOptions& opts) {
  const at::Tensor& tensor = only("reduce", tensors);
  Plan plan;
  plan.call.collective = Collective::reduce;
  plan.call.dtype = *dtype_of(tensor.scalar_type());
  plan.call.op = reduce_op_of(opts.reduceOp);
  plan.call.root = static_cast<int>(opts.rootRank);
  plan.call.numel = static_cast<uint64_t>(tensor.numel());
  if (getRank() == plan.call.root) plan.call.output = plan.write(tensor);
  plan.call.input = plan.call.output != nullptr && opts.reduceOp.op_ != c10d::ReduceOp::PREMUL_SUM
                        ? plan.call.output
                        : plan.read(premultiplied(tensor, opts.reduceOp));
  return launch(std::move(plan),
                {c10d::OpType::REDUCE, "pycomm:reduce", opts.asyncOp, opts.timeout}, tensors,
                tensors);
}

void PycommBackend::plan_all_gather(Plan& plan, const at::Tensor& output,
                                    const at::Tensor& input) const {
  constexpr const char* kOp = "all_gather_into_tensor";
  checked(kOp, input);
  checked(kOp, output);
  if (output.scalar_type() != input.scalar_type()) refuse(kOp, "output and input differ in dtype");
  if (output.numel() != input.numel() * getSize())
    refuse(kOp, "output has " + std::to_string(output.numel()) + " elements, " +
                    std::to_string(getSize()) + " ranks of " + std::to_string(input.numel()) +
                    " give " + std::to_string(input.numel() * getSize()));
  plan.call.collective = Collective::all_gather;
  plan.call.dtype = *dtype_of(input.scalar_type());
  plan.call.numel = static_cast<uint64_t>(output.numel());
  plan.call.input = plan.read(input);
  plan.call.output = plan.write(output);
}

PycommBackend::WorkPtr PycommBackend::_allgather_base(at::Tensor& output, at::Tensor& input,
                                                      const c10d::AllgatherOptions& opts) {
  Plan plan;
  plan_all_gather(plan, output, input);
  return launch(
      std::move(plan),
      {c10d::OpType::_ALLGATHER_BASE, "pycomm:_all_gather_base", opts.asyncOp, opts.timeout}, input,
      output);
}

PycommBackend::WorkPtr PycommBackend::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) {
  if (outputs.size() != inputs.size())
    refuse("all_gather_into_tensor_coalesced", "outputs and inputs differ in number");
  std::vector<Plan> plans(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) plan_all_gather(plans[i], outputs[i], inputs[i]);
  return launch(
      plans, {c10d::OpType::ALLGATHER_COALESCED, "pycomm:all_gather", opts.asyncOp, opts.timeout},
      inputs, outputs);
}

PycommBackend::WorkPtr PycommBackend::allgather(TensorLists& outputs, Tensors& inputs,
                                                const c10d::AllgatherOptions& opts) {
  const at::Tensor& input = only("all_gather", inputs);
  const Tensors& list = one_per_rank("all_gather", "the output", outputs);
  if (list[0].scalar_type() != input.scalar_type())
    refuse("all_gather", "output and input differ in dtype");
  const auto counts = numels(list);
  const uint64_t own = counts[static_cast<size_t>(getRank())];
  if (own != static_cast<uint64_t>(input.numel()))
    refuse("all_gather", "this rank's place in the output list has " + std::to_string(own) +
                             " elements, the input " + std::to_string(input.numel()));
  Plan plan;
  plan.call.collective = Collective::all_gather;
  plan.call.dtype = *dtype_of(input.scalar_type());
  plan.call.numel = total(counts);
  if (!all_equal(counts)) plan.call.counts = counts;
  plan.call.input = plan.read(input);
  plan.call.output = plan.write(at::TensorList(list));
  return launch(std::move(plan),
                {c10d::OpType::ALLGATHER, "pycomm:all_gather", opts.asyncOp, opts.timeout}, inputs,
                list);
}

PycommBackend::WorkPtr PycommBackend::allgather_coalesced(TensorLists& outputs, Tensors& inputs,
                                                          const c10d::AllgatherOptions& opts) {
  constexpr const char* kOp = "all_gather_coalesced";
  if (outputs.size() != static_cast<size_t>(getSize()))
    refuse(kOp, "needs one output list per rank (" + std::to_string(getSize()) + "), got " +
                    std::to_string(outputs.size()));
  for (const auto& list : outputs)
    if (list.size() != inputs.size())
      refuse(kOp, "every output list must be as long as the inputs (" +
                      std::to_string(inputs.size()) + "), one has " + std::to_string(list.size()));
  std::vector<Plan> plans(inputs.size());
  Tensors results;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const at::Tensor& input = checked(kOp, inputs[i]);
    Tensors places;
    for (const auto& list : outputs) {
      if (checked(kOp, list[i]).numel() != input.numel() ||
          list[i].scalar_type() != input.scalar_type())
        refuse(kOp, "every output must have its input's dtype and number of elements");
      places.push_back(list[i]);
    }
    Call& call = plans[i].call;
    call.collective = Collective::all_gather;
    call.dtype = *dtype_of(input.scalar_type());
    call.numel = static_cast<uint64_t>(input.numel() * getSize());
    call.input = plans[i].read(input);
    call.output = plans[i].write(at::TensorList(places));
    results.insert(results.end(), places.begin(), places.end());
  }
  return launch(
      plans, {c10d::OpType::ALLGATHER_COALESCED, "pycomm:all_gather", opts.asyncOp, opts.timeout},
      inputs, results);
}

PycommBackend::WorkPtr PycommBackend::gather(TensorLists& outputs, Tensors& inputs,
                                             const c10d::GatherOptions& opts) {
  const at::Tensor& input = only("gather", inputs);
  Plan plan;
  plan.call.collective = Collective::gather;
  plan.call.dtype = *dtype_of(input.scalar_type());
  plan.call.root = static_cast<int>(opts.rootRank);
  plan.call.numel = static_cast<uint64_t>(input.numel() * getSize());
  plan.call.input = plan.read(input);
  if (getRank() != plan.call.root) {
    if (!outputs.empty())
      refuse("gather",
             "only the root (rank " + std::to_string(plan.call.root) + ") gives an output list");
  } else {
    for (const auto& tensor : one_per_rank("gather", "the root's output", outputs))
      if (tensor.numel() != input.numel() || tensor.scalar_type() != input.scalar_type())
        refuse("gather", "every output must have the input's dtype and number of elements");
    plan.call.output = plan.write(at::TensorList(outputs[0]));
  }
  return launch(std::move(plan),
                {c10d::OpType::GATHER, "pycomm:gather", opts.asyncOp, opts.timeout}, inputs,
                outputs.empty() ? at::TensorList() : at::TensorList(outputs[0]));
}

PycommBackend::WorkPtr PycommBackend::scatter(Tensors& outputs, TensorLists& inputs,
                                              const c10d::ScatterOptions& opts) {
  const at::Tensor& output = only("scatter", outputs);
  Plan plan;
  plan.call.collective = Collective::scatter;
  plan.call.dtype = *dtype_of(output.scalar_type());
  plan.call.root = static_cast<int>(opts.rootRank);
  plan.call.numel = static_cast<uint64_t>(output.numel() * getSize());
  if (getRank() != plan.call.root) {
    if (!inputs.empty())
      refuse("scatter",
             "only the root (rank " + std::to_string(plan.call.root) + ") gives an input list");
  } else {
    for (const auto& tensor : one_per_rank("scatter", "the root's input", inputs))
      if (tensor.numel() != output.numel() || tensor.scalar_type() != output.scalar_type())
        refuse("scatter", "every input must have the output's dtype and number of elements");
    plan.call.input = plan.read(at::TensorList(inputs[0]));
  }
  plan.call.output = plan.write(output);
  return launch(std::move(plan),
                {c10d::OpType::SCATTER, "pycomm:scatter", opts.asyncOp, opts.timeout},
                inputs.empty() ? at::TensorList() : at::TensorList(inputs[0]), outputs);
}

void PycommBackend::plan_reduce_scatter(Plan& plan, const at::Tensor& output,
                                        const at::Tensor& input, const c10d::ReduceOp& op) const {
  constexpr const char* kOp = "reduce_scatter_tensor";
  checked(kOp, input);
  checked(kOp, output);
  if (output.scalar_type() != input.scalar_type()) refuse(kOp, "output and input differ in dtype");
  if (input.numel() != output.numel() * getSize())
    refuse(kOp, "input has " + std::to_string(input.numel()) + " elements, " +
                    std::to_string(getSize()) + " ranks of " + std::to_string(output.numel()) +
                    " need " + std::to_string(output.numel() * getSize()));
  plan.call.collective = Collective::reduce_scatter;
  plan.call.dtype = *dtype_of(input.scalar_type());
  plan.call.op = reduce_op_of(op);
  plan.call.numel = static_cast<uint64_t>(input.numel());
  plan.call.input = plan.read(premultiplied(input, op));
  plan.call.output = plan.write(output);
}

PycommBackend::WorkPtr PycommBackend::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                           const c10d::ReduceScatterOptions& opts) {
  Plan plan;
  plan_reduce_scatter(plan, output, input, opts.reduceOp);
  return launch(std::move(plan),
                {c10d::OpType::_REDUCE_SCATTER_BASE, "pycomm:_reduce_scatter_base", opts.asyncOp,
                 opts.timeout},
                input, output);
}

PycommBackend::WorkPtr PycommBackend::reduce_scatter_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& opts) {
  if (outputs.size() != inputs.size())
    refuse("reduce_scatter_tensor_coalesced", "outputs and inputs differ in number");
  std::vector<Plan> plans(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i)
    plan_reduce_scatter(plans[i], outputs[i], inputs[i], opts.reduceOp);
  return launch(plans,
                {c10d::OpType::REDUCE_SCATTER, "pycomm:reduce_scatter", opts.asyncOp, opts.timeout},
                inputs, outputs);
}

PycommBackend::WorkPtr PycommBackend::reduce_scatter(Tensors& outputs, TensorLists& inputs,
                                                     const c10d::ReduceScatterOptions& opts) {
  const at::Tensor& output = only("reduce_scatter", outputs);
  const Tensors& list = one_per_rank("reduce_scatter", "the input", inputs);
  if (list[0].scalar_type() != output.scalar_type())
    refuse("reduce_scatter", "output and input differ in dtype");
  const auto counts = numels(list);
  const uint64_t own = counts[static_cast<size_t>(getRank())];
  if (own != static_cast<uint64_t>(output.numel()))
    refuse("reduce_scatter", "this rank's input has " + std::to_string(own) +
                                 " elements, the output " + std::to_string(output.numel()));
  Plan plan;
  plan.call.collective = Collective::reduce_scatter;
  plan.call.dtype = *dtype_of(output.scalar_type());
  plan.call.op = reduce_op_of(opts.reduceOp);
  plan.call.numel = total(counts);
  if (!all_equal(counts)) plan.call.counts = counts;
  if (opts.reduceOp.op_ == c10d::ReduceOp::PREMUL_SUM) {
    Tensors scaled;
    for (const auto& tensor : list) scaled.push_back(premultiplied(tensor, opts.reduceOp));
    plan.call.input = plan.read(at::TensorList(scaled));
  } else {
    plan.call.input = plan.read(at::TensorList(list));
  }
  plan.call.output = plan.write(output);
  return launch(std::move(plan),
                {c10d::OpType::REDUCE_SCATTER, "pycomm:reduce_scatter", opts.asyncOp, opts.timeout},
                list, outputs);
}

PycommBackend::WorkPtr PycommBackend::alltoall_base(at::Tensor& output, at::Tensor& input,
                                                    std::vector<int64_t>& output_splits,
                                                    std::vector<int64_t>& input_splits,
                                                    const c10d::AllToAllOptions& opts) {
  checked("all_to_all_single", input);
  checked("all_to_all_single", output);
  if (output.scalar_type() != input.scalar_type())
    refuse("all_to_all_single", "output and input differ in dtype");
  const auto counts_of = [&](const char* which, const at::Tensor& tensor,
                             const std::vector<int64_t>& splits) {
    const auto n = static_cast<int64_t>(getSize());
    const int64_t rows = tensor.dim() == 0 ? 1 : tensor.size(0);
    const int64_t row = rows == 0 ? 0 : tensor.numel() / rows;
    std::vector<uint64_t> counts;
    if (splits.empty()) {
      if (rows % n != 0)
        refuse("all_to_all_single", std::string(which) + " has " + std::to_string(rows) +
                                        " rows, which do not divide by " + std::to_string(n) +
                                        " ranks; give split sizes");
      counts.assign(static_cast<size_t>(n), static_cast<uint64_t>(rows / n * row));
      return counts;
    }
    if (splits.size() != static_cast<size_t>(n) ||
        std::accumulate(splits.begin(), splits.end(), int64_t{0}) != rows ||
        std::any_of(splits.begin(), splits.end(), [](int64_t split) { return split < 0; }))
      refuse("all_to_all_single", std::string(which) + " splits must be " + std::to_string(n) +
                                      " sizes that add up to its " + std::to_string(rows) +
                                      " rows");
    for (const int64_t split : splits) counts.push_back(static_cast<uint64_t>(split * row));
    return counts;
  };
  Plan plan;
  plan.call.collective = Collective::all_to_all;
  plan.call.dtype = *dtype_of(input.scalar_type());
  const auto send = counts_of("input", input, input_splits),
             recv = counts_of("output", output, output_splits);
  plan.call.numel = std::max(total(send), total(recv));
  // Splits given on one rank may be even there and not on another: then all say so.
  if (!input_splits.empty() || !output_splits.empty()) {
    plan.call.counts = send;
    plan.call.recv_counts = recv;
  } else if (input.numel() != output.numel()) {
    refuse("all_to_all_single",
           "without split sizes input and output must have the same number of elements");
  }
  plan.call.input = plan.read(input);
  plan.call.output = plan.write(output);
  return launch(std::move(plan),
                {c10d::OpType::ALLTOALL_BASE, "pycomm:all_to_all", opts.asyncOp, opts.timeout},
                input, output);
}

PycommBackend::WorkPtr PycommBackend::alltoall(Tensors& outputs, Tensors& inputs,
                                               const c10d::AllToAllOptions& opts) {
  const auto n = static_cast<size_t>(getSize());
  if (outputs.size() != n || inputs.size() != n)
    refuse("all_to_all", "input and output lists must hold one tensor per rank (" +
                             std::to_string(n) + "), got " + std::to_string(inputs.size()) +
                             " and " + std::to_string(outputs.size()));
  for (const auto* list : {&outputs, &inputs})
    for (const auto& tensor : *list)
      if (checked("all_to_all", tensor).scalar_type() != inputs[0].scalar_type())
        refuse("all_to_all", "the tensors differ in dtype");
  Plan plan;
  plan.call.collective = Collective::all_to_all;
  plan.call.dtype = *dtype_of(inputs[0].scalar_type());
  plan.call.counts = numels(inputs);
  plan.call.recv_counts = numels(outputs);
  plan.call.numel = std::max(total(plan.call.counts), total(plan.call.recv_counts));
  plan.call.input = plan.read(at::TensorList(inputs));
  plan.call.output = plan.write(at::TensorList(outputs));
  return launch(std::move(plan),
                {c10d::OpType::ALLTOALL, "pycomm:all_to_all", opts.asyncOp, opts.timeout}, inputs,
                outputs);
}

// ---- messages and the barrier ----

PycommBackend::WorkPtr PycommBackend::message(Tensors& tensors, int peer, int tag, bool is_send) {
  const char* const op = is_send ? "send" : "recv";
  const at::Tensor& tensor = only(op, tensors);
  if (!tensor.is_contiguous()) refuse(op, "the tensor is not contiguous; call .contiguous()");
  if (DeviceSide::serves(tensor.device())) return message_on_device(tensor, peer, tag, is_send);
  const bool any = !is_send && peer < 0;
  auto work = begin(is_send ? c10d::OpType::SEND
                    : any   ? c10d::OpType::RECVANYSOURCE
                            : c10d::OpType::RECV,
                    is_send ? "pycomm:send"
                    : any   ? "pycomm:recvAnySource"
                            : "pycomm:recv",
                    tensors);
  const auto nbytes = static_cast<uint64_t>(tensor.nbytes());
  auto held = std::make_shared<at::Tensor>(tensor);
  auto message = is_send ? group_->send(tensor.data_ptr(), nbytes, peer, tag, {}, std::move(held))
                         : group_->recv(tensor.data_ptr(), nbytes, peer, tag, {}, std::move(held));
  return started(std::move(work), {std::move(message)}, tensors);
}

PycommBackend::WorkPtr PycommBackend::send(Tensors& tensors, int peer, int tag) {
  return message(tensors, peer, tag, true);
}
PycommBackend::WorkPtr PycommBackend::recv(Tensors& tensors, int peer, int tag) {
  return message(tensors, peer, tag, false);
}
PycommBackend::WorkPtr PycommBackend::recvAnysource(Tensors& tensors, int tag) {
  return message(tensors, -1, tag, false);
}

// On a device too: once the caller's stream is there, the hosts meet.
PycommBackend::WorkPtr PycommBackend::barrier(const c10d::BarrierOptions& opts) {
  if (const auto side = device_side()) side->synchronise();
  Plan plan;
  plan.call.collective = Collective::barrier;
  return launch(std::move(plan),
                {c10d::OpType::BARRIER, "pycomm:barrier", opts.asyncOp, opts.timeout}, {}, {});
}

}  // namespace pycomm::torch_layer
