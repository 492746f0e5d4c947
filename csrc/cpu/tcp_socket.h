// TcpSocket: one connection to a rank of another host: set up, proved at both ends, then bytes out
// and in through small buffers of its own. Never blocks, never throws for what the network does:
// problem() says what went wrong. Thread safety: none; the engine's lock guards it.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/engine.h"
#include "cpu/tcp_listener.h"

namespace pycomm::cpu {

class TcpSocket {
 public:
  // Connects. from: the address to leave by, or empty.
  TcpSocket(const SocketAddress& to, const std::string& from, const Greeting& greeting);
  // Takes a connection that the listener has proved.
  explicit TcpSocket(UniqueFd accepted);
  // One step of the handshake; true once it is done.
  bool advance(const Secret& secret);
  bool is_open() const { return state_ == State::open; }  // has been; see problem()
  // How long the other host's kernel has left the connection unanswered.
  Clock::duration unanswered() const;
  // Whether the other host has acknowledged nothing for a while of what was sent to it.
  bool silent() const;
  const std::string& problem() const { return problem_; }
  std::string describe() const;  // "10.0.0.1 to 10.0.0.2:4242"

  // What is gathered leaves with the next send(), before its data, in one system call.
  void gather(const void* data, size_t nbytes);
  size_t gathered() const { return out_.size() - out_begin_; }
  size_t send(const void* data, size_t nbytes);  // returns how much of data has left
  uint64_t bytes_sent() const { return bytes_sent_; }
  size_t queued() const;  // bytes that the other host has not acknowledged

  // What has arrived and lies in the staging buffer; the first element stands aligned.
  std::span<const std::byte> staged() const { return {staging_.get() + begin_, end_ - begin_}; }
  void unstage(size_t nbytes) { begin_ += nbytes; }
  void align_staged();
  // Receives into data, then up to `staged` more bytes into the staging buffer. Returns how much
  // went to data. REQUIRES: nothing staged where nbytes > 0.
  size_t receive(void* data, size_t nbytes, size_t staged = kStagingBytes);

  // To sleep on until it can go on: in reading where `reads`, in sending where it was refused.
  void add_wait(std::vector<pollfd>& entries, bool reads) const;
  void shut_down();

  static constexpr size_t kStagingBytes = size_t{256} << 10;

 private:
  enum class State { connecting, challenged, greeted, open };
  bool receive_all(void* data, size_t nbytes);
  void opened();
  void bound_buffer();
  void choose_congestion_control();
  void look_at_buffer();
  void fail(const std::string& what) { problem_ = what; }

  UniqueFd fd_;
  State state_;
  std::string problem_;
  std::string from_, to_;
  Greeting greeting_;
  Challenge challenge_;
  size_t handshake_bytes_ = 0;
  Clock::time_point since_{};
  std::vector<std::byte> out_;  // gathered, [out_begin_, end)
  size_t out_begin_ = 0;
  uint64_t bytes_sent_ = 0;
  bool full_ = false;           // the last send was refused some
  int buffer_ = 0;              // what the system's send buffer is bound to, 0: by nothing of ours
  uint64_t looked_bytes_ = 0;   // bytes_sent_ at the last look at it,
  Clock::time_point looked_{};  // and when that was
  std::unique_ptr<std::byte[]> staging_;
  size_t begin_ = 0, end_ = 0;
};

}  // namespace pycomm::cpu
