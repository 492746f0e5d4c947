// Mailbox: a rank's unix datagram socket, through which the ranks of a host hand each other file
// descriptors, each with a letter. No connection, no server, and nothing in the store but the
// address. Only letters of the same user are read (SCM_CREDENTIALS): abstract sockets have no file
// permissions. A letter nobody has asked for yet is kept. Thread safety: all members.
#pragma once

#include <cstdint>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/engine.h"
#include "cpu/posix.h"

namespace pycomm::cpu {

class Mailbox {
 public:
  struct Letter {
    uint64_t key = 0;  // what it is about
    int from = -1;
    std::string text;
    std::vector<UniqueFd> fds;
  };
  static constexpr size_t kMaxText = 16 * 1024;

  // Errors: Error(internal) where the system refuses sockets, or descriptors over them: that is
  // tried here.
  Mailbox();
  const std::string& address() const { return address_; }
  // The descriptors stay the caller's. Waits while the other mailbox is full, reading its own
  // meanwhile: two that write to each other never wait for ever.
  // Errors: Error(timeout), Error(peer_lost) where nobody owns the address any more.
  void send(const std::string& to, uint64_t key, int from, const std::string& text,
            const std::vector<int>& fds, Clock::time_point deadline);
  // The letter about `key` from rank `from` (-1: any); nullopt where none has come by the deadline.
  std::optional<Letter> take(uint64_t key, int from, Clock::time_point deadline);

 private:
  void receive();  // all that has come
  std::optional<Letter> find(uint64_t key, int from);
  void await(std::chrono::milliseconds limit);

  UniqueFd socket_;
  std::string address_;
  std::mutex mutex_;
  std::list<Letter> letters_;
  std::string room_ = std::string(kMaxText, '\0');
};

}  // namespace pycomm::cpu
