// What a call of kernels with tensors of a device needs: that device and its current stream,
// checks, pointers.
#pragma once

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <optional>
#include <string>
#include <vector>

#include "torch/arrays.h"
#include "torch/device_side.h"

namespace pycomm::torch_layer {

// The device of all, current while it lives where torch knows such devices, and its current stream.
class OnDevice {
 public:
  OnDevice(const char* what, const View& first, const std::vector<const View*>& others) {
    for (const View* each : others)
      if (each->device != first.device)
        refuse(what, "one tensor is on " + first.device.str() + ", another on " +
                         each->device.str() + "; all must be on one device");
    if (c10::impl::hasDeviceGuardImpl(first.device.type())) guard_.emplace(first.device);
    stream = current_stream_of(first.device);
  }
  void* stream;

 private:
  std::optional<c10::DeviceGuard> guard_;
};

inline void require(const char* what, const Status& status) {
  if (!status.ok())
    throw Error(status.code, std::string(what) + " on the device: " + status.message);
}

inline const int64_t* ints(const char* what, const View& view) {
  if (view.dtype != DType::int64)
    refuse(what, std::string("indices must be int64, not ") + name_of(view.dtype));
  return static_cast<const int64_t*>(view.data);
}

inline std::vector<const View*> pointers(const std::vector<View>& sources) {
  std::vector<const View*> found;
  for (const View& each : sources) found.push_back(&each);
  return found;
}

inline std::vector<const void*> data_of(const std::vector<View>& sources) {
  std::vector<const void*> found;
  for (const View& each : sources) found.push_back(each.data);
  return found;
}

}  // namespace pycomm::torch_layer
