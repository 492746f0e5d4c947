// DeviceSide: what PycommBackend needs for tensors on an accelerator: the group over the CUDA
// engine, the device's streams by torch's device-generic guard, and the engine's own stream as one
// of torch's, so that copies and futures can be put on it. No CUDA header: a CPU-only torch builds
// this.
//
// PYCOMM_TEST_DEVICE names a library whose device of host memory takes the place of CUDA's; CPU
// tensors are then its tensors (tests/cc/fake_nccl).
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <memory>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <vector>

#include "core/group.h"
#include "cuda/engine.h"

namespace pycomm::torch_layer {

// The device whose memory this is; that which is current for nullptr. Throws for the host's.
c10::Device device_of(const void* memory);
// torch's current stream there; nullptr, the default one, where torch knows no such devices.
void* current_stream_of(const c10::Device& device);

// pycomm/planning.py's DevicePlanning.
struct DevicePlanner {
  Planner planner;
  std::function<cuda::Between()> between;                    // what joins hosts
  uint64_t peer_nbytes = 0;                                  // EngineOptions'
  std::optional<int> max_ctas;                               // likewise
  std::function<void(const std::string& why)> through_host;  // NCCL does not: plan for that
  std::function<DevicePlanner(const std::vector<int>& ranks)> select;  // of some of the ranks
};

// A group of host memory of some ranks of a group; its name tells it from others. All of them call.
using MakePart =
    std::function<std::shared_ptr<Group>(const c10::intrusive_ptr<c10d::Store>&,
                                         const std::vector<int>& ranks, const std::string& name)>;

class DeviceSide {
 public:
  // What all devices of a backend have in common.
  struct Options {
    c10::intrusive_ptr<c10d::Store> store;  // the backend's own
    std::string nccl_wheel;                 // path of torch's libnccl.so.2, or empty
    std::vector<std::string> hosts;         // by rank
    DevicePlanner planner;
    MakePart part;  // of the ranks of this backend
  };

  // Whether tensors of this device are ours.
  static bool serves(const c10::Device& device);
  // Local: ranks meet in the first operation. host: the same ranks' group of host memory.
  static std::shared_ptr<DeviceSide> create(const Options& options, const c10::Device& device,
                                            const std::shared_ptr<Group>& host);
  // Ranks of this one, by NCCL's split; nullptr where this rank is not among them. All ranks call.
  std::shared_ptr<DeviceSide> split(const Options& options, const std::vector<int>& ranks,
                                    Group* like);

  Group& group() const { return *group_; }
  const c10::Device& device() const { return device_; }
  bool has_streams() const { return stream_.has_value(); }
  void* current_stream() const;  // the caller's; nullptr without streams
  void* own_stream() const;      // where asynchronous operations run
  // Runs task with the engine's stream as torch's current one.
  void on_own_stream(const std::function<void()>& task) const;
  void synchronise() const;  // waits for the caller's stream
  // CudaEngine::share(), within the group's timeout; the tensors on it are memory_device()'s.
  std::shared_ptr<cuda::SymmetricMemory> share(
      int64_t nbytes, const std::shared_ptr<cuda::SymmetricMemory>& instead, std::string* why);
  c10::Device memory_device() const { return on_host_ ? c10::Device(at::kCPU) : device_; }
  // Every operation of the device's group, on every rank, fails with `why`.
  void revoke(const Status& why);

 private:
  DeviceSide(const c10::Device& device, std::optional<c10::Stream> stream, bool on_host)
      : device_(device), stream_(stream), on_host_(on_host) {}
  static std::shared_ptr<DeviceSide> prepare(const Options& options, const c10::Device& device,
                                             cuda::EngineOptions* engine);
  void serve(std::shared_ptr<cuda::CudaEngine> engine, Group& like, const Planner& planner);

  const c10::Device device_;
  const std::optional<c10::Stream> stream_;
  const bool on_host_;            // a test's device, whose memory is the host's
  std::shared_ptr<Store> store_;  // the engine's
  std::shared_ptr<cuda::CudaEngine> engine_;
  std::shared_ptr<Group> group_;
};

}  // namespace pycomm::torch_layer
