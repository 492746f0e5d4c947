#include "cuda/staged.h"

#include <algorithm>
#include <thread>

namespace pycomm::cuda {
namespace {

constexpr auto kPoll = std::chrono::microseconds(20);

std::chrono::milliseconds left_until(Clock::time_point deadline) {
  return std::max(std::chrono::milliseconds(1),
                  std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()));
}

uint64_t aligned(uint64_t nbytes) { return (nbytes + 63) / 64 * 64; }

// The launch as a call of the host's group, but for its memory.
Call call_of(const Launch& launch, int size) {
  const Fingerprint& print = launch.fingerprint;
  Call call;
  call.collective = print.collective;
  call.dtype = print.dtype;
  call.op = launch.op;
  call.root = print.root;
  call.wire = print.wire;
  const uint64_t element = size_of(print.dtype);
  call.numel = std::max(print.numel, std::max(launch.input_nbytes, launch.output_nbytes) / element);
  call.timeout = left_until(launch.deadline);
  if (!print.has_counts) return call;
  call.counts = launch.link_send_counts;
  call.recv_counts = launch.link_recv_counts;
  if (print.collective != Collective::all_to_all)
    for (int rank = 0; rank < size; ++rank)
      call.counts.push_back(launch.layout.nbytes(rank) / element);
  return call;
}

}  // namespace

// What has been done by the time it is made, but for the end of its stream.
class StagedWork final : public Work {
 public:
  StagedWork(std::shared_ptr<StagedEngine> engine, std::shared_ptr<void> memory,
             Clock::time_point since)
      : engine_(std::move(engine)),
        memory_(std::move(memory)),
        end_(engine_->device_->new_event()) {
    engine_->device_->record(end_, engine_->stream_);
    duration_ = std::chrono::duration<double>(Clock::now() - since).count();
  }
  ~StagedWork() override { engine_->device_->free_event(end_); }
  void wait(std::chrono::milliseconds timeout) override {
    const auto deadline = Clock::now() + timeout;
    InterruptCheck interrupted;
    while (!done()) {
      if (Clock::now() >= deadline)
        throw Error(Code::timeout,
                    "the device has not reached the end of an operation that is "
                    "done on the host; is its stream waiting for something?");
      interrupted(Clock::now());
      std::this_thread::sleep_for(kPoll);
    }
  }
  void order_before(void* stream) override {
    if (engine_->device_->is_host_memory() && stream == nullptr)
      return wait(std::chrono::hours(24 * 365));
    engine_->device_->wait(stream, end_);
  }
  bool done() const override { return engine_->device_->passed(end_); }
  Status status() const override { return {}; }
  double duration_s() const override { return duration_; }
  void on_done(std::function<void()> callback) override { callback(); }

 private:
  const std::shared_ptr<StagedEngine> engine_;
  const std::shared_ptr<void> memory_;
  const Device::Event end_;
  double duration_;
};

StagedEngine::StagedEngine(std::shared_ptr<Device> device, std::shared_ptr<Group> host,
                           void* stream)
    : device_(std::move(device)),
      host_(std::move(host)),
      makes_stream_(stream == nullptr),
      stream_(makes_stream_ ? device_->new_stream() : stream),
      reached_(device_->new_event()) {}

StagedEngine::~StagedEngine() {
  if (pinned_ != nullptr) device_->release_pinned(pinned_);
  device_->free_event(reached_);
  if (makes_stream_) device_->free_stream(stream_);
}

std::byte* StagedEngine::pinned(uint64_t nbytes) {
  if (nbytes > pinned_nbytes_) {
    const uint64_t larger = std::max(nbytes, 2 * pinned_nbytes_);
    if (pinned_ != nullptr) device_->release_pinned(pinned_);  // nothing is under way
    pinned_ = nullptr;
    pinned_nbytes_ = 0;
    pinned_ = static_cast<std::byte*>(device_->allocate_pinned(larger));
    pinned_nbytes_ = larger;
  }
  return pinned_;
}

// Until the device is where the stream is now.
void StagedEngine::wait(Device::Stream stream, Clock::time_point deadline) {
  device_->record(reached_, stream);
  InterruptCheck interrupted;
  while (!device_->passed(reached_)) {
    const auto now = Clock::now();
    if (now >= deadline)
      throw Error(Code::timeout, "group '" + host_->name() + "', rank " +
                                     std::to_string(host_->rank()) + ": " + device_->name() +
                                     " has not reached an operation that is staged through the "
                                     "host at its deadline");
    interrupted(now);
    std::this_thread::sleep_for(kPoll);
  }
}

// ---- collectives ----

void StagedEngine::stage(const Launch& launch, Device::Stream stream) {
  Call call = call_of(launch, host_->size());
  if (device_->capturing(stream))
    throw Error(Code::invalid_argument,
                "group '" + host_->name() + "': " + name_of(call.collective) +
                    " is staged through the host, which no graph can capture; see "
                    "PYCOMM_CUDA_BETWEEN_HOSTS in docs/cuda.md");
  const bool gives = launch.input != nullptr && launch.input_nbytes > 0;
  const bool gets = launch.output != nullptr && launch.output_nbytes > 0;
  const uint64_t in_nbytes = aligned(gives ? launch.input_nbytes : 0);
  const uint64_t out_nbytes = aligned(gets ? launch.output_nbytes : 0);
  const uint64_t lost_nbytes = launch.residual != nullptr ? call.numel * sizeof(float) : 0;
  std::byte* const in = pinned(in_nbytes + out_nbytes + lost_nbytes + 64);
  // A broadcast has one buffer, and whoever gives nothing to another collective still has one.
  std::byte* const out = call.collective == Collective::broadcast ? in : in + in_nbytes;
  if (gives) device_->copy(in, launch.input, launch.input_nbytes, stream);
  wait(stream, launch.deadline);
  call.input = launch.input != nullptr || call.collective == Collective::broadcast ? in : nullptr;
  call.output =
      launch.output != nullptr || call.collective == Collective::broadcast ? out : nullptr;
  if (launch.residual != nullptr)
    call.residual = reinterpret_cast<float*>(in + in_nbytes + out_nbytes);
  host_->run(call);
  if (gets) device_->copy(launch.output, out, launch.output_nbytes, stream);
  if (launch.residual != nullptr)
    device_->copy(launch.residual, call.residual, lost_nbytes, stream);
  wait(stream, launch.deadline);
  if (launch.finish) device_->in_order(stream, launch.finish);
}

void StagedEngine::run(Launch launch) {
  const std::lock_guard lock(mutex_);
  stage(launch, launch.stream);
}

std::shared_ptr<Work> StagedEngine::start(Launch launch, std::shared_ptr<void> keep_alive) {
  return start_together({std::move(launch)}, {}, std::move(keep_alive));
}

std::shared_ptr<Work> StagedEngine::start_together(std::vector<Launch> launches,
                                                   std::vector<Message> messages,
                                                   std::shared_ptr<void> keep_alive) {
  const auto since = Clock::now();
  const std::lock_guard lock(mutex_);
  const auto follow = [&](Device::Stream callers) {  // stream_ comes after what the caller's holds
    device_->record(reached_, callers);
    device_->wait(stream_, reached_);
  };
  for (const Launch& launch : launches) {
    follow(launch.stream);
    stage(launch, stream_);
  }
  if (!messages.empty()) {
    follow(messages[0].stream);
    exchange(messages, stream_);
  }
  return std::make_shared<StagedWork>(shared_from_this(), std::move(keep_alive), since);
}

// ---- messages ----

void StagedEngine::exchange(const std::vector<Message>& messages, Device::Stream stream) {
  uint64_t needed = 0;
  for (const Message& message : messages) needed += aligned(message.nbytes);
  std::byte* const memory = pinned(needed + 64);
  const auto each = [&](auto&& does) {
    std::byte* at = memory;
    for (const Message& message : messages) {
      does(message, at);
      at += aligned(message.nbytes);
    }
  };
  const auto deadline = messages[0].deadline;
  each([&](const Message& message, std::byte* at) {
    if (message.is_send && message.nbytes > 0)
      device_->copy(at, message.data, message.nbytes, stream);
  });
  wait(stream, deadline);
  std::vector<std::shared_ptr<Work>> works;
  each([&](const Message& message, std::byte* at) {
    const auto timeout = left_until(message.deadline);
    works.push_back(message.is_send
                        ? host_->send(at, message.nbytes, message.peer, 0, timeout, nullptr)
                        : host_->recv(at, message.nbytes, message.peer, 0, timeout, nullptr));
  });
  for (const auto& work : works) work->wait(std::chrono::hours(24 * 365));  // each has its deadline
  each([&](const Message& message, std::byte* at) {
    if (!message.is_send && message.nbytes > 0)
      device_->copy(message.data, at, message.nbytes, stream);
  });
  wait(stream, deadline);
}

std::shared_ptr<Work> StagedEngine::send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                                         Clock::time_point deadline,
                                         std::shared_ptr<void> keep_alive) {
  if (tag != 0) throw Error(Code::invalid_argument, "send: messages of devices have no tag");
  return start_together({}, {{true, const_cast<void*>(data), nbytes, peer, nullptr, deadline}},
                        std::move(keep_alive));
}

std::shared_ptr<Work> StagedEngine::recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                                         Clock::time_point deadline,
                                         std::shared_ptr<void> keep_alive) {
  if (tag != 0 || peer < 0)
    throw Error(Code::invalid_argument, "recv: messages of devices have a source and no tag");
  return start_together({}, {{false, data, nbytes, peer, nullptr, deadline}},
                        std::move(keep_alive));
}

void StagedEngine::run_send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                            Clock::time_point deadline) {
  send(data, nbytes, peer, tag, deadline, nullptr)->wait(left_until(deadline));
}

int StagedEngine::run_recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                           Clock::time_point deadline) {
  recv(data, nbytes, peer, tag, deadline, nullptr)->wait(left_until(deadline));
  return peer;
}

}  // namespace pycomm::cuda
