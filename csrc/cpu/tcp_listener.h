// TcpListener: where ranks of other hosts connect to this one. It proves who they are before
// anything they say is read, and keeps each connection until the group it is for asks. Thread
// safety: all members.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "core/siphash.h"
#include "cpu/posix.h"

namespace pycomm::cpu {

// What a connecting rank says about itself, once it has been challenged. Both sides prove that they
// know the job's secret:
//   listener -> Challenge; connecter -> Greeting with mac(challenge, greeting); listener ->
//   mac(greeting.nonce)
struct Challenge {
  uint64_t magic = 0x70636f6d6d2d6331ull;
  uint64_t nonce = 0;
};
struct Greeting {
  uint64_t group = 0;  // hash of the group's name and store prefix
  int32_t from = 0;
  int32_t to = 0;
  int32_t lane = 0;
  int32_t pad = 0;
  uint64_t nonce = 0;
  uint64_t mac = 0;
};
uint64_t greeting_mac(const Secret& secret, const Challenge& challenge, const Greeting& greeting);
uint64_t welcome_mac(const Secret& secret, const Greeting& greeting);
uint64_t random_u64();

class TcpListener {
 public:
  // Listens on a free port of `address` (IPv4 or IPv6, numeric). Errors: Error(invalid_argument)
  // where it cannot be bound.
  TcpListener(const std::string& address);
  int port() const { return port_; }
  int socket() const { return fd_.get(); }
  void set_secret(const Secret& secret) { secret_ = secret; }
  // The connection from rank `from` of the group, once it has come and proved itself; never blocks.
  std::optional<UniqueFd> take(uint64_t group, int from, int to, int lane);
  // Connections for this group, which have come or will come, are closed: its rank here has left
  // it.
  void refuse(uint64_t group);

 private:
  struct Pending {
    UniqueFd socket;
    Challenge challenge;
    size_t sent = 0;
    Greeting greeting;
    size_t received = 0;
  };
  void accept_all();
  bool advance(Pending& pending);  // true when it is settled, one way or the other

  std::mutex mutex_;
  UniqueFd fd_;
  int port_ = 0;
  Secret secret_{};
  std::vector<Pending> pending_;
  std::map<std::tuple<uint64_t, int, int, int>, UniqueFd> ready_;
  std::set<uint64_t> refused_;
};

// A non-blocking TCP socket that is connecting to address:port. Errors: Error(peer_lost).
UniqueFd tcp_connect(const std::string& address, int port);
void set_tcp_options(int socket);

}  // namespace pycomm::cpu
