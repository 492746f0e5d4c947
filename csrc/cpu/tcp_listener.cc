#include "cpu/tcp_listener.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/random.h>
#include <sys/socket.h>

namespace pycomm::cpu {
namespace {

struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;
};

Address parse(const std::string& address, int port) {
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (::getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found) != 0 ||
      found == nullptr)
    throw Error(Code::invalid_argument,
                "'" + address +
                    "' is not a numeric IP address; set PYCOMM_ADDRESS to one of this "
                    "host's that the other hosts reach");
  Address result;
  result.length = found->ai_addrlen;
  std::memcpy(&result.storage, found->ai_addr, found->ai_addrlen);
  ::freeaddrinfo(found);
  return result;
}

}  // namespace

uint64_t random_u64() {
  uint64_t value = 0;
  if (::getrandom(&value, sizeof(value), 0) != static_cast<ssize_t>(sizeof(value)))
    throw_errno(Code::internal, "getrandom");
  return value;
}

uint64_t greeting_mac(const Secret& secret, const Challenge& challenge, const Greeting& greeting) {
  struct {
    Challenge challenge;
    Greeting greeting;
  } text{challenge, greeting};
  text.greeting.mac = 0;
  return siphash(secret, &text, sizeof(text));
}

uint64_t welcome_mac(const Secret& secret, const Greeting& greeting) {
  const uint64_t text[2] = {greeting.nonce, ~greeting.mac};
  return siphash(secret, text, sizeof(text));
}

void set_tcp_options(int socket) {
  const int one = 1;
  ::setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
}

UniqueFd tcp_connect(const std::string& address, int port) {
  const Address to = parse(address, port);
  UniqueFd socket(::socket(to.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket)
    throw_errno(Code::internal, "tcp socket (is the limit on open files reached? see ulimit -n)");
  set_tcp_options(socket.get());
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&to.storage), to.length) != 0 &&
      errno != EINPROGRESS)
    throw_errno(Code::peer_lost, "connecting to " + address + ":" + std::to_string(port));
  return socket;
}

TcpListener::TcpListener(const std::string& address) {
  Address at = parse(address, 0);
  fd_ = UniqueFd(::socket(at.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd_) throw_errno(Code::internal, "tcp socket");
  if (::bind(fd_.get(), reinterpret_cast<sockaddr*>(&at.storage), at.length) != 0)
    throw_errno(Code::invalid_argument,
                "cannot listen on " + address + " (set PYCOMM_ADDRESS to an address of this host)");
  if (::listen(fd_.get(), 1024) != 0) throw_errno(Code::internal, "listen");
  ::getsockname(fd_.get(), reinterpret_cast<sockaddr*>(&at.storage), &at.length);
  port_ =
      ntohs(at.storage.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(at.storage).sin6_port
                                             : reinterpret_cast<sockaddr_in&>(at.storage).sin_port);
}

void TcpListener::accept_all() {
  for (;;) {
    UniqueFd socket(::accept4(fd_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!socket) return;
    set_tcp_options(socket.get());
    Pending pending;
    pending.socket = std::move(socket);
    pending.challenge.nonce = random_u64();
    pending_.push_back(std::move(pending));
  }
}

bool TcpListener::advance(Pending& pending) {
  const int fd = pending.socket.get();
  if (pending.sent < sizeof(Challenge)) {
    const auto n = ::send(fd, reinterpret_cast<const char*>(&pending.challenge) + pending.sent,
                          sizeof(Challenge) - pending.sent, MSG_NOSIGNAL);
    if (n < 0) return errno != EAGAIN;
    pending.sent += static_cast<size_t>(n);
    if (pending.sent < sizeof(Challenge)) return false;
  }
  const auto n = ::recv(fd, reinterpret_cast<char*>(&pending.greeting) + pending.received,
                        sizeof(Greeting) - pending.received, 0);
  if (n == 0) return true;
  if (n < 0) return errno != EAGAIN && errno != EINTR;
  pending.received += static_cast<size_t>(n);
  if (pending.received < sizeof(Greeting)) return false;
  const Greeting& greeting = pending.greeting;
  if (greeting.mac != greeting_mac(secret_, pending.challenge, greeting))
    return true;  // a stranger: dropped unanswered
  if (refused_.contains(greeting.group)) return true;
  const uint64_t welcome = welcome_mac(secret_, greeting);
  if (::send(fd, &welcome, sizeof(welcome), MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof(welcome)))
    return true;
  ready_[{greeting.group, greeting.from, greeting.to, greeting.lane}] = std::move(pending.socket);
  return true;
}

void TcpListener::refuse(uint64_t group) {
  std::lock_guard lock(mutex_);
  refused_.insert(group);
  std::erase_if(ready_, [group](const auto& entry) { return std::get<0>(entry.first) == group; });
}

std::optional<UniqueFd> TcpListener::take(uint64_t group, int from, int to, int lane) {
  std::lock_guard lock(mutex_);
  accept_all();
  std::erase_if(pending_, [this](Pending& pending) { return advance(pending); });
  const auto found = ready_.find({group, from, to, lane});
  if (found == ready_.end()) return std::nullopt;
  UniqueFd socket = std::move(found->second);
  ready_.erase(found);
  return socket;
}

}  // namespace pycomm::cpu
