#include "cuda/engine.h"

#include <algorithm>
#include <thread>

#include "cuda/work.h"

namespace pycomm::cuda {
namespace {

constexpr auto kFinish = std::chrono::seconds(3);  // at the end, for what is still under way

std::string host_of(const EngineOptions& options, int rank) {
  return options.hosts[static_cast<size_t>(rank)];
}

std::string opening(const EngineOptions& options) {
  return "group '" + options.name + "', rank " + std::to_string(options.rank) + " of " +
         std::to_string(options.hosts.size()) + " (host " + host_of(options, options.rank) + ", " +
         options.device->name() + ")";
}

}  // namespace

CudaEngine::CudaEngine(EngineOptions options)
    : options_(std::move(options)),
      rank_(options_.rank),
      size_(static_cast<int>(options_.hosts.size())),
      spans_hosts_(std::any_of(options_.hosts.begin(), options_.hosts.end(),
                               [&](const auto& host) { return host != options_.hosts[0]; })),
      me_(opening(options_)),
      device_(*options_.device),
      makes_stream_(options_.stream == nullptr),
      through_host_(spans_hosts_ && options_.between == Between::tcp) {
  scratch_ = device_.allocate(sizeof(int64_t));  // what fails most likely first: nothing is lost
  stream_ = makes_stream_ ? device_.new_stream() : options_.stream;
  watch_ = std::make_unique<Watch>(
      options_.device,
      Watch::Owner{[this] { return look(); },
                   [this](const Operation& operation) { look_at_others(operation); },
                   [this](const Operation& operation) { return too_late(operation); },
                   [this](const Status& why) { end_all(why); }});
}

std::shared_ptr<CudaEngine> CudaEngine::create(EngineOptions options) {
  const auto store = options.store;
  const std::string who = opening(options);
  try {
    // Its last owner may be a callback on one of its threads, which cannot wait for its own end.
    return std::shared_ptr<CudaEngine>(new CudaEngine(std::move(options)), [](CudaEngine* engine) {
      if (engine->on_own_thread())
        std::thread([engine] { delete engine; }).detach();
      else
        delete engine;
    });
  } catch (const Error& error) {  // ranks that have an engine wait for this one
    const Status why{error.code(), who + ": no device memory to begin with: " + error.what()};
    tell(*store, why);
    throw Error(why);
  }
}

bool CudaEngine::on_own_thread() const {
  const auto all = couriers();
  return watch_->is_own_thread() || std::any_of(all.begin(), all.end(), [](const auto& courier) {
           return courier->is_own_thread();
         });
}

CudaEngine::~CudaEngine() {
  close();
  watch_->close(std::chrono::seconds(0));
  // Couriers go while there is a watch to tell, and nobody else holds one.
  for (const auto& courier : couriers()) courier->end(kFinish);
  courier_.reset();
  peers_.reset();
  for (auto& [peer, pair] : pairs_) pair.courier.reset();
  watch_.reset();
  for (const auto& [peer, pair] : pairs_) device_.free_stream(pair.stream);
  for (const auto& [partition, layer] : layers_) device_.free_stream(layer.stream);
  for (void* const memory : partials_) device_.release(memory);
  if (last_ != nullptr) device_.free_event(last_);
  if (makes_stream_) device_.free_stream(stream_);
  device_.release(scratch_);
}

// ---- submitting ----

void CudaEngine::run(Launch launch) {
  const bool on_host = device_.is_host_memory() && launch.stream == nullptr;
  if (on_host || launch.fingerprint.collective == Collective::barrier)
    return start(std::move(launch), nullptr)->wait(kForever);
  const std::lock_guard lock(mutex_);
  const auto operation = describe(launch);
  meet(launch.deadline);
  const Device::Stream stream = launch.stream;
  submit(
      operation, true, stream, stream, [&] { put(launch, operation, stream); },
      std::span(&launch, 1));
}

std::shared_ptr<Work> CudaEngine::start(Launch launch, std::shared_ptr<void> keep_alive) {
  const std::lock_guard lock(mutex_);
  const auto operation = describe(launch);
  operation->memory = std::move(keep_alive);
  meet(launch.deadline);
  submit(
      operation, true, stream_, launch.stream, [&] { put(launch, operation, stream_); },
      std::span(&launch, 1));
  return std::make_shared<CudaWork>(shared_from_this(), operation);
}

// One collective, in the way that is its. REQUIRES: the ranks have met.
void CudaEngine::put(const Launch& launch, const std::shared_ptr<Operation>& operation,
                     Device::Stream stream) {
  if (launch.program != nullptr && (courier_ == nullptr || goes_in_parts(launch)))
    run_program(launch, operation, stream);
  else if (courier_ != nullptr)
    carry(launch, operation->what, stream);
  else if (Peers* const peers = peers_for(launch, stream); peers != nullptr) {
    const auto verdict = [this, peers, what = operation->what] {
      Status status = peers->status();
      if (!status.ok()) status.message = me_ + ": " + what + ": " + status.message;
      return status;
    };
    if (const Status before = verdict(); !before.ok()) throw Error(before);
    operation->verdict = verdict;
    peers->run(launch, static_cast<uint32_t>(fnv1a(operation->what.data(), operation->what.size())),
               stream);
  } else
    communicator_->run([&] { return operation->what; }, look_for_word_now_and_then(),
                       operation->deadline,
                       [&](NcclComm* comm) { return enqueue(launch, comm, stream); });
}

std::shared_ptr<Work> CudaEngine::start_together(std::vector<Launch> launches,
                                                 std::vector<Message> messages,
                                                 std::shared_ptr<void> keep_alive) {
  if (messages.size() == 1 && messages[0].alone) return start_message(messages[0], keep_alive);
  const std::lock_guard lock(mutex_);
  require_sound();
  auto operation = std::make_shared<Operation>();
  operation->deadline = Clock::time_point::max();
  operation->sequence = sequence_;
  Device::Stream callers = nullptr;
  for (Launch& launch : launches) {
    const auto one = describe(launch);
    if (launch.program != nullptr)
      throw Error(Code::invalid_argument,
                  me_ + ": " + one->what + " is of several steps and starts alone");
    operation->what += (operation->what.empty() ? "" : ", ") + one->what;
    operation->deadline = std::min(operation->deadline, launch.deadline);
    callers = launch.stream;
  }
  for (const Message& message : messages) {
    operation->what += (operation->what.empty() ? "" : ", ") +
                       std::string(message.is_send ? "send to " : "recv from ") + who(message.peer);
    operation->deadline = std::min(operation->deadline, message.deadline);
    callers = message.stream;
  }
  // Messages count as none: not every rank need have any.
  operation->what = "together: " + operation->what;
  require_no_capture(operation->what, callers);
  operation->memory = std::move(keep_alive);
  meet(operation->deadline);
  const auto calls = [&](NcclComm* comm) {
    NcclResult result = NcclResult::success;
    const auto note = [&](NcclResult one) {
      if (one != NcclResult::success && one != NcclResult::in_progress) result = one;
    };
    for (const Launch& launch : launches) note(enqueue(launch, comm, stream_));
    for (const Message& message : messages)
      note(message.is_send ? options_.api->send(message.data, message.nbytes, NcclDType::uint8,
                                                message.peer, comm, stream_)
                           : options_.api->recv(message.data, message.nbytes, NcclDType::uint8,
                                                message.peer, comm, stream_));
    return result;
  };
  submit(
      operation, true, stream_, callers,
      [&] {
        if (courier_ == nullptr)
          return communicator_->run([&] { return operation->what; }, look_for_word_now_and_then(),
                                    operation->deadline, calls);
        for (const Launch& launch : launches) carry(launch, operation->what, stream_);
        if (!messages.empty()) carry(messages, operation->what, everyone_, *courier_, stream_);
      },
      launches);
  return std::make_shared<CudaWork>(shared_from_this(), operation);
}

// Puts what `enqueue` does on `stream`, behind what the caller's stream holds, and has the
// operation watched. What fails in it is told to all ranks: some may have begun their part.
void CudaEngine::submit(const std::shared_ptr<Operation>& operation, bool of_group,
                        Device::Stream stream, Device::Stream callers,
                        const std::function<void()>& enqueue, std::span<const Launch> launches) {
  // Again: the ranks may have met just now, and found that they go through the host.
  if (of_group) require_no_capture(operation->what, callers);
  bool captured = false;
  try {
    captured = device_.capturing(callers);
    operation->on_own_stream = stream != callers;
    operation->begin = watch_->event();
    operation->end = watch_->event();
    if (of_group && last_ == nullptr) last_ = watch_->event();
    if (stream != callers) {
      device_.record(operation->begin, callers);
      device_.wait(stream, operation->begin);
    }
    // NCCL wants one communicator's operations in one order, on whatever streams.
    if (of_group && has_last_ && last_stream_ != stream && !captured) device_.wait(stream, last_);
    device_.record(operation->begin, stream);
    for (const Launch& launch : launches)
      if (launch.residual != nullptr)
        device_.zero(launch.residual, launch.fingerprint.numel * sizeof(float), stream);
    enqueue();
    if (courier_ == nullptr)
      for (const Launch& launch : launches) copy_own(launch, stream);
    for (const Launch& launch : launches)
      if (launch.finish) device_.in_order(stream, launch.finish);
    device_.record(operation->end, stream);
  } catch (const Error& error) {
    // Part of it may be on its way on some ranks: nobody knows what the next would meet.
    const Status why{error.code(), named(error.what())};
    watch_->abandon(operation);
    watch_->fail(why);
    throw Error(why);
  }
  if (captured) {  // its events belong to the graph: nobody may ask for them
    watch_->abandon(operation);
    return;
  }
  if (of_group) {
    device_.record(last_, stream);
    last_stream_ = stream;
    has_last_ = true;
  }
  watch_->add(operation);
}

// ---- state, end ----

uint64_t CudaEngine::sequence() const {
  const std::lock_guard lock(mutex_);
  return sequence_;
}

bool CudaEngine::has_communicator() const {
  const std::lock_guard lock(mutex_);
  return communicator_ != nullptr;
}

Stats CudaEngine::stats() const {
  Stats all = watch_->stats();
  const std::lock_guard lock(communicators_mutex_);
  for (const auto& group : host_groups_) {
    const Stats one = group->engine().stats();
    all.bytes_inside_hosts += one.bytes_inside_hosts;
    all.bytes_between_hosts += one.bytes_between_hosts;
  }
  return all;
}

void CudaEngine::revoke(const Status& why) { watch_->fail(why); }

std::vector<std::shared_ptr<Courier>> CudaEngine::couriers() const {
  const std::lock_guard lock(communicators_mutex_);
  std::vector<std::shared_ptr<Courier>> all;
  if (courier_) all.push_back(courier_);
  for (const auto& [peer, pair] : pairs_)
    if (pair.courier) all.push_back(pair.courier);
  return all;
}

void CudaEngine::close() {
  if (closed_.exchange(true)) return;
  const bool sound = broken().ok();
  const bool ended = watch_->close(sound ? kFinish : std::chrono::seconds(0));
  const auto until = Clock::now() + kFinish;
  const std::lock_guard lock(mutex_);
  if (sound && ended) leave_shared();
  for (auto& [peer, pair] : pairs_)
    if (pair.communicator) pair.communicator->abort();
  for (auto& [partition, layer] : layers_)
    if (layer.communicator) layer.communicator->abort();
  if (inside_) inside_->abort();
  for (const auto& group : host_groups_) group->engine().close();
  for (const auto& courier : couriers()) courier->end(kFinish);
  if (communicator_ == nullptr) return;
  if (sound)
    communicator_->finish(until);
  else
    communicator_->abort();
}

}  // namespace pycomm::cuda
