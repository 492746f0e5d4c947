#include "cpu/fd_exchange.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>

#include "core/engine.h"

namespace pycomm::cpu {
namespace {

constexpr size_t kMaxFds = 250;  // the kernel takes 253 in one message

// Waits until fd is readable. Throws Error(timeout) saying `what`.
void await_readable(int fd, Clock::time_point deadline, const std::string& what) {
  for (;;) {
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd entry{fd, POLLIN, 0};
    const int n = ::poll(&entry, 1, static_cast<int>(std::clamp<long>(left, 0, 1000)));
    if (n > 0) return;
    if (n < 0 && errno != EINTR) throw_errno(Code::internal, "poll");
    if (left <= 0) throw Error(Code::timeout, what);
  }
}

void send_fds(int socket, int32_t index, const std::vector<int>& fds) {
  const int32_t header[2] = {index, static_cast<int32_t>(fds.size())};
  iovec data{const_cast<int32_t*>(header), sizeof(header)};
  std::vector<char> control(CMSG_SPACE(sizeof(int) * std::max<size_t>(fds.size(), 1)));
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* part = CMSG_FIRSTHDR(&message);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
    std::memcpy(CMSG_DATA(part), fds.data(), sizeof(int) * fds.size());
  }
  if (::sendmsg(socket, &message, MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof(header)))
    throw_errno(Code::peer_lost, "handing shared memory to a rank of this host");
}

int32_t recv_fds(int socket, std::vector<UniqueFd>& fds) {
  int32_t header[2] = {-1, 0};
  iovec data{header, sizeof(header)};
  std::vector<char> control(CMSG_SPACE(sizeof(int) * kMaxFds));
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  if (::recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_WAITALL) !=
      static_cast<ssize_t>(sizeof(header)))
    throw_errno(Code::peer_lost,
                "receiving shared memory from a rank of this host (it ended, or its user differs)");
  for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr;
       part = CMSG_NXTHDR(&message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t n = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    std::vector<int> raw(n);
    std::memcpy(raw.data(), CMSG_DATA(part), n * sizeof(int));
    for (const int fd : raw) fds.emplace_back(fd);
  }
  if (fds.size() != static_cast<size_t>(header[1]))
    throw Error(Code::internal, "got " + std::to_string(fds.size()) + " of " +
                                    std::to_string(header[1]) +
                                    " file descriptors from a rank of this host; raise the limit "
                                    "on open files (ulimit -n)");
  return header[0];
}

std::vector<UniqueFd> lead(Store& store, const std::string& key, int n_members,
                           const std::vector<int>& mine, Clock::time_point deadline) {
  UniqueFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!listener) throw_errno(Code::internal, "unix socket");
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  socklen_t length = sizeof(sa_family_t);  // autobind: the kernel picks a free abstract name
  if (::bind(listener.get(), reinterpret_cast<sockaddr*>(&address), length) != 0 ||
      ::listen(listener.get(), n_members) != 0)
    throw_errno(Code::internal, "abstract unix socket");
  length = sizeof(address);
  ::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &length);
  store.set(key, std::string(address.sun_path + 1, length - offsetof(sockaddr_un, sun_path) - 1));

  const auto n = static_cast<size_t>(n_members);
  std::vector<UniqueFd> sockets(n);
  std::vector<std::vector<UniqueFd>> given(n);
  for (int joined = 1; joined < n_members;) {
    await_readable(listener.get(), deadline,
                   "only " + std::to_string(joined) + " of " + std::to_string(n_members) +
                       " ranks of this host came to share memory; did the others start?");
    UniqueFd socket(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!socket) throw_errno(Code::internal, "accept");
    ucred peer{};
    length = sizeof(peer);
    ::getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &length);
    if (peer.uid != ::geteuid())
      continue;  // another user's process: not one of ours, and not answered
    await_readable(socket.get(), deadline,
                   "a rank of this host connected to share memory, then said nothing");
    std::vector<UniqueFd> fds;
    const int32_t index = recv_fds(socket.get(), fds);
    if (index <= 0 || index >= n_members || sockets[index])
      throw Error(Code::internal, "two ranks of one host say the same index");
    sockets[index] = std::move(socket);
    given[index] = std::move(fds);
    ++joined;
  }
  std::vector<int> all(mine);
  for (const auto& fds : given)
    for (const auto& fd : fds) all.push_back(fd.get());
  if (all.size() > kMaxFds)
    throw Error(Code::invalid_argument,
                std::to_string(n_members) + " ranks on one host are more than the " +
                    std::to_string(kMaxFds) + " that can share memory; use fewer ranks per host");
  for (int i = 1; i < n_members; ++i) send_fds(sockets[i].get(), 0, all);
  std::vector<UniqueFd> result;
  for (const int fd : mine) {
    result.emplace_back(::dup(fd));
    if (!result.back()) throw_errno(Code::internal, "dup");
  }
  for (auto& fds : given)
    for (auto& fd : fds) result.push_back(std::move(fd));
  return result;
}

}  // namespace

std::vector<UniqueFd> exchange_fds(Store& store, const std::string& key, int index, int n_members,
                                   const std::vector<int>& mine,
                                   std::chrono::milliseconds timeout) {
  const auto deadline = Clock::now() + timeout;
  if (index == 0) return lead(store, key, n_members, mine, deadline);
  const std::string name = store.get_all({key}, timeout).front();
  UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket) throw_errno(Code::internal, "unix socket");
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(),
              std::min(name.size(), sizeof(address.sun_path) - 1));
  const auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  if (::connect(socket.get(), reinterpret_cast<sockaddr*>(&address), length) != 0)
    throw_errno(
        Code::peer_lost,
        "connecting to this host's first rank to share memory (is it still running, in the same "
        "network namespace? otherwise give the ranks different PYCOMM_HOST_ID)");
  send_fds(socket.get(), index, mine);
  await_readable(
      socket.get(), deadline,
      "this host's first rank did not hand out shared memory; are all its ranks running?");
  std::vector<UniqueFd> fds;
  recv_fds(socket.get(), fds);
  return fds;
}

}  // namespace pycomm::cpu
