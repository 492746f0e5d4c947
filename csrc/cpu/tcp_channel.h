// TcpChannel: one TCP connection to a rank of another host. It opens on first use (the lower rank
// connects) and proves both ends' identity before a byte is believed. On the wire: frames of a
// 16-byte header and up to 1 MiB of payload, so that word of a broken group gets through between
// two frames.
#pragma once

#include <memory>
#include <vector>

#include "cpu/channel.h"
#include "cpu/endpoint.h"
#include "cpu/segment.h"

namespace pycomm::cpu {

struct TcpPeer {
  uint64_t group = 0;  // what the connection is for
  int rank = 0;        // this rank in the group
  int peer = 0;        // the peer's
  std::string host;    // the peer's, for messages
  std::string address;
  int port = 0;
  Lane lane = kCollectiveLane;
};

class TcpChannel final : public Channel {
 public:
  TcpChannel(const TcpPeer& peer, Endpoint& endpoint) : peer_(peer), endpoint_(endpoint) {}
  size_t write(const void* data, size_t nbytes) override;
  std::span<const std::byte> readable(size_t at_least = 1) override;
  void consume(size_t nbytes) override;
  size_t read(void* data, size_t nbytes) override;
  void align_write() override {}
  void align_read() override {}
  void flush() override;
  bool flushed() const override { return out_.empty(); }
  void poison(const Status& why) override;
  int socket() const override;
  bool joined() const override { return state_ == State::open; }
  void probe() override;
  std::string describe() const override;

 private:
  enum class State { closed, connecting, greeting, open };
  struct FrameHeader {
    uint32_t magic;
    int32_t code;  // 0: payload; else a Status, its message the payload
    uint64_t nbytes;
  };
  static constexpr uint32_t kFrameMagic = 0x70636d66;
  static constexpr size_t kFrameBytes = size_t{1} << 20;
  static constexpr size_t kGatherBytes =
      4096;  // smaller pieces wait for flush() and leave in one system call
  static constexpr size_t kStagingBytes = size_t{256} << 10;

  bool open();
  bool send_out(const void* data, size_t nbytes,
                size_t* sent);  // what is gathered, then data; false when the socket is full
  void receive(void* data,
               size_t nbytes);  // into staging, or first into data (direct_ says how much)
  bool next_frame();            // parses a header from staging
  [[noreturn]] void lost(const std::string& how) const;

  const TcpPeer peer_;
  Endpoint& endpoint_;
  State state_ = State::closed;
  UniqueFd socket_;
  UniqueFd knock_;  // see probe()
  Greeting greeting_;
  Challenge challenge_;
  size_t handshake_bytes_ = 0;
  std::vector<std::byte> out_;  // gathered small pieces and frame headers, [out_begin_, end)
  size_t out_begin_ = 0;
  size_t frame_left_out_ = 0;  // payload bytes of the open outgoing frame still to come
  std::unique_ptr<std::byte[]> staging_;
  size_t in_begin_ = 0, in_end_ = 0;
  size_t frame_left_in_ = 0;  // payload bytes of the current incoming frame not yet handed out
  size_t direct_ = 0;
};

}  // namespace pycomm::cpu
