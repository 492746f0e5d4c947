// PycommBackend: torch.distributed's backend "pycomm". It turns c10d's calls into core/group.h's
// and nothing more; a warm call does not enter Python. Tensors that are not contiguous, and lists
// of tensors that do not lie one after the other, go through one flat copy. A blocking call gives
// no c10d::Work at all, which torch takes for "done".
//
// One backend serves CPU tensors and those of one device (backend_device.cc): torch makes one
// object for "cpu:pycomm,cuda:pycomm". The group on the device is made when the first of its
// tensors comes.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "core/group.h"
#include "cpu/endpoint.h"
#include "torch/device_side.h"
#include "torch/work.h"

namespace pycomm::torch_layer {

struct Plan;  // a call, and the tensors whose memory it names: plan.h

// c10d's timeout, or none where the caller gave none.
inline std::optional<std::chrono::milliseconds> limit_of(std::chrono::milliseconds timeout) {
  return timeout == c10d::kUnsetTimeout ? std::nullopt : std::optional(timeout);
}

class PycommBackend final : public c10d::Backend {
 public:
  using BackendPtr = c10::intrusive_ptr<c10d::Backend>;
  using StorePtr = c10::intrusive_ptr<c10d::Store>;
  // What Python makes (pycomm/backend.py): the group of some ranks of this one, and a backend for
  // ranks of two jobs that meet in a store.
  struct Makers {
    MakePart split;
    std::function<BackendPtr(const StorePtr&, int rank, int size, const std::string& name,
                             double timeout_s)>
        merge;
  };
  PycommBackend(std::shared_ptr<Group> group, std::shared_ptr<cpu::Endpoint> endpoint,
                DeviceSide::Options device_options, Makers makers);
  ~PycommBackend() override;

  const std::shared_ptr<Group>& group() const { return group_; }
  const std::shared_ptr<cpu::Endpoint>& endpoint() const { return endpoint_; }
  const std::string getBackendName() const override { return "pycomm"; }
  bool supportsSplitting() const override { return true; }
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override;
  c10::intrusive_ptr<c10d::Work> endCoalescing() override;
  void setTimeout(std::chrono::milliseconds timeout) override;
  c10::intrusive_ptr<Options> getBackendOptions() override;
  BackendPtr split(const StorePtr& store, const std::vector<int>& ranks,
                   const c10::intrusive_ptr<Options>& opts) override;
  BackendPtr merge(const StorePtr& store, const c10::intrusive_ptr<Options>& opts, const int& rank,
                   const int& size) override;
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override;
  c10d::ErrorType getError() override;
  // Tensors that the other ranks of the host map, as pycomm.empty().
  bool supportsTensorAlloc(c10::DeviceIndex) override { return true; }
  at::Tensor allocateTensor(long numel, at::TensorOptions options) override;
  void abort() override;
  void shutdown() override;

  using Tensors = std::vector<at::Tensor>;
  using TensorLists = std::vector<std::vector<at::Tensor>>;
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& opts) override;
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& opts) override;
  // sum or average, in place, asynchronous: what a communication hook calls. residual: as
  // core/group.h's Call.
  WorkPtr all_reduce_wire(const at::Tensor& tensor, bool average, Wire wire,
                          const std::optional<at::Tensor>& residual);
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
  // How c10d knows a call, and what its caller asks beside the tensors.
  struct What {
    c10d::OpType type;
    const char* title;  // the profiler's
    bool async;
    std::chrono::milliseconds timeout;
  };
  WorkPtr launch(std::span<Plan> plans, const What& what, at::TensorList inputs,
                 at::TensorList results);
  WorkPtr launch(Plan plan, const What& what, at::TensorList inputs, at::TensorList results);
  c10::intrusive_ptr<BackendWork> begin(c10d::OpType type, const char* title,
                                        at::TensorList inputs) const;
  WorkPtr started(c10::intrusive_ptr<BackendWork> work, BackendWork::Works works, Tensors results);
  void plan_all_reduce(Plan& plan, at::TensorList tensors, const c10d::ReduceOp& op) const;
  void plan_all_gather(Plan& plan, const at::Tensor& output, const at::Tensor& input) const;
  void plan_reduce_scatter(Plan& plan, const at::Tensor& output, const at::Tensor& input,
                           const c10d::ReduceOp& op) const;
  WorkPtr all_reduce_sparse(const Tensors& tensors, const c10d::AllreduceOptions& opts);
  [[noreturn]] void refuse(const char* op, const std::string& text) const;
  const at::Tensor& checked(const char* op, const at::Tensor& tensor) const;
  const at::Tensor& only(const char* op, const Tensors& tensors) const;
  const Tensors& one_per_rank(const char* op, const char* what, const TensorLists& lists) const;
  WorkPtr message(Tensors& tensors, int peer, int tag, bool is_send);

  // torch asks the backend of each device type for a part of it, or a merger; one serves them all.
  bool made_already(const std::string& name, BackendPtr* made);
  BackendPtr remember(const std::string& name, BackendPtr made);

  // backend_device.cc
  std::shared_ptr<DeviceSide> device_side() const;  // nullptr before the first tensor on a device
  DeviceSide& device_side(const c10::Device& device);
  WorkPtr launch_on_device(std::span<Plan> plans, const What& what, at::TensorList inputs,
                           at::TensorList results);
  WorkPtr message_on_device(const at::Tensor& tensor, int peer, int tag, bool is_send);
  WorkPtr coalesced_on_device();

  const std::shared_ptr<Group> group_;
  const std::shared_ptr<cpu::Endpoint> endpoint_;  // for groups of fewer ranks
  const Makers makers_;
  const DeviceSide::Options device_options_;
  mutable std::mutex device_mutex_;
  std::shared_ptr<DeviceSide> device_side_;  // under device_mutex_
  const std::shared_ptr<FutureThreads> future_threads_ = std::make_shared<FutureThreads>();
  std::string last_made_name_;
  bool last_made_none_ = false;
  c10::weak_intrusive_ptr<c10d::Backend> last_made_{BackendPtr()};
  std::atomic<int64_t> n_sparse_{0};
  bool coalescing_ = false;
  BackendWork::Works coalesced_;
  Tensors coalesced_results_;
  // On the device, they start at endCoalescing().
  std::vector<Call> coalesced_calls_;
  std::vector<Message> coalesced_messages_;
  std::vector<std::shared_ptr<void>> coalesced_memory_;
};

}  // namespace pycomm::torch_layer
