#include "cpu/mailbox.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>

namespace pycomm::cpu {
namespace {

constexpr size_t kMaxFds = 8;
constexpr auto kSlice = std::chrono::milliseconds(5);  // another thread may take in our letter
constexpr size_t kAddressOffset = offsetof(sockaddr_un, sun_path) + 1;  // abstract: after a zero

struct Header {
  uint64_t key;
  int64_t from;
};

}  // namespace

Mailbox::Mailbox() : socket_(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) {
  if (!socket_) throw_errno(Code::internal, "unix socket");
  const int on = 1;
  if (::setsockopt(socket_.get(), SOL_SOCKET, SO_PASSCRED, &on, sizeof(on)) != 0)
    throw_errno(Code::internal, "SO_PASSCRED of a unix socket");
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  socklen_t length = sizeof(sa_family_t);  // autobind: the kernel picks a free abstract name
  if (::bind(socket_.get(), reinterpret_cast<sockaddr*>(&address), length) != 0)
    throw_errno(Code::internal, "abstract unix socket");
  length = sizeof(address);
  ::getsockname(socket_.get(), reinterpret_cast<sockaddr*>(&address), &length);
  address_.assign(address.sun_path + 1, length - kAddressOffset);
  const auto soon = Clock::now() + std::chrono::seconds(1);
  send(address_, 0, 0, "", {socket_.get()}, soon);
  const auto back = take(0, 0, soon);
  if (!back || back->fds.size() != 1)
    throw Error(Code::internal, "a descriptor sent over a unix socket did not arrive");
}

void Mailbox::send(const std::string& to, uint64_t key, int from, const std::string& text,
                   const std::vector<int>& fds, Clock::time_point deadline) {
  PYCOMM_CHECK(fds.size() <= kMaxFds && text.size() <= kMaxText, "a letter's size");
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  PYCOMM_CHECK(to.size() < sizeof(address.sun_path), "a mailbox's address");
  std::memcpy(address.sun_path + 1, to.data(), to.size());
  Header header{key, from};
  iovec parts[2] = {{&header, sizeof(header)}, {const_cast<char*>(text.data()), text.size()}};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxFds)] = {};
  msghdr message{};
  message.msg_name = &address;
  message.msg_namelen = static_cast<socklen_t>(kAddressOffset + to.size());
  message.msg_iov = parts;
  message.msg_iovlen = 2;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
    cmsghdr* rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
    std::memcpy(CMSG_DATA(rights), fds.data(), sizeof(int) * fds.size());
  }
  while (::sendmsg(socket_.get(), &message, MSG_NOSIGNAL) < 0) {
    // ETOOMANYREFS: too many descriptors of this user are on their way.
    const bool full = errno == EAGAIN || errno == ENOBUFS || errno == ETOOMANYREFS;
    if (!full && errno != EINTR)
      throw_errno(Code::peer_lost, "handing shared memory to a rank of this host");
    if (Clock::now() >= deadline)
      throw Error(Code::timeout,
                  "a rank of this host takes no shared memory: is its process stopped, or does it "
                  "not make the groups that the others make?");
    // Nothing tells when another's mailbox has room again.
    await(std::chrono::milliseconds(1));
  }
}

void Mailbox::await(std::chrono::milliseconds limit) {
  pollfd entry{socket_.get(), POLLIN, 0};
  ::poll(&entry, 1, static_cast<int>(limit.count()));
  std::lock_guard lock(mutex_);
  receive();
}

void Mailbox::receive() {
  for (;;) {
    Header header{};
    iovec parts[2] = {{&header, sizeof(header)}, {room_.data(), room_.size()}};
    alignas(
        cmsghdr) char control[CMSG_SPACE(sizeof(int) * kMaxFds) + CMSG_SPACE(sizeof(ucred))] = {};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    const ssize_t n = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return;
    if (n < 0) throw_errno(Code::internal, "taking shared memory from a rank of this host");
    Letter letter;
    bool same_user = false;
    for (cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr;
         part = CMSG_NXTHDR(&message, part)) {
      if (part->cmsg_level != SOL_SOCKET) continue;
      if (part->cmsg_type == SCM_RIGHTS) {
        const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; ++i) {
          int fd = -1;
          std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(fd));
          letter.fds.emplace_back(fd);
        }
      } else if (part->cmsg_type == SCM_CREDENTIALS) {
        ucred sender{};
        std::memcpy(&sender, CMSG_DATA(part), sizeof(sender));
        same_user = sender.uid == ::geteuid();
      }
    }
    if (!same_user || n < static_cast<ssize_t>(sizeof(header))) continue;  // not one of ours
    if ((message.msg_flags & MSG_CTRUNC) != 0)
      throw Error(
          Code::no_files,
          "the kernel cut the shared memory that a rank of this host handed over: the limit "
          "on open files is reached; raise it, see ulimit -n");
    letter.key = header.key;
    letter.from = static_cast<int>(header.from);
    letter.text = room_.substr(0, static_cast<size_t>(n) - sizeof(header));
    letters_.push_back(std::move(letter));
  }
}

std::optional<Mailbox::Letter> Mailbox::find(uint64_t key, int from) {
  const auto found = std::find_if(letters_.begin(), letters_.end(), [&](const Letter& letter) {
    return letter.key == key && (from < 0 || letter.from == from);
  });
  if (found == letters_.end()) return std::nullopt;
  Letter letter = std::move(*found);
  letters_.erase(found);
  return letter;
}

std::optional<Mailbox::Letter> Mailbox::take(uint64_t key, int from, Clock::time_point deadline) {
  InterruptCheck interrupted;
  for (;;) {
    {
      std::lock_guard lock(mutex_);
      receive();
      if (auto letter = find(key, from)) return letter;
    }
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now());
    if (left.count() <= 0) return std::nullopt;
    await(std::min(kSlice, left));
    interrupted(Clock::now());
  }
}

}  // namespace pycomm::cpu
