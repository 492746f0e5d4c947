#include "cuda/peers.h"

#include <algorithm>
#include <thread>

namespace pycomm::cuda {
namespace {

constexpr auto kLeave = std::chrono::seconds(2);
constexpr int64_t kGranule = 2 << 20;  // of memory that other processes map: no one else's is in it
// What two shots save, (n - 2) / n of the tensor from each other rank, is worth their second wait
// from here on: 5 us at 300 GB/s. No GPU has confirmed it.
constexpr int64_t kTwoShotBytes = 1500 << 10;

}  // namespace

bool Peers::has(const Launch& launch) {
  const Fingerprint& print = launch.fingerprint;
  const bool dtype = print.dtype == DType::float32 || print.dtype == DType::float16 ||
                     print.dtype == DType::bfloat16;
  const bool op = print.op == ReduceOp::sum || print.op == ReduceOp::product ||
                  print.op == ReduceOp::min || print.op == ReduceOp::max;
  return print.collective == Collective::all_reduce && launch.program == nullptr && dtype && op &&
         print.wire == Wire::none && launch.input_nbytes > 0;
}

void Peers::make_buffer() {
  const int64_t nbytes = (peer_buffer_nbytes(capacity_) + kGranule - 1) / kGranule * kGranule;
  failed_ = static_cast<uint32_t*>(device_->allocate_pinned(sizeof(uint32_t)));
  *failed_ = 0;
  stream_ = device_->new_stream();
  last_ = device_->new_event();
  buffers_[static_cast<size_t>(rank_)] =
      static_cast<char*>(device_->allocate_shared(static_cast<size_t>(nbytes)));
  const auto zeroed = device_->new_event();
  device_->zero(buffers_[static_cast<size_t>(rank_)], static_cast<size_t>(nbytes), stream_);
  device_->record(zeroed, stream_);
  while (!device_->passed(zeroed)) std::this_thread::sleep_for(std::chrono::microseconds(50));
  device_->free_event(zeroed);
}

std::unique_ptr<Peers> Peers::create(std::shared_ptr<Device> device, int rank, int size,
                                     int64_t capacity, const Exchange& exchange, std::string* why) {
  std::unique_ptr<Peers> self(new Peers(std::move(device), rank, size, capacity));
  self->buffers_.resize(static_cast<size_t>(size), nullptr);
  // "!" and why not, or a device's id, a newline and the handle.
  const auto failure_in = [&](const std::vector<std::string>& told) {
    for (size_t of = 0; of < told.size(); ++of)
      if (told[of].starts_with('!')) {
        *why = "rank " + std::to_string(of) + ": " + told[of].substr(1);
        return true;
      }
    return false;
  };
  std::string mine;
  try {
    self->make_buffer();
    mine = self->device_->id() + "\n" +
           self->device_->handle_of(self->buffers_[static_cast<size_t>(rank)]);
  } catch (const Error& error) {
    mine = std::string("!") + error.what();
  }
  const auto told = exchange("buffer", mine);
  if (failure_in(told)) {
    self->releases_ = true;  // nobody has mapped it
    return nullptr;
  }
  mine.clear();
  self->n_on_device_ = 0;
  try {
    for (size_t of = 0; of < told.size(); ++of) {
      const size_t end = told[of].find('\n');
      self->n_on_device_ += told[of].substr(0, end) == self->device_->id();
      self->handles_.push_back(told[of].substr(end + 1));
      if (static_cast<int>(of) != rank)
        self->buffers_[of] = static_cast<char*>(self->device_->map_shared(self->handles_[of]));
    }
  } catch (const Error& error) {
    mine = std::string("!") + error.what();
  }
  return failure_in(exchange("mapped", mine)) ? nullptr : std::move(self);
}

bool Peers::idle() {
  const auto until = Clock::now() + kLeave;
  while (launched_ && !device_->passed(last_)) {
    if (Clock::now() >= until) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return true;
}

Peers::~Peers() {
  if (!idle()) return;  // a stream will come to it yet: all it uses stays
  for (size_t of = 0; of < handles_.size(); ++of)
    if (static_cast<int>(of) != rank_ && buffers_[of] != nullptr)
      device_->unmap_shared(buffers_[of], handles_[of]);
  // Else it stays to the end of the process: another rank may be reading it.
  if (releases_ && buffers_[static_cast<size_t>(rank_)] != nullptr)
    device_->release_shared(buffers_[static_cast<size_t>(rank_)]);
  if (last_ != nullptr) device_->free_event(last_);
  if (stream_ != nullptr) device_->free_stream(stream_);
  if (failed_ != nullptr) device_->release_pinned(failed_);
}

void Peers::run(const Launch& launch, uint32_t tag, Device::Stream stream) {
  PeerArguments args{};
  std::copy(buffers_.begin(), buffers_.end(), args.buffers);
  args.rank = rank_;
  args.n_ranks = size_;
  args.epoch = ++epoch_;
  args.tag = tag;
  args.capacity = capacity_;
  args.input = launch.input;
  args.output = launch.output;
  args.numel = static_cast<int64_t>(launch.input_nbytes / size_of(launch.fingerprint.dtype));
  args.op = launch.fingerprint.op;
  args.failed = failed_;
  // The engine's watch is to see the deadline first: it knows who is late.
  const auto left = launch.deadline - Clock::now() + std::chrono::seconds(5);
  args.timeout_ns = static_cast<uint64_t>(
      std::max<int64_t>(1, std::chrono::duration_cast<std::chrono::nanoseconds>(left).count()));
  const bool two_shot = (size_ - 2) * static_cast<int64_t>(launch.input_nbytes) >= kTwoShotBytes;
  device_->peer_all_reduce(args, launch.fingerprint.dtype, two_shot, n_on_device_, stream);
  device_->record(last_, stream);
  launched_ = true;
}

Status Peers::status() const {
  switch (std::atomic_ref(*failed_).load(std::memory_order_acquire)) {
    case 0:
      return {};
    case kPeerMismatch:
      return {Code::mismatch,
              "collective mismatch: ranks have called different all_reduces, or in another order; "
              "every rank must make the same calls in the same order"};
    default:
      return {Code::timeout, "a rank that shares its memory was not there at the deadline"};
  }
}

void Peers::end() {
  auto* const control = reinterpret_cast<PeerControl*>(buffers_[static_cast<size_t>(rank_)]);
  device_->write_value(stream_, &control->error, kPeerEnded);
  (void)idle();  // until nothing on the device uses callers' memory
}

}  // namespace pycomm::cuda
