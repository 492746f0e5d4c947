#include "cpu/tcp_socket.h"

#include <linux/sockios.h>
#include <linux/tcp.h>  // of netinet/tcp.h's tcp_info min_rtt is missing
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <string_view>

#ifndef SO_BUF_LOCK
#define SO_BUF_LOCK 72  // Linux 5.14
#endif

namespace pycomm::cpu {
namespace {

constexpr uint32_t kSilentMs = 20'000;
// Of the system's send buffer; it doubles what it is given, for its own bookkeeping.
constexpr int kLeastBuffer = 128 << 10;
constexpr int kMostBuffer = 512 << 10;
constexpr uint64_t kLookAtBuffer = 1 << 20;  // bytes sent between two looks
constexpr uint32_t kLongPathUs = 1000;       // its round trip

uint32_t shortest_round_trip_us(int fd) {
  tcp_info info{};
  socklen_t length = sizeof(info);
  return ::getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) == 0 ? info.tcpi_min_rtt : 0;
}

}  // namespace

TcpSocket::TcpSocket(const SocketAddress& to, const std::string& from, const Greeting& greeting)
    : state_(State::connecting),
      from_(from),
      to_(to.text()),
      greeting_(greeting),
      since_(Clock::now()) {
  try {
    fd_ = tcp_connect(to, from);
    if (from_.empty()) from_ = own_address(fd_.get()).address;
  } catch (const Error& error) {
    if (error.code() != Code::peer_lost) throw;
    fail(error.what());
  }
}

TcpSocket::TcpSocket(UniqueFd accepted) : fd_(std::move(accepted)), state_(State::open) {
  from_ = own_address(fd_.get()).text();
  to_ = peer_address(fd_.get()).text();
  opened();
}

void TcpSocket::opened() {
  staging_ = std::make_unique_for_overwrite<std::byte[]>(kStagingBytes);
  state_ = State::open;
  bound_buffer();
  choose_congestion_control();
}

// bbr sends at the rate it has seen a flow reach, and probes for more a few round trips later. A
// rank's flow pauses for its neighbours' and shares a NIC with other ranks': it has seen too little
// most of the time, and in a ring everyone waits for the slowest. Over long paths, where losses are
// no sign of a full queue, bbr is why a system has it, and stays.
void TcpSocket::choose_congestion_control() {
  char now[16] = {};
  socklen_t length = sizeof(now);
  if (wanted_congestion_control() != nullptr || shortest_round_trip_us(fd_.get()) >= kLongPathUs ||
      ::getsockopt(fd_.get(), IPPROTO_TCP, TCP_CONGESTION, now, &length) != 0 ||
      !std::string_view(now, length).starts_with("bbr"))
    return;
  if (!set_congestion_control(fd_.get(), "cubic")) set_congestion_control(fd_.get(), "reno");
}

// What lies in the buffer stands in the NIC's queue sooner or later, before other groups' bytes and
// before the acknowledgements of what comes the other way. The system's own sizing goes to
// megabytes, which only long paths need; short ones need what a link carries while the rank waits
// for a core. A system that could not be given the buffer back keeps it.
void TcpSocket::bound_buffer() {
  int locks = 0;
  socklen_t length = sizeof(locks);
  if (shortest_round_trip_us(fd_.get()) >= kLongPathUs ||
      ::getsockopt(fd_.get(), SOL_SOCKET, SO_BUF_LOCK, &locks, &length) != 0)
    return;
  buffer_ = kLeastBuffer;
  ::setsockopt(fd_.get(), SOL_SOCKET, SO_SNDBUF, &buffer_, sizeof(buffer_));
}

// A path that carries half of it within its shortest round trip gets more, in the end what the
// system thinks right.
void TcpSocket::look_at_buffer() {
  const auto now = Clock::now();
  const auto nbytes = static_cast<double>(bytes_sent_ - looked_bytes_);
  const double round_trips = std::chrono::duration<double, std::micro>(now - looked_).count() /
                             shortest_round_trip_us(fd_.get());
  looked_ = now;
  looked_bytes_ = bytes_sent_;
  if (nbytes / round_trips < buffer_ / 2) return;
  buffer_ *= 2;
  if (buffer_ <= kMostBuffer) {
    ::setsockopt(fd_.get(), SOL_SOCKET, SO_SNDBUF, &buffer_, sizeof(buffer_));
  } else {
    buffer_ = 0;
    ::setsockopt(fd_.get(), SOL_SOCKET, SO_BUF_LOCK, &buffer_, sizeof(buffer_));
  }
}

std::string TcpSocket::describe() const { return from_ + " to " + to_; }

Clock::duration TcpSocket::unanswered() const {
  return state_ == State::connecting ? Clock::now() - since_ : Clock::duration(0);
}

bool TcpSocket::receive_all(void* data, size_t nbytes) {
  const auto n =
      ::recv(fd_.get(), static_cast<char*>(data) + handshake_bytes_, nbytes - handshake_bytes_, 0);
  if (n == 0)
    fail(
        "it closed the connection during the handshake: it closed the group, or has another job's "
        "secret");
  if (n < 0 && errno != EAGAIN && errno != EINTR) fail(errno_text("handshake"));
  if (n > 0) handshake_bytes_ += static_cast<size_t>(n);
  return handshake_bytes_ == nbytes;
}

bool TcpSocket::advance(const Secret& secret) {
  if (!problem_.empty()) return false;
  if (state_ == State::open) return true;
  pollfd entry{fd_.get(), static_cast<short>(state_ == State::connecting ? POLLOUT : POLLIN), 0};
  if (::poll(&entry, 1, 0) <= 0) return false;
  int error = 0;
  socklen_t length = sizeof(error);
  ::getsockopt(fd_.get(), SOL_SOCKET, SO_ERROR, &error, &length);
  if (error != 0) {
    fail(std::string("connecting failed: ") + std::strerror(error));
    return false;
  }
  if (state_ == State::connecting) state_ = State::challenged;
  // The challenge, then the welcome; both are tiny and come whole or in pieces.
  if (state_ == State::challenged) {
    if (!receive_all(&challenge_, sizeof(challenge_))) return false;
    if (challenge_.magic != Challenge{}.magic) {
      fail("something else than pycomm answers there");
      return false;
    }
    greeting_.nonce = random_u64();
    greeting_.mac = greeting_mac(secret, challenge_, greeting_);
    if (::send(fd_.get(), &greeting_, sizeof(greeting_), MSG_NOSIGNAL) !=
        static_cast<ssize_t>(sizeof(greeting_))) {
      fail(errno_text("handshake"));
      return false;
    }
    handshake_bytes_ = 0;
    state_ = State::greeted;
  }
  if (!receive_all(&challenge_.nonce, sizeof(challenge_.nonce))) return false;
  if (challenge_.nonce != welcome_mac(secret, greeting_)) {
    fail("it does not know this job's secret");
    return false;
  }
  opened();
  return true;
}

// Retransmitting, and nothing acknowledged: a live host answers even where its process does not
// read, with an acknowledgement of no room.
bool TcpSocket::silent() const {
  tcp_info info{};
  socklen_t length = sizeof(info);
  if (::getsockopt(fd_.get(), IPPROTO_TCP, TCP_INFO, &info, &length) != 0) return false;
  return info.tcpi_unacked > 0 && info.tcpi_retransmits > 0 && info.tcpi_last_ack_recv > kSilentMs;
}

void TcpSocket::gather(const void* data, size_t nbytes) {
  const auto* bytes = static_cast<const std::byte*>(data);
  out_.insert(out_.end(), bytes, bytes + nbytes);
}

size_t TcpSocket::send(const void* data, size_t nbytes) {
  iovec parts[2] = {{out_.data() + out_begin_, gathered()}, {const_cast<void*>(data), nbytes}};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = nbytes > 0 ? 2 : 1;
  const auto n = ::sendmsg(fd_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (n < 0) {
    full_ = errno == EAGAIN || errno == EINTR || errno == ENOBUFS;
    if (!full_) fail(errno_text("send"));
    return 0;
  }
  full_ = static_cast<size_t>(n) < gathered() + nbytes;
  bytes_sent_ += static_cast<size_t>(n);
  if (buffer_ > 0 && bytes_sent_ - looked_bytes_ >= kLookAtBuffer) look_at_buffer();
  const size_t before = std::min(static_cast<size_t>(n), gathered());
  out_begin_ += before;
  if (out_begin_ == out_.size()) {
    out_.clear();
    out_begin_ = 0;
  }
  return static_cast<size_t>(n) - before;
}

size_t TcpSocket::queued() const {
  int n = 0;
  return ::ioctl(fd_.get(), SIOCOUTQ, &n) == 0 ? static_cast<size_t>(n) + gathered() : gathered();
}

void TcpSocket::align_staged() {
  if (begin_ % 16 == 0) return;
  std::memmove(staging_.get(), staging_.get() + begin_, end_ - begin_);
  end_ -= begin_;
  begin_ = 0;
}

size_t TcpSocket::receive(void* data, size_t nbytes, size_t staged) {
  if (begin_ == end_) begin_ = end_ = 0;
  if (kStagingBytes - end_ < kStagingBytes / 4 && begin_ > 0) {
    std::memmove(staging_.get(), staging_.get() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  staged = std::min(staged, kStagingBytes - end_);
  if (nbytes + staged == 0) return 0;
  iovec parts[2] = {{data, nbytes}, {staging_.get() + end_, staged}};
  const auto n = nbytes > 0 ? ::readv(fd_.get(), parts, staged > 0 ? 2 : 1)
                            : ::recv(fd_.get(), staging_.get() + end_, staged, MSG_DONTWAIT);
  if (n == 0) fail("it closed the connection");
  if (n < 0 && errno != EAGAIN && errno != EINTR) fail(errno_text("receive"));
  if (n <= 0) return 0;
  const size_t direct = std::min(static_cast<size_t>(n), nbytes);
  end_ += static_cast<size_t>(n) - direct;
  return direct;
}

void TcpSocket::add_wait(std::vector<pollfd>& entries, bool reads) const {
  const bool writes = state_ == State::connecting || full_;
  const int events = (reads || state_ != State::open ? POLLIN : 0) | (writes ? POLLOUT : 0);
  if (events != 0 && problem_.empty())
    entries.push_back({fd_.get(), static_cast<short>(events), 0});
}

void TcpSocket::shut_down() { ::shutdown(fd_.get(), SHUT_RDWR); }

}  // namespace pycomm::cpu
