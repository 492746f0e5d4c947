// CudaWork: a started operation of a CudaEngine, as its caller holds it.
#pragma once

#include "cuda/engine.h"

namespace pycomm::cuda {

constexpr auto kForever = std::chrono::milliseconds(std::chrono::hours(24 * 365));

class CudaWork final : public Work {
 public:
  CudaWork(std::shared_ptr<CudaEngine> engine, std::shared_ptr<Operation> operation)
      : engine_(std::move(engine)), operation_(std::move(operation)) {}
  void wait(std::chrono::milliseconds timeout) override {
    engine_->watch_->wait(operation_, timeout);
  }
  void order_before(void* stream) override {
    if (operation_->done) {
      if (const Status found = status(); !found.ok()) throw Error(found);
    }
    if (engine_->device_.is_host_memory() && stream == nullptr) return wait(kForever);
    if (operation_->on_own_stream) engine_->device_.wait(stream, operation_->end);
    if (stream != engine_->stream_) engine_->watch_->let_go(operation_);
  }
  bool done() const override { return operation_->done; }
  Status status() const override { return engine_->watch_->status(*operation_); }
  double duration_s() const override { return engine_->watch_->duration_s(*operation_); }
  int source() const override { return operation_->peer; }
  void on_done(std::function<void()> callback) override {
    engine_->watch_->on_done(operation_, std::move(callback));
  }

 private:
  const std::shared_ptr<CudaEngine> engine_;
  const std::shared_ptr<Operation> operation_;
};

}  // namespace pycomm::cuda
