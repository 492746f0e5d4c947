#include "cpu/shm_channel.h"

#include <algorithm>

#include "cpu/copy.h"

namespace pycomm::cpu {
namespace {
constexpr uint64_t kAlign = 64;
constexpr uint64_t align_up(uint64_t x) { return (x + kAlign - 1) & ~(kAlign - 1); }
}  // namespace

ShmChannel::ShmChannel(const Segment& segment, int mine, int theirs, Lane lane, Endpoint& endpoint,
                       int peer)
    : out_control_(segment.ring_control(mine, theirs, lane)),
      in_control_(segment.ring_control(theirs, mine, lane)),
      out_(segment.ring_data(mine, theirs, lane)),
      in_(segment.ring_data(theirs, mine, lane)),
      size_(segment.ring_bytes()),
      endpoint_(endpoint),
      peer_(peer) {}

size_t ShmChannel::write(const void* data, size_t nbytes) {
  const auto free = [&] { return size_ - std::min(size_, out_tail_ - out_head_); };
  if (free() < nbytes)
    out_head_ = out_control_.head.load(std::memory_order_acquire);  // what it frees has been read
  const size_t n = std::min<uint64_t>(nbytes, free());
  if (n == 0) return 0;
  const uint64_t at = out_tail_ % size_;
  const size_t first = std::min<uint64_t>(n, size_ - at);
  copy(out_ + at, data, first);
  copy(out_, static_cast<const std::byte*>(data) + first, n - first);
  out_tail_ += n;
  bytes_written_ += n;
  out_control_.tail.store(
      out_tail_, std::memory_order_release);  // publishes the bytes above; pairs with readable()
  published_ = true;
  return n;
}

std::span<const std::byte> ShmChannel::readable(size_t at_least) {
  if (in_tail_ < in_head_ + at_least) in_tail_ = in_control_.tail.load(std::memory_order_acquire);
  if (in_tail_ <= in_head_) return {};
  const uint64_t at = in_head_ % size_;
  return {in_ + at, static_cast<size_t>(std::min(in_tail_ - in_head_, size_ - at))};
}

void ShmChannel::consume(size_t nbytes) {
  in_head_ += nbytes;
  in_control_.head.store(
      in_head_, std::memory_order_release);  // our reads are done; pairs with the load in write()
  published_ = true;
}

size_t ShmChannel::read(void* data, size_t nbytes) {
  const auto here = readable();
  const size_t n = std::min(nbytes, here.size());
  if (n == 0) return 0;
  copy(data, here.data(), n);
  consume(n);
  return n;
}

void ShmChannel::align_write() {
  const uint64_t aligned = align_up(out_tail_);
  if (aligned == out_tail_) return;
  out_tail_ = aligned;
  out_control_.tail.store(out_tail_, std::memory_order_release);
}

void ShmChannel::align_read() {
  const uint64_t aligned = align_up(in_head_);
  if (aligned == in_head_) return;
  in_head_ = aligned;
  in_control_.head.store(in_head_, std::memory_order_release);
}

void ShmChannel::flush() {
  if (!published_) return;
  published_ = false;
  endpoint_.ring(peer_);
}

}  // namespace pycomm::cpu
