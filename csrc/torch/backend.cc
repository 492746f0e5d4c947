#include "torch/backend.h"

#include <ATen/ATen.h>

#include <numeric>
#include <sstream>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include "torch/tensors.h"

namespace pycomm::torch_layer {
namespace {

using Milliseconds = std::chrono::milliseconds;
constexpr int64_t kMonitorTag =
    std::numeric_limits<int64_t>::min() + 1;  // no user's tag: c10d's are 32-bit

std::optional<Milliseconds> limit_of(Milliseconds timeout) {
  return timeout == c10d::kUnsetTimeout ? std::nullopt : std::optional(timeout);
}

// One or several started operations as one c10d::Work.
class BackendWork final : public c10d::Work {
 public:
  BackendWork(int rank, c10d::OpType type, std::vector<std::shared_ptr<pycomm::Work>> works,
              std::vector<at::Tensor> results)
      : c10d::Work(rank, type), works_(std::move(works)), results_(std::move(results)) {}
  bool isCompleted() override {
    return std::all_of(works_.begin(), works_.end(), [](const auto& work) { return work->done(); });
  }
  bool isSuccess() const override {
    return std::all_of(works_.begin(), works_.end(),
                       [](const auto& work) { return work->done() && work->status().ok(); });
  }
  std::exception_ptr exception() const override {
    for (const auto& work : works_)
      if (const Status status = work->status(); !status.ok())
        return std::make_exception_ptr(Error(status));
    return nullptr;
  }
  int sourceRank() const override { return works_.empty() ? -1 : works_.front()->source(); }
  std::vector<at::Tensor> result() override { return results_; }
  void synchronize() override { wait(kNoTimeout); }
  bool wait(Milliseconds timeout) override {
    const auto limit =
        timeout <= Milliseconds(0) ? Milliseconds(std::chrono::hours(24 * 365)) : timeout;
    for (const auto& work : works_) work->wait(limit);
    return true;
  }
  void abort() override {}
  // Completed by whoever completes the last operation.
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    std::lock_guard lock(mutex_);
    if (future_) return future_;
    future_ =
        c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    auto left = std::make_shared<std::atomic<size_t>>(works_.size());
    const auto complete = [future = future_, works = works_, results = results_] {
      for (const auto& work : works)
        if (const Status status = work->status(); !status.ok())
          return future->setError(std::make_exception_ptr(Error(status)));
      future->markCompleted(c10::IValue(results));
    };
    if (works_.empty()) complete();
    for (const auto& work : works_)
      work->on_done([left, complete] {
        if (left->fetch_sub(1) == 1) complete();
      });
    return future_;
  }

 private:
  const std::vector<std::shared_ptr<pycomm::Work>> works_;
  const std::vector<at::Tensor> results_;
  std::mutex mutex_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

ReduceOp reduce_op_of(const c10d::ReduceOp& op) {
  switch (op.op_) {
    case c10d::ReduceOp::SUM:
    case c10d::ReduceOp::PREMUL_SUM:
      return ReduceOp::sum;
    case c10d::ReduceOp::AVG:
      return ReduceOp::avg;
    case c10d::ReduceOp::PRODUCT:
      return ReduceOp::product;
    case c10d::ReduceOp::MIN:
      return ReduceOp::min;
    case c10d::ReduceOp::MAX:
      return ReduceOp::max;
    case c10d::ReduceOp::BAND:
      return ReduceOp::band;
    case c10d::ReduceOp::BOR:
      return ReduceOp::bor;
    case c10d::ReduceOp::BXOR:
      return ReduceOp::bxor;
    default:
      throw Error(Code::invalid_argument, "this ReduceOp is unknown to pycomm");
  }
}

// The input of a reduction after PREMUL_SUM's factor; itself for every other op.
at::Tensor premultiplied(const at::Tensor& input, const c10d::ReduceOp& op) {
  if (op.op_ != c10d::ReduceOp::PREMUL_SUM) return input;
  // Its name in torch 2.11; later ones keep it as an alias.
  const auto* supplement = dynamic_cast<const c10d::NCCLPreMulSumSupplement*>(op.supplement_.get());
  if (supplement == nullptr) throw Error(Code::invalid_argument, "PREMUL_SUM without a factor");
  return supplement->tensor_factor.defined() ? input * supplement->tensor_factor.to(input.dtype())
                                             : input * supplement->double_factor;
}

std::vector<uint64_t> numels(const std::vector<at::Tensor>& tensors) {
  std::vector<uint64_t> counts;
  for (const auto& tensor : tensors) counts.push_back(static_cast<uint64_t>(tensor.numel()));
  return counts;
}

uint64_t total(const std::vector<uint64_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), uint64_t{0});
}

bool all_equal(const std::vector<uint64_t>& counts) {
  return std::all_of(counts.begin(), counts.end(),
                     [&](uint64_t count) { return count == counts.front(); });
}

at::Tensor flattened(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> rows;
  for (const auto& tensor : tensors) rows.push_back(tensor.reshape(-1));
  return at::cat(rows);
}

void unflatten(const at::Tensor& flat, const std::vector<at::Tensor>& tensors) {
  int64_t at = 0;
  for (const auto& tensor : tensors) {
    const_cast<at::Tensor&>(tensor).copy_(flat.narrow(0, at, tensor.numel()).view(tensor.sizes()));
    at += tensor.numel();
  }
}

}  // namespace

// A call, the tensors it reads and writes, and those c10d gets back.
struct PycommBackend::Plan {
  Call call;
  std::vector<at::Tensor> held;  // memory the engine works on
  std::vector<at::Tensor> results;
  // The tensor to write into: `tensor` itself, or a contiguous stand-in copied back at the end.
  void* write(const at::Tensor& tensor) {
    if (tensor.is_contiguous()) {
      held.push_back(tensor);
      return tensor.data_ptr();
    }
    const at::Tensor flat = tensor.contiguous();
    held.push_back(flat);
    call.finish = [flat, tensor] { const_cast<at::Tensor&>(tensor).copy_(flat); };
    return flat.data_ptr();
  }
  const void* read(const at::Tensor& tensor) {
    held.push_back(tensor.contiguous());
    return held.back().data_ptr();
  }
  // One flat buffer, copied out to the list at the end.
  void* write_list(const std::vector<at::Tensor>& tensors, const at::TensorOptions& options) {
    const at::Tensor flat = at::empty({static_cast<int64_t>(total(numels(tensors)))}, options);
    held.push_back(flat);
    call.finish = [flat, tensors] { unflatten(flat, tensors); };
    return flat.data_ptr();
  }
};

PycommBackend::PycommBackend(std::shared_ptr<Group> group, std::shared_ptr<cpu::Endpoint> endpoint,
                             MakeGroup make_group)
    : c10d::Backend(group->rank(), group->size()),
      group_(std::move(group)),
      endpoint_(std::move(endpoint)),
      make_group_(std::move(make_group)) {}

PycommBackend::~PycommBackend() = default;

void PycommBackend::refuse(const char* op, const std::string& text) const {
  throw Error(Code::invalid_argument, std::string(op) + " in group '" + group_->name() +
                                          "', rank " + std::to_string(group_->rank()) + ": " +
                                          text);
}

const at::Tensor& PycommBackend::checked(const char* op, const at::Tensor& tensor) const {
  if (!tensor.defined()) refuse(op, "the tensor is undefined");
  if (!tensor.device().is_cpu())
    refuse(op, "the tensor is on " + tensor.device().str() +
                   ", this backend moves CPU tensors; call .cpu(), or register another "
                   "backend for that device, as in init_process_group('cpu:pycomm,cuda:nccl')");
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

PycommBackend::WorkPtr PycommBackend::collect(WorkPtr work) {
  if (coalescing_) coalesced_.push_back(work);
  return work;
}

void PycommBackend::startCoalescing() {
  if (coalescing_) refuse("startCoalescing", "already coalescing");
  coalescing_ = true;
}

namespace {
// Several works as one; each was started already.
class ManyWorks final : public c10d::Work {
 public:
  ManyWorks(int rank, std::vector<c10::intrusive_ptr<c10d::Work>> works)
      : c10d::Work(rank, c10d::OpType::COALESCED), works_(std::move(works)) {}
  bool isCompleted() override {
    return std::all_of(works_.begin(), works_.end(),
                       [](const auto& work) { return work->isCompleted(); });
  }
  bool isSuccess() const override {
    return std::all_of(works_.begin(), works_.end(),
                       [](const auto& work) { return work->isSuccess(); });
  }
  std::exception_ptr exception() const override {
    for (const auto& work : works_)
      if (auto error = work->exception()) return error;
    return nullptr;
  }
  std::vector<at::Tensor> result() override {
    std::vector<at::Tensor> all;
    for (const auto& work : works_)
      for (auto& tensor : work->result()) all.push_back(tensor);
    return all;
  }
  void synchronize() override { wait(kNoTimeout); }
  bool wait(Milliseconds timeout) override {
    for (const auto& work : works_) work->wait(timeout);
    return true;
  }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    auto futures = c10::List<c10::intrusive_ptr<c10::ivalue::Future>>(
        c10::FutureType::create(c10::ListType::create(c10::TensorType::get())));
    for (const auto& work : works_) futures.push_back(work->getFuture());
    return c10::collectAll(futures)->then(
        [results = result()](c10::ivalue::Future& all) {
          if (all.hasError()) std::rethrow_exception(all.exception_ptr());
          return c10::IValue(results);
        },
        c10::ListType::create(c10::TensorType::get()));
  }

 private:
  const std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};
}  // namespace

PycommBackend::WorkPtr PycommBackend::endCoalescing() {
  if (!coalescing_) refuse("endCoalescing", "startCoalescing was not called");
  coalescing_ = false;
  return c10::make_intrusive<ManyWorks>(getRank(), std::exchange(coalesced_, {}));
}

PycommBackend::WorkPtr PycommBackend::launch(Plan plan, c10d::OpType type, bool async,
                                             Milliseconds timeout) {
  plan.call.timeout = limit_of(timeout);
  if (!async && !coalescing_) {
    group_->run(plan.call);
    return c10::make_intrusive<BackendWork>(
        getRank(), type, std::vector<std::shared_ptr<pycomm::Work>>{}, std::move(plan.results));
  }
  auto held = std::make_shared<Tensors>(std::move(plan.held));
  auto work = group_->start(plan.call, std::move(held));
  return collect(c10::make_intrusive<BackendWork>(getRank(), type, std::vector{std::move(work)},
                                                  std::move(plan.results)));
}

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
  plan.results = tensors;
  return launch(std::move(plan), c10d::OpType::BROADCAST, opts.asyncOp, opts.timeout);
}

PycommBackend::WorkPtr PycommBackend::allreduce(Tensors& tensors,
                                                const c10d::AllreduceOptions& opts) {
  const at::Tensor& tensor = only("all_reduce", tensors);
  Plan plan;
  plan.call.collective = Collective::all_reduce;
  plan.call.dtype = *dtype_of(tensor.scalar_type());
  plan.call.op = reduce_op_of(opts.reduceOp);
  plan.call.numel = static_cast<uint64_t>(tensor.numel());
  plan.call.output = plan.write(tensor);
  plan.call.input = opts.reduceOp == c10d::ReduceOp::PREMUL_SUM
                        ? plan.read(premultiplied(tensor, opts.reduceOp))
                        : plan.call.output;
  plan.results = tensors;
  return launch(std::move(plan), c10d::OpType::ALLREDUCE, opts.asyncOp, opts.timeout);
}

PycommBackend::WorkPtr PycommBackend::allreduce_coalesced(
    Tensors& tensors, const c10d::AllreduceCoalescedOptions& opts) {
  std::vector<WorkPtr> works;
  for (auto& tensor : tensors) {
    Tensors one{tensor};
    works.push_back(allreduce(one, opts));
  }
  return c10::make_intrusive<ManyWorks>(getRank(), std::move(works));
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
  plan.call.input = plan.call.output != nullptr && opts.reduceOp != c10d::ReduceOp::PREMUL_SUM
                        ? plan.call.output
                        : plan.read(premultiplied(tensor, opts.reduceOp));
  plan.results = tensors;
  return launch(std::move(plan), c10d::OpType::REDUCE, opts.asyncOp, opts.timeout);
}

PycommBackend::WorkPtr PycommBackend::_allgather_base(at::Tensor& output, at::Tensor& input,
                                                      const c10d::AllgatherOptions& opts) {
  checked("all_gather_into_tensor", input);
  checked("all_gather_into_tensor", output);
  if (output.scalar_type() != input.scalar_type())
    refuse("all_gather_into_tensor", "output and input differ in dtype");
  if (output.numel() != input.numel() * getSize())
    refuse("all_gather_into_tensor", "output has " + std::to_string(output.numel()) +
                                         " elements, " + std::to_string(getSize()) + " ranks of " +
                                         std::to_string(input.numel()) + " give " +
                                         std::to_string(input.numel() * getSize()));
  Plan plan;
  plan.call.collective = Collective::all_gather;
  plan.call.dtype = *dtype_of(input.scalar_type());
  plan.call.numel = static_cast<uint64_t>(output.numel());
  plan.call.input = plan.read(input);
  plan.call.output = plan.write(output);
  plan.results = {output};
  return launch(std::move(plan), c10d::OpType::_ALLGATHER_BASE, opts.asyncOp, opts.timeout);
}

PycommBackend::WorkPtr PycommBackend::allgather(TensorLists& outputs, Tensors& inputs,
                                                const c10d::AllgatherOptions& opts) {
  const at::Tensor& input = only("all_gather", inputs);
  if (outputs.size() != 1 || outputs[0].size() != static_cast<size_t>(getSize()))
    refuse("all_gather",
           "the output list must hold one tensor per rank (" + std::to_string(getSize()) + ")");
  for (const auto& tensor : outputs[0])
    if (checked("all_gather", tensor).scalar_type() != input.scalar_type())
      refuse("all_gather", "output and input differ in dtype");
  const auto counts = numels(outputs[0]);
  if (counts[static_cast<size_t>(getRank())] != static_cast<uint64_t>(input.numel()))
    refuse("all_gather", "this rank's place in the output list has " +
                             std::to_string(counts[static_cast<size_t>(getRank())]) +
                             " elements, the input " + std::to_string(input.numel()));
  Plan plan;
  plan.call.collective = Collective::all_gather;
  plan.call.dtype = *dtype_of(input.scalar_type());
  plan.call.numel = total(counts);
  if (!all_equal(counts)) plan.call.counts = counts;
  plan.call.input = plan.read(input);
  plan.call.output = plan.write_list(outputs[0], input.options());
  plan.results = outputs[0];
  return launch(std::move(plan), c10d::OpType::ALLGATHER, opts.asyncOp, opts.timeout);
}

PycommBackend::WorkPtr PycommBackend::allgather_coalesced(TensorLists& outputs, Tensors& inputs,
                                                          const c10d::AllgatherOptions& opts) {
  if (outputs.size() != static_cast<size_t>(getSize()))
    refuse("all_gather_coalesced", "needs one output list per rank");
  std::vector<WorkPtr> works;
  for (size_t i = 0; i < inputs.size(); ++i) {
    TensorLists one(1);
    for (auto& list : outputs) {
      if (list.size() != inputs.size())
        refuse("all_gather_coalesced", "every output list must be as long as the inputs");
      one[0].push_back(list[i]);
    }
    Tensors input{inputs[i]};
    works.push_back(allgather(one, input, opts));
  }
  return c10::make_intrusive<ManyWorks>(getRank(), std::move(works));
}

PycommBackend::WorkPtr PycommBackend::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& opts) {
  if (outputs.size() != inputs.size())
    refuse("all_gather_into_tensor_coalesced", "outputs and inputs differ in number");
  std::vector<WorkPtr> works;
  for (size_t i = 0; i < inputs.size(); ++i)
    works.push_back(_allgather_base(outputs[i], inputs[i], opts));
  return c10::make_intrusive<ManyWorks>(getRank(), std::move(works));
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
  if (getRank() == plan.call.root) {
    if (outputs.size() != 1 || outputs[0].size() != static_cast<size_t>(getSize()))
      refuse("gather",
             "the root's list must hold one tensor per rank (" + std::to_string(getSize()) + ")");
    for (const auto& tensor : outputs[0])
      if (checked("gather", tensor).numel() != input.numel() ||
          tensor.scalar_type() != input.scalar_type())
        refuse("gather", "every output must have the input's dtype and number of elements");
    plan.call.output = plan.write_list(outputs[0], input.options());
    plan.results = outputs[0];
  } else if (!outputs.empty()) {
    refuse("gather",
           "only the root (rank " + std::to_string(plan.call.root) + ") gives an output list");
  }
  return launch(std::move(plan), c10d::OpType::GATHER, opts.asyncOp, opts.timeout);
}

PycommBackend::WorkPtr PycommBackend::scatter(Tensors& outputs, TensorLists& inputs,
                                              const c10d::ScatterOptions& opts) {
  const at::Tensor& output = only("scatter", outputs);
  Plan plan;
  plan.call.collective = Collective::scatter;
  plan.call.dtype = *dtype_of(output.scalar_type());
  plan.call.root = static_cast<int>(opts.rootRank);
  plan.call.numel = static_cast<uint64_t>(output.numel() * getSize());
  if (getRank() == plan.call.root) {
    if (inputs.size() != 1 || inputs[0].size() != static_cast<size_t>(getSize()))
      refuse("scatter",
             "the root's list must hold one tensor per rank (" + std::to_string(getSize()) + ")");
    for (const auto& tensor : inputs[0])
      if (checked("scatter", tensor).numel() != output.numel() ||
          tensor.scalar_type() != output.scalar_type())
        refuse("scatter", "every input must have the output's dtype and number of elements");
    plan.call.input = plan.read(flattened(inputs[0]));
  } else if (!inputs.empty()) {
    refuse("scatter",
           "only the root (rank " + std::to_string(plan.call.root) + ") gives an input list");
  }
  plan.call.output = plan.write(output);
  plan.results = outputs;
  return launch(std::move(plan), c10d::OpType::SCATTER, opts.asyncOp, opts.timeout);
}

PycommBackend::WorkPtr PycommBackend::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                           const c10d::ReduceScatterOptions& opts) {
  checked("reduce_scatter_tensor", input);
  checked("reduce_scatter_tensor", output);
  if (output.scalar_type() != input.scalar_type())
    refuse("reduce_scatter_tensor", "output and input differ in dtype");
  if (input.numel() != output.numel() * getSize())
    refuse("reduce_scatter_tensor", "input has " + std::to_string(input.numel()) + " elements, " +
                                        std::to_string(getSize()) + " ranks of " +
                                        std::to_string(output.numel()) + " need " +
                                        std::to_string(output.numel() * getSize()));
  Plan plan;
  plan.call.collective = Collective::reduce_scatter;
  plan.call.dtype = *dtype_of(input.scalar_type());
  plan.call.op = reduce_op_of(opts.reduceOp);
  plan.call.numel = static_cast<uint64_t>(input.numel());
  plan.call.input = plan.read(premultiplied(input, opts.reduceOp));
  plan.call.output = plan.write(output);
  plan.results = {output};
  return launch(std::move(plan), c10d::OpType::_REDUCE_SCATTER_BASE, opts.asyncOp, opts.timeout);
}

PycommBackend::WorkPtr PycommBackend::reduce_scatter(Tensors& outputs, TensorLists& inputs,
                                                     const c10d::ReduceScatterOptions& opts) {
  const at::Tensor& output = only("reduce_scatter", outputs);
  if (inputs.size() != 1 || inputs[0].size() != static_cast<size_t>(getSize()))
    refuse("reduce_scatter",
           "the input list must hold one tensor per rank (" + std::to_string(getSize()) + ")");
  for (const auto& tensor : inputs[0])
    if (checked("reduce_scatter", tensor).scalar_type() != output.scalar_type())
      refuse("reduce_scatter", "output and input differ in dtype");
  const auto counts = numels(inputs[0]);
  if (counts[static_cast<size_t>(getRank())] != static_cast<uint64_t>(output.numel()))
    refuse("reduce_scatter", "this rank's input has " +
                                 std::to_string(counts[static_cast<size_t>(getRank())]) +
                                 " elements, the output " + std::to_string(output.numel()));
  Plan plan;
  plan.call.collective = Collective::reduce_scatter;
  plan.call.dtype = *dtype_of(output.scalar_type());
  plan.call.op = reduce_op_of(opts.reduceOp);
  plan.call.numel = total(counts);
  if (!all_equal(counts)) plan.call.counts = counts;
  plan.call.input = plan.read(premultiplied(flattened(inputs[0]), opts.reduceOp));
  plan.call.output = plan.write(output);
  plan.results = outputs;
  return launch(std::move(plan), c10d::OpType::REDUCE_SCATTER, opts.asyncOp, opts.timeout);
}

PycommBackend::WorkPtr PycommBackend::reduce_scatter_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& opts) {
  if (outputs.size() != inputs.size())
    refuse("reduce_scatter_tensor_coalesced", "outputs and inputs differ in number");
  std::vector<WorkPtr> works;
  for (size_t i = 0; i < inputs.size(); ++i)
    works.push_back(_reduce_scatter_base(outputs[i], inputs[i], opts));
  return c10::make_intrusive<ManyWorks>(getRank(), std::move(works));
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
  plan.results = {output};
  return launch(std::move(plan), c10d::OpType::ALLTOALL_BASE, opts.asyncOp, opts.timeout);
}

PycommBackend::WorkPtr PycommBackend::alltoall(Tensors& outputs, Tensors& inputs,
                                               const c10d::AllToAllOptions& opts) {
  const auto n = static_cast<size_t>(getSize());
  if (outputs.size() != n || inputs.size() != n)
    refuse("all_to_all",
           "input and output lists must hold one tensor per rank (" + std::to_string(n) + ")");
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
  plan.call.input = plan.read(flattened(inputs));
  plan.call.output = plan.write_list(outputs, inputs[0].options());
  plan.results = outputs;
  return launch(std::move(plan), c10d::OpType::ALLTOALL, opts.asyncOp, opts.timeout);
}

PycommBackend::WorkPtr PycommBackend::message(Tensors& tensors, int peer, int tag, bool is_send) {
  const at::Tensor& tensor = only(is_send ? "send" : "recv", tensors);
  if (!tensor.is_contiguous())
    refuse(is_send ? "send" : "recv", "the tensor is not contiguous; call .contiguous()");
  const auto nbytes = static_cast<uint64_t>(tensor.nbytes());
  auto held = std::make_shared<at::Tensor>(tensor);
  auto work = is_send ? group_->send(tensor.data_ptr(), nbytes, peer, tag, {}, held)
                      : group_->recv(tensor.data_ptr(), nbytes, peer, tag, {}, held);
  const auto type = is_send    ? c10d::OpType::SEND
                    : peer < 0 ? c10d::OpType::RECVANYSOURCE
                               : c10d::OpType::RECV;
  return collect(
      c10::make_intrusive<BackendWork>(getRank(), type, std::vector{std::move(work)}, tensors));
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

PycommBackend::WorkPtr PycommBackend::barrier(const c10d::BarrierOptions& opts) {
  Plan plan;
  plan.call.collective = Collective::barrier;
  return launch(std::move(plan), c10d::OpType::BARRIER, opts.asyncOp, opts.timeout);
}

// Rank 0 hears from every rank, then answers each: a rank that is missing can be named.
void PycommBackend::monitoredBarrier(const c10d::BarrierOptions& opts, bool wait_all_ranks) {
  const auto timeout = limit_of(opts.timeout).value_or(group_->timeout());
  const auto limit =
      Milliseconds(std::chrono::hours(24 * 365));  // the operation's own deadline ends the wait
  uint8_t token = 0;
  if (getRank() != 0) {
    group_->send(&token, 1, 0, kMonitorTag, timeout, nullptr)->wait(limit);
    group_->recv(&token, 1, 0, kMonitorTag, timeout, nullptr)->wait(limit);
    return;
  }
  std::vector<uint8_t> tokens(static_cast<size_t>(getSize()));
  std::vector<std::shared_ptr<pycomm::Work>> arrivals(1);
  for (int rank = 1; rank < getSize(); ++rank)
    arrivals.push_back(
        group_->recv(&tokens[static_cast<size_t>(rank)], 1, rank, kMonitorTag, timeout, nullptr));
  std::string missing;
  for (int rank = 1; rank < getSize(); ++rank) {
    try {
      arrivals[static_cast<size_t>(rank)]->wait(limit);
    } catch (const Error& error) {
      missing += (missing.empty() ? "" : ", ") + std::to_string(rank);
      if (!wait_all_ranks) break;
    }
  }
  if (!missing.empty()) {
    const Status why{Code::timeout, "monitored_barrier in group '" + group_->name() +
                                        "': rank(s) " + missing + " did not reach it within " +
                                        std::to_string(timeout.count()) + " ms"};
    group_->engine().revoke(why);
    throw Error(why);
  }
  for (int rank = 1; rank < getSize(); ++rank)
    group_->send(&token, 1, rank, kMonitorTag, timeout, nullptr)->wait(limit);
}

c10::intrusive_ptr<c10d::Backend::Options> PycommBackend::getBackendOptions() {
  return c10::make_intrusive<Options>("pycomm", group_->timeout());
}

c10::intrusive_ptr<c10d::Backend> PycommBackend::split(const c10::intrusive_ptr<c10d::Store>& store,
                                                       const std::vector<int>& ranks,
                                                       const c10::intrusive_ptr<Options>& opts) {
  if (std::find(ranks.begin(), ranks.end(), getRank()) == ranks.end()) return nullptr;
  auto group = make_group_(store, ranks, opts ? opts->group_name : "split");
  if (opts) group->set_timeout(opts->timeout);
  return c10::make_intrusive<PycommBackend>(std::move(group), endpoint_, make_group_);
}

void PycommBackend::abort() {
  group_->engine().revoke({Code::closed, "rank " + std::to_string(getRank()) + " called abort()"});
}

void PycommBackend::shutdown() { group_->engine().close(); }

}  // namespace pycomm::torch_layer
