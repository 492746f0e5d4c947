#include "cuda/courier.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

namespace pycomm::cuda {
namespace {

constexpr auto kGoOn = std::chrono::seconds(2);  // for streams, once they may
constexpr auto kPoll = std::chrono::microseconds(20);

uint64_t aligned(uint64_t nbytes) { return (nbytes + 63) / 64 * 64; }

uint64_t total(const std::vector<Courier::Piece>& pieces) {
  uint64_t nbytes = 0;
  for (const auto& piece : pieces) nbytes += piece.nbytes;
  return nbytes;
}

}  // namespace

Courier::Courier(std::shared_ptr<Device> device, std::function<void(const Status&)> failed)
    : device_(std::move(device)),
      failed_(std::move(failed)),
      done_(static_cast<uint32_t*>(device_->allocate_pinned(64))),
      stream_(device_->new_stream()),
      copied_(device_->new_event()) {
  *done_ = 0;
  thread_ = std::thread([this] { loop(); });
}

Courier::~Courier() {
  {
    const std::lock_guard lock(mutex_);
    closing_ = ended_ = true;
    release(n_put_);
    changed_.notify_all();
  }
  thread_.join();
  const auto until = std::chrono::steady_clock::now() + kGoOn;
  const std::lock_guard lock(mutex_);
  for (forget_waits(); !waits_.empty() && std::chrono::steady_clock::now() < until; forget_waits())
    std::this_thread::sleep_for(kPoll);
  device_->free_stream(stream_);
  for (const Numbered& numbered : jobs_) free_events_.push_back(numbered.begin);
  free_events_.push_back(copied_);
  for (const auto event : free_events_) device_->free_event(event);
  if (pinned_ != nullptr) device_->release_pinned(pinned_);
  // A stream that has not come so far will read it yet: then it stays.
  if (waits_.empty()) device_->release_pinned(done_);
}

void Courier::put(Job job, Device::Stream stream) {
  const std::lock_guard lock(mutex_);
  if (ended_) throw Error(Code::closed, "the way through the host has ended");
  forget_waits();
  const auto begin = event(), end = event();
  device_->record(begin, stream);
  device_->wait_value(stream, done_, n_put_ + 1);
  device_->record(end, stream);
  waits_.push_back(end);
  jobs_.push_back({std::move(job), ++n_put_, begin});
  changed_.notify_all();
}

Device::Event Courier::event() {
  if (free_events_.empty()) return device_->new_event();
  const auto event = free_events_.back();
  free_events_.pop_back();
  return event;
}

void Courier::forget_waits() {
  std::erase_if(waits_, [&](const Device::Event event) {
    if (!device_->passed(event)) return false;
    free_events_.push_back(event);
    return true;
  });
}

void Courier::release(uint32_t number) {
  std::atomic_ref(*done_).store(number, std::memory_order_release);
}

void Courier::end(std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  ended_ = true;
  release(n_put_);
  changed_.notify_all();
  if (!is_own_thread()) changed_.wait_for(lock, patience, [&] { return !busy_; });
}

void Courier::loop() {
  device_->adopt_thread();
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return closing_ || (!ended_ && !jobs_.empty()); });
    if (closing_) return;
    Numbered next = std::move(jobs_.front());
    jobs_.pop_front();
    busy_ = true;
    lock.unlock();
    Status status;
    try {
      run(next);
    } catch (const Error& error) {
      status = error.status();
    } catch (const std::exception& error) {
      status = {Code::internal, error.what()};
    }
    lock.lock();
    free_events_.push_back(next.begin);
    const bool tells = !status.ok() && !ended_;
    if (!status.ok()) ended_ = true;
    if (tells) {  // before the stream goes on with what is undefined now
      lock.unlock();
      failed_(status);
      lock.lock();
    }
    busy_ = false;
    release(ended_ ? n_put_ : next.number);
    changed_.notify_all();
  }
}

std::byte* Courier::pinned(uint64_t nbytes) {
  if (nbytes > pinned_nbytes_) {
    if (pinned_ != nullptr) device_->release_pinned(std::exchange(pinned_, nullptr));
    pinned_nbytes_ = 0;
    try {
      pinned_ = static_cast<std::byte*>(device_->allocate_pinned(nbytes));
    } catch (const Error& error) {
      throw Error(error.code(),
                  std::to_string((nbytes + 1023) >> 10) +
                      " KiB of pinned host memory to go through the host: " + error.what() +
                      "; free some, raise the limit on locked memory, or send less "
                      "at a time");
    }
    pinned_nbytes_ = nbytes;
  }
  return pinned_;
}

// Until the copies are done, which come after what the job's stream held.
void Courier::wait_for_copies() {
  device_->record(copied_, stream_);
  while (!device_->passed(copied_)) {
    {
      const std::lock_guard lock(mutex_);
      if (ended_) throw Error(Code::closed, "the way through the host has ended");
    }
    std::this_thread::sleep_for(kPoll);
  }
}

void Courier::run(const Numbered& numbered) {
  const Job& job = numbered.job;
  const uint64_t in_nbytes = aligned(total(job.in)), out_nbytes = aligned(total(job.out));
  const uint64_t shared = std::max(in_nbytes, out_nbytes);
  std::byte* const in =
      pinned((job.one_buffer ? shared : in_nbytes + out_nbytes) + job.lost.nbytes + 64);
  std::byte* const out = job.one_buffer ? in : in + in_nbytes;
  std::byte* const lost = job.one_buffer ? in + shared : out + out_nbytes;
  device_->wait(stream_, numbered.begin);
  std::byte* at = in;
  for (const Piece& piece : job.in) {
    if (piece.nbytes > 0) device_->copy(at, piece.data, piece.nbytes, stream_);
    at += piece.nbytes;
  }
  wait_for_copies();
  job.exchange(in, out, lost);
  at = out;
  for (const Piece& piece : job.out) {
    if (piece.nbytes > 0) device_->copy(piece.data, at, piece.nbytes, stream_);
    at += piece.nbytes;
  }
  if (job.lost.nbytes > 0) device_->copy(job.lost.data, lost, job.lost.nbytes, stream_);
  wait_for_copies();
}

}  // namespace pycomm::cuda
