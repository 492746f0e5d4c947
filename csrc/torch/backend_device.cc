// PycommBackend on tensors of a device, with torch's meaning of streams: an operation comes after
// what the caller's stream holds; a blocking call comes before what that stream is given next, and
// returns without waiting; an asynchronous one runs on a stream of its own, and Work.wait() makes
// the then current stream wait.
#include <c10/core/DeviceGuard.h>

#include "torch/backend.h"
#include "torch/blocking.h"
#include "torch/plan.h"

namespace pycomm::torch_layer {

std::shared_ptr<DeviceSide> PycommBackend::device_side() const {
  const std::lock_guard lock(device_mutex_);
  return device_side_;
}

DeviceSide& PycommBackend::device_side(const c10::Device& device) {
  const std::lock_guard lock(device_mutex_);
  if (device_side_ == nullptr) device_side_ = DeviceSide::create(device_options_, device, group_);
  if (device_side_->device() != device)
    refuse("a call", "the tensor is on " + device.str() + ", this group works on " +
                         device_side_->device().str() +
                         ", where its first tensor was; a rank has one device, call "
                         "torch.cuda.set_device() before tensors are made");
  return *device_side_;
}

PycommBackend::WorkPtr PycommBackend::launch_on_device(std::span<Plan> plans, const What& what,
                                                       at::TensorList inputs,
                                                       at::TensorList results) {
  DeviceSide& side = device_side(plans[0].device);
  for (const Plan& plan : plans)
    if (plan.device != plans[0].device)
      refuse(what.title, "one tensor is on " + plans[0].device.str() + ", another on " +
                             plan.device.str() + "; all tensors of a call must be on one device");
  const c10::DeviceGuard guard(side.device());
  const bool async = what.async || coalescing_;
  auto work = begin(what.type, what.title, inputs);
  work->set_side(device_side());
  for (Plan& plan : plans) {
    plan.call.stream = side.current_stream();
    if (async && plan.call.finish)
      plan.call.finish = [finish = std::move(plan.call.finish), &side] {
        side.on_own_stream(finish);  // which is there: the engine ends only after the operation
      };
  }
  if (coalescing_) {
    for (Plan& plan : plans) {
      coalesced_calls_.push_back(plan.call);
      coalesced_memory_.push_back(std::make_shared<Plan>(std::move(plan)));
    }
    coalesced_results_.insert(coalesced_results_.end(), results.begin(), results.end());
    work->set({}, results.vec());
    return work;
  }
  const InterruptScope interruptible(check_signals, is_only_thread);
  if (!async && plans.size() == 1) {
    side.group().run(plans[0].call);
    work->end_event();
    return {};
  }
  // The plans hold all memory, also that of copies which only finish() knows.
  BackendWork::Works works;
  if (plans.size() == 1) {
    const auto plan = std::make_shared<Plan>(std::move(plans[0]));
    works.push_back(side.group().start(plan->call, plan));
  } else if (!plans.empty()) {
    const auto held = std::make_shared<std::vector<Plan>>();
    std::vector<Call> calls;
    for (Plan& plan : plans) calls.push_back(held->emplace_back(std::move(plan)).call);
    works.push_back(side.group().start_together(calls, {}, limit_of(what.timeout), held));
  }
  work->set(std::move(works), results.vec());
  if (async) return work;
  work->wait(kNoTimeout);
  return {};
}

PycommBackend::WorkPtr PycommBackend::message_on_device(const at::Tensor& tensor, int peer, int tag,
                                                        bool is_send) {
  const char* const op = is_send ? "send" : "recv";
  if (!is_send && peer < 0)
    refuse(op, "from any rank on " + tensor.device().str() +
                   ": NCCL must know who sends; name the source");
  if (tag != 0)
    refuse(op, "tag " + std::to_string(tag) + " on " + tensor.device().str() +
                   ": NCCL's messages have no tag, they come in the order in which they are sent");
  DeviceSide& side = device_side(tensor.device());
  const c10::DeviceGuard guard(side.device());
  auto work = begin(is_send ? c10d::OpType::SEND : c10d::OpType::RECV,
                    is_send ? "pycomm:send" : "pycomm:recv", {tensor});
  work->set_side(device_side());
  Message message{is_send, tensor.data_ptr(),     static_cast<uint64_t>(tensor.nbytes()),
                  peer,    side.current_stream(), {}};
  auto held = std::make_shared<at::Tensor>(tensor);
  if (coalescing_) {
    coalesced_messages_.push_back(message);
    coalesced_memory_.push_back(std::move(held));
    coalesced_results_.push_back(tensor);
    work->set({}, {tensor});
    return work;
  }
  message.alone = true;
  const InterruptScope interruptible(check_signals, is_only_thread);
  work->set({side.group().start_together({}, {message}, std::nullopt, std::move(held))}, {tensor});
  return work;
}

PycommBackend::WorkPtr PycommBackend::coalesced_on_device() {
  const auto side = device_side();
  const c10::DeviceGuard guard(side->device());
  auto work = begin(c10d::OpType::COALESCED, nullptr, {});
  work->set_side(side);
  auto memory = std::make_shared<decltype(coalesced_memory_)>(std::exchange(coalesced_memory_, {}));
  const auto calls = std::exchange(coalesced_calls_, {});
  auto messages = std::exchange(coalesced_messages_, {});
  auto results = std::exchange(coalesced_results_, {});
  BackendWork::Works works = std::exchange(coalesced_, {});  // of CPU tensors among them
  const InterruptScope interruptible(check_signals, is_only_thread);
  works.push_back(
      side->group().start_together(calls, std::move(messages), std::nullopt, std::move(memory)));
  work->set(std::move(works), std::move(results));
  return work;
}

}  // namespace pycomm::torch_layer
