#include "torch/device_side.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include "torch/tensors.h"

namespace pycomm::torch_layer {
namespace {

const char* test_library() {
  static const char* const path = std::getenv("PYCOMM_TEST_DEVICE");
  return path;
}

std::shared_ptr<cuda::Device> test_device(const char* path, int rank) {
  void* library = ::dlopen(path, RTLD_NOW | RTLD_LOCAL);
  using Make = cuda::Device* (*)(const char* id);
  const auto make =
      library == nullptr ? nullptr : reinterpret_cast<Make>(::dlsym(library, "pycomm_test_device"));
  if (make == nullptr)
    throw Error(Code::invalid_argument,
                std::string("PYCOMM_TEST_DEVICE=") + path + ": " + ::dlerror());
  return std::shared_ptr<cuda::Device>(
      make((std::to_string(::getpid()) + "/" + std::to_string(rank)).c_str()));
}

std::shared_ptr<cuda::Device> open_device(const c10::Device& device, int rank) {
  if (const char* path = test_library()) return test_device(path, rank);
#ifdef PYCOMM_WITH_CUDA
  return cuda::cuda_device(device.index());
#else
  throw Error(Code::invalid_argument, "tensors on " + device.str() +
                                          ": this pycomm was built without CUDA; build it where "
                                          "nvcc is found (docs/install.md)");
#endif
}

std::shared_ptr<Store> store_of(const DeviceSide::Options& options) {
  return std::make_shared<TorchStore>(
      c10::make_intrusive<c10d::PrefixStore>("device", options.store));
}

}  // namespace

c10::Device device_of(const void* memory) {
  if (test_library() != nullptr) return {at::kCUDA, 0};
#ifdef PYCOMM_WITH_CUDA
  return {at::kCUDA, static_cast<c10::DeviceIndex>(cuda::device_index_of(memory))};
#else
  (void)memory;
  throw Error(Code::invalid_argument,
              "an array on a CUDA device: this pycomm was built without CUDA; build it where nvcc "
              "is found (docs/install.md)");
#endif
}

void* current_stream_of(const c10::Device& device) {
  if (test_library() != nullptr || !c10::impl::hasDeviceGuardImpl(device.type())) return nullptr;
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

bool DeviceSide::serves(const c10::Device& device) {
  return device.is_cuda() || (device.is_cpu() && test_library() != nullptr);
}

// What create() and split() do alike: opens NCCL and the device, takes a stream of torch's. What
// fails is told to ranks that wait for this one.
std::shared_ptr<DeviceSide> DeviceSide::prepare(const Options& options, const c10::Device& device,
                                                cuda::EngineOptions* engine) {
  engine->store = store_of(options);
  engine->between = options.planner.between();
  engine->peer_nbytes = options.planner.peer_nbytes;
  engine->max_ctas = options.planner.max_ctas;
  if (const Status status = cuda::NcclApi::open(options.nccl_wheel, &engine->api); !status.ok())
    engine->no_nccl = status.message;
  std::optional<c10::Stream> stream;
  try {
    engine->device = open_device(device, engine->rank);
    if (!engine->device->is_host_memory() && c10::impl::hasDeviceGuardImpl(device.type())) {
      stream = c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device, true);
      engine->stream = stream->native_handle();
    }
  } catch (const std::exception& error) {
    cuda::CudaEngine::tell(
        *engine->store,
        {Code::internal, "group '" + engine->name + "', rank " + std::to_string(engine->rank) +
                             " cannot use its device: " + error.what()});
    throw;
  }
  std::shared_ptr<DeviceSide> self(
      new DeviceSide(device, stream, engine->device->is_host_memory()));
  self->store_ = engine->store;
  engine->host_group = [part = options.part, store = options.store, name = engine->name](
                           const std::vector<int>& ranks, const std::string& suffix) {
    const std::string key = "host/" + suffix;
    return part(c10::make_intrusive<c10d::PrefixStore>(key, store), ranks, name + "/" + key);
  };
  engine->through_host = [weak = std::weak_ptr(self),
                          tell = options.planner.through_host](const std::string& why) {
    tell(why);
    if (const auto side = weak.lock()) side->group_->choose_anew();
  };
  return self;
}

void DeviceSide::serve(std::shared_ptr<cuda::CudaEngine> engine, Group& like,
                       const Planner& planner) {
  engine_ = std::move(engine);
  group_ = std::make_shared<Group>(like.name(), like.rank(), like.size(), engine_, planner,
                                   like.timeout());
}

std::shared_ptr<DeviceSide> DeviceSide::create(const Options& options, const c10::Device& device,
                                               const std::shared_ptr<Group>& host) {
  cuda::EngineOptions engine;
  engine.name = host->name();
  engine.rank = host->rank();
  engine.hosts = options.hosts;
  auto self = prepare(options, device, &engine);
  self->serve(cuda::CudaEngine::create(std::move(engine)), *host, options.planner.planner);
  return self;
}

std::shared_ptr<DeviceSide> DeviceSide::split(const Options& options, const std::vector<int>& ranks,
                                              Group* like) {
  const c10::DeviceGuard guard(device_);
  const auto deadline = Clock::now() + group_->timeout();
  if (!engine_->has_communicator()) return nullptr;  // the new group meets when it is used
  const auto hash = fnv1a(ranks.data(), ranks.size() * sizeof(int));
  const int color = like == nullptr ? cuda::kNcclNoColor : static_cast<int>(hash & 0x7fffffff);
  cuda::EngineOptions engine;
  if (like == nullptr) {
    (void)engine_->split(color, 0, ranks, std::move(engine), deadline);
    return nullptr;
  }
  engine.name = like->name();
  engine.rank = like->rank();
  auto self = prepare(options, device_, &engine);
  self->serve(engine_->split(color, like->rank(), ranks, std::move(engine), deadline), *like,
              options.planner.planner);
  return self;
}

void* DeviceSide::current_stream() const {
  if (!has_streams()) return nullptr;
  return current_stream_of(device_);
}

void* DeviceSide::own_stream() const { return has_streams() ? stream_->native_handle() : nullptr; }

void DeviceSide::on_own_stream(const std::function<void()>& task) const {
  if (!has_streams()) return task();
  const c10::StreamGuard guard(*stream_);
  task();
}

std::shared_ptr<cuda::SymmetricMemory> DeviceSide::share(
    int64_t nbytes, const std::shared_ptr<cuda::SymmetricMemory>& instead, std::string* why) {
  return engine_->share(nbytes, instead, Clock::now() + group_->timeout(), why);
}

void DeviceSide::revoke(const Status& why) {
  cuda::CudaEngine::tell(*store_, why);  // the engine tells failures alone
  engine_->revoke(why);
}

void DeviceSide::synchronise() const {
  if (!has_streams()) return;
  const c10::impl::VirtualGuardImpl guard(device_.type());
  guard.synchronizeStream(guard.getStream(device_));
}

}  // namespace pycomm::torch_layer
