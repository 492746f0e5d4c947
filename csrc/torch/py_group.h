// core/group.h's Group as Python's pycomm.Group, and what an asynchronous call on it gives.
#pragma once

#include <memory>

#include "core/group.h"
#include "torch/blocking.h"
#include "torch/python.h"

namespace pycomm::torch_layer {

class PyGroup {
 public:
  explicit PyGroup(std::shared_ptr<Group> group) : group_(std::move(group)) {}
  const std::shared_ptr<Group>& group() const { return group_; }
  Group& operator*() const { return *group_; }

 private:
  const std::shared_ptr<Group> group_;
};

class PyWork {
 public:
  PyWork(std::shared_ptr<Work> work) : work_(std::move(work)) {}
  void wait(std::optional<double> timeout_s) {
    const auto limit = limit_of(timeout_s).value_or(Milliseconds(std::chrono::hours(24 * 365)));
    Blocking blocking;
    work_->wait(limit);
  }
  bool is_completed() const { return work_->done(); }
  double duration_s() const { return work_->duration_s(); }
  int source() const { return work_->source(); }

 private:
  const std::shared_ptr<Work> work_;
};

// By its name in Python. Throws Error(invalid_argument) that lists them.
Wire parse_wire(const std::string& name);

// The collectives, messages and the barrier.
void def_methods(py::class_<PyGroup>& type);

}  // namespace pycomm::torch_layer
