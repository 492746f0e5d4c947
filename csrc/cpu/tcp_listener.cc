#include "cpu/tcp_listener.h"

#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/random.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>

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

SocketAddress unparse(const Address& address) {
  char host[NI_MAXHOST] = {}, port[NI_MAXSERV] = {};
  if (::getnameinfo(reinterpret_cast<const sockaddr*>(&address.storage), address.length, host,
                    sizeof(host), port, sizeof(port), NI_NUMERICHOST | NI_NUMERICSERV) != 0)
    return {"an unknown address", 0};
  return {host, std::atoi(port)};
}

// An interface's first address, IPv4 before IPv6; what is no interface's name, as it is.
std::string resolve(const std::string& name) {
  if (name.empty() || ::if_nametoindex(name.c_str()) == 0) return name;
  ifaddrs* all = nullptr;
  if (::getifaddrs(&all) != 0) throw_errno(Code::internal, "getifaddrs");
  std::string found;
  for (const int family : {AF_INET, AF_INET6})
    for (const ifaddrs* at = all; at != nullptr && found.empty(); at = at->ifa_next) {
      if (at->ifa_addr == nullptr || at->ifa_addr->sa_family != family || name != at->ifa_name)
        continue;
      Address address;
      address.length = family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
      std::memcpy(&address.storage, at->ifa_addr, address.length);
      found = unparse(address).address;
    }
  ::freeifaddrs(all);
  if (found.empty())
    throw Error(Code::invalid_argument, "network interface " + name + " has no address");
  return found;
}

void require_wanted_congestion_control(int socket) {
  const char* const name = wanted_congestion_control();
  if (name != nullptr && name != std::string_view("system") &&
      !set_congestion_control(socket, name))
    throw_errno(Code::invalid_argument,
                "the system refuses PYCOMM_CONGESTION=" + std::string(name) +
                    " (see net.ipv4.tcp_allowed_congestion_control; \"system\" takes its default)");
}

UniqueFd listen_on(const std::string& address, SocketAddress* bound) {
  Address at = parse(address, 0);
  UniqueFd fd(::socket(at.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd)
    throw_errno(errno == EAFNOSUPPORT ? Code::invalid_argument : Code::internal, "tcp socket");
  if (::bind(fd.get(), reinterpret_cast<sockaddr*>(&at.storage), at.length) != 0)
    throw_errno(Code::invalid_argument,
                "cannot listen on " + address + " (set PYCOMM_ADDRESS to an address of this host)");
  require_wanted_congestion_control(fd.get());  // those it accepts inherit it
  if (::listen(fd.get(), 1024) != 0) throw_errno(Code::internal, "listen");
  ::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&at.storage), &at.length);
  *bound = unparse(at);
  return fd;
}

// A host that dies without a word shows after some 25 s, also where nothing is under way. Receive
// buffers stay the system's: it grows them with the link's bandwidth-delay product (tcp_rmem),
// which a size of our own would end; of send buffers see TcpSocket::bound_buffer(). No
// TCP_USER_TIMEOUT: it ends connections to a peer that is alive and does not read for a while; see
// TcpSocket::silent().
void set_tcp_options(int socket) {
  const auto set = [socket](int level, int option, int value) {
    ::setsockopt(socket, level, option, &value, sizeof(value));
  };
  set(IPPROTO_TCP, TCP_NODELAY, 1);
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, 10);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 5);
  set(IPPROTO_TCP, TCP_KEEPCNT, 3);
}

}  // namespace

const char* wanted_congestion_control() {
  const char* const name = std::getenv("PYCOMM_CONGESTION");
  return name == nullptr || *name == '\0' ? nullptr : name;
}

bool set_congestion_control(int socket, std::string_view name) {
  return ::setsockopt(socket, IPPROTO_TCP, TCP_CONGESTION, name.data(),
                      static_cast<socklen_t>(name.size())) == 0;
}

std::string SocketAddress::text() const {
  const bool v6 = address.find(':') != std::string::npos;
  return (v6 ? "[" + address + "]" : address) + ":" + std::to_string(port);
}

std::string pack(const std::vector<SocketAddress>& addresses) {
  std::string text;
  for (const SocketAddress& at : addresses)
    text += (text.empty() ? "" : " ") + at.address + " " + std::to_string(at.port);
  return text;
}

std::vector<SocketAddress> unpack_addresses(const std::string& text) {
  std::vector<SocketAddress> addresses;
  std::istringstream in(text);
  bool whole = true;
  for (SocketAddress at; whole && in >> at.address;) {
    whole = (in >> at.port) && at.port > 0 && at.port < 65536;
    addresses.push_back(at);
  }
  if (addresses.empty() || !whole)
    throw Error(Code::internal, "a rank published addresses that cannot be read: " + text);
  return addresses;
}

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

UniqueFd tcp_connect(const SocketAddress& peer, const std::string& from) {
  const Address to = parse(peer.address, peer.port);
  UniqueFd socket(::socket(to.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket)
    throw_errno(Code::internal, "tcp socket (is the limit on open files reached? see ulimit -n)");
  set_tcp_options(socket.get());
  require_wanted_congestion_control(socket.get());
  if (!from.empty()) {
    const Address own = parse(from, 0);
    const int one = 1;
    ::setsockopt(socket.get(), IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one));
    if (own.storage.ss_family == to.storage.ss_family &&
        ::bind(socket.get(), reinterpret_cast<const sockaddr*>(&own.storage), own.length) != 0)
      throw_errno(Code::peer_lost, "leaving by " + from);
  }
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&to.storage), to.length) != 0 &&
      errno != EINPROGRESS)
    throw_errno(Code::peer_lost, "connecting to " + peer.text());
  return socket;
}

SocketAddress own_address(int socket) {
  Address at;
  at.length = sizeof(at.storage);
  ::getsockname(socket, reinterpret_cast<sockaddr*>(&at.storage), &at.length);
  return unparse(at);
}

SocketAddress peer_address(int socket) {
  Address at;
  at.length = sizeof(at.storage);
  ::getpeername(socket, reinterpret_cast<sockaddr*>(&at.storage), &at.length);
  return unparse(at);
}

TcpListener::TcpListener(const std::string& addresses) {
  std::istringstream in(addresses);
  std::string refused;
  for (std::string name; std::getline(in, name, ',');) {
    try {
      SocketAddress bound;
      fds_.push_back(listen_on(resolve(name), &bound));
      addresses_.push_back(bound);
    } catch (const Error& error) {
      if (error.code() != Code::invalid_argument) throw;
      refused += (refused.empty() ? "" : "; ") + std::string(error.what());
    }
  }
  if (fds_.empty())
    throw Error(Code::invalid_argument,
                refused.empty() ? "no address to listen on; set PYCOMM_ADDRESS" : refused);
  if (!refused.empty()) warn_once(refused + "; goes on with " + addresses_[0].address);
}

void TcpListener::add_waits(std::vector<pollfd>& entries) const {
  for (const UniqueFd& fd : fds_) entries.push_back({fd.get(), POLLIN, 0});
}

void TcpListener::accept_all() {
  for (const UniqueFd& fd : fds_)
    for (;;) {
      UniqueFd socket(::accept4(fd.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (!socket) break;
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
  if (greeting.path < 0 || greeting.path >= greeting.n_paths || greeting.n_paths > kMaxPaths)
    return true;
  if (refused_.contains(greeting.group)) return true;
  const uint64_t welcome = welcome_mac(secret_, greeting);
  if (::send(fd, &welcome, sizeof(welcome), MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof(welcome)))
    return true;
  ready_.insert_or_assign(
      {greeting.group, greeting.from, greeting.to, greeting.lane, greeting.path},
      Taken{greeting.path, greeting.n_paths, std::move(pending.socket)});
  return true;
}

void TcpListener::warn_once(const std::string& text) {
  std::lock_guard lock(mutex_);
  if (warned_.insert(text).second) std::fprintf(stderr, "pycomm: warning: %s\n", text.c_str());
}

void TcpListener::refuse(uint64_t group) {
  std::lock_guard lock(mutex_);
  refused_.insert(group);
  std::erase_if(ready_, [group](const auto& entry) { return std::get<0>(entry.first) == group; });
}

std::optional<TcpListener::Taken> TcpListener::take(uint64_t group, int from, int to, int lane) {
  std::lock_guard lock(mutex_);
  accept_all();
  std::erase_if(pending_, [this](Pending& pending) { return advance(pending); });
  const auto found = ready_.lower_bound({group, from, to, lane, 0});
  if (found == ready_.end() ||
      std::tie(std::get<0>(found->first), std::get<1>(found->first), std::get<2>(found->first),
               std::get<3>(found->first)) != std::tie(group, from, to, lane))
    return std::nullopt;
  Taken taken = std::move(found->second);
  ready_.erase(found);
  return taken;
}

}  // namespace pycomm::cpu
