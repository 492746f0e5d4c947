#include "cpu/tcp_channel.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>

namespace pycomm::cpu {

std::string TcpChannel::describe() const {
  return "host " + peer_.host + ", tcp " + peer_.address + ":" + std::to_string(peer_.port);
}

int TcpChannel::socket() const {
  if (socket_) return socket_.get();
  return peer_.rank > peer_.peer ? endpoint_.listener().socket() : -1;
}

// Until the lower rank connects, nothing shows whether it lives. Its listener does: when its
// process has ended nobody answers there.
void TcpChannel::probe() {
  if (state_ != State::closed || peer_.rank < peer_.peer) return;
  if (!knock_) knock_ = tcp_connect(peer_.address, peer_.port);
  pollfd entry{knock_.get(), POLLOUT, 0};
  if (::poll(&entry, 1, 0) <= 0) return;
  int error = 0;
  socklen_t length = sizeof(error);
  ::getsockopt(knock_.get(), SOL_SOCKET, SO_ERROR, &error, &length);
  knock_.reset();
  if (error == ECONNREFUSED)
    lost("nobody listens there any more");  // another error may be a firewall's
}

void TcpChannel::lost(const std::string& how) const {
  throw Error(Code::peer_lost, "rank " + std::to_string(peer_.rank) + " lost rank " +
                                   std::to_string(peer_.peer) + " (" + describe() + "): " + how +
                                   ". Its process ended or the network between broke.");
}

bool TcpChannel::open() {
  if (state_ == State::open) [[likely]]
    return true;
  if (peer_.rank > peer_.peer) {  // the lower rank connects
    auto taken = endpoint_.listener().take(peer_.group, peer_.peer, peer_.rank, peer_.lane);
    if (!taken) return false;
    socket_ = std::move(*taken);
    state_ = State::open;
  }
  if (state_ == State::closed) {
    socket_ = tcp_connect(peer_.address, peer_.port);
    state_ = State::connecting;
  }
  if (state_ == State::connecting || state_ == State::greeting) {
    pollfd entry{socket_.get(), static_cast<short>(state_ == State::connecting ? POLLOUT : POLLIN),
                 0};
    if (::poll(&entry, 1, 0) <= 0) return false;
    int error = 0;
    socklen_t length = sizeof(error);
    ::getsockopt(socket_.get(), SOL_SOCKET, SO_ERROR, &error, &length);
    if (error != 0) lost(std::string("connecting failed: ") + std::strerror(error));
  }
  // The challenge, then the welcome; both are tiny and come whole or in pieces.
  const auto receive_all = [&](void* data, size_t nbytes) {
    const auto n = ::recv(socket_.get(), static_cast<char*>(data) + handshake_bytes_,
                          nbytes - handshake_bytes_, 0);
    if (n == 0)
      lost(
          "it closed the connection during the handshake: it closed the group, or has another "
          "job's secret");
    if (n < 0 && errno != EAGAIN && errno != EINTR) lost(errno_text("handshake"));
    if (n > 0) handshake_bytes_ += static_cast<size_t>(n);
    return handshake_bytes_ == nbytes;
  };
  if (state_ == State::connecting) {
    if (!receive_all(&challenge_, sizeof(challenge_))) return false;
    if (challenge_.magic != Challenge{}.magic) lost("something else than pycomm answers there");
    greeting_ = Greeting{peer_.group, peer_.rank, peer_.peer, peer_.lane, 0, random_u64(), 0};
    greeting_.mac = greeting_mac(endpoint_.secret(), challenge_, greeting_);
    if (::send(socket_.get(), &greeting_, sizeof(greeting_), MSG_NOSIGNAL) !=
        static_cast<ssize_t>(sizeof(greeting_)))
      lost(errno_text("handshake"));
    handshake_bytes_ = 0;
    state_ = State::greeting;
  }
  if (state_ == State::greeting) {
    if (!receive_all(&challenge_.nonce, sizeof(challenge_.nonce))) return false;
    if (challenge_.nonce != welcome_mac(endpoint_.secret(), greeting_))
      lost("it does not know this job's secret");
    state_ = State::open;
  }
  staging_ = std::make_unique_for_overwrite<std::byte[]>(kStagingBytes);
  return true;
}

bool TcpChannel::send_out(const void* data, size_t nbytes, size_t* sent) {
  *sent = 0;
  iovec parts[2] = {{out_.data() + out_begin_, out_.size() - out_begin_},
                    {const_cast<void*>(data), nbytes}};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = nbytes > 0 ? 2 : 1;
  const auto n = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (n < 0) {
    if (errno == EAGAIN || errno == EINTR || errno == ENOBUFS) return false;
    // The peer's own account of what went wrong may be on its way in: it says more than EPIPE.
    const std::string how = errno_text("send");
    size_t before = 0;
    do {
      while (next_frame() && in_begin_ < in_end_)
        consume(std::min(frame_left_in_, in_end_ - in_begin_));
      before = in_end_ - in_begin_;
      receive(nullptr, 0);
    } while (in_end_ - in_begin_ > before);
    lost(how);
  }
  const size_t gathered = std::min(static_cast<size_t>(n), out_.size() - out_begin_);
  out_begin_ += gathered;
  *sent = static_cast<size_t>(n) - gathered;
  if (out_begin_ == out_.size()) {
    out_.clear();
    out_begin_ = 0;
  }
  return true;
}

size_t TcpChannel::write(const void* data, size_t nbytes) {
  if (!open() || nbytes == 0) return 0;
  if (frame_left_out_ == 0) {
    const FrameHeader header{kFrameMagic, 0, std::min(nbytes, kFrameBytes)};
    const auto* bytes = reinterpret_cast<const std::byte*>(&header);
    out_.insert(out_.end(), bytes, bytes + sizeof(header));
    frame_left_out_ = header.nbytes;
  }
  size_t n = std::min(nbytes, frame_left_out_);
  if (n <= kGatherBytes && out_.size() - out_begin_ < 4 * kGatherBytes) {
    const auto* bytes = static_cast<const std::byte*>(data);
    out_.insert(out_.end(), bytes, bytes + n);
  } else {
    send_out(data, n, &n);
  }
  frame_left_out_ -= n;
  bytes_written_ += n;
  return n;
}

void TcpChannel::flush() {
  size_t sent = 0;
  if (state_ == State::open && out_begin_ < out_.size()) send_out(nullptr, 0, &sent);
}

void TcpChannel::receive(void* data, size_t nbytes) {
  direct_ = 0;
  if (in_begin_ == in_end_) in_begin_ = in_end_ = 0;
  if (kStagingBytes - in_end_ < kStagingBytes / 4 && in_begin_ > 0) {
    std::memmove(staging_.get(), staging_.get() + in_begin_, in_end_ - in_begin_);
    in_end_ -= in_begin_;
    in_begin_ = 0;
  }
  iovec parts[2] = {{data, nbytes}, {staging_.get() + in_end_, kStagingBytes - in_end_}};
  const auto n =
      nbytes > 0 ? ::readv(socket_.get(), parts, 2) : ::readv(socket_.get(), parts + 1, 1);
  if (n == 0 && parts[1].iov_len > 0) lost("it closed the connection");
  if (n < 0) {
    if (errno == EAGAIN || errno == EINTR) return;
    lost(errno_text("receive"));
  }
  direct_ = std::min(static_cast<size_t>(n), nbytes);
  in_end_ += static_cast<size_t>(n) - direct_;
}

bool TcpChannel::next_frame() {
  while (frame_left_in_ == 0) {
    if (in_end_ - in_begin_ < sizeof(FrameHeader)) return false;
    FrameHeader header;
    std::memcpy(&header, staging_.get() + in_begin_, sizeof(header));
    if (header.magic != kFrameMagic || header.nbytes > kFrameBytes) lost("its bytes make no sense");
    if (header.code != 0) {
      if (header.nbytes > kStagingBytes / 2) lost("its bytes make no sense");
      if (in_end_ - in_begin_ < sizeof(header) + header.nbytes)
        return false;  // the text is on its way
      const auto* text = reinterpret_cast<const char*>(staging_.get() + in_begin_ + sizeof(header));
      throw Error(static_cast<Code>(header.code), std::string(text, header.nbytes));
    }
    in_begin_ += sizeof(header);
    frame_left_in_ = header.nbytes;
    if (in_begin_ % 16 !=
        0) {  // after an odd-sized frame: elements must lie aligned for the kernels
      std::memmove(staging_.get(), staging_.get() + in_begin_, in_end_ - in_begin_);
      in_end_ -= in_begin_;
      in_begin_ = 0;
    }
  }
  return true;
}

std::span<const std::byte> TcpChannel::readable(size_t at_least) {
  if (!open()) return {};
  if (!next_frame() || in_end_ - in_begin_ < std::min(at_least, frame_left_in_)) {
    receive(nullptr, 0);
    if (!next_frame()) return {};
  }
  return {staging_.get() + in_begin_, std::min(frame_left_in_, in_end_ - in_begin_)};
}

void TcpChannel::consume(size_t nbytes) {
  in_begin_ += nbytes;
  frame_left_in_ -= nbytes;
}

size_t TcpChannel::read(void* data, size_t nbytes) {
  if (!open()) return 0;
  if (in_begin_ == in_end_ &&
      frame_left_in_ > 0) {  // nothing staged: the frame's rest goes straight to where it belongs
    receive(data, std::min(nbytes, frame_left_in_));
    frame_left_in_ -= direct_;
    return direct_;
  }
  const auto here = readable();
  const size_t n = std::min(nbytes, here.size());
  if (n == 0) return 0;
  std::memcpy(data, here.data(), n);
  consume(n);
  return n;
}

void TcpChannel::poison(const Status& why) {
  if (state_ != State::open) return;
  if (frame_left_out_ >
      0) {  // mid-frame no word gets through: the peer sees the connection close instead
    ::shutdown(socket_.get(), SHUT_RDWR);
    return;
  }
  const FrameHeader header{kFrameMagic, static_cast<int32_t>(why.code), why.message.size()};
  const auto* bytes = reinterpret_cast<const std::byte*>(&header);
  const auto* text = reinterpret_cast<const std::byte*>(why.message.data());
  out_.insert(out_.end(), bytes, bytes + sizeof(header));
  out_.insert(out_.end(), text, text + why.message.size());
  iovec part{out_.data() + out_begin_, out_.size() - out_begin_};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  [[maybe_unused]] const auto n = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  out_.clear();
  out_begin_ = 0;
}

}  // namespace pycomm::cpu
