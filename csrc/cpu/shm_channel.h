// ShmChannel: two rings in the group's segment, one each way. A reader sees the bytes in place, so
// a reduction costs no extra copy.
#pragma once

#include "cpu/channel.h"
#include "cpu/endpoint.h"
#include "cpu/segment.h"

namespace pycomm::cpu {

class ShmChannel final : public Channel {
 public:
  // mine, theirs: indices in the segment. peer: the peer's rank in the endpoint, to ring.
  ShmChannel(const Segment& segment, int mine, int theirs, Lane lane, Endpoint& endpoint, int peer);
  size_t write(const void* data, size_t nbytes) override;
  std::span<const std::byte> readable(size_t at_least = 1) override;
  void consume(size_t nbytes) override;
  size_t read(void* data, size_t nbytes) override;
  void align_write() override;
  void align_read() override;
  void flush() override;
  // Small enough to stay in the second-level cache between a peer's write and our reduction, large
  // enough that the flags do not show.
  size_t segment_nbytes() const override { return 64 * 1024; }
  void poison(const Status&) override {}  // the segment's header carries it
  std::string describe() const override { return "shared memory"; }

 private:
  RingControl& out_control_;
  RingControl& in_control_;
  std::byte* const out_;
  const std::byte* const in_;
  const uint64_t size_;
  Endpoint& endpoint_;
  const int peer_;
  uint64_t out_tail_ = 0, out_head_ = 0;  // ours, and the peer's as last seen
  uint64_t in_tail_ = 0, in_head_ = 0;
  bool published_ = false;
};

}  // namespace pycomm::cpu
