#include "cuda/peers.h"

#include <algorithm>
#include <thread>

namespace pycomm::cuda {
namespace {

constexpr auto kLeave = std::chrono::seconds(2);
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

void Peers::make() {
  failed_ = static_cast<uint32_t*>(device_->allocate_pinned(sizeof(uint32_t)));
  *failed_ = 0;
  stream_ = device_->new_stream();
  last_ = device_->new_event();
}

std::unique_ptr<Peers> Peers::create(std::shared_ptr<Device> device, int rank, int size,
                                     int64_t capacity, const SymmetricMemory::Exchange& exchange,
                                     std::string* why) {
  std::unique_ptr<Peers> self(new Peers(device, rank, size, capacity));
  std::string lacks;
  try {
    self->make();
  } catch (const Error& error) {
    lacks = error.what();
  }
  self->memory_ = SymmetricMemory::create(std::move(device), rank, size,
                                          peer_buffer_nbytes(capacity), exchange, lacks, why);
  return self->memory_ == nullptr ? nullptr : std::move(self);
}

bool Peers::idle() {
  const auto until = Clock::now() + kLeave;
  while (launched_ && !device_->passed(last_)) {
    if (Clock::now() >= until) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return true;
}

bool Peers::leave() {
  if (!idle()) return false;
  memory_->leave();
  return true;
}

Peers::~Peers() {
  if (!idle()) {  // a stream will come to it yet: all it uses stays
    (void)memory_.release();
    return;
  }
  if (memory_ != nullptr) memory_->leave();
  if (last_ != nullptr) device_->free_event(last_);
  if (stream_ != nullptr) device_->free_stream(stream_);
  if (failed_ != nullptr) device_->release_pinned(failed_);
}

void Peers::run(const Launch& launch, uint32_t tag, Device::Stream stream) {
  PeerArguments args{};
  for (int of = 0; of < size_; ++of) args.buffers[of] = memory_->of(of);
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
  device_->peer_all_reduce(args, launch.fingerprint.dtype, two_shot, memory_->n_on_device(),
                           stream);
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
  auto* const control = reinterpret_cast<PeerControl*>(memory_->of(rank_));
  device_->write_value(stream_, &control->error, kPeerEnded);
  (void)idle();  // until nothing on the device uses callers' memory
}

}  // namespace pycomm::cuda
