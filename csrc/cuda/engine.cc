#include "cuda/engine.h"

#include <algorithm>
#include <thread>

#include "cuda/reduction.h"

namespace pycomm::cuda {
namespace {

constexpr auto kForever = std::chrono::milliseconds(std::chrono::hours(24 * 365));
constexpr auto kFinish = std::chrono::seconds(3);  // at the end, for what is still under way

std::string host_of(const EngineOptions& options, int rank) {
  return options.hosts[static_cast<size_t>(rank)];
}

std::string opening(const EngineOptions& options) {
  return "group '" + options.name + "', rank " + std::to_string(options.rank) + " of " +
         std::to_string(options.hosts.size()) + " (host " + host_of(options, options.rank) + ", " +
         options.device->name() + ")";
}

const std::byte* input_of(const Launch& launch) {
  return static_cast<const std::byte*>(launch.input);
}
std::byte* output_of(const Launch& launch) { return static_cast<std::byte*>(launch.output); }

bool even(const Launch& launch) { return !launch.fingerprint.has_counts; }

bool is_floating(DType dtype) {
  return dtype == DType::float16 || dtype == DType::bfloat16 || dtype == DType::float32 ||
         dtype == DType::float64 || dtype == DType::complex64 || dtype == DType::complex128;
}

bool goes_by_pieces(const Launch& launch) {
  const Collective collective = launch.fingerprint.collective;
  return collective == Collective::gather || collective == Collective::scatter ||
         collective == Collective::all_to_all || !even(launch);
}

}  // namespace

// An operation as its caller holds it.
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

CudaEngine::CudaEngine(EngineOptions options)
    : options_(std::move(options)),
      rank_(options_.rank),
      size_(static_cast<int>(options_.hosts.size())),
      spans_hosts_(std::any_of(options_.hosts.begin(), options_.hosts.end(),
                               [&](const auto& host) { return host != options_.hosts[0]; })),
      me_(opening(options_)),
      device_(*options_.device),
      makes_stream_(options_.stream == nullptr) {
  stream_ = makes_stream_ ? device_.new_stream() : options_.stream;
  scratch_ = device_.allocate(sizeof(int64_t));
  watch_ = std::make_unique<Watch>(
      options_.device,
      Watch::Owner{[this] { return look(); },
                   [this](const Operation& operation) { look_at_others(operation); },
                   [this](const Operation& operation) { return too_late(operation); },
                   [this](const Status& why) { end_all(why); }});
}

std::shared_ptr<CudaEngine> CudaEngine::create(EngineOptions options) {
  // Its last owner may be a callback on the watch's thread, which cannot wait for its own end.
  return std::shared_ptr<CudaEngine>(new CudaEngine(std::move(options)), [](CudaEngine* engine) {
    if (engine->watch_->is_own_thread())
      std::thread([engine] { delete engine; }).detach();
    else
      delete engine;
  });
}

CudaEngine::~CudaEngine() {
  close();
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
  Communicator& group = *communicator(launch.deadline);
  const Device::Stream stream = launch.stream;
  submit(
      operation, group, stream, stream,
      [&](NcclComm* comm) { return enqueue(launch, comm, stream); }, std::span(&launch, 1));
}

std::shared_ptr<Work> CudaEngine::start(Launch launch, std::shared_ptr<void> keep_alive) {
  const std::lock_guard lock(mutex_);
  const auto operation = describe(launch);
  operation->memory = std::move(keep_alive);
  Communicator& group = *communicator(launch.deadline);
  submit(
      operation, group, stream_, launch.stream,
      [&](NcclComm* comm) { return enqueue(launch, comm, stream_); }, std::span(&launch, 1));
  return std::make_shared<CudaWork>(shared_from_this(), operation);
}

std::shared_ptr<Work> CudaEngine::start_together(std::vector<Launch> launches,
                                                 std::vector<Message> messages,
                                                 std::shared_ptr<void> keep_alive) {
  if (launches.empty() && messages.size() == 1) return start_message(messages[0], keep_alive);
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
  if (launches.empty()) sequence_ += 1;  // messages that start together count as one
  operation->what = "together: " + operation->what;
  operation->memory = std::move(keep_alive);
  Communicator& group = *communicator(operation->deadline);
  submit(
      operation, group, stream_, callers,
      [&](NcclComm* comm) {
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
      },
      launches);
  return std::make_shared<CudaWork>(shared_from_this(), operation);
}

std::shared_ptr<Work> CudaEngine::start_message(const Message& message,
                                                std::shared_ptr<void> keep_alive) {
  const std::lock_guard lock(mutex_);
  require_sound();
  auto operation = std::make_shared<Operation>();
  operation->what = (message.is_send ? "send to " : "recv from ") + who(message.peer) + " (" +
                    std::to_string(message.nbytes) + " bytes, message #" +
                    std::to_string(n_messages_++) + ")";
  operation->peer = message.peer;
  operation->deadline = message.deadline;
  operation->memory = std::move(keep_alive);
  Pair& with = pair(message.peer, message.deadline);
  const int peer = message.peer < rank_ ? 0 : 1;
  submit(operation, *with.communicator, with.stream, message.stream,
         [&](NcclComm* comm) {
           return message.is_send ? options_.api->send(message.data, message.nbytes,
                                                       NcclDType::uint8, peer, comm, with.stream)
                                  : options_.api->recv(message.data, message.nbytes,
                                                       NcclDType::uint8, peer, comm, with.stream);
         },
         {});
  return std::make_shared<CudaWork>(shared_from_this(), operation);
}

// The operation of a launch that NCCL can do, with its number. Throws before anything is sent.
std::shared_ptr<Operation> CudaEngine::describe(const Launch& launch) {
  require_sound();
  const Fingerprint& print = launch.fingerprint;
  const auto refuse = [&](const std::string& text) {
    throw Error(Code::invalid_argument,
                me_ + ": " + std::string(name_of(print.collective)) + ": " + text);
  };
  if (launch.wire != Wire::none && (print.collective != Collective::all_reduce ||
                                    (launch.wire != Wire::fp8 && launch.wire != Wire::int8) ||
                                    (print.op != ReduceOp::sum && print.op != ReduceOp::avg)))
    refuse(std::string("wire '") + name_of(launch.wire) +
           "': on devices sum and avg of all_reduce have a wire, fp8 or int8");
  if (launch.program != nullptr && launch.program->calls.empty())
    refuse("algorithm '" + launch.program->algorithm +
           "' is one of the CPU engine's; leave the choice to NCCL");
  if (reduces(print.collective) && !reduction_of(print.dtype, print.op)) {
    const bool converts = size_of(print.dtype) == 2 || is_float8(print.dtype);
    refuse(std::string("NCCL has no ") + name_of(print.op) + " of " + name_of(print.dtype) +
           (converts && nccl_dtype(print.dtype) == std::nullopt
                ? "; convert it, to float32 or int32 for example"
                : "; use sum, avg, product, min or max"));
  }
  if (launch.program != nullptr && reduces(print.collective) && print.op == ReduceOp::avg &&
      !is_floating(print.dtype))
    refuse("the average of integers cannot be taken in two steps; use sum, or algorithm 'native'");
  auto operation = std::make_shared<Operation>();
  Fingerprint numbered = print;
  numbered.sequence = sequence_;
  operation->what = numbered.describe();
  operation->sequence = sequence_++;
  operation->deadline = launch.deadline;
  return operation;
}

// Puts the calls on `stream`, behind what the caller's stream holds, and has the operation watched.
void CudaEngine::submit(const std::shared_ptr<Operation>& operation, Communicator& communicator,
                        Device::Stream stream, Device::Stream callers,
                        const Communicator::Calls& calls, std::span<const Launch> launches) {
  const bool captured = device_.capturing(callers);
  operation->on_own_stream = stream != callers;
  operation->begin = watch_->event();
  operation->end = watch_->event();
  if (stream != callers) {
    device_.record(operation->begin, callers);
    device_.wait(stream, operation->begin);
  }
  // NCCL wants one communicator's operations in one order, on whatever streams.
  const bool of_group = &communicator == communicator_.get();
  if (of_group && has_last_ && last_stream_ != stream && !captured) device_.wait(stream, last_);
  device_.record(operation->begin, stream);
  try {
    if (launches.size() == 1 && launches[0].program != nullptr)
      run_program(launches[0], operation, stream);
    else
      communicator.run(operation->what, operation->deadline, calls);
  } catch (const Error& error) {
    // Part of it may be on its way on some ranks: nobody knows what the next would meet.
    watch_->abandon(operation);
    watch_->fail(error.status());
    throw;
  }
  for (const Launch& launch : launches) {
    copy_own(launch, stream);
    if (launch.finish) device_.in_order(stream, launch.finish);
  }
  device_.record(operation->end, stream);
  if (captured) {  // its events belong to the graph: nobody may ask for them
    watch_->abandon(operation);
    return;
  }
  if (of_group) {
    if (last_ == nullptr) last_ = watch_->event();
    device_.record(last_, stream);
    last_stream_ = stream;
    has_last_ = true;
  }
  watch_->add(operation);
}

// ---- one collective as NCCL's calls ----

NcclResult CudaEngine::enqueue(const Launch& launch, NcclComm* comm, Device::Stream stream) const {
  const NcclApi& api = *options_.api;
  const Fingerprint& print = launch.fingerprint;
  const auto reduction = reduction_of(print.dtype, print.op);
  const auto elements = [&](uint64_t nbytes) {
    return nbytes / size_of(print.dtype) * static_cast<uint64_t>(reduction->elements);
  };
  if (print.collective == Collective::barrier)
    return api.all_reduce(scratch_, scratch_, 1, NcclDType::int32, NcclOp::sum, comm, stream);
  if (print.numel == 0 && even(launch)) return NcclResult::success;
  if (goes_by_pieces(launch)) return enqueue_pieces(launch, comm, stream);
  switch (print.collective) {
    case Collective::all_reduce:
      return api.all_reduce(launch.input, launch.output, elements(launch.input_nbytes),
                            reduction->dtype, reduction->op, comm, stream);
    case Collective::reduce:
      return api.reduce(launch.input, launch.output, elements(launch.input_nbytes),
                        reduction->dtype, reduction->op, print.root, comm, stream);
    case Collective::broadcast:
      return api.broadcast(launch.input != nullptr ? launch.input : launch.output, launch.output,
                           launch.output_nbytes, NcclDType::uint8, print.root, comm, stream);
    case Collective::all_gather:
      return api.all_gather(launch.input, launch.output, launch.input_nbytes, NcclDType::uint8,
                            comm, stream);
    case Collective::reduce_scatter:
      return api.reduce_scatter(launch.input, launch.output, elements(launch.output_nbytes),
                                reduction->dtype, reduction->op, comm, stream);
    default:
      return NcclResult::success;  // the others go by pieces
  }
}

// Piece by piece: what NCCL has no call for, or none with uneven counts.
NcclResult CudaEngine::enqueue_pieces(const Launch& launch, NcclComm* comm,
                                      Device::Stream stream) const {
  const NcclApi& api = *options_.api;
  const Fingerprint& print = launch.fingerprint;
  const Layout& layout = launch.layout;
  NcclResult result = NcclResult::success;
  const auto note = [&](NcclResult one) {
    if (one != NcclResult::success && one != NcclResult::in_progress) result = one;
  };
  const auto send = [&](const void* data, uint64_t nbytes, int to) {
    if (nbytes > 0) note(api.send(data, nbytes, NcclDType::uint8, to, comm, stream));
  };
  const auto recv = [&](void* data, uint64_t nbytes, int from) {
    if (nbytes > 0) note(api.recv(data, nbytes, NcclDType::uint8, from, comm, stream));
  };
  const uint64_t mine =
      layout.nbytes(print.collective == Collective::all_to_all ? rank_ * size_ + rank_ : rank_);
  for (int peer = 0; peer < size_; ++peer) {
    switch (print.collective) {
      case Collective::all_gather:
        if (const uint64_t nbytes = layout.nbytes(peer); nbytes > 0) {
          std::byte* const place = output_of(launch) + layout.output_offset(peer);
          note(api.broadcast(peer == rank_ ? launch.input : place, place, nbytes, NcclDType::uint8,
                             peer, comm, stream));
        }
        break;
      case Collective::reduce_scatter:
        if (const uint64_t nbytes = layout.nbytes(peer); nbytes > 0) {
          const auto reduction = *reduction_of(print.dtype, print.op);
          note(api.reduce(input_of(launch) + layout.input_offset(peer),
                          peer == rank_ ? launch.output : nullptr,
                          nbytes / size_of(print.dtype) * static_cast<uint64_t>(reduction.elements),
                          reduction.dtype, reduction.op, peer, comm, stream));
        }
        break;
      case Collective::gather:
        if (peer == rank_) break;
        if (rank_ == print.root)
          recv(output_of(launch) + layout.output_offset(peer), layout.nbytes(peer), peer);
        else if (peer == print.root)
          send(launch.input, mine, peer);
        break;
      case Collective::scatter:
        if (peer == rank_) break;
        if (rank_ == print.root)
          send(input_of(launch) + layout.input_offset(peer), layout.nbytes(peer), peer);
        else if (peer == print.root)
          recv(launch.output, mine, peer);
        break;
      case Collective::all_to_all:
        if (peer == rank_) break;
        send(input_of(launch) + layout.input_offset(rank_ * size_ + peer),
             layout.nbytes(rank_ * size_ + peer), peer);
        recv(output_of(launch) + layout.output_offset(peer * size_ + rank_),
             layout.nbytes(peer * size_ + rank_), peer);
        break;
      default:
        break;
    }
  }
  return result;
}

// What a rank gives itself.
void CudaEngine::copy_own(const Launch& launch, Device::Stream stream) const {
  const Fingerprint& print = launch.fingerprint;
  const Layout& layout = launch.layout;
  const bool exchange = print.collective == Collective::all_to_all;
  if (!exchange && print.collective != Collective::gather &&
      print.collective != Collective::scatter)
    return;
  if (!exchange && print.root != rank_) return;
  if (print.numel == 0 && even(launch)) return;
  const int chunk = exchange ? rank_ * size_ + rank_ : rank_;
  const std::byte* const from = input_of(launch) + layout.input_offset(chunk);
  std::byte* const to = output_of(launch) + layout.output_offset(chunk);
  if (layout.nbytes(chunk) > 0 && from != to) device_.copy(to, from, layout.nbytes(chunk), stream);
}

// ---- messages, state, end ----

std::shared_ptr<Work> CudaEngine::send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                                       Clock::time_point deadline,
                                       std::shared_ptr<void> keep_alive) {
  if (tag != 0)
    throw Error(Code::invalid_argument, me_ + ": send: tag " + std::to_string(tag) +
                                            ": NCCL's messages have no tag, they come in order");
  return start_message({true, const_cast<void*>(data), nbytes, peer, nullptr, deadline},
                       std::move(keep_alive));
}

std::shared_ptr<Work> CudaEngine::recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                                       Clock::time_point deadline,
                                       std::shared_ptr<void> keep_alive) {
  if (tag != 0)
    throw Error(Code::invalid_argument, me_ + ": recv: tag " + std::to_string(tag) +
                                            ": NCCL's messages have no tag, they come in order");
  if (peer < 0)
    throw Error(Code::invalid_argument,
                me_ + ": recv from any rank: NCCL must know who sends; name the source");
  return start_message({false, data, nbytes, peer, nullptr, deadline}, std::move(keep_alive));
}

void CudaEngine::run_send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                          Clock::time_point deadline) {
  send(data, nbytes, peer, tag, deadline, nullptr)->wait(kForever);
}

int CudaEngine::run_recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                         Clock::time_point deadline) {
  recv(data, nbytes, peer, tag, deadline, nullptr)->wait(kForever);
  return peer;
}

uint64_t CudaEngine::sequence() const {
  const std::lock_guard lock(mutex_);
  return sequence_;
}

bool CudaEngine::has_communicator() const {
  const std::lock_guard lock(mutex_);
  return communicator_ != nullptr;
}

void CudaEngine::revoke(const Status& why) { watch_->fail(why); }

void CudaEngine::close() {
  if (closed_.exchange(true)) return;
  const bool sound = broken().ok();
  watch_->close(sound ? kFinish : std::chrono::seconds(0));
  const auto until = Clock::now() + kFinish;
  const std::lock_guard lock(mutex_);
  for (auto& [peer, pair] : pairs_) pair.communicator->abort();
  for (auto& [partition, layer] : layers_) layer.communicator->abort();
  if (communicator_ == nullptr) return;
  if (sound)
    communicator_->finish(until);
  else
    communicator_->abort();
}

}  // namespace pycomm::cuda
