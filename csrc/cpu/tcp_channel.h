// TcpChannel: a FIFO of bytes to a rank of another host over one or more connections ("paths"): as
// many per pair of NICs as PYCOMM_SOCKETS says, NIC i of one host to NIC i of the other. They open
// on first use (the lower rank connects); the first that stands carries all there is, others join
// as they come, and one that cannot be opened is reported and left out. On the wire: frames of a
// 16-byte header and a payload, each on one path. A header also says which path the next frame
// takes, so that the receiver reads one socket at a time, in order: stripes are reassembled by
// reading them to where they belong, and what comes early waits in its socket. Between two frames
// word of a broken group gets through.
#pragma once

#include <memory>
#include <vector>

#include "cpu/channel.h"
#include "cpu/endpoint.h"
#include "cpu/segment.h"
#include "cpu/tcp_socket.h"

namespace pycomm::cpu {

struct TcpPeer {
  uint64_t group = 0;  // what the channel is for
  int rank = 0;        // this rank in the group
  int peer = 0;        // the peer's
  std::string host;    // the peer's, for messages
  std::vector<SocketAddress> addresses;
  Lane lane = kCollectiveLane;
};

class TcpChannel final : public Channel {
 public:
  TcpChannel(TcpPeer peer, Endpoint& endpoint) : peer_(std::move(peer)), endpoint_(endpoint) {}
  size_t write(const void* data, size_t nbytes) override;
  std::span<const std::byte> readable(size_t at_least = 1) override;
  void consume(size_t nbytes) override;
  size_t read(void* data, size_t nbytes) override;
  void align_write() override {}
  void align_read() override {}
  void flush() override;
  bool flushed() const override;
  void poison(const Status& why) override;
  bool can_say_why() const override { return out_ < 0 || frame_left_out_ == 0; }
  size_t segment_nbytes() const override { return kFrameBytes; }
  void add_waits(std::vector<pollfd>& entries) const override;
  bool joined() const override { return out_ >= 0; }
  void probe() override;
  std::string describe() const override;
  // By path: what this side has sent over it, headers included; 0 where it does not stand.
  std::vector<uint64_t> bytes_by_path() const;

 private:
  struct FrameHeader {
    uint16_t magic;
    uint8_t code;  // 0: payload; else a Status, its message the payload
    uint8_t next;  // path of the next frame
    uint32_t nbytes;
    uint64_t number;
  };
  static constexpr uint16_t kFrameMagic = 0x7066;
  static constexpr size_t kFrameBytes = size_t{1} << 20;
  static constexpr size_t kStripeBytes = size_t{128} << 10;  // a frame where there are more paths
  static constexpr size_t kGatherBytes =
      4096;  // smaller pieces wait for flush() and leave in one system call

  bool accepts() const { return peer_.rank > peer_.peer; }
  bool open();
  void connect_paths();
  void advance_paths();
  void give_up_paths();
  int least_queued(size_t more) const;
  size_t send(int path, const void* data, size_t nbytes);
  size_t receive(void* data, size_t nbytes, size_t staged);  // on the path the next bytes come by
  void receive_somewhere();                                  // before the first frame
  bool next_frame();                                         // parses a header from staging
  void hear_last_words();
  [[noreturn]] void lost(const std::string& path, const std::string& how) const;
  [[noreturn]] void lost(const TcpSocket& path) const { lost(path.describe(), path.problem()); }

  const TcpPeer peer_;
  Endpoint& endpoint_;
  std::vector<std::unique_ptr<TcpSocket>> paths_;  // none where one is still to come, or failed
  size_t n_pending_ = 1;        // paths that may still open: at first nobody knows how many
  Clock::time_point looked_{};  // at pending paths
  std::string problems_;        // of paths that failed
  UniqueFd knock_;              // see probe()
  int out_ = -1;                // path of the frame being written, or of the next
  int next_out_ = -1;
  size_t n_open_ = 0;
  size_t frame_left_out_ = 0;  // payload bytes of the open outgoing frame still to come
  uint64_t n_out_ = 0;         // frames begun
  int in_ = -1;                // path of the frame being read, or of the next; -1 before the first
  int next_in_ = -1;
  size_t frame_left_in_ = 0;  // payload bytes of the current incoming frame not yet handed out
  uint64_t n_in_ = 0;
};

}  // namespace pycomm::cpu
