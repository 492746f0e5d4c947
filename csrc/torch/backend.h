// PycommBackend: torch.distributed's backend "pycomm" on CPU tensors. It turns c10d's calls into
// core/group.h's and nothing more; a warm call does not enter Python. Tensors that are not
// contiguous, and lists of tensors, go through one flat copy; what c10d calls *_into_tensor goes
// without.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "core/group.h"
#include "cpu/endpoint.h"

namespace pycomm::torch_layer {

class PycommBackend final : public c10d::Backend {
 public:
  // Makes the group of some ranks of this one, for split_group: (store, ranks, name) -> Group.
  using MakeGroup = std::function<std::shared_ptr<Group>(
      const c10::intrusive_ptr<c10d::Store>&, const std::vector<int>&, const std::string&)>;
  PycommBackend(std::shared_ptr<Group> group, std::shared_ptr<cpu::Endpoint> endpoint,
                MakeGroup make_group);
  ~PycommBackend() override;

  const std::shared_ptr<Group>& group() const { return group_; }
  const std::shared_ptr<cpu::Endpoint>& endpoint() const { return endpoint_; }
  const std::string getBackendName() const override { return "pycomm"; }
  bool supportsSplitting() const override { return true; }
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override;
  c10::intrusive_ptr<c10d::Work> endCoalescing() override;
  void setTimeout(std::chrono::milliseconds timeout) override { group_->set_timeout(timeout); }
  c10::intrusive_ptr<Options> getBackendOptions() override;
  c10::intrusive_ptr<c10d::Backend> split(const c10::intrusive_ptr<c10d::Store>& store,
                                          const std::vector<int>& ranks,
                                          const c10::intrusive_ptr<Options>& opts) override;
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return group_->engine().sequence(); }
  c10d::ErrorType getError() override { return c10d::ErrorType::SUCCESS; }
  void abort() override;
  void shutdown() override;

  using Tensors = std::vector<at::Tensor>;
  using TensorLists = std::vector<std::vector<at::Tensor>>;
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& opts) override;
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& opts) override;
  WorkPtr allreduce_coalesced(Tensors& tensors,
                              const c10d::AllreduceCoalescedOptions& opts) override;
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& opts) override;
  WorkPtr allgather(TensorLists& outputs, Tensors& inputs,
                    const c10d::AllgatherOptions& opts) override;
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input,
                          const c10d::AllgatherOptions& opts) override;
  WorkPtr allgather_coalesced(TensorLists& outputs, Tensors& inputs,
                              const c10d::AllgatherOptions& opts) override;
  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::AllgatherOptions& opts) override;
  WorkPtr gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& opts) override;
  WorkPtr scatter(Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& opts) override;
  WorkPtr reduce_scatter(Tensors& outputs, TensorLists& inputs,
                         const c10d::ReduceScatterOptions& opts) override;
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& opts) override;
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& opts) override;
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits,
                        const c10d::AllToAllOptions& opts) override;
  WorkPtr alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& opts) override;
  WorkPtr send(Tensors& tensors, int peer, int tag) override;
  WorkPtr recv(Tensors& tensors, int peer, int tag) override;
  WorkPtr recvAnysource(Tensors& tensors, int tag) override;
  WorkPtr barrier(const c10d::BarrierOptions& opts) override;
  void monitoredBarrier(const c10d::BarrierOptions& opts, bool wait_all_ranks) override;

 private:
  struct Plan;
  WorkPtr launch(Plan plan, c10d::OpType type, bool async, std::chrono::milliseconds timeout);
  WorkPtr collect(WorkPtr work);
  [[noreturn]] void refuse(const char* op, const std::string& text) const;
  const at::Tensor& checked(const char* op, const at::Tensor& tensor) const;
  const at::Tensor& only(const char* op, const Tensors& tensors) const;
  WorkPtr message(Tensors& tensors, int peer, int tag, bool is_send);

  const std::shared_ptr<Group> group_;
  const std::shared_ptr<cpu::Endpoint> endpoint_;  // for groups of fewer ranks
  const MakeGroup make_group_;
  bool coalescing_ = false;
  std::vector<WorkPtr> coalesced_;
};

}  // namespace pycomm::torch_layer
