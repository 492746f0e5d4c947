// core/group.h's Group as Python's pycomm.Group, and what an asynchronous call on it gives.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "core/group.h"
#include "torch/blocking.h"
#include "torch/device_side.h"
#include "torch/python.h"

namespace pycomm::torch_layer {

// A group of CPU memory and, from the first array on a device on, the same ranks' group there. Any
// thread may use it; copies are the same group.
class PyGroup {
 public:
  // devices: nullopt for a group whose arrays are always the host's.
  explicit PyGroup(std::shared_ptr<Group> group,
                   std::optional<DeviceSide::Options> devices = std::nullopt)
      : group_(std::move(group)), devices_(std::make_shared<Devices>(std::move(devices))) {}
  const std::shared_ptr<Group>& group() const { return group_; }
  PyGroup& operator*() { return *this; }  // what def_method() gives its functions
  // The group of memory on this device, and what it stands on. Throws where the group works on
  // another one.
  DeviceSide& side(const char* what, const c10::Device& device);
  Group& on(const char* what, const c10::Device& device) { return side(what, device).group(); }
  void set_timeout(Milliseconds timeout) const;
  void revoke(const Status& why) const;
  Stats stats() const;  // with the bytes of arrays on a device that went through the host
  void close() const;

 private:
  struct Devices {
    explicit Devices(std::optional<DeviceSide::Options> given) : options(std::move(given)) {}
    ~Devices() {  // the device's watch may want the GIL for the last arrays it holds
      std::optional<py::gil_scoped_release> release;
      if (side != nullptr && Py_IsInitialized() && PyGILState_Check()) release.emplace();
      side.reset();
    }
    const std::optional<DeviceSide::Options> options;
    std::mutex mutex;
    std::shared_ptr<DeviceSide> side;
  };
  const std::shared_ptr<Group> group_;
  const std::shared_ptr<Devices> devices_;
};

// One asynchronous call: one operation, or messages that started together.
class PyWork {
 public:
  using Works = std::vector<std::shared_ptr<Work>>;
  // stream: of arrays on a device, what waits for them; empty on the host.
  explicit PyWork(Works works, std::function<void*()> stream = {})
      : works_(std::move(works)), stream_(std::move(stream)) {}
  void wait(std::optional<double> timeout_s) {
    const auto limit = limit_of(timeout_s);
    Blocking blocking;
    wait_for(works_, stream_, limit);
  }
  bool is_completed() const {
    return std::all_of(works_.begin(), works_.end(), [](const auto& work) { return work->done(); });
  }
  double duration_s() const {
    double longest = 0;
    for (const auto& work : works_) longest = std::max(longest, work->duration_s());
    return longest;
  }
  int source() const { return works_.empty() ? -1 : works_.front()->source(); }

 private:
  const Works works_;
  const std::function<void*()> stream_;
};

// By its name in Python. Throws Error(invalid_argument) that lists them.
Wire parse_wire(const std::string& name);

// The collectives, messages and the barrier.
void def_methods(py::class_<PyGroup>& type);

}  // namespace pycomm::torch_layer
