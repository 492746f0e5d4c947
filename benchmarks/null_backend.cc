// A c10d backend that does nothing: what is left of a call is torch's own part of it.
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace {

class DoneWork final : public c10d::Work {
 public:
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds) override { return true; }
  int sourceRank() const override { return 0; }
};

class NullBackend final : public c10d::Backend {
 public:
  using Backend::Backend;
  using Tensors = std::vector<at::Tensor>;
  using Splits = std::vector<int64_t>;
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  const std::string getBackendName() const override { return "null"; }

  WorkPtr broadcast(Tensors&, const c10d::BroadcastOptions& o) override { return end(o.asyncOp); }
  WorkPtr allreduce(Tensors&, const c10d::AllreduceOptions& o) override { return end(o.asyncOp); }
  WorkPtr _allgather_base(at::Tensor&, at::Tensor&, const c10d::AllgatherOptions& o) override {
    return end(o.asyncOp);
  }
  WorkPtr _reduce_scatter_base(at::Tensor&, at::Tensor&,
                               const c10d::ReduceScatterOptions& o) override {
    return end(o.asyncOp);
  }
  WorkPtr alltoall_base(at::Tensor&, at::Tensor&, Splits&, Splits&,
                        const c10d::AllToAllOptions& o) override {
    return end(o.asyncOp);
  }
  WorkPtr barrier(const c10d::BarrierOptions& o) override { return end(o.asyncOp); }
  WorkPtr send(Tensors&, int, int) override { return end(true); }
  WorkPtr recv(Tensors&, int, int) override { return end(true); }
  WorkPtr recvAnysource(Tensors&, int) override { return end(true); }

 private:
  // A blocking call may give no Work at all: torch takes that for "done".
  static WorkPtr end(bool async) {
    return async ? WorkPtr(c10::make_intrusive<DoneWork>()) : WorkPtr();
  }
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<NullBackend, c10d::Backend, c10::intrusive_ptr<NullBackend>>(m, "NullBackend")
      .def(py::init<int, int>());
}
